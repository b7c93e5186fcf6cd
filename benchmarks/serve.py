"""Mode serve of `benchmark.py`: what a user of `generate()` sees, the default model beside a Llama of its sizes."""

import itertools
import time
from functools import partial
from statistics import median

import torch

from . import timing
from .blocks import IN_FLOAT8
from .context import DECODE_ROOM, causal_lm, static_cache, step, time_steps
from .timing import clock, measure, random_tokens

SHORT_PROMPT = 512  # tokens before those whose rate is measured, at most `--chunk`
LAYER_PROMPT = 4096  # tokens of the prefill whose launches are counted, at most `--chunk`
DRAFT = 64  # tokens that prompt lookup drafts at once
SAMPLING = {"do_sample": True, "top_k": 50, "temperature": 0.8}


class Server:
    """Holds the one model that is served now, and the rates measured so far by model and case."""

    def __init__(self, args):
        self.args, self.name, self.model, self.rates = args, None, None, {}

    @torch.no_grad()
    def load(self, name):
        """The model of a name, in the place of the last one. It chooses no end of text: that token's logit is 0."""
        if name != self.name:
            self.model = self.name = None
            timing.free_memory(self.args)
            self.model = causal_lm(self.args, name)
            self.model.get_input_embeddings().weight[-1] = 0.0
            self.name = name
        return self.model

    def prompt(self, B, most=SHORT_PROMPT):
        """Random token ids [B, tokens]."""
        return random_tokens(self.args, B, min(most, self.args.chunk))

    def generate(self, name, ids_BT, tokens, **options):
        """Token ids after a prompt, chosen greedily unless the options say otherwise."""
        end = self.args.vocab_size - 1
        options = {"do_sample": False, "eos_token_id": end, "pad_token_id": end, "max_new_tokens": tokens} | options
        return self.load(name).generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)

    @torch.no_grad()
    def first_token(self, name, tokens):
        """Time to the first token of a prompt; of HSPMN also that of one forward and, once, of reading in pieces."""
        args, ids_BT, model = self.args, random_tokens(self.args, 1, tokens), self.load(name)
        metrics = {"ttft_ms": median(measure(partial(self.generate, name, ids_BT, 1), args, wall=True))}
        metrics |= timing.peak_memory(args)
        ways = {}
        if name != "dense":
            ways["forward_ms"] = partial(model, input_ids=ids_BT, use_cache=True, logits_to_keep=1)
        if name != "dense" and tokens == min((n for n in args.prompts if n > max(args.pieces)), default=0):
            ways |= {f"chunked_{n}_ms": partial(model.prefill, ids_BT, chunk_size=n) for n in args.pieces}
        return metrics | {way: median(measure(call, args, wall=True)) for way, call in ways.items()}

    def rate(self, name, way, B, tokens, **options):
        """Tokens per second of all rows: the time of so many `tokens` more, in which the prompt does not count."""
        ids_BT, few, times = self.prompt(B), max(1, tokens // 4), []
        if "cache_implementation" in options:
            options["max_cache_len"] = ids_BT.shape[1] + few + tokens  # the same, and compiled once, in both
        for count in (few + tokens, few):
            call = partial(self.generate, name, ids_BT, count, **options)
            if (made := call().shape[1] - ids_BT.shape[1]) != count:
                raise RuntimeError(f"{made} tokens were generated instead of {count}")
            times.append(median(timing.wall_ms(call, self.args) for _ in range(3)))
        self.rates[name, way, B] = 1e3 * B * tokens / (times[0] - times[1])
        return {"tok_s": self.rates[name, way, B]}

    @torch.no_grad()
    def drafted(self, name, tokens):
        """Rates with prompt lookup and without, of a text that repeats its last token: that is what a model writes
        whose blocks add nothing to their input, for all of their work."""
        for layer in self.load(name).model.layers:
            layer.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        plain, drafted = (self.rate(name, "copied", 1, tokens, **x) for x in ({}, {"prompt_lookup_num_tokens": DRAFT}))
        self.name = None  # for what comes after it is no model
        return drafted | {"plain_tok_s": plain["tok_s"], "speedup": drafted["tok_s"] / plain["tok_s"]}

    @torch.no_grad()
    def captured(self, name):
        """One decoding step on a static cache, replayed from a CUDA graph, and static `generate()`'s share of it."""
        args, model, ids_B1, ids_BT = self.args, self.load(name), random_tokens(self.args, 1, 1), self.prompt(1)
        cache = static_cache(args, model, 1, ids_BT.shape[1])
        model.prefill(ids_BT, past_key_values=cache)
        call, steps = timing.replayed(partial(step, model, ids_B1, cache), args), min(4 * args.reps, DECODE_ROOM // 2)
        cache.reserve(steps + 1)
        metrics = timing.spread(time_steps(call, args, ids_B1, steps), tokens=1)
        if (name, "static", 1) in self.rates:
            metrics["static_share"] = self.rates[name, "static", 1] / metrics["tok_s"]
        return metrics

    @torch.no_grad()
    def layer(self, name, B, cached):
        """Launches and microseconds of the host per layer, of a call that it queues without waiting for the device.
        The call is a prompt of LAYER_PROMPT tokens with a cache, or one token after a cached SHORT_PROMPT."""
        args, model, times = self.args, self.load(name), []
        call = partial(model, input_ids=self.prompt(B, LAYER_PROMPT), use_cache=True, logits_to_keep=1)
        if cached:
            call = partial(step, model, random_tokens(args, B, 1), model.prefill(self.prompt(B)).past_key_values)
        for _ in range(3 + args.reps):
            begun = clock(args)
            call()
            times.append(time.perf_counter() - begun)
        metrics = {"host_us": 1e6 * median(times[3:]) / args.layers}
        if args.device.type == "cuda" and (launches := timing.host_work(call)[0]):
            metrics["launches"] = launches / args.layers
        return metrics


def serve_cases(args):
    """`<model>/prompt_<tokens>` and `<model>/<way>_B<rows>`, the models one after the other."""
    server, static = Server(args), {"tokens": args.static_tokens, "cache_implementation": "static"}
    ways = (("eager", {"tokens": args.new_tokens}), ("static", static))
    for name in (name for name in ("hspmn", IN_FLOAT8, "dense") if name in args.models):
        for tokens in args.prompts:
            yield f"{name}/prompt_{tokens}", partial(server.first_token, name, tokens)
        for B, (way, options) in itertools.product((1, 8), ways):
            yield f"{name}/{way}_B{B}", partial(server.rate, name, way, B, **options)
        if name != "dense":
            yield f"{name}/sampled_static_B1", partial(server.rate, name, "sampled", 1, **static, **SAMPLING)
            yield f"{name}/captured_B1", partial(server.captured, name)
            for way, B in (("prefill", 1), ("token_B1", 1), ("token_B16", 16)):
                yield f"{name}/layer_{way}", partial(server.layer, name, B, cached=way != "prefill")
            yield f"{name}/drafted_B1", partial(server.drafted, name, args.static_tokens)
