"""Modes context and decode of `benchmark.py`: how long a context fits, and how fast tokens follow it."""

import itertools
import math
import statistics
import sys
import time
from functools import partial

import torch
from transformers import AutoModelForCausalLM, StaticCache

from ..configuration_hspmn import ROUTING_PERIOD
from .blocks import hspmn_model, set_load
from .timing import (
    LeftOut,
    Shape,
    compiled,
    copy_rate,
    model_config,
    peak_memory,
    random_hidden,
    random_tokens,
    replayed,
    spread,
    synchronize,
    wall_ms,
)

DECODE_ROOM = 320  # tokens that a static cache can take after its context; no measurement takes more steps
DECODE_REPS = 4  # HSPMN's steps per `--reps`: how many rows a step routes varies, so its mean needs more of them
DECODE_SPARE = 6 * 10**9  # bytes that decoding needs beside the keys and values of the cache


def causal_lm(args, name):
    """A whole model with random weights; HSPMN's loads are set on random tokens."""
    torch.manual_seed(0)
    config = model_config(args, name, args.layers, args.model_intermediate_size)
    with args.device:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=args.dtype).eval()
    if name != "dense":
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


def step(model, ids_B1, cache):
    """Logits of one decoded token."""
    return model(input_ids=ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def clock(args):
    """Seconds at which the device is idle; peak memory is counted from here on."""
    synchronize(args)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def cache_bytes(cache):
    """Bytes of all tensors of a cache's layers."""
    return sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))


def used_gb(args, cache):
    """Peak memory on CUDA; elsewhere, where nobody counts it, the bytes of the cache."""
    return peak_memory(args).get("peak_gb", cache_bytes(cache) / 1e9)


@torch.no_grad()
def measure_model_context(args, name):
    """A long random prompt through a whole model in chunks, then greedy tokens; `load` is the prompt's."""
    model, ids_BT = causal_lm(args, name), random_tokens(args, 1, args.context_tokens)
    begun = clock(args)
    output = model.prefill(ids_BT, chunk_size=args.chunk)
    synchronize(args)
    read, cache, logits = time.perf_counter(), output.past_key_values, output.logits
    load = statistics.mean(layer.count.item() / args.context_tokens for layer in cache.layers if layer.routes)
    decoding = time.perf_counter()
    for _ in range(args.new_tokens):
        logits = step(model, logits[:, -1:].argmax(-1), cache)
    synchronize(args)
    metrics = {"tokens": args.context_tokens, "prefill_tok_s": args.context_tokens / (read - begun)}
    metrics |= {"generated": args.new_tokens, "decode_tok_s": args.new_tokens / (time.perf_counter() - decoding)}
    metrics |= {"load": load, "params": sum(p.numel() for p in model.parameters())}
    return metrics | {"cache_gb": cache_bytes(cache) / 1e9, "peak_gb": used_gb(args, cache)}


@torch.no_grad()
def measure_block_context(args, name, most):
    """How many hidden states, at most `most`, one block reads chunk by chunk before it passes the memory budget."""
    model, modeling = hspmn_model(args, name)
    block, cache = model.layers[0], modeling.HSPMNCache(model.config)
    load = set_load(block, random_hidden(args, 1, min(args.chunk, 16384)))
    tokens, peak, limited, begun = 0, 0.0, 0, clock(args)
    while tokens < most and not limited:
        try:
            block(random_hidden(args, 1, args.chunk, seed=tokens), past_key_values=cache)
            limited = int(used_gb(args, cache) > args.memory_gb)
        except torch.OutOfMemoryError:
            limited = 1
        if not limited:
            tokens, peak = tokens + args.chunk, used_gb(args, cache)
    synchronize(args)
    metrics = {"tokens": tokens, "peak_gb": peak, "prefill_tok_s": tokens / (time.perf_counter() - begun)}
    return metrics | {"load": load, "memory_gb": args.memory_gb, "limited_by_memory": limited}


def context_cases(args):
    """`<model>/model/<tokens>` and `<model>/block/max`; a routing block of the default model reads as many keys."""
    blocks = {"hspmn": ("hspmn_routing", args.block_tokens // ROUTING_PERIOD)}
    for name in ("hspmn", "hspmn_even"):
        if name in args.models:
            layer, most = blocks.get(name, (name, args.block_tokens))
            yield f"{name}/model/{args.context_tokens}", partial(measure_model_context, args, name)
            yield f"{layer}/block/max", partial(measure_block_context, args, layer, most)


def time_steps(call, args, ids_B1, steps):
    """Milliseconds of each of `steps` calls one after the other, which read `ids_B1`, drawn anew for each.

    A time runs from the end of one step to the end of the next, so it holds the writing of the new ids.
    """
    ids_NB1 = torch.randint(args.vocab_size, (steps, *ids_B1.shape), device=args.device)
    if args.device.type != "cuda":
        return [wall_ms(call, args, partial(ids_B1.copy_, ids)) for ids in ids_NB1]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    call()  # while it runs, the host gets ahead of the device
    events[0].record()
    for ids, event in zip(ids_NB1, events[1:], strict=True):
        ids_B1.copy_(ids)
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def static_cache(args, model, B, tokens, capacity=None):
    """An `HSPMNStaticCache` of the model's own module, for B rows of `tokens` tokens and the steps after them."""
    kind = sys.modules[type(model).__module__].HSPMNStaticCache
    return kind(model.config, B, tokens + DECODE_ROOM, capacity, args.device, args.dtype)


def fill(cache, shares, tokens):
    """Make a static cache one that has read `tokens` tokens, of which each layer routed its share.

    What it holds is random: how long a step takes depends on how many values it reads and not on what they are.
    """
    for layer, share in zip(cache.layers, shares, strict=True):
        layer.most_used = round(share * tokens)
        layer.count.fill_(layer.most_used)
        layer.document_slot.zero_()
        states = (layer.linear_state, layer.conv_state, layer.window_keys, layer.window_values)
        for x in (*states, *(getattr(layer, name) for name in layer.slot_tensors)):
            x.normal_() if x.is_floating_point() else x.random_(-127, 128)
    for counter in (cache.columns, cache.seen, cache.document_seen):
        counter.fill_(tokens)
    cache.last_position.fill_(tokens - 1)


def slot_bytes(layer):
    """Bytes of the keys and values of one sparse slot, with their scales."""
    return sum(getattr(layer, name)[0, 0].nbytes for name in layer.slot_tensors if name != "positions")


@torch.no_grad()
def measure_hspmn_decoding(args, name, B, contexts):
    """HSPMN's decoding of B rows after each of `contexts`: metrics by context, of those that fit into memory.

    Each row goes on with other random tokens, so rows route different steps. One static cache, large enough for the
    longest context, serves all of them: the step is compiled and captured once.
    """
    rate, model, free = copy_rate(args), causal_lm(args, name), math.inf
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] - DECODE_SPARE
    fitting = [S for S in contexts if B * S * model.kv_bytes_per_token() < free]
    if not fitting:
        raise LeftOut("its cache does not fit into memory")
    shares, ids_B1 = model.config.layer_sparsity, random_tokens(args, B, 1)
    steps, results = DECODE_REPS * args.reps, {}
    cache = static_cache(args, model, B, fitting[-1], [round(share * fitting[-1]) + DECODE_ROOM for share in shares])
    fill(cache, shares, fitting[-1])
    call = replayed(compiled(partial(step, model, ids_B1, cache), args), args)
    for S in fitting:
        fill(cache, shares, S)
        cache.reserve(steps + 1)
        before = [layer.count.clone() for layer in cache.layers]
        columns, times = int(cache.columns), time_steps(call, args, ids_B1, steps)
        moved, load = step_bytes(model, cache, before, int(cache.columns) - columns)
        unused = sum(slot_bytes(layer) * (layer.slots - layer.count).sum().item() for layer in cache.layers)
        results[S] = decoding_metrics(times, args, B, moved, rate)
        results[S] |= {"cache_gb": (cache_bytes(cache) - unused) / 1e9, "load": load}
    return results


def step_bytes(model, cache, before, steps):
    """Bytes that a mean one of the last `steps` steps moved, and the share of rows that routing layers routed in it.

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
    rate, model, read = copy_rate(args), causal_lm(args, "dense"), 0
    cache = StaticCache(config=model.config, max_cache_len=S + DECODE_ROOM)
    cache.early_initialization(B, args.num_key_value_heads, args.head_dim, args.dtype, args.device)
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            read += x.normal_()[:, :, :S].nbytes
        layer.cumulative_length.fill_(S)
    ids_B1 = random_tokens(args, B, 1)
    times = time_steps(replayed(compiled(partial(step, model, ids_B1, cache), args), args), args, ids_B1, args.reps)
    moved = sum(p.nbytes for p in model.parameters()) + read
    return decoding_metrics(times, args, B, moved, rate) | {"cache_gb": cache_bytes(cache) / 1e9}


def decoding_metrics(times, args, B, moved, rate):
    """Speed of decoding B rows, beside moving the `moved` bytes of a mean step at the copy rate.

    Means and no medians: how long a step takes depends on how many rows it routes.
    """
    ms, floor_ms, middle = statistics.mean(times), 1e3 * moved / rate, spread(times)
    metrics = {"ms": ms, "tok_s": 1e3 * B / ms, "floor_ms": floor_ms, "floor_ratio": floor_ms / ms}
    metrics |= {"p50_ms": middle["ms"], "p95_ms": middle["p95_ms"], "bytes": moved}
    return metrics | {"graph": int(args.device.type == "cuda")}


def decode_cases(args):
    """`<model>/<shape>`; of an HSPMN all contexts of a batch size when the first of them is asked for."""
    contexts, measured = sorted(args.contexts), {}

    def run(name, B, S):
        if name == "dense":
            return measure_dense_decoding(args, B, S)
        if (name, B) not in measured:
            measured[name, B] = measure_hspmn_decoding(args, name, B, contexts)
        if S not in measured[name, B]:
            raise LeftOut("its cache does not fit into memory")
        return measured[name, B][S]

    for name, B, S in itertools.product(("hspmn", "hspmn_even", "dense"), sorted(args.batches), contexts):
        if name in args.models:
            yield f"{name}/{Shape(B, S).case}", partial(run, name, B, S)
