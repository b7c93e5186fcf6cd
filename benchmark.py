"""How fast, how long, how large: HSPMN beside compiled peers and beside what the machine allows.

    python benchmark.py --mode throughput      one block, forward, at four shapes
    python benchmark.py --mode latency         one block, batch 1: eager, compiled, replayed from a CUDA graph
    python benchmark.py --mode train           one block, forward and backward
    python benchmark.py --mode kernels         each kernel, checked against its reference, then timed beside its rivals
    python benchmark.py --mode context         a million tokens through a model; the longest context of one block
    python benchmark.py --mode decode          tokens per second after 8k, 128k and 1M tokens of context
    python benchmark.py --mode all             all of these
    python benchmark.py --mode all --tiny      the same in seconds on a CPU, as on every machine without CUDA

Models: hspmn; dense, LlamaDecoderLayer of transformers with SDPA; gdn, GatedDeltaNet of flash-linear-attention, if it
is installed, between the norms and SwiGLU of dense; floor, what no block with these projections can beat by much: its
GEMMs alone on random data, and the least bytes of everything between them at the measured copy rate. Every model runs
in the same process and dtype. The routing bias is set so that the load on the random input is `sparsity_k`.
floor_ratio is the floor's time over the measured one, so 1 is the best; flops of gdn counts its GEMMs alone.

Results go to one file per mode, saved after every case; later runs replace cases of the same name. B batch, S and T
tokens, K routed tokens, H query heads, G key/value heads, E head width, D hidden size.
"""

import argparse
import importlib
import math
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent
PACKAGE = __package__ or "hspmn_checkout"
if not __package__:  # run as a script: a package of the checkout, whose files import each other by relative names
    sys.modules[PACKAGE] = ModuleType(PACKAGE)
    sys.modules[PACKAGE].__path__ = [str(ROOT)]

blocks, common, context, kernels = (
    importlib.import_module(f"{PACKAGE}.benchmark_{part}") for part in ("blocks", "common", "context", "kernels")
)
Shape = common.Shape
evaluate = importlib.import_module(f"{PACKAGE}.evaluate")

CASES = {
    "throughput": blocks.throughput_cases, "latency": blocks.latency_cases, "train": blocks.train_cases,
    "kernels": kernels.kernels_cases, "context": context.context_cases, "decode": context.decode_cases,
}  # fmt: skip


class Runner:
    """Runs cases one by one within the time budget, saves what each measured, and prints the tables last.

    A case that fails is reported with its traceback and does not stop the others; `failed` counts them.
    """

    def __init__(self, args):
        """Start the clock."""
        self.args, self.begun, self.rows, self.failed = args, time.monotonic(), {}, 0
        # a log has no width of its own
        self.console = Console(width=None if sys.stdout.isatty() else 160)

    def run(self, modes):
        """Run all cases of `modes`."""
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        cases = [(mode, name, call) for mode in modes for name, call in CASES[mode](self.args)]
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=len(cases))
            for mode, name, call in cases:
                progress.update(task, description=f"{mode} {name}")
                metrics = self.attempt(f"{mode} {name}", call)
                if metrics:
                    self.save(mode, [evaluate.row(name, metric, value) for metric, value in metrics.items()])
                common.free_memory(self.args)
                progress.advance(task)

    def attempt(self, name, call):
        """What a case measured, or None if it did not run to its end."""
        spent = time.monotonic() - self.begun
        try:
            if self.args.time_budget and spent > self.args.time_budget:
                raise common.LeftOut(f"{spent:.0f} s of {self.args.time_budget:.0f} s are spent")
            metrics = call()
            self.say(f"{name}: {summary(metrics)} ({time.monotonic() - self.begun - spent:.0f} s)")
            return metrics
        except common.LeftOut as reason:
            self.say(f"{name}: left out, {reason}")
        except torch.OutOfMemoryError as error:
            self.say(f"{name}: left out, {str(error).splitlines()[0]}")
        except Exception:  # whatever it is, it is shown, counted, and must not cost the cases after it
            self.failed += 1
            self.say(f"{name}: FAILED\n{traceback.format_exc()}", style="red")
        return None

    def say(self, text, style=None):
        """Print above the progress bar, at once, so that a log can be followed."""
        self.console.print(text, style=style, markup=False, highlight=False)
        self.console.file.flush()

    def save(self, mode, rows):
        """Keep the rows of one case, and write them if there is an output folder."""
        self.rows.setdefault(mode, []).extend(rows)
        if self.args.output is not None:
            evaluate.merge_results(self.args.output / f"{mode}.json", rows, {}, self.args)

    def print_tables(self):
        """One table per mode: a line per case, a column per metric."""
        for mode, rows in self.rows.items():
            metrics = list(dict.fromkeys(row["metric"] for row in rows))
            table = Table("case", title=f"{mode}: {device_name(self.args)}")
            for metric in metrics:
                table.add_column(metric, justify="right")
            values = {(row["case"], row["metric"]): row["value"] for row in rows}
            for case in dict.fromkeys(row["case"] for row in rows):
                table.add_row(case, *(number(values.get((case, metric))) for metric in metrics))
            self.console.print(table)


def number(value):
    """A value in few characters."""
    if value is None:
        return "-"
    if isinstance(value, int) and abs(value) < 1e9:
        return f"{value:,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def summary(metrics):
    """The first metrics of a case in one line."""
    return " ".join(f"{metric} {number(value)}" for metric, value in list(metrics.items())[:4])


def device_name(args):
    """The device that is measured."""
    return torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"


TINY = {
    "hidden_size": 64, "intermediate_size": 96, "model_intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "layers": 2, "sliding_window": 8, "reps": 3,
    "shapes": [Shape(2, 64)], "kernel_shapes": [Shape(2, 70)], "sqsk_shapes": [Shape(2, 40)],
    "chunk": 64, "context_tokens": 256, "new_tokens": 4, "block_tokens": 256, "block_most_tokens": 4096,
    "memory_gb": 2e-4, "contexts": [64, 128], "batches": [1, 2], "device": "cpu", "compile": "eager",
}  # fmt: skip


def parse_shape(text):
    """A `Shape` from a text such as "64x4096"; raises ArgumentTypeError for others."""
    B, cross, S = text.partition("x")
    if not (cross and B.isdigit() and S.isdigit() and int(B) and int(S)):
        raise argparse.ArgumentTypeError(f"expected BATCHxTOKENS such as 64x4096, got {text!r}")
    return Shape(int(B), int(S))


def make_parser():
    """Arguments; every default is the setting of the committed measurement."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--mode", required=True, choices=(*CASES, "all"))
    add("--models", nargs="+", choices=blocks.MODELS, default=list(blocks.MODELS), help="all but kernels and context")
    add("--shapes", nargs="+", type=parse_shape, metavar="BxS", help="throughput, latency, train: such as 64x4096")
    add("--output", type=Path, help="folder of the results; benchmarks/results on cuda, none on cpu")
    add("--time_budget", type=float, default=0.0, help="seconds after which no case is started; 0 for no limit")
    add("--reps", type=int, default=20, help=f"timed calls per case; five if one takes {common.SLOW_MS / 1e3} s")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of HSPMNConfig, such as backend=flex")
    add("--hidden_size", type=int, default=2048)
    add("--num_attention_heads", type=int, default=16)
    add("--num_key_value_heads", type=int, default=4)
    add("--head_dim", type=int, default=128)
    add("--intermediate_size", type=int, default=8192, help="of one block")
    add("--sparsity_k", type=float, default=0.2, help="share of routed tokens")
    add("--sliding_window", type=int, default=128, help="tokens of the local attention, at least 1")
    add("--kernel_shapes", nargs="+", type=parse_shape, default=[Shape(64, 4096)], metavar="BxT", help="kernels")
    add("--sqsk_shapes", nargs="+", type=parse_shape, metavar="BxK", help="kernels: compacted rows",
        default=[Shape(64, 820), Shape(8, 6554), Shape(1, 67175)])  # fmt: skip
    add("--layers", type=int, default=24, help="context, decode: layers of the whole model")
    add("--model_intermediate_size", type=int, default=6912, help="context, decode: 1.3 B parameters in all")
    add("--vocab_size", type=int, default=16384)
    add("--chunk", type=int, default=65536, help="context, decode: tokens read at once")
    add("--context_tokens", type=int, default=1048576, help="context: tokens read by the whole model")
    add("--new_tokens", type=int, default=128, help="context: tokens generated after them")
    add("--memory_gb", type=float, default=30.24, help="context: memory budget of the block, 10^9 bytes")
    add("--block_tokens", type=int, default=4194304, help="context: first length tried with the block")
    add("--block_most_tokens", type=int, default=8388608, help="context: length at which the search stops")
    add("--contexts", type=int, nargs="+", default=[8192, 131072, 1048576], help="decode: tokens of context")
    add("--batches", type=int, nargs="+", default=[1, 8], help="decode: rows")
    add("--device", help="cuda or cpu; cuda where there is one")
    add("--compile", choices=("inductor", "eager", "none"), default="inductor", help="backend of torch.compile")
    add("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser


def check_arguments(args):
    """Fill in what depends on the machine; raises ValueError for numbers that make no sense."""
    least = ("reps", "chunk", "context_tokens", "layers", "block_tokens", "block_most_tokens", "sliding_window")
    for field, value in ((field, getattr(args, field)) for field in least):
        if value < 1:
            raise ValueError(f"--{field} must be at least 1, got {value}")
    if args.reps > 64:
        raise ValueError(f"--reps must be at most 64, got {args.reps}: decoding steps fill a cache with room for more")
    if not 0.0 < args.sparsity_k <= 1.0:
        raise ValueError(f"--sparsity_k must lie in (0, 1], got {args.sparsity_k}; use a share such as 0.2")
    for field in ("block_tokens", "block_most_tokens"):
        if getattr(args, field) % args.chunk:
            nearest = math.ceil(getattr(args, field) / args.chunk) * args.chunk
            raise ValueError(f"--{field} must be a multiple of --chunk ({args.chunk}); use {nearest}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    if args.output is None and args.device.type == "cuda" and not args.tiny:
        args.output = ROOT / "benchmarks" / "results"
    common.hspmn_config(args, args.layers, args.model_intermediate_size)  # names a wrong --set before anything runs


def parse_arguments(argv=None):
    """Checked arguments; small sizes where they are asked for or there is no CUDA."""
    parser = make_parser()
    if not torch.cuda.is_available() or "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    args.command = evaluate.recorded_command(parser, args)
    check_arguments(args)
    return args


def main(argv=None):
    """Run the cases of one mode or all; returns 1 if any failed."""
    args = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: small sizes on the CPU with the reference backend; these are not results")
    transformers.utils.logging.disable_progress_bar()
    runner = Runner(args)
    runner.run(CASES if args.mode == "all" else [args.mode])
    runner.print_tables()
    return int(runner.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
