"""Modes context and decode of `benchmark.py`: how long a context fits, and how fast tokens follow it."""

import itertools
import math
import statistics
import sys
import time

import numpy as np
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
    measure_clock,
    random_hidden,
    random_tokens,
    synchronize,
)

DECODE_ROOM = 320  # tokens that a static cache can take after its context; no measurement takes more steps
DECODE_REPS = 4  # HSPMN's steps per `--reps`: how many rows a step routes varies, so its mean needs more of them
DECODE_SPARE = 6 * 10**9  # bytes that decoding needs beside the cache: a prefill's activations
PROMPT_MOST = 131072  # longest context that is read for decoding


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
def measure_model_context(args):
    """A long random prompt through a whole model in chunks, then greedy tokens; `load` is the prompt's."""
    model = causal_lm(args, "hspmn")
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(args)
    begun = time.perf_counter()
    output = model.prefill(random_tokens(args, 1, args.context_tokens), chunk_size=args.chunk)
    synchronize(args)
    read, cache = time.perf_counter(), output.past_key_values
    load = statistics.mean(layer.count.item() / args.context_tokens for layer in cache.layers if layer.routes)
    decoding = time.perf_counter()
    for _ in range(args.new_tokens):
        ids = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronize(args)
    metrics = {"tokens": args.context_tokens, "prefill_tok_s": args.context_tokens / (read - begun)}
    metrics |= {"generated": args.new_tokens, "decode_tok_s": args.new_tokens / (time.perf_counter() - decoding)}
    metrics |= {"load": load, "params": sum(p.numel() for p in model.parameters())}
    return metrics | {"cache_gb": cache_bytes(cache) / 1e9, "peak_gb": used_gb(args, output)}


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


def require_memory(args, wanted):
    """Raise LeftOut unless `wanted` bytes are free on the device."""
    if args.device.type != "cuda":
        return
    torch.cuda.empty_cache()
    if wanted > (free := torch.cuda.mem_get_info()[0]):
        raise LeftOut(f"it needs {wanted / 1e9:.0f} GB and {free / 1e9:.0f} GB are free")


def step_call(step, args):
    """A call of the compiled `step`, replayed from a CUDA graph where there is CUDA."""
    step()  # compiles it
    return capture(step)[0].replay if args.device.type == "cuda" else step


def time_steps(call, args, ids_B1, steps):
    """Milliseconds of each of `steps` calls one after the other, which read `ids_B1`, drawn anew for each.

    A time runs from the end of one step to the end of the next, so it holds the writing of the new ids.
    """
    ids_NB1 = torch.randint(args.vocab_size, (steps, *ids_B1.shape), device=args.device)
    if args.device.type != "cuda":
        ids_iterator = iter(ids_NB1)
        return measure_clock(call, steps, lambda: ids_B1.copy_(next(ids_iterator)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    call()  # while it runs, the host gets ahead of the device
    events[0].record()
    for ids, event in zip(ids_NB1, events[1:], strict=True):
        ids_B1.copy_(ids)
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def load_context(cache, prompt, tokens):
    """Fill every row of the static `cache` with the one of `prompt`, as if it had read `tokens` tokens.

    A shorter context takes the first of the prompt's sparse keys and values, a longer one repeats them.
    """
    for layer, source in zip(cache.layers, prompt.layers, strict=True):
        for name in ("linear_state", "conv_state", "window_keys", "window_values", "document_slot"):
            getattr(layer, name).copy_(getattr(source, name).expand_as(getattr(layer, name)))
        layer.most_used, read = slots_after(source, prompt, tokens), int(source.count)
        layer.count.fill_(layer.most_used)
        for begin in range(0, layer.most_used, max(read, 1)):
            end = min(begin + read, layer.most_used)
            for name in layer.slot_tensors:
                getattr(layer, name)[:, begin:end] = getattr(source, name)[:, : end - begin]
    for counter in (cache.columns, cache.seen, cache.document_seen):
        counter.fill_(tokens)
    cache.last_position.fill_(tokens - 1)


def slots_after(layer, prompt, tokens):
    """Sparse slots of a layer after `tokens` tokens, of which it routes as many as of the prompt."""
    return int(layer.count) * tokens // prompt.get_seq_length()


def slot_bytes(layer):
    """Bytes of the keys and values of one sparse slot, with their scales."""
    return sum(getattr(layer, name)[0, 0].nbytes for name in layer.slot_tensors if name != "positions")


def decoding_cache(args, model, prompt, B, contexts):
    """A static cache of B rows for the longest of `contexts` that fits into memory, and those that fit."""
    slot = slot_bytes(prompt.layers[0])
    states = sum(layer.linear_state.nbytes for layer in prompt.layers)
    free = math.inf
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] - DECODE_SPARE
    capacities = {S: [slots_after(x, prompt, S) + DECODE_ROOM for x in prompt.layers] for S in contexts}
    fitting = [S for S in contexts if B * (slot * sum(capacities[S]) + states) < free]
    if not fitting:
        return None, fitting
    static_cache = sys.modules[type(model).__module__].HSPMNStaticCache
    sizes = (B, fitting[-1] + DECODE_ROOM, capacities[fitting[-1]])
    return static_cache(model.config, *sizes, args.device, args.dtype), fitting


@torch.no_grad()
def measure_hspmn_decoding(args, B, contexts):
    """HSPMN's decoding of B rows after each of `contexts`: metrics by context, of those that fit into memory.

    The context of every row is one prompt of random tokens, read by `prefill` up to PROMPT_MOST of them and repeated
    beyond; each row goes on with other random tokens, so rows route different steps. One static cache, large enough
    for the longest context, serves all of them: the step is compiled and captured once.
    """
    rate, model = copy_rate(args), causal_lm(args, "hspmn")
    ids = random_tokens(args, 1, min(contexts[-1], PROMPT_MOST))
    prompt = model.prefill(ids, chunk_size=args.chunk).past_key_values
    cache, fitting = decoding_cache(args, model, prompt, B, contexts)
    ids_B1, steps, call, results = random_tokens(args, B, 1), DECODE_REPS * args.reps, None, {}

    def forward():
        return model(input_ids=ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    for S in fitting:
        load_context(cache, prompt, S)
        if call is None:
            call = step_call(compiled(forward, args), args)
            load_context(cache, prompt, S)
        cache.reserve(steps + 1)
        before = [layer.count.clone() for layer in cache.layers]
        columns, times = int(cache.columns), time_steps(call, args, ids_B1, steps)
        moved, load = step_bytes(model, cache, before, int(cache.columns) - columns)
        unused = sum(slot_bytes(layer) * (layer.slots - layer.count).sum().item() for layer in cache.layers)
        results[S] = decoding_metrics(times, args, B, moved, rate)
        results[S] |= {"cache_gb": (cache_bytes(cache) - unused) / 1e9, "load": load}
    return results


def step_bytes(model, cache, before, steps):
    """Bytes that a mean one of the last `steps` steps moved, and the share of rows that it routed, over all layers.

    before: each layer's `count` before them. Weights are read once, states read and written, the keys and values of
    a row's routed tokens read where a layer routes the row's new token.
    """
    moved, loads = sum(p.nbytes for p in model.parameters()), []
    for layer, before_B in zip(cache.layers, before, strict=True):
        routed_B = layer.count - before_B
        moved += 2 * (layer.linear_state.nbytes + layer.conv_state.nbytes)
        moved += layer.window_keys.nbytes + layer.window_values.nbytes
        moved += slot_bytes(layer) * (routed_B.double() * (before_B + layer.count) / 2).sum().item() / steps
        if layer.routes:
            loads.append(routed_B.double().mean().item() / steps)
    return moved, statistics.mean(loads or [0.0])


@torch.no_grad()
def measure_dense_decoding(args, B, S):
    """A Llama's decoding with transformers' static cache, compiled; the context is random keys and values.

    Its SDPA copies keys and values for every query head as transformers does it, which the floor does not count.
    """
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

    call = step_call(compiled(forward, args), args)
    times = time_steps(call, args, ids_B1, args.reps)
    moved = sum(p.nbytes for p in model.parameters()) + row // (S + DECODE_ROOM) * S * args.layers
    return decoding_metrics(times, args, B, moved, rate) | {"cache_gb": cache_bytes(cache) / 1e9}


def decoding_metrics(times, args, B, moved, rate):
    """Speed of decoding B rows, beside moving the `moved` bytes of a mean step at the copy rate.

    Means and no medians: how long a step takes depends on how many rows it routes.
    """
    ms, floor_ms = statistics.mean(times), 1e3 * moved / rate
    metrics = {"ms": ms, "tok_s": 1e3 * B / ms, "floor_ms": floor_ms, "floor_ratio": floor_ms / ms}
    metrics |= {"p50_ms": statistics.median(times), "p95_ms": float(np.quantile(times, 0.95)), "bytes": moved}
    return metrics | {"graph": int(args.device.type == "cuda")}


def decode_cases(args):
    """`<model>/<shape>`; HSPMN first, all contexts of a batch size when the first of them is asked for."""
    contexts, measured = sorted(args.contexts), {}

    def hspmn(B, S):
        if B not in measured:
            measured[B] = measure_hspmn_decoding(args, B, contexts)
        if S not in measured[B]:
            raise LeftOut("its cache does not fit into memory")
        return measured[B][S]

    for B, S in itertools.product(sorted(args.batches), contexts):
        if "hspmn" in args.models:
            yield f"hspmn/{Shape(B, S).case}", lambda b=B, s=S: hspmn(b, s)
    for B, S in itertools.product(sorted(args.batches), contexts):
        if "dense" in args.models:
            yield f"dense/{Shape(B, S).case}", lambda b=B, s=S: measure_dense_decoding(args, b, s)
