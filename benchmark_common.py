"""What all modes of `benchmark.py` share: timing, compiling, capturing, and the sizes of what is measured.

B batch, S and T tokens, H query heads, G key/value heads, E head width, D hidden size.
"""

import gc
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from .evaluate import config_with, parse_overrides

SLOW_MS = 300.0  # calls longer than this are timed five times


class LeftOut(Exception):
    """A case that cannot run here, and why."""


class Shape(NamedTuple):
    """Rows and tokens per row of one measurement; written 64x4096 on the command line, B64_S4096 in case names."""

    B: int
    S: int

    def __str__(self):
        return f"{self.B}x{self.S}"

    @property
    def case(self):
        """As the last part of a case name."""
        return f"B{self.B}_S{self.S}"


def measure(call, args, before=None):
    """Milliseconds of `args.reps` calls after a warm-up of three; `before` runs before each, untimed.

    Resets the peak memory counter after the warm-up. CUDA events on CUDA, the clock elsewhere.
    """
    before = before or (lambda: None)
    for _ in range(3):
        before()
        call()
    synchronize(args)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    call()
    synchronize(args)
    reps = args.reps if 1e3 * (time.perf_counter() - begun) < SLOW_MS else min(args.reps, 5)
    return measure_cuda(call, reps, before) if args.device.type == "cuda" else measure_clock(call, reps, before)


def measure_cuda(call, reps, before):
    """Milliseconds of each call between CUDA events, without waiting for one before the next is queued."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(reps)]
    for begin, end in events:
        before()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def measure_clock(call, reps, before):
    """Milliseconds of each call by the clock."""
    times = []
    for _ in range(reps):
        before()
        begun = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begun))
    return times


def timing(times, tokens, args):
    """Median and P95 milliseconds, tokens per second, and peak memory on CUDA, as metrics."""
    metrics = {"ms": statistics.median(times), "p95_ms": float(np.quantile(times, 0.95))}
    metrics["tok_s"] = 1e3 * tokens / metrics["ms"]
    if args.device.type == "cuda":
        metrics["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics


def synchronize(args):
    """Wait for the device."""
    if args.device.type == "cuda":
        torch.cuda.synchronize()


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
    return 2 * source.numel() / (1e-3 * statistics.median(measure(lambda: target.copy_(source), args)))


def compiled(function, args, fullgraph=True):
    """`function` compiled for its one shape as `--compile` says."""
    if args.compile == "none":
        return function
    return torch.compile(function, fullgraph=fullgraph, dynamic=False, backend=args.compile)


def capture(call):
    """A CUDA graph of `call` and its output, which a replay overwrites; RuntimeError if it reads the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            output = call()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream behind
    return graph, output


def host_syncs(call):
    """How often the host waits for the device, or copies from it, between the first and the last launch of a call.

    None if the profiler saw no launch, as where it may not read the device's counters.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    on_host = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CPU]
    launches = [event.time_range for event in on_host if event.name.startswith("cu") and "Launch" in event.name]
    if not launches:
        return None
    begin, end = min(span.start for span in launches), max(span.end for span in launches)
    waits = [event for event in on_host if "Synchronize" in event.name and begin <= event.time_range.start <= end]
    return len(waits) + sum("Memcpy DtoH" in event.name for event in trace.events())


def shared_sizes(args, layers, intermediate_size):
    """Fields that every decoder has."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    sizes = {name: getattr(args, name) for name in names}
    return sizes | {
        "num_hidden_layers": layers, "intermediate_size": intermediate_size, "tie_word_embeddings": True,
        "max_position_embeddings": 1048576, "rms_norm_eps": 1e-6,
    }  # fmt: skip


def hspmn_config(args, layers, intermediate_size):
    """Configuration of an HSPMN of the sizes in `args`, with the fields of `--set`."""
    fields = shared_sizes(args, layers, intermediate_size)
    fields |= {"sparsity_k": args.sparsity_k, "sliding_window": args.sliding_window}
    return config_with(fields | parse_overrides(args.set))


def dense_config(args, layers, intermediate_size):
    """Configuration of a Llama of the same sizes, with SDPA."""
    config = LlamaConfig(**shared_sizes(args, layers, intermediate_size))
    config._attn_implementation = "sdpa"
    return config


def random_hidden(args, B, S, seed=0):
    """Unit-variance hidden states [B, S, D]."""
    generator = torch.Generator(args.device).manual_seed(seed)
    return torch.randn(B, S, args.hidden_size, device=args.device, dtype=args.dtype, generator=generator)


def random_tokens(args, B, T):
    """Token ids [B, T]."""
    return torch.randint(args.vocab_size, (B, T), device=args.device)


def gemm_sizes(args, intermediate_size):
    """(inputs, outputs) of the block's GEMMs: qkv, o, gate and up, down."""
    D, width = args.hidden_size, intermediate_size
    H, G, E = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    return [(D, (H + 2 * G) * E), (H * E, D), (D, 2 * width), (width, D)]
