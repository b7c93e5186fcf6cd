"""Modes context and decode of `benchmark.py`: how long a context fits, and how fast tokens follow it."""

import copy
import itertools
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, StaticCache

from .benchmark_blocks import hspmn_model, set_load
from .benchmark_common import (
    LeftOut,
    Shape,
    capture,
    compiled,
    copy_rate,
    dense_config,
    free_memory,
    gemm_sizes,
    hspmn_config,
    measure,
    random_hidden,
    random_tokens,
    synchronize,
    timing,
)

DECODE_ROOM = 256  # tokens that a static cache can take after its context; warm-up and timed steps are fewer


def causal_lm(args, name):
    """A whole model with random weights; HSPMN's loads are set on random tokens."""
    torch.manual_seed(0)
    make_config = hspmn_config if name == "hspmn" else dense_config
    config = make_config(args, args.layers, args.model_intermediate_size)
    with args.device:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=args.dtype).eval()
    if name == "hspmn":
        set_model_loads(model, random_tokens(args, 1, min(args.chunk, 8192)))
    return model


@torch.no_grad()
def set_model_loads(model, ids_BT):
    """Set every layer's bias for its share of `ids`; twice, because a layer's routing changes the next one's input."""
    for _ in range(2):
        scores_LBT = model(input_ids=ids_BT, use_cache=False, logits_to_keep=1).router_scores
        for layer, scores_BT in zip(model.model.layers, scores_LBT, strict=True):
            if layer.router is not None:
                layer.router.bias.fill_(-scores_BT.quantile(1 - layer.router.sparsity_k))


@torch.no_grad()
def prefill(model, tokens, args, cache=None):
    """Read `tokens` random tokens in chunks; returns the last output and the load of each chunk."""
    loads = []
    for begin in range(0, tokens, args.chunk):
        ids = random_tokens(args, 1, min(args.chunk, tokens - begin))
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        loads.append(output.router_load.mean())
    return output, torch.stack(loads).mean().item()


@torch.no_grad()
def measure_model_context(args):
    """A long prompt through a whole model in chunks, then greedy tokens."""
    model = causal_lm(args, "hspmn")
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(args)
    begun = time.perf_counter()
    output, load = prefill(model, args.context_tokens, args)
    synchronize(args)
    read = time.perf_counter()
    for _ in range(args.new_tokens):
        ids = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    synchronize(args)
    metrics = {"tokens": args.context_tokens, "prefill_tok_s": args.context_tokens / (read - begun)}
    metrics |= {"generated": args.new_tokens, "decode_tok_s": args.new_tokens / (time.perf_counter() - read)}
    metrics |= {"load": load, "params": sum(p.numel() for p in model.parameters())}
    return metrics | {"cache_gb": cache_bytes(output.past_key_values) / 1e9, "peak_gb": used_gb(args, output)}


def cache_bytes(cache):
    """Bytes of all tensors of a cache's layers."""
    return sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))


def used_gb(args, holder):
    """Peak memory on CUDA; elsewhere, where nobody counts it, the bytes of `holder.past_key_values`."""
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return cache_bytes(holder.past_key_values) / 1e9


def longest(read, first, most, step):
    """The most tokens that `read` takes, by doubling from `first` and bisection to `step`, and whether memory set it.

    read(tokens) returns how many it read within the budget, in whole steps. A read that stops halfway fills a cache
    that grows, so nothing longer fits and the search ends there; one that stops at once says only that its own size
    does not fit. `most` ends the search.
    """
    best, limit, wanted = 0, None, min(first, most)
    while True:
        reached = read(wanted)
        best = max(best, reached)
        if reached < wanted:
            limit = reached + step if reached else wanted
        if best >= most or (limit is not None and limit - best <= step):
            return best, limit is not None
        wanted = min(2 * wanted, most) if limit is None else max(step, (best + limit) // 2 // step * step)


class BlockReader:
    """Reads ever longer contexts through one block and its cache, hidden states made chunk by chunk."""

    def __init__(self, args):
        """Build the block and set its load."""
        self.args, (self.model, self.modeling) = args, hspmn_model(args)
        self.load = set_load(self.model.layers[0], random_hidden(args, 1, min(args.chunk, 16384)))
        self.past_key_values, self.peak_gb, self.tok_s = None, 0.0, 0.0

    @torch.no_grad()
    def __call__(self, tokens):
        """Tokens read, in whole chunks, before the memory budget was passed."""
        self.past_key_values = None
        free_memory(self.args)
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.past_key_values = self.modeling.HSPMNCache(self.model.config)
        reached, peak, begun = 0, 0.0, time.perf_counter()
        try:
            while reached < tokens:
                x_BSD = random_hidden(self.args, 1, self.args.chunk, seed=reached)
                self.model.layers[0](x_BSD, past_key_values=self.past_key_values)
                now = used_gb(self.args, self)
                if now > self.args.memory_gb:
                    break
                reached, peak = reached + self.args.chunk, now
        except torch.OutOfMemoryError:
            print(f"out of memory after {reached:,} tokens", file=sys.stderr)
        synchronize(self.args)
        if reached:
            self.peak_gb, self.tok_s = max(self.peak_gb, peak), reached / (time.perf_counter() - begun)
        return reached


def measure_block_context(args):
    """The longest context of one block within the memory budget."""
    reader = BlockReader(args)
    tokens, limited = longest(reader, args.block_tokens, args.block_most_tokens, args.chunk)
    metrics = {"tokens": tokens, "peak_gb": reader.peak_gb, "prefill_tok_s": reader.tok_s, "load": reader.load}
    return metrics | {"memory_gb": args.memory_gb, "limited_by_memory": int(limited)}


def context_cases(args):
    """`model/<tokens>` and `block/max`."""
    yield f"model/{args.context_tokens}", lambda: measure_model_context(args)
    yield "block/max", lambda: measure_block_context(args)


class Prompt:
    """One model and one row of context that grows from case to case, read by a chunked prefill."""

    def __init__(self, args):
        """Nothing is built before it is asked for."""
        self.args, self.model, self.cache = args, None, None

    def grow(self, tokens):
        """Model and cache after `tokens` tokens of context."""
        self.model = self.model or causal_lm(self.args, "hspmn")
        seen = 0 if self.cache is None else self.cache.get_seq_length()
        if seen < tokens:
            self.cache = prefill(self.model, tokens - seen, self.args, self.cache)[0].past_key_values
        return self.model, self.cache

    def release(self):
        """Free model and cache."""
        self.model = self.cache = None


def require_memory(args, wanted):
    """Raise LeftOut unless `wanted` bytes are free on the device."""
    if args.device.type != "cuda":
        return
    torch.cuda.empty_cache()
    if wanted > (free := torch.cuda.mem_get_info()[0]):
        raise LeftOut(f"it needs {wanted / 1e9:.0f} GB and {free / 1e9:.0f} GB are free")


def time_steps(step, args, ids_B1):
    """Times of `step()`, the mean of what it returns, and how it ran; it reads `ids_B1`, drawn anew each time.

    From a CUDA graph if it can be captured (then `graph` is 1), from plain calls otherwise; `plain_ms` is theirs.
    """
    graph, seen, calls = 0, {"out": step(), "sum": 0.0}, {"count": 0}

    def plain():
        seen["out"] = step()

    def before():
        ids_B1.copy_(torch.randint_like(ids_B1, args.vocab_size))
        seen["sum"], calls["count"] = seen["sum"] + seen["out"].float(), calls["count"] + 1

    times = plain_times = measure(plain, args, before)
    if args.device.type == "cuda":
        try:
            captured, seen["out"] = capture(step)
            captured.replay()  # capturing computes nothing, so the output holds no value yet
            seen["sum"], calls["count"], graph = 0.0, 0, 1
            times = measure(captured.replay, args, before)
        except RuntimeError as error:
            print(f"not captured in a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
    return times, seen["sum"] / calls["count"], {"graph": graph, "plain_ms": statistics.median(plain_times)}


@torch.no_grad()
def measure_hspmn_decoding(args, prompt, B, S):
    """HSPMN's decoding: B rows with the same context and different next tokens."""
    rate = copy_rate(args)
    model, cache = prompt.grow(S)
    require_memory(args, (B + 1) * cache_bytes(cache))
    cache = copy.deepcopy(cache)
    if B > 1:
        cache.batch_repeat_interleave(B)
    ids_B1 = random_tokens(args, B, 1)

    def step():
        return model(input_ids=ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1).router_mask

    times, routed_LB1, extra = time_steps(step, args, ids_B1)
    moved = sum(p.nbytes for p in model.parameters())
    for layer, routed_B in zip(cache.layers, routed_LB1[..., 0], strict=True):
        states = [layer.linear_state, layer.conv_state]  # read and written
        moved += sum(2 * x.nbytes for x in states if x is not None)
        moved += sum(x.nbytes for x in (layer.window_keys, layer.window_values) if x is not None)
        row = layer.keys[0, 0].nbytes + layer.values[0, 0].nbytes
        moved += row * (routed_B * layer.count).sum().item()
    extra["load"] = routed_LB1.mean().item()
    return decoding_metrics(times, args, cache, moved, rate) | extra


@torch.no_grad()
def measure_dense_decoding(args, prompt, B, S):
    """A Llama's decoding with transformers' static cache, compiled; the context is random keys and values."""
    prompt.release()
    free_memory(args)
    rate = copy_rate(args)
    row = 2 * args.num_key_value_heads * args.head_dim * args.dtype.itemsize * B * (S + DECODE_ROOM)
    repeated = row * args.num_attention_heads // args.num_key_value_heads  # one layer's, for every query head
    weights = sum(inputs * outputs for inputs, outputs in gemm_sizes(args, args.model_intermediate_size))
    weights = (args.vocab_size * args.hidden_size + args.layers * weights) * args.dtype.itemsize
    require_memory(args, weights + row * args.layers + 2 * repeated)
    model = causal_lm(args, "dense")
    cache = StaticCache(config=model.config, max_cache_len=S + DECODE_ROOM)
    cache.early_initialization(B, args.num_key_value_heads, args.head_dim, args.dtype, args.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(S)
    ids_B1 = random_tokens(args, B, 1)

    def forward():
        return model(input_ids=ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    times, _, extra = time_steps(compiled(forward, args, fullgraph=False), args, ids_B1)
    moved = sum(p.nbytes for p in model.parameters()) + row // (S + DECODE_ROOM) * S * args.layers
    return decoding_metrics(times, args, cache, moved, rate) | extra


def decoding_metrics(times, args, cache, moved, rate):
    """Speed of decoding all rows of a cache, beside moving the `moved` bytes of a step at the copy rate."""
    metrics, floor_ms = timing(times, cache.batch_size, args), 1e3 * moved / rate
    metrics.pop("peak_gb", None)  # HSPMN's would count the context that the next case grows from
    metrics |= {"floor_ms": floor_ms, "floor_ratio": floor_ms / metrics["ms"], "bytes": moved}
    return metrics | {"cache_gb": cache_bytes(cache) / 1e9}


def decode_cases(args):
    """`<model>/<shape>`; HSPMN first, its context growing, then the dense model."""
    prompt = Prompt(args)
    for S, B in itertools.product(sorted(args.contexts), sorted(args.batches)):
        if "hspmn" in args.models:
            yield f"hspmn/{Shape(B, S).case}", lambda b=B, s=S: measure_hspmn_decoding(args, prompt, b, s)
    for S, B in itertools.product(sorted(args.contexts), sorted(args.batches)):
        if "dense" in args.models:
            yield f"dense/{Shape(B, S).case}", lambda b=B, s=S: measure_dense_decoding(args, prompt, b, s)
