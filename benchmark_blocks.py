"""Modes throughput, latency and train of `benchmark.py`: one block beside compiled peers and beside its floor."""

import importlib
import importlib.util
import itertools
import statistics
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import AutoModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from .benchmark_common import (
    LeftOut,
    Shape,
    capture,
    compiled,
    copy_rate,
    dense_config,
    gemm_sizes,
    host_syncs,
    hspmn_config,
    measure,
    random_hidden,
    timing,
)

MODELS = ("hspmn", "dense", "gdn", "floor")


class Block(NamedTuple):
    """One block ready to run: its module, `forward` from [B, S, D] to the same, flops of it, and the measured load."""

    module: nn.Module
    forward: object
    flops: float
    load: float | None = None


def hspmn_model(args):
    """A one-layer HSPMN and the module that its classes come from."""
    torch.manual_seed(0)
    with args.device:
        config = hspmn_config(args, 1, args.intermediate_size)
        model = AutoModel.from_config(config, trust_remote_code=True, dtype=args.dtype)
    return model.eval(), sys.modules[type(model).__module__]


@torch.no_grad()
def set_load(block, x_BSD):
    """Set the routing bias so that `x` is routed at the block's share, and return the load measured."""
    if block.router is None:
        return 0.0
    parts = x_BSD.reshape(1, -1, x_BSD.shape[-1]).split(16384, 1)
    scores = torch.cat([block.router(block.input_layernorm(part)).score_BT[0] for part in parts])
    block.router.bias.fill_(-scores.quantile(1 - block.router.sparsity_k))
    return (scores + block.router.bias > 0).float().mean().item()


def hspmn_block(args, x_BSD):
    """HSPMN's block, called as the model calls it: where the tokens stand is worked out once for all layers."""
    model, modeling = hspmn_model(args)
    block, stream = model.layers[0], modeling.make_stream(x_BSD, None, model.rotary_emb)
    load = set_load(block, x_BSD)
    flops = model.estimate_flops(x_BSD.shape[1], x_BSD.shape[0])
    return Block(block, lambda x: block(x, stream)[0], flops, load)


def dense_block(args, x_BSD):
    """The block of a Llama."""
    torch.manual_seed(0)
    config = dense_config(args, 1, args.intermediate_size)
    block = LlamaDecoderLayer(config, 0).to(args.device, args.dtype).eval()
    B, S = x_BSD.shape[:2]
    angles = LlamaRotaryEmbedding(config).to(args.device)(x_BSD, torch.arange(S, device=args.device)[None])
    attention = 2 * B * args.num_attention_heads * args.head_dim * S**2
    return Block(block, lambda x: block(x, position_embeddings=angles), gemm_flops(args, B * S) + attention)


class GatedDeltaBlock(nn.Module):
    """GatedDeltaNet with as many heads of the same width as the dense block has queries, and its SwiGLU."""

    def __init__(self, args, mixer_class):
        super().__init__()
        config = dense_config(args, 1, args.intermediate_size)
        self.input_layernorm = LlamaRMSNorm(args.hidden_size)
        self.mixer = mixer_class(
            hidden_size=args.hidden_size, num_heads=args.num_attention_heads, head_dim=args.head_dim, expand_v=1,
            layer_idx=0,
        )  # fmt: skip
        self.post_attention_layernorm = LlamaRMSNorm(args.hidden_size)
        self.mlp = LlamaMLP(config)

    def forward(self, x_BSD):
        """[B, S, D] to [B, S, D]."""
        x_BSD = x_BSD + self.mixer(self.input_layernorm(x_BSD))[0]
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


def gdn_block(args, x_BSD):
    """The block around fla's GatedDeltaNet; left out where fla is not installed or there is no CUDA."""
    if importlib.util.find_spec("fla") is None or args.device.type != "cuda":
        raise LeftOut("flash-linear-attention is not installed" if args.device.type == "cuda" else "it needs CUDA")
    torch.manual_seed(0)
    mixer_class = importlib.import_module("fla.layers").GatedDeltaNet
    block = GatedDeltaBlock(args, mixer_class).to(args.device, args.dtype).eval()
    weights = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
    return Block(block, block, 2 * weights * x_BSD.shape[0] * x_BSD.shape[1])


BLOCKS = {"hspmn": hspmn_block, "dense": dense_block, "gdn": gdn_block}


def gemm_flops(args, tokens):
    """Operations of the block's GEMMs."""
    return 2 * tokens * sum(inputs * outputs for inputs, outputs in gemm_sizes(args, args.intermediate_size))


def least_bytes(args, tokens):
    """Bytes that pass between the GEMMs if every step reads its inputs and writes its outputs once.

    Norm (x in, h out), attention (qkv in, heads out), sum and norm (two in, two out), SiLU and product (two in, one
    out), sum (two in, one out).
    """
    D, width = args.hidden_size, args.intermediate_size
    H, G, E = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    return tokens * args.dtype.itemsize * (9 * D + (2 * H + 2 * G) * E + 3 * width)


@torch.no_grad()
def measure_floor(args, shape):
    """The floor of one shape: each GEMM on random data, and the bytes between them at the copy rate."""
    tokens, gemms = shape.B * shape.S, []
    for inputs, outputs in gemm_sizes(args, args.intermediate_size):
        x = torch.randn(tokens, inputs, device=args.device, dtype=args.dtype)
        weight = torch.randn(outputs, inputs, device=args.device, dtype=args.dtype)
        times = measure(lambda x=x, weight=weight: F.linear(x, weight), args)
        gemms.append(timing(times, tokens, args))
        del x, weight, times
    rate = copy_rate(args)
    bytes_ms = 1e3 * least_bytes(args, tokens) / rate
    gemm_ms = sum(gemm["ms"] for gemm in gemms)
    metrics = {"ms": gemm_ms + bytes_ms, "p95_ms": sum(gemm["p95_ms"] for gemm in gemms) + bytes_ms}
    metrics["tok_s"] = 1e3 * tokens / metrics["ms"]
    if "peak_gb" in gemms[0]:
        metrics["peak_gb"] = max(gemm["peak_gb"] for gemm in gemms)
    metrics |= {"gemm_ms": gemm_ms, "bytes_ms": bytes_ms, "copy_tb_s": rate / 1e12}
    return metrics | {"flops": gemm_flops(args, tokens), "bytes": least_bytes(args, tokens)}


@torch.no_grad()
def measure_forward(args, name, shape, floors):
    """One block's compiled forward."""
    if name == "floor":
        floors[shape] = measure_floor(args, shape)
        return floors[shape]
    x_BSD = random_hidden(args, *shape)
    block = BLOCKS[name](args, x_BSD)
    forward = compiled(block.forward, args, fullgraph=name != "gdn")  # fla keeps its operations out of the graph
    metrics = timing(measure(lambda: forward(x_BSD), args), shape.B * shape.S, args)
    metrics |= {"flops": block.flops, "bytes": least_bytes(args, shape.B * shape.S)}
    if shape in floors:
        metrics["floor_ratio"] = floors[shape]["ms"] / metrics["ms"]
    return metrics if block.load is None else metrics | {"load": block.load}


def throughput_cases(args):
    """`<model>/fwd/<shape>`, the floor of each shape first."""
    floors = {}
    for shape in args.shapes or (Shape(64, 4096), Shape(8, 32768), Shape(2, 131072), Shape(1, 335872)):
        for name in sorted(args.models, key=lambda name: name != "floor"):
            yield f"{name}/fwd/{shape.case}", lambda n=name, s=shape: measure_forward(args, n, s, floors)


@torch.no_grad()
def measure_latency(args, name, shape):
    """One block called eagerly, compiled, and replayed from a CUDA graph of the compiled call.

    graphs and graph_breaks are those of the compiled call, host_syncs what it waits for; cuda_graphs is 1 if it is
    captured whole, 0 if it cannot be.
    """
    x_BSD = random_hidden(args, *shape)
    block = BLOCKS[name](args, x_BSD)
    counters.clear()
    forward = compiled(block.forward, args, fullgraph=name != "gdn")
    metrics = named("eager", measure(lambda: block.forward(x_BSD), args))
    metrics |= named("compiled", measure(lambda: forward(x_BSD), args))
    metrics["graphs"] = counters["stats"]["unique_graphs"]
    metrics["graph_breaks"] = sum(counters["graph_break"].values())
    if args.device.type == "cuda":
        if (syncs := host_syncs(lambda: forward(x_BSD))) is not None:
            metrics["host_syncs"] = syncs
        try:
            graph, _ = capture(lambda: forward(x_BSD))
            metrics |= named("graph", measure(graph.replay, args)) | {"cuda_graphs": 1}
        except RuntimeError as error:
            print(f"{name}: not captured in a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
            metrics["cuda_graphs"] = 0
    return metrics if block.load is None else metrics | {"load": block.load}


def named(way, times):
    """Median and P95 milliseconds of one way to call a block."""
    return {f"{way}_ms": statistics.median(times), f"{way}_p95_ms": float(np.quantile(times, 0.95))}


def latency_cases(args):
    """`<model>/<shape>`."""
    for shape, name in itertools.product(args.shapes or [Shape(1, S) for S in (1024, 2048, 4096, 8192)], args.models):
        if name != "floor":
            yield f"{name}/{shape.case}", lambda n=name, s=shape: measure_latency(args, n, s)


def measure_training(args, name, shape):
    """One block's compiled forward and backward, to the input and the weights."""
    x_BSD = random_hidden(args, *shape)
    block = BLOCKS[name](args, x_BSD)
    block.module.train()
    forward, grad_BSD = compiled(block.forward, args, fullgraph=name != "gdn"), random_hidden(args, *shape, seed=1)
    x_BSD.requires_grad_()

    def step():
        block.module.zero_grad(set_to_none=True)
        x_BSD.grad = None
        forward(x_BSD).backward(grad_BSD)

    metrics = timing(measure(step, args), shape.B * shape.S, args) | {"flops": 3 * block.flops}
    return metrics if block.load is None else metrics | {"load": block.load}


def train_cases(args):
    """`<model>/fwd_bwd/<shape>`."""
    for shape, name in itertools.product(args.shapes or (Shape(32, 4096), Shape(4, 32768)), args.models):
        if name != "floor":
            yield f"{name}/fwd_bwd/{shape.case}", lambda n=name, s=shape: measure_training(args, n, s)
