"""Modes throughput, latency and train of `benchmark.py`: one block beside compiled peers and beside its floor."""

import importlib
import importlib.util
import sys
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import AutoModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ..configuration_hspmn import ROUTING_PERIOD
from .timing import (
    LeftOut,
    Shape,
    capture,
    compiled,
    copy_rate,
    gemm_sizes,
    host_work,
    measure,
    model_config,
    peak_memory,
    random_hidden,
    spread,
    timing,
)

MODELS = ("hspmn", "hspmn_even", "dense", "gdn", "floor")
DEFAULT_LAYERS = ("hspmn_routing", "hspmn_reflexive")  # of the default model, whose mean layer is `hspmn`


class Block(NamedTuple):
    """One block ready to run: its module, `forward` from [B, S, D] to the same, flops of it, and the measured load."""

    module: nn.Module | None
    forward: object
    flops: float
    load: dict = {}


def hspmn_model(args, name):
    """A one-layer HSPMN and the module that its classes come from."""
    torch.manual_seed(0)
    with args.device:
        config = model_config(args, name, 1, args.intermediate_size)
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


def hspmn_block(args, name, x_BSD):
    """HSPMN's block, called as the model calls it: where the tokens stand is worked out once for all layers."""
    model, modeling = hspmn_model(args, name)
    block, load = model.layers[0], set_load(model.layers[0], x_BSD)
    backend = modeling.pick_backend(model.config.backend, x_BSD.device, args.head_dim)
    stream = modeling.make_stream(x_BSD, None, model.rotary_emb, backend=backend)
    flops = model.estimate_flops(x_BSD.shape[1], x_BSD.shape[0])
    return Block(block, lambda x: block(x, stream, output_router=True)[0], flops, {"load": load})


def dense_block(args, name, x_BSD):
    """The block of a Llama."""
    torch.manual_seed(0)
    config = model_config(args, "dense", 1, args.intermediate_size)
    block = LlamaDecoderLayer(config, 0).to(args.device, args.dtype).eval()
    B, S = x_BSD.shape[:2]
    angles = LlamaRotaryEmbedding(config).to(args.device)(x_BSD, torch.arange(S, device=args.device)[None])
    attention = 2 * B * args.num_attention_heads * args.head_dim * S**2
    return Block(block, lambda x: block(x, position_embeddings=angles), gemm_flops(args, B * S) + attention)


class GatedDelta(nn.Module):
    """fla's GatedDeltaNet in the place of a Llama's attention, with as many heads of the same width."""

    def __init__(self, args):
        super().__init__()
        sizes = {"hidden_size": args.hidden_size, "num_heads": args.num_attention_heads, "head_dim": args.head_dim}
        self.mixer = importlib.import_module("fla.layers").GatedDeltaNet(**sizes, expand_v=1, layer_idx=0)

    def forward(self, hidden_states, **kwargs):
        """[B, S, D] to the same, and no attention weights."""
        return self.mixer(hidden_states)[0], None


def gdn_block(args, name, x_BSD):
    """A Llama's block around GatedDeltaNet; left out where fla is not installed or there is no CUDA."""
    if importlib.util.find_spec("fla") is None or args.device.type != "cuda":
        raise LeftOut("flash-linear-attention is not installed" if args.device.type == "cuda" else "it needs CUDA")
    block = dense_block(args, name, x_BSD)
    block.module.self_attn = GatedDelta(args).to(args.device, args.dtype).eval()
    weights = sum(module.weight.numel() for module in block.module.modules() if isinstance(module, nn.Linear))
    return block._replace(flops=2 * weights * x_BSD[..., 0].numel())


def floor_block(args, name, x_BSD):
    """The block's GEMMs alone, each on random data."""
    like, tokens = {"device": args.device, "dtype": args.dtype}, x_BSD[..., 0].numel()
    sizes = gemm_sizes(args, args.intermediate_size)
    pairs = [(torch.randn(tokens, inputs, **like), torch.randn(outputs, inputs, **like)) for inputs, outputs in sizes]

    def forward(_):
        for x, weight in pairs:
            F.linear(x, weight)

    return Block(None, forward, gemm_flops(args, tokens))


BLOCKS = dict.fromkeys(("hspmn_even", *DEFAULT_LAYERS), hspmn_block)
BLOCKS |= {"dense": dense_block, "gdn": gdn_block, "floor": floor_block}


def prepare(args, name, shape):
    """Random hidden states of a shape, a block, and its compiled forward; fla keeps its operations out of a graph."""
    x_BSD = random_hidden(args, *shape)
    block = BLOCKS[name](args, name, x_BSD)
    return x_BSD, block, block.forward if name == "floor" else compiled(block.forward, args, fullgraph=name != "gdn")


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
def measure_forward(args, name, shape):
    """One block's compiled forward; to the floor's products come the bytes between them, at the copy rate."""
    x_BSD, block, forward = prepare(args, name, shape)
    times, tokens = measure(lambda: forward(x_BSD), args), shape.B * shape.S
    costs = peak_memory(args) | {"flops": block.flops, "bytes": least_bytes(args, tokens)}
    if name == "floor":
        rate, gemm_ms = copy_rate(args), spread(times)["ms"]
        bytes_ms = 1e3 * costs["bytes"] / rate
        costs |= {"gemm_ms": gemm_ms, "bytes_ms": bytes_ms, "copy_tb_s": rate / 1e12}
        times = [ms + bytes_ms for ms in times]
    return timing(times, tokens) | costs | block.load


@torch.no_grad()
def measure_latency(args, name, shape):
    """One block called eagerly, compiled, and replayed from a CUDA graph of the compiled call.

    graphs and graph_breaks are those of the compiled call, host_syncs what it waits for; cuda_graphs is 1 if it is
    captured whole, 0 if it cannot be.
    """
    x_BSD, block, forward = prepare(args, name, shape)
    counters.clear()
    metrics = spread(measure(lambda: block.forward(x_BSD), args), "eager_")
    metrics |= spread(measure(lambda: forward(x_BSD), args), "compiled_")
    metrics["graphs"] = counters["stats"]["unique_graphs"]
    metrics["graph_breaks"] = sum(counters["graph_break"].values())
    if args.device.type == "cuda":
        if (syncs := host_work(lambda: forward(x_BSD))[1]) is not None:
            metrics["host_syncs"] = syncs
        try:
            graph, _ = capture(lambda: forward(x_BSD))
            metrics |= spread(measure(graph.replay, args), "graph_") | {"cuda_graphs": 1}
        except RuntimeError as error:
            print(f"{name}: not captured in a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
            metrics["cuda_graphs"] = 0
    return metrics | block.load


def measure_training(args, name, shape):
    """One block's compiled forward and backward, to the input and the weights."""
    (x_BSD, block, forward), grad_BSD = prepare(args, name, shape), random_hidden(args, *shape, seed=1)
    block.module.train()
    x_BSD.requires_grad_()

    def step():
        block.module.zero_grad(set_to_none=True)
        x_BSD.grad = None
        forward(x_BSD).backward(grad_BSD)

    metrics = timing(measure(step, args), shape.B * shape.S)
    return metrics | peak_memory(args) | {"flops": 3 * block.flops} | block.load


def mean_layer(found, tokens):
    """What a layer of the default model takes on average; one of ROUTING_PERIOD layers routes."""
    if not found.keys() >= set(DEFAULT_LAYERS):
        raise LeftOut("one of its two kinds of layer was not measured")
    routing, reflexive = (found[name] for name in DEFAULT_LAYERS)
    names = [name for name in reflexive if name.endswith("ms") or name in ("flops", "bytes", "load")]
    sums = {name: routing[name] + (ROUTING_PERIOD - 1) * reflexive[name] for name in names if name in routing}
    metrics = {name: total / ROUTING_PERIOD for name, total in sums.items()}
    if "ms" in metrics:
        metrics["tok_s"] = 1e3 * tokens / metrics["ms"]
    if "peak_gb" in routing:
        metrics["peak_gb"] = max(routing["peak_gb"], reflexive["peak_gb"])
    return metrics


def block_cases(args, way, shapes, call, models=MODELS[:-1]):
    """`<model>/<way><shape>`: what `call` measures; hspmn is the mean of the cases of its two kinds of layer."""

    def run(name, shape, found):
        found[name] = mean_layer(found, shape.B * shape.S) if name == "hspmn" else call(args, name, shape)
        if "floor" in found and name != "floor":
            found[name]["floor_ratio"] = found["floor"]["ms"] / found[name]["ms"]
        return found[name]

    for shape in args.shapes or shapes:
        found = {}
        for model in (name for name in models if name in args.models):
            for name in (*DEFAULT_LAYERS, model) if model == "hspmn" else (model,):
                yield f"{name}/{way}{shape.case}", partial(run, name, shape, found)


def throughput_cases(args):
    """`<model>/fwd/<shape>`, the floor of each shape first."""
    shapes = (Shape(64, 4096), Shape(8, 32768), Shape(2, 131072), Shape(1, 335872))
    return block_cases(args, "fwd/", shapes, measure_forward, ("floor", *MODELS[:-1]))


def latency_cases(args):
    """`<model>/<shape>`."""
    return block_cases(args, "", [Shape(1, S) for S in (1024, 2048, 4096, 8192)], measure_latency)


def train_cases(args):
    """`<model>/fwd_bwd/<shape>`."""
    return block_cases(args, "fwd_bwd/", (Shape(32, 4096), Shape(4, 32768)), measure_training)
