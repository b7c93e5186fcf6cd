"""Modes context and decode of `benchmark.py`: how long a context fits, and how fast tokens follow it."""

import itertools
import statistics
import sys
from functools import partial

import torch
from transformers import AutoModelForCausalLM, StaticCache

from ..configuration_hspmn import ROUTING_PERIOD
from . import timing
from .blocks import IN_FLOAT8, hspmn_model, set_load
from .timing import LeftOut, clock, random_hidden, random_tokens

DECODE_ROOM = 320  # tokens that a static cache can take after its context; no measurement takes more steps
DECODE_REPS = 4  # HSPMN's steps per `--reps`: how many rows a step routes varies, so its mean needs more of them
DECODE_SPARE = 6 * 10**9  # bytes that decoding needs beside the keys and values of the cache


def new_model(args, name, layers):
    """A whole model with random weights."""
    torch.manual_seed(0)
    config = timing.model_config(args, name, layers, args.model_intermediate_size)
    with args.device:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=args.dtype)


def causal_lm(args, name):
    """A whole model with random weights; HSPMN's loads are set on random tokens."""
    model = timing.as_named(new_model(args, name, args.layers), name)
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


def cache_gb(cache, unused=0):
    """Size of all tensors of a cache's layers, but so many bytes."""
    tensors = (x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))
    return (sum(x.nbytes for x in tensors) - unused) / 1e9


@torch.no_grad()
def measure_model_context(args, name):
    """A long random prompt through a whole model in chunks, then greedy tokens; `load` is the prompt's."""
    model, ids_BT = causal_lm(args, name), random_tokens(args, 1, args.context_tokens)
    begun = clock(args, count_peak=True)
    output = model.prefill(ids_BT, chunk_size=args.chunk)
    reading, cache, logits = clock(args) - begun, output.past_key_values, output.logits
    load = statistics.mean(layer.count.item() / args.context_tokens for layer in cache.layers if layer.routes)
    begun = clock(args)
    for _ in range(args.new_tokens):
        logits = step(model, logits[:, -1:].argmax(-1), cache)
    decoding = clock(args) - begun
    return {
        "tokens": args.context_tokens, "prefill_tok_s": args.context_tokens / reading, "generated": args.new_tokens,
        "decode_tok_s": args.new_tokens / decoding, "load": load, "params": model.num_parameters(),
        "cache_gb": cache_gb(cache), "peak_gb": cache_gb(cache)} | timing.peak_memory(args)  # fmt: skip


@torch.no_grad()
def measure_block_context(args, name, most):
    """How many hidden states, at most `most`, one block reads chunk by chunk before it passes the memory budget; where
    nobody counts memory, the size of the cache must keep to it."""
    model, modeling = hspmn_model(args, name)
    block, cache = model.layers[0], modeling.HSPMNCache(model.config)
    load = set_load(block, random_hidden(args, 1, min(args.chunk, 16384)))
    tokens, peak, limited, begun = 0, 0.0, 0, clock(args, count_peak=True)
    while tokens < most and not limited:
        try:
            block(random_hidden(args, 1, args.chunk, seed=tokens), past_key_values=cache)
            used = timing.peak_memory(args).get("peak_gb", cache_gb(cache))
        except torch.OutOfMemoryError:
            used = float("inf")
        if not (limited := int(used > args.memory_gb)):
            tokens, peak = tokens + args.chunk, used
    metrics = {"tokens": tokens, "peak_gb": peak, "prefill_tok_s": tokens / (clock(args) - begun)}
    return metrics | {"load": load, "memory_gb": args.memory_gb, "limited_by_memory": limited}


def context_cases(args):
    """`<model>/model/<tokens>` and `<model>/block/max`; a routing block of the default model reads as many keys."""
    most = args.block_tokens
    for name, *block in (("hspmn", "hspmn_routing", most // ROUTING_PERIOD), ("hspmn_even", "hspmn_even", most)):
        if name in args.models:
            yield f"{name}/model/{args.context_tokens}", partial(measure_model_context, args, name)
            yield f"{block[0]}/block/max", partial(measure_block_context, args, *block)


def time_steps(call, args, ids_B1, steps):
    """Milliseconds of each of `steps` calls one after the other, which read `ids_B1`, drawn anew for each. A time runs
    from the end of one step to the end of the next, so it holds the writing of the new ids."""
    ids_NB1 = random_tokens(args, steps, *ids_B1.shape)
    if args.device.type != "cuda":
        return [timing.wall_ms(call, args, partial(ids_B1.copy_, ids)) for ids in ids_NB1]
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
    """Make a static cache one that has read `tokens` tokens, of which each layer routed its share. What it holds is
    random: how long a step takes depends on how many values it reads and not on what they are."""
    for layer, share in zip(cache.layers, shares, strict=True):
        layer.most_used = round(share * tokens)
        layer.count.fill_(layer.most_used)
        layer.document_slot.zero_()
        for name in ("linear_state", "conv_state", "window_keys", "window_values", *layer.slot_tensors):
            x = getattr(layer, name)
            x.normal_() if x.is_floating_point() else x.random_(torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max + 1)
    for counter in (cache.columns, cache.seen, cache.document_seen):
        counter.fill_(tokens)
    cache.last_position.fill_(tokens - 1)


@torch.no_grad()
def measure_hspmn_decoding(args, name, B, contexts):
    """HSPMN's decoding of B rows after each of `contexts`: metrics by context, of those that fit into memory. Each row
    goes on with other random tokens, so rows route different steps. One static cache, large enough for the longest
    context, serves all of them: the step is compiled and captured once. `load` is the share of rows that routing
    layers routed in a mean step, for which weights are read once, states read and written, and the keys and values of
    a row's routed tokens, with their scales, read where a layer routes the row's new token."""
    rate, model, results = timing.copy_rate(args), causal_lm(args, name), {}
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] - DECODE_SPARE
        contexts = [S for S in contexts if B * S * model.kv_bytes_per_token() < free]
    if not contexts:
        return {}
    shares, ids_B1, steps = model.config.layer_sparsity, random_tokens(args, B, 1), DECODE_REPS * args.reps
    cache = static_cache(args, model, B, contexts[-1], [round(share * contexts[-1]) + DECODE_ROOM for share in shares])
    fill(cache, shares, contexts[-1])
    call = timing.replayed(timing.compiled(partial(step, model, ids_B1, cache), args), args)
    for S in contexts:
        fill(cache, shares, S)
        cache.reserve(steps + 1)
        before, columns = [layer.count.clone() for layer in cache.layers], int(cache.columns)
        times, made = time_steps(call, args, ids_B1, steps), int(cache.columns) - columns
        moved, loads, unused = sum(p.nbytes for p in model.parameters()), [], 0
        for layer, before_B in zip(cache.layers, before, strict=True):
            slot_bytes = sum(getattr(layer, x)[0, 0].nbytes for x in layer.slot_tensors if x != "positions")
            routed_B = layer.count - before_B
            moved += 2 * (layer.linear_state.nbytes + layer.conv_state.nbytes)
            moved += layer.window_keys.nbytes + layer.window_values.nbytes
            moved += slot_bytes * (routed_B.double() * (before_B + layer.count) / 2).sum().item() / made
            unused += slot_bytes * (layer.slots - layer.count).sum().item()
            if layer.routes:
                loads.append(routed_B.double().mean().item() / made)
        results[S] = decoding_metrics(times, args, B, moved, rate)
        results[S] |= {"cache_gb": cache_gb(cache, unused), "load": statistics.mean(loads or [0.0])}
    return results


@torch.no_grad()
def measure_dense_decoding(args, B, S):
    """A Llama's decoding with transformers' static cache, compiled; the context is random keys and values. Its SDPA
    copies keys and values for every query head as transformers does it, which the floor does not count."""
    rate, model, ids_B1 = timing.copy_rate(args), causal_lm(args, "dense"), random_tokens(args, B, 1)
    cache, moved = StaticCache(config=model.config, max_cache_len=S + DECODE_ROOM), 0
    cache.early_initialization(B, args.num_key_value_heads, args.head_dim, args.dtype, args.device)
    for layer in cache.layers:
        moved += sum(x.normal_()[:, :, :S].nbytes for x in (layer.keys, layer.values))
        layer.cumulative_length.fill_(S)
    moved += sum(p.nbytes for p in model.parameters())
    call = timing.replayed(timing.compiled(partial(step, model, ids_B1, cache), args), args)
    times = time_steps(call, args, ids_B1, args.reps)
    return decoding_metrics(times, args, B, moved, rate) | {"cache_gb": cache_gb(cache)}


def decoding_metrics(times, args, B, moved, rate):
    """Speed of decoding B rows, beside moving the `moved` bytes of a mean step at the copy rate. Means and no medians:
    how long a step takes depends on how many rows it routes."""
    ms, floor_ms, middle = statistics.mean(times), 1e3 * moved / rate, timing.spread(times)
    return {
        "ms": ms, "tok_s": 1e3 * B / ms, "floor_ms": floor_ms, "floor_ratio": floor_ms / ms, "p50_ms": middle["ms"],
        "p95_ms": middle["p95_ms"], "bytes": moved, "graph": int(args.device.type == "cuda")}  # fmt: skip


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

    for name, B, S in itertools.product(("hspmn", "hspmn_even", "dense", IN_FLOAT8), sorted(args.batches), contexts):
        if name in args.models:
            yield f"{name}/B{B}_S{S}", partial(run, name, B, S)
