"""Mode train of `benchmark.py`: what a step of training costs, of one block and of a whole model with its optimizer.

As users train: float32 weights under bfloat16 autocast (none on a CPU), fused AdamW, gradients clipped, every layer
compiled for itself. mfu is the share of the device's peak that the model's own operations take: three times those of
its forward pass, causal halves counted once, what is recomputed not at all.
"""

import math
import re
from argparse import ArgumentTypeError
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import torch
from accelerate.utils import compile_regions
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from ..results import PEAK_TFLOPS, low_precision, refuse
from . import timing
from .blocks import BLOCKS, DEFAULT_LAYERS, MODELS, llama_flops, mean_layer, prepare
from .cases import check
from .context import new_model
from .timing import LeftOut, measure, peak_memory, random_hidden, random_tokens, spread

PARALLEL = ("ddp", "fsdp2")
PARALLEL_REPS = 5  # at most: all processes must take as many steps, however long each finds them
CASE = re.compile(r"(?:block|model0*([1-9]\d{0,3}))/B0*([1-9]\d*)_S0*([1-9]\d*)")


def case(text):
    """A text such as "block/B4_S4096" or, of 24 layers, "model24/B4_S4096" as it is; else ArgumentTypeError."""
    if not CASE.fullmatch(text):
        raise ArgumentTypeError(f"expected block/B4_S4096 or, of 24 layers, model24/B4_S4096, got {text!r}")
    return text


def trained_alike(args, **fields):
    """`args` for float32 weights, and with other fields."""
    return SimpleNamespace(**vars(args) | {"dtype": torch.float32} | fields)


def mfu(args, flops, ms):
    """Share of the peak as a metric, nothing where that is not known."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else ""
    return {"mfu": 1e-9 * flops / ms / PEAK_TFLOPS[name]} if name in PEAK_TFLOPS else {}


def block_step(args, block, forward, x_BSD, grad_BSD):
    """One forward and backward of a `Block`: gradients of its input and weights, by name."""
    named = {"input": x_BSD.requires_grad_()} | dict(block.module.train().named_parameters())
    with low_precision(args.device):
        y_BSD = forward(x_BSD)
    return dict(zip(named, torch.autograd.grad(y_BSD, list(named.values()), grad_BSD.to(y_BSD.dtype)), strict=True))


def check_gradients(args, name):
    """The largest relative error of a block's gradients, compiled, against the reference in float64. What is more than
    twice that of the reference in low precision, eager, ends the program, see `cases.check`."""
    args = trained_alike(args, low=args.dtype)
    shape = (2, min(512, args.chunk))
    reference = trained_alike(args, set=[*args.set, "backend=reference"])
    x_BSD, block, forward = prepare(args, name, shape)
    grad_BSD = random_hidden(args, *shape, seed=1)
    got = block_step(args, block, forward, x_BSD, grad_BSD)
    block = BLOCKS[name](reference, name, x_BSD.detach())
    eager = block_step(args, block, block.forward, x_BSD, grad_BSD)
    block.module.double()
    exact = block_step(args, block, block.forward, x_BSD.detach().double(), grad_BSD.double())
    try:
        return {"error": check({key: x.to(args.low) for key, x in got.items()}, eager, exact, {})}
    except ValueError as error:
        refuse(f"{name}: gradient, {error}", code=1)


def measure_block(args, name, shape):
    """One block, forward and backward, compiled whole; its input is what an embedding gives, float32."""
    args = trained_alike(args)
    (x_BSD, block, forward), grad_BSD = prepare(args, name, shape), random_hidden(args, *shape, seed=1)
    times = measure(partial(block_step, args, block, forward, x_BSD, grad_BSD), args)
    return spread(times, tokens=math.prod(shape)) | peak_memory(args) | {"flops": 3 * block.flops} | block.load


def join(args):
    """Join this process to the others that train with it, for the rest of its life."""
    if not distributed.is_initialized():
        backend = "nccl" if args.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=1))


def distribute(args, model):
    """The model as one of several processes holds it, each layer compiled for itself."""
    if args.parallel == "ddp":
        # by layers as they are: the compiler would cut each along DDP's buckets, and refuses to where it holds a mask
        torch._dynamo.config.optimize_ddp = False
        return DistributedDataParallel(compile_model(args, model), bucket_cap_mb=100, gradient_as_bucket_view=True)
    mesh = init_device_mesh(args.device.type, (distributed.get_world_size(),))
    # casts weights alone, as autocast does with one process; residuals and angles stay float32
    policy = MixedPrecisionPolicy(param_dtype=args.low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        if args.compile != "none":
            layer.compile(backend=args.compile)  # in place, or the hooks of `fully_shard` would not run
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def compile_model(args, model):
    """The model with each layer compiled for itself, one graph for all of a kind."""
    return model if args.compile == "none" else compile_regions(model, backend=args.compile)


def measure_steps(args, name, layers, shape, form):
    """Steps of a fresh model in the `form` that a function of it gives, of this process: time and memory."""
    (B, S), model = shape, new_model(args, name, layers).train()
    sizes = trained_alike(args, intermediate_size=args.model_intermediate_size)
    flops = layers * llama_flops(sizes, B, S) + 2 * B * S * args.hidden_size * args.vocab_size
    flops = 3 * (flops if name == "dense" else model.estimate_flops(S, B))
    model, ids_BT = form(args, model), random_tokens(args, B, S)
    optimizer, last = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), {}

    def step():
        with low_precision(args.device):
            outputs = model(input_ids=ids_BT, labels=ids_BT, use_cache=False)
        last["loss"], last["load_L"] = loss, _ = outputs.loss, getattr(outputs, "router_load", None)
        del outputs  # a trainer keeps no logits either
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    metrics = {"first_step_s": timing.wall_ms(step, args) / 1e3}
    metrics |= spread(measure(step, args), tokens=B * S) | peak_memory(args) | {"flops": flops}
    if not last["loss"].isfinite():
        raise RuntimeError(f"the loss is {last['loss'].item()}")
    metrics |= {} if last["load_L"] is None else {"load": last["load_L"].mean().item()}
    return metrics | mfu(args, flops, metrics["ms"])


def measure_model(args, name, layers, shape, found):
    """Steps of a whole model in this process, of several in the first: `found` keeps their speed by what they are."""
    if args.process > 0:
        raise LeftOut("it is the first process's")
    metrics = measure_steps(trained_alike(args), name, layers, shape, compile_model)
    found[name, layers, shape] = metrics["tok_s"]
    return metrics


def measure_processes(args, name, layers, shape, found):
    """Steps of a whole model in all processes, beside the speed of one. They join here and not before: the biases of
    routers move by the load in all processes that are joined."""
    join(args)
    few = trained_alike(args, low=args.dtype, reps=min(args.reps, PARALLEL_REPS))
    metrics, alone = measure_steps(few, name, layers, shape, distribute), [found.get((name, layers, shape))]
    distributed.broadcast_object_list(alone)
    metrics |= {"tok_s": args.processes * metrics["tok_s"], "alone_tok_s": alone[0]}
    return metrics | {"scaling": metrics["tok_s"] / alone[0]}


def train_cases(args):
    """`<model>/gradients` of the blocks that are HSPMN's own, then `<model>/<case>`; of several processes, last,
    `<model>/<case>/ddp2` or `/fsdp2`."""
    asked = [name for name in MODELS[:-1] if name in args.models]
    for name in asked:
        for own in {"hspmn": DEFAULT_LAYERS, "hspmn_even": [name]}.get(name, ()):
            yield f"{own}/gradients", partial(check_gradients, args, own)

    def run_block(name, shape, found):
        found[name] = mean_layer(found, math.prod(shape)) if name == "hspmn" else measure_block(args, name, shape)
        return found[name] | mfu(args, found[name]["flops"], found[name]["ms"])

    models, speeds = [], {}
    for text in args.cases:
        layers, *shape = (size and int(size) for size in CASE.fullmatch(text).groups())
        found = {}
        for name in asked:
            if layers is None:
                for each in (*DEFAULT_LAYERS, name) if name == "hspmn" else (name,):
                    yield f"{each}/{text}", partial(run_block, each, shape, found)
            elif name != "gdn":
                models.append((f"{name}/{text}", name, layers, tuple(shape)))
    for case_name, *model in models:
        yield case_name, partial(measure_model, args, *model, speeds)
    for case_name, *model in models if args.parallel else ():
        way = f"{args.parallel.removesuffix('2')}{args.processes}"
        yield f"{case_name}/{way}", partial(measure_processes, args, *model, speeds)
