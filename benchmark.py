"""How fast, how long, how large: HSPMN beside compiled peers and beside what the machine allows.

    python benchmark.py --mode throughput      one block, forward, at four shapes
    python benchmark.py --mode latency         one block, batch 1: eager, compiled, replayed from a CUDA graph
    python benchmark.py --mode train           training steps: one block, and whole models with their optimizer
    python benchmark.py --mode kernels         each kernel, checked against its reference, then timed beside its rivals
    python benchmark.py --mode context         a million tokens through a model; the longest context of one block
    python benchmark.py --mode decode          tokens per second after 8k, 128k and 1M tokens of context
    python benchmark.py --mode serve           generate(): time to the first token, tokens per second, host time
    python benchmark.py --mode all             all of these
    torchrun --nproc_per_node 2 benchmark.py --mode train --parallel fsdp2 --cases model24/B4_S4096
                                               a whole model in two processes, and in one of them before
    python benchmark.py --mode all --tiny      the same in a minute on a CPU, as on every machine without CUDA

Models: hspmn, the default configuration, where every fourth layer routes 0.8 of the tokens and the others none: of
blocks the mean of one hspmn_routing and three hspmn_reflexive; hspmn_even, the original setting, the same share,
`--sparsity_k`, in every layer; dense, a Llama of transformers with SDPA; gdn, GatedDeltaNet of flash-linear-attention,
if it is installed, between the norms and SwiGLU of dense; floor, what no block with these projections can beat by
much: its GEMMs alone on random data, and the least bytes of everything between them at the measured copy rate; and,
where it is asked for, hspmn_float8, hspmn with its products in float8, in the modes throughput, latency, decode and
serve. Every
model runs in the same process and dtype. Routing biases are set so that random inputs are routed at the configured
shares. floor_ratio is the floor's time over the measured one, so 1 is the best; flops of gdn counts its GEMMs alone.
Results go to one file per mode, saved after every case; later runs replace cases of the same name. B batch, S and T
tokens, K routed tokens, H query heads, G key/value heads, E head width, D hidden size.
"""

import argparse
import os
import re
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import transformers
from rich.console import Console
from rich.table import Column, Table

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parent)]

from hspmn.benchmarks import training
from hspmn.benchmarks.blocks import IN_FLOAT8, MODELS, MODES, block_cases
from hspmn.benchmarks.cases import kernels_cases
from hspmn.benchmarks.context import context_cases, decode_cases
from hspmn.benchmarks.serve import serve_cases
from hspmn.benchmarks.timing import SLOW_MS, LeftOut, free_memory, model_config
from hspmn.results import DEVICES, RESULTS, Parser, at_least, check_output, merge_results, refuse, row

CASES = {mode: partial(block_cases, mode) for mode in MODES} | {
    "train": training.train_cases, "kernels": kernels_cases, "context": context_cases, "decode": decode_cases,
    "serve": serve_cases}  # fmt: skip


def run(args, modes):
    """Run all cases of `modes` one by one, save what each measured, and print the tables last. Returns how many
    failed: these are reported with their traceback and do not stop the others."""
    # a log has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 160, quiet=args.process > 0)
    cases = [(mode, name, call) for mode in modes for name, call in CASES[mode](args)]
    begun, measured, failed = time.monotonic(), {}, 0
    for done, (mode, name, call) in enumerate(cases, 1):
        spent, metrics, style = time.monotonic() - begun, {}, None
        try:
            if args.time_budget and spent > args.time_budget:
                raise LeftOut(f"{spent:.0f} s of {args.time_budget:.0f} s are spent")
            metrics = call()
            first = " ".join(f"{metric} {number(value)}" for metric, value in list(metrics.items())[:4])
            text = f"{first} ({time.monotonic() - begun - spent:.0f} s)"
        except (LeftOut, torch.OutOfMemoryError) as reason:
            if args.parallel and not isinstance(reason, LeftOut):
                raise  # or the other processes would wait for this one
            text = f"left out, {str(reason).splitlines()[0]}"
        except Exception:  # whatever it is, it is shown, counted, and must not cost the cases after it
            if args.parallel:
                raise
            text, style, failed = f"FAILED\n{traceback.format_exc()}", "red", failed + 1
        console.print(f"[{done}/{len(cases)}] {mode} {name}: {text}", style=style, markup=False, highlight=False)
        console.file.flush()  # so that a log can be followed
        if metrics:
            measured.setdefault(mode, {})[name] = metrics
        if metrics and args.output is not None:
            rows = [row(name, metric, value) for metric, value in metrics.items()]
            merge_results(args.output / f"{mode}.json", rows, {}, args.command)
        free_memory(args)
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    for mode, found in measured.items():
        names = dict.fromkeys(name for metrics in found.values() for name in metrics)
        table = Table("case", *(Column(name, justify="right") for name in names), title=f"{mode}: {device}")
        for case, metrics in found.items():
            table.add_row(case, *(number(metrics[name]) if name in metrics else "-" for name in names))
        console.print(table)
    return failed


def number(value):
    """A value in few characters."""
    whole = isinstance(value, int) or abs(value) >= 1e3
    return f"{value:,.0f}" if whole and abs(value) < 1e9 else f"{value:.4g}"


TINY = {
    "hidden_size": 64, "intermediate_size": 96, "model_intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "layers": 2, "sliding_window": 8, "reps": 3,
    "shapes": ["2x64"], "cases": ["block/B2_S64", "model2/B2_S64"], "kernel_shapes": ["2x70"], "sqsk_shapes": ["2x40"],
    "chunk": 64, "context_tokens": 256, "new_tokens": 4, "static_tokens": 4, "block_tokens": 4096, "memory_gb": 2e-4,
    "contexts": [64, 128], "batches": [1, 2], "prompts": [32, 64], "pieces": [16, 32], "device": "cpu",
    "compile": "eager"}  # fmt: skip
# Numbers from 1 up: the default, which is the setting of the committed measurement, and what they say
NUMBERS = {
    "hidden_size": (2048, None), "num_attention_heads": (16, None), "num_key_value_heads": (4, None),
    "head_dim": (128, None), "intermediate_size": (8192, "of one block"), "vocab_size": (16384, None),
    "model_intermediate_size": (6912, "of a whole model: 1.3 B parameters in all"), "layers": (24, "of a whole model"),
    "sliding_window": (128, "tokens of the local attention"),
    "reps": (20, f"timed calls per case; five if one takes {SLOW_MS / 1e3} s"),
    "chunk": (65536, "context: tokens read at once"),
    "context_tokens": (1048576, "context: tokens read by the whole model"),
    "block_tokens": (8388608, "context: length at which one block stops reading"),
    "new_tokens": (128, "context, serve: tokens generated eagerly"),
    "static_tokens": (512, "serve: tokens generated with a static cache"),
    "contexts": ([8192, 131072, 1048576], "decode: tokens of context"), "batches": ([1, 8], "decode: rows"),
    "prompts": ([2048, 8192, 32768, 65536, 131072], "serve: tokens before the first one that is generated"),
    "pieces": ([4096, 16384, 32768], "serve: pieces in which the shortest longer prompt is read, too")}  # fmt: skip
# Routed tokens of the shapes of --mode throughput: in a routing layer of the default model, then a fifth of all
SQSK_SHAPES = ["64x3277", "8x26214", "1x268698", "64x820", "8x6554", "1x67175"]
TRAINED = [
    "block/B32_S4096", "block/B4_S32768", "model8/B8_S4096", "model8/B2_S16384", "model8/B1_S65536",
    "model24/B4_S4096"]  # fmt: skip


def shape(text):
    """A text such as "64x4096" as it is; raises ArgumentTypeError for others."""
    if not re.fullmatch(r"0*[1-9]\d*x0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected BATCHxTOKENS such as 64x4096, got {text!r}")
    return text


def make_parser():
    """Arguments; every default is the setting of the committed measurement."""
    parser = Parser("benchmark.py", __doc__)
    add = parser.add_argument
    add("--mode", required=True, choices=(*CASES, "all"))
    add("--models", nargs="+", choices=(*MODELS, IN_FLOAT8), default=list(MODELS), help="all but kernels")
    add("--shapes", nargs="+", type=shape, metavar="BxS", help="throughput, latency: such as 64x4096")
    add("--cases", nargs="+", type=training.case, default=TRAINED, help="train: block/B4_S4096, model24/B4_S4096")
    add("--parallel", choices=training.PARALLEL, help="train: models in all processes that torchrun starts, too")
    add("--output", type=Path, help="folder of the results; benchmarks/results on cuda, none on cpu")
    add("--time_budget", type=at_least(0, float), default=0.0, help="seconds after which no case starts; 0: no limit")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of HSPMNConfig, such as backend=flex")
    add("--sparsity_k", type=at_least(1e-3, float, 1.0), default=0.2, help="share of routed tokens of hspmn_even")
    add("--memory_gb", type=at_least(1e-6, float), default=30.24, help="context: budget of the block, 10^9 bytes")
    add("--kernel_shapes", nargs="+", type=shape, default=["64x4096"], metavar="BxT", help="kernels")
    add("--sqsk_shapes", nargs="+", type=shape, default=SQSK_SHAPES, metavar="BxK", help="compacted rows")
    for name, (default, text) in NUMBERS.items():
        several = {"nargs": "+"} if isinstance(default, list) else {}
        add(f"--{name}", type=at_least(1), default=default, help=text, **several)
    add("--device", choices=DEVICES, default=DEVICES[0])
    add("--compile", choices=("inductor", "eager", "none"), default="inductor", help="backend of torch.compile")
    add("--tiny", action="store_true", help="sizes that run on a CPU in a minute")
    return parser


def check_processes(args):
    """Refuse several processes where one is meant, and the reverse; the first of them speaks."""
    several, problem = args.processes > 1, None
    if several and not args.parallel:
        problem = f"torchrun started {args.processes} processes: give --parallel, or start python benchmark.py"
    elif args.parallel and not several:
        problem = f"--parallel {args.parallel} takes several processes: start torchrun --nproc_per_node 2 benchmark.py"
    elif args.parallel and args.mode != "train":
        problem = f"--parallel {args.parallel} belongs to --mode train, got --mode {args.mode}; leave it out"
    elif args.parallel and (blocks := [text for text in args.cases if text.startswith("block")]):
        problem = f"--cases {blocks[0]} runs in one process: name models beside --parallel, such as model24/B4_S4096"
    elif args.parallel and args.time_budget:
        problem = f"--time_budget {args.time_budget} beside --parallel: processes would differ about it; leave it out"
    if problem and args.process == 0:
        refuse(problem)
    if problem:
        raise SystemExit(2)


def parse_arguments(argv=None):
    """Checked arguments; small sizes where they are asked for or there is no CUDA."""
    parser = make_parser()
    if not torch.cuda.is_available():
        parser.set_defaults(**TINY)
    args = parser.parse(argv, TINY)
    if args.reps > 64:
        refuse(f"--reps {args.reps}: use at most 64, decoding steps fill a cache with room for no more")
    args.process, args.processes = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    check_processes(args)
    if args.parallel and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    args.device = torch.device(args.device)
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    if args.process > 0:
        args.output = None
    elif args.output is None and args.device.type == "cuda" and not args.tiny:
        args.output = RESULTS
    if args.output is not None:
        for mode in CASES if args.mode == "all" else [args.mode]:
            check_output(args.output / f"{mode}.json")
    for name in ("hspmn_even", "dense"):  # refuses wrong sizes and wrong --set
        model_config(args, name, args.layers, args.model_intermediate_size)
    return args


def main(argv=None):
    """Run the cases of one mode or all; returns 1 if any failed."""
    args = parse_arguments(argv)
    if not torch.cuda.is_available() and not args.process:
        print("no CUDA device: small sizes on the CPU with the reference backend; these are not results")
    transformers.utils.logging.disable_progress_bar()
    failed = run(args, CASES if args.mode == "all" else [args.mode])
    if args.parallel:
        torch.distributed.destroy_process_group()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
