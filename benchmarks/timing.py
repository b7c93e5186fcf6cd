"""What all modes of `benchmark.py` share: timing, compiling, capturing, and what is measured, lettered as there."""

import gc
import time
from functools import partial
from statistics import median

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from ..configuration_hspmn import CONCENTRATED_SHARE, ROUTING_PERIOD
from ..float8_hspmn import replace_layers
from ..results import config_with, parse_overrides, refusing

FLOAT8 = "_float8"  # how the names of such models end
SLOW_MS = 300.0  # calls longer than this are timed five times


class LeftOut(Exception):
    """A case that cannot run here, and why."""


def clock(args, count_peak=False):
    """Seconds at which the device is idle; `count_peak`: peak memory is counted from here on."""
    torch.get_device_module(args.device).synchronize()
    if count_peak and args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def peak_memory(args):
    """Peak memory since it was reset as a metric; nothing where nobody counts it."""
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if args.device.type == "cuda" else {}


def measure(call, args, before=lambda: None, wall=False):
    """Milliseconds of `args.reps` calls after a warm-up of three; `before` runs before each, untimed. Between CUDA
    events, without waiting for one call before the next is queued; by the clock on a CPU and for `wall`: from an idle
    device until the result is there. Resets the peak memory counter after the warm-up."""
    for _ in range(3):
        spent = wall_ms(call, args, before)
    reps = args.reps if spent < SLOW_MS else min(args.reps, 5)
    clock(args, count_peak=True)
    if wall or args.device.type != "cuda":
        return [wall_ms(call, args, before) for _ in range(reps)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(reps)]
    for begin, end in events:
        before()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def wall_ms(call, args, before=lambda: None):
    """Milliseconds of one call by the clock, from an idle device to an idle device."""
    before()
    begun = clock(args)
    call()
    return 1e3 * (clock(args) - begun)


def spread(times, way="", tokens=None):
    """Median and P95 of milliseconds as metrics, named by the way that was measured, and `tokens` per second."""
    metrics = {f"{way}ms": median(times), f"{way}p95_ms": float(np.quantile(times, 0.95))}
    return metrics | ({} if tokens is None else {"tok_s": 1e3 * tokens / median(times)})


def free_memory(args):
    """Drop compiled code and cached memory, so that no case pays for the one before."""
    torch.compiler.reset()
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()


def copy_rate(args):
    """Bytes per second, read and written, of a device copy."""
    source = torch.ones(2**28 if args.device.type == "cuda" else 2**24, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * median(measure(lambda: target.copy_(source), args)))


def compiled(function, args, fullgraph=True):
    """`function` compiled for its one shape as `--compile` says."""
    how = {"fullgraph": fullgraph, "dynamic": False, "backend": args.compile}
    return function if args.compile == "none" else torch.compile(function, **how)


def capture(call):
    """A call that replays `call` from a CUDA graph; RuntimeError if it reads the device."""
    graph, own, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(own)
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    own.wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(own)  # a capture that fails leaves its own stream behind
    return graph.replay


def replayed(step, args):
    """A call that replays `step` from a CUDA graph where there is CUDA; else `step`, which has run once."""
    step()  # compiles it
    return capture(step) if args.device.type == "cuda" else step


def host_work(call):
    """Launches of a call, and how often the host waits for the device, or copies from it, between the first and last.
    Both are None if the profiler saw no launch, as where it may not read the device's counters."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    on_host = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CPU]
    launches = [event.time_range for event in on_host if event.name.startswith("cu") and "Launch" in event.name]
    if not launches:
        return None, None
    begin, end = min(span.start for span in launches), max(span.end for span in launches)
    waits = [event for event in on_host if "Synchronize" in event.name and begin <= event.time_range.start <= end]
    return len(launches), len(waits) + sum("Memcpy DtoH" in event.name for event in trace.events())


def model_config(args, name, layers, intermediate_size):
    """Configuration of a model of the sizes in `args`: a Llama with SDPA for dense, else an HSPMN with `--set`. hspmn
    is the default one, of whose layers hspmn_routing and hspmn_reflexive are the two kinds; hspmn_even routes the same
    share in every layer; `<name>_float8` is configured as the model of that name."""
    fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    sizes = {field: getattr(args, field) for field in fields} | {
        "num_hidden_layers": layers, "intermediate_size": intermediate_size, "tie_word_embeddings": True,
        "max_position_embeddings": 1048576, "rms_norm_eps": 1e-6}  # fmt: skip
    if name == "dense":
        with refusing(TypeError):
            return LlamaConfig(**sizes, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None)
    routing = [CONCENTRATED_SHARE * ROUTING_PERIOD]
    shares = {"hspmn": None, "hspmn_even": args.sparsity_k, "hspmn_reflexive": [0.0], "hspmn_routing": routing}
    own = {"sparsity_k": shares[name.removesuffix(FLOAT8)], "sliding_window": args.sliding_window}
    return config_with(sizes | own | parse_overrides("--set", args.set))


def as_named(model, name):
    """A model in evaluation, its products in float8, by rows, if its name ends so."""
    if name.endswith(FLOAT8):
        replace_layers(model, partial(model.float8_layer.of, scaling="rowwise"))
    return model.eval()


def random_hidden(args, B, S, seed=0):
    """Unit-variance hidden states [B, S, D]."""
    generator = torch.Generator(args.device).manual_seed(seed)
    return torch.randn(B, S, args.hidden_size, device=args.device, dtype=args.dtype, generator=generator)


def random_tokens(args, *shape):
    """Token ids of a shape."""
    return torch.randint(args.vocab_size, shape, device=args.device)
