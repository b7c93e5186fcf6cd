"""Modes throughput and latency of `benchmark.py`: one block beside compiled peers and beside its floor."""

import importlib.util
import math
import sys
from collections import namedtuple
from functools import partial

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import AutoModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ..configuration_hspmn import ROUTING_PERIOD
from . import timing
from .timing import LeftOut, measure, peak_memory, random_hidden, spread

MODELS = ("hspmn", "hspmn_even", "dense", "gdn", "floor")
IN_FLOAT8 = "hspmn" + timing.FLOAT8  # measured where it is asked for, by no mode that trains
DEFAULT_LAYERS = ("hspmn_routing", "hspmn_reflexive")  # of the default model, whose mean layer is `hspmn`
# One block ready to run: its module, `forward` from [B, S, D] to the same, flops of it, and the measured load
Block = namedtuple("Block", "module forward flops load", defaults=({},))


def hspmn_model(args, name):
    """A one-layer HSPMN and the module that its classes come from."""
    torch.manual_seed(0)
    with args.device:
        config = timing.model_config(args, name, 1, args.intermediate_size)
        model = AutoModel.from_config(config, trust_remote_code=True, dtype=args.dtype)
    return timing.as_named(model, name), sys.modules[type(model).__module__]


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


class _Mixer(nn.Sequential):  # fla's GatedDeltaNet in the place of a Llama's attention, which gives weights, too
    def forward(self, hidden_states, **kwargs):
        return self[0](hidden_states)[0], None


def llama_block(args, name, x_BSD):
    """The block of a Llama; gdn has GatedDeltaNet with as many heads of the same width in it, and is left out where
    fla or CUDA are missing."""
    if name == "gdn" and (args.device.type != "cuda" or importlib.util.find_spec("fla") is None):
        raise LeftOut("flash-linear-attention is not installed" if args.device.type == "cuda" else "it needs CUDA")
    torch.manual_seed(0)
    config, (B, S, _) = timing.model_config(args, "dense", 1, args.intermediate_size), x_BSD.shape
    block = LlamaDecoderLayer(config, 0).to(args.device, args.dtype).eval()
    angles = LlamaRotaryEmbedding(config).to(args.device)(x_BSD, torch.arange(S, device=args.device)[None])
    flops = llama_flops(args, B, S)
    if name == "gdn":
        sizes = {"hidden_size": args.hidden_size, "num_heads": args.num_attention_heads, "head_dim": args.head_dim}
        mixer = importlib.import_module("fla.layers").GatedDeltaNet(**sizes, expand_v=1, layer_idx=0)
        block.self_attn = _Mixer(mixer).to(args.device, args.dtype).eval()
        flops = 2 * B * S * sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear))
    return Block(block, lambda x: block(x, position_embeddings=angles), flops)


def floor_block(args, name, x_BSD):
    """The block's GEMMs alone, each on random data."""
    like, tokens = {"device": args.device, "dtype": args.dtype}, x_BSD[..., 0].numel()
    pairs = [(torch.randn(tokens, width, **like), torch.randn(out, width, **like)) for width, out in gemm_sizes(args)]

    def forward(_):
        for x, weight in pairs:
            F.linear(x, weight)

    return Block(None, forward, gemm_flops(args, tokens))


BLOCKS = dict.fromkeys(("hspmn_even", *DEFAULT_LAYERS, *(x + timing.FLOAT8 for x in DEFAULT_LAYERS)), hspmn_block)
BLOCKS |= {"dense": llama_block, "gdn": llama_block, "floor": floor_block}


def prepare(args, name, shape):
    """Random hidden states of a shape, a block, and its compiled forward; fla keeps its operations out of a graph."""
    x_BSD = random_hidden(args, *shape)
    block, whole = BLOCKS[name](args, name, x_BSD), name != "gdn"
    return x_BSD, block, block.forward if name == "floor" else timing.compiled(block.forward, args, fullgraph=whole)


def gemm_sizes(args):
    """(inputs, outputs) of the block's GEMMs: qkv, o, gate and up, down."""
    D, width, heads_width = args.hidden_size, args.intermediate_size, args.num_attention_heads * args.head_dim
    qkv_width = heads_width + 2 * args.num_key_value_heads * args.head_dim
    return [(D, qkv_width), (heads_width, D), (D, 2 * width), (width, D)]


def gemm_flops(args, tokens):
    """Operations of the block's GEMMs."""
    return 2 * tokens * sum(inputs * outputs for inputs, outputs in gemm_sizes(args))


def llama_flops(args, B, S):
    """Operations of a Llama's block: its GEMMs and the causal half of attention."""
    return gemm_flops(args, B * S) + 2 * B * args.num_attention_heads * args.head_dim * S**2


def least_bytes(args, tokens):
    """Bytes that pass between the GEMMs if every step reads its inputs and writes its outputs once. Norm (x in, h
    out), attention (qkv in, heads out), sum and norm (two in, two out), SiLU and product (two in, one out), sum (two
    in, one out)."""
    (D, qkv_width), (heads_width, _), _, (width, _) = gemm_sizes(args)
    return tokens * args.dtype.itemsize * (9 * D + qkv_width + heads_width + 3 * width)


@torch.no_grad()
def measure_forward(args, name, shape):
    """One block's compiled forward; to the floor's products come the bytes between them, at the copy rate."""
    (x_BSD, block, forward), tokens = prepare(args, name, shape), math.prod(shape)
    times = measure(lambda: forward(x_BSD), args)
    costs = peak_memory(args) | {"flops": block.flops, "bytes": least_bytes(args, tokens)}
    if name == "floor":
        rate, gemm_ms = timing.copy_rate(args), spread(times)["ms"]
        bytes_ms = 1e3 * costs["bytes"] / rate
        costs |= {"gemm_ms": gemm_ms, "bytes_ms": bytes_ms, "copy_tb_s": rate / 1e12}
        times = [ms + bytes_ms for ms in times]
    return spread(times, tokens=tokens) | costs | block.load


@torch.no_grad()
def measure_latency(args, name, shape):
    """One block called eagerly, compiled, and replayed from a CUDA graph of the compiled call. graphs and graph_breaks
    are those of the compiled call, host_syncs what it waits for; cuda_graphs is 1 if it is captured whole, 0 if it
    cannot be."""
    x_BSD, block, forward = prepare(args, name, shape)
    call = partial(forward, x_BSD)
    counters.clear()
    metrics = spread(measure(lambda: block.forward(x_BSD), args), "eager_")
    metrics |= spread(measure(call, args), "compiled_") | {"graphs": counters["stats"]["unique_graphs"]}
    metrics["graph_breaks"] = sum(counters["graph_break"].values())
    if args.device.type == "cuda":
        if (syncs := timing.host_work(call)[1]) is not None:
            metrics["host_syncs"] = syncs
        try:
            metrics |= spread(measure(timing.capture(call), args), "graph_") | {"cuda_graphs": 1}
        except RuntimeError as error:
            print(f"{name}: not captured in a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
            metrics["cuda_graphs"] = 0
    return metrics | block.load


def mean_layer(found, tokens, suffix=""):
    """What a layer of the default model takes on average; one of ROUTING_PERIOD layers routes. suffix: of a name."""
    layers = [name + suffix for name in DEFAULT_LAYERS]
    if not found.keys() >= set(layers):
        raise LeftOut("one of its two kinds of layer was not measured")
    routing, reflexive = (found[name] for name in layers)
    means = [name for name in reflexive if name.endswith("ms") or name in ("flops", "bytes", "load")]
    total = {name: routing[name] + (ROUTING_PERIOD - 1) * reflexive[name] for name in means if name in routing}
    metrics = {name: value / ROUTING_PERIOD for name, value in total.items()}
    metrics |= {"tok_s": 1e3 * tokens / metrics["ms"]} if "ms" in metrics else {}
    return metrics | ({"peak_gb": max(routing["peak_gb"], reflexive["peak_gb"])} if "peak_gb" in routing else {})


MODES = {  # what is measured, how case names call it, and at which shapes
    "throughput": (measure_forward, "fwd/", ("64x4096", "8x32768", "2x131072", "1x335872")),
    "latency": (measure_latency, "", ("1x1024", "1x2048", "1x4096", "1x8192")),
}


def block_cases(mode, args):
    """`<model>/<way><shape>`, where throughput has the floor first; hspmn is the mean of its two kinds of layer."""
    call, way, shapes = MODES[mode]

    def run(name, shape, found):
        suffix = name.removeprefix("hspmn")
        found[name] = call(args, name, shape) if name in BLOCKS else mean_layer(found, math.prod(shape), suffix)
        if "floor" in found and name != "floor":
            found[name]["floor_ratio"] = found["floor"]["ms"] / found[name]["ms"]
        return found[name]

    for text in args.shapes or shapes:
        (B, S), found = map(int, text.split("x")), {}
        for model in (*MODELS[-1:] * (mode == "throughput"), *MODELS[:-1], IN_FLOAT8):
            suffix = model.removeprefix("hspmn")
            names = (model,) if model in BLOCKS else (*(layer + suffix for layer in DEFAULT_LAYERS), model)
            for name in names if model in args.models else ():
                yield f"{name}/{way}B{B}_S{S}", partial(run, name, (B, S), found)
