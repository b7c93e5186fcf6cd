"""What the scripts share: command lines that refuse bad input in one line, and files of results."""

import argparse
import difflib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers import __version__ as transformers_version

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "benchmarks" / "results"
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)  # the first is the default of --device
PEAK_TFLOPS = {  # dense bf16 products with float32 sums, of the data sheets; a device of another name has no MFU
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA B200": 2250, "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 5090": 209,
}  # fmt: skip
KEPT_OUT_OF_COMMAND = ("folder", "output", "data_cache", "checkpoints", "help")  # paths of one machine


def complain(message):
    """One line on standard error."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)


class RefusedByWorker(Exception):
    """What `refuse` raises in a process of a data loader, whose batches would be lost with it."""


def refuse(message, code=2):
    """End the program with an exit code and one line on standard error: the flag, its value and the way out."""
    complain(message)
    raise SystemExit(code) if torch.utils.data.get_worker_info() is None else RefusedByWorker(message)


@contextmanager
def refusing(*more):
    """What libraries raise about a user's input, and errors of `more` kinds, end the program in one line."""
    try:
        yield
    except (ImportError, OSError, OverflowError, StrictDataclassError, ValueError, *more) as error:
        refuse(error)


def check_name(flag, name, known):
    """Refuse a name that is not among the known ones; the two closest are proposed."""
    if name not in known:
        closest = difflib.get_close_matches(name, known, 2, 0.0)
        refuse(f"{flag} {name} is unknown; did you mean {' or '.join(closest)}?")


def parse_overrides(flag, items):
    """Fields and values from texts such as "sliding_window=64"; values are JSON, or text if they are not."""
    fields = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            refuse(f"{flag} {item}: expected key=value, such as sliding_window=64")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value
    return fields


def config_with(fields, flag="--set", source=ROOT):
    """The `HSPMNConfig` of this checkout, or of the model saved at `source`, with other values; refuses wrong ones."""
    with refusing(TypeError):
        config = AutoConfig.from_pretrained(source, trust_remote_code=True)
        for field, value in fields.items():
            check_name(flag, field, config.to_dict())
            whole = isinstance(value, int) and not isinstance(value, bool)
            setattr(config, field, float(value) if whole and isinstance(getattr(config, field), float) else value)
        config.validate()
    return config


@contextmanager
def loading(source):
    """Refuse in one line whatever `from_pretrained` raises within: the files of `source` are damaged or foreign."""
    try:
        yield
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        refuse(f"{source} cannot be loaded, {type(error).__name__}: {reason}")


def at_least(least, kind=int, most=2**40):
    """An argparse type: numbers of `kind` from `least` to `most`, both finite."""

    def number(text):
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a number ({kind.__name__}), got {text!r}") from error
        if not least <= value <= most:  # nan is not
            raise argparse.ArgumentTypeError(f"must be at least {least} and at most {most}, got {text}")
        return value

    return number


SEED = at_least(0, most=2**32 - 1)
SHARE = at_least(0.0, float, 1.0)
RATE = at_least(1e-12, float, 1e6)  # of learning, and deviations of weights


def is_plain(name):
    """Whether a name makes a file in the folder it is written to, and nowhere else."""
    fits = name.isprintable() and not set("/\\") & set(name) and len(name.encode()) <= 200
    return fits and name.strip() not in ("", ".", "..")


def file_name(text):
    """An argparse type: a plain name."""
    if not is_plain(text):
        raise argparse.ArgumentTypeError(f"must be a plain name of 200 bytes at most, without folders, got {text!r}")
    return text


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line and whose arguments hold the command that gives them."""

    def __init__(self, prog, description):
        raw = argparse.RawTextHelpFormatter
        super().__init__(prog, description=description, formatter_class=raw, allow_abbrev=False)

    error = staticmethod(refuse)

    def parse(self, argv, small):
        """Arguments of `argv` (None: the command line), `small` as defaults with `--tiny`, and their `command`."""
        if "--tiny" in (sys.argv[1:] if argv is None else argv):
            self.set_defaults(**small)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            check_name("argument", unknown[0].split("=")[0], self._option_string_actions)
        words = ["python", self.prog]
        for action in self._actions:
            value, shown = getattr(args, action.dest, None), action.dest not in KEPT_OUT_OF_COMMAND
            if shown and action.option_strings and value != action.default:
                words.append(action.option_strings[0])
                words += [] if value is True else map(str, value if isinstance(value, list) else [value])
        args.command = shlex.join(words)
        return args


def low_precision(device):
    """bfloat16 autocast on CUDA, nothing on CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def row(case, metric, value):
    """One number of a results file."""
    return {"case": case, "metric": metric, "value": value}


def code_hash():
    """Hash of the files that define the model, equal in every copy of the same checkout."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*_hspmn.py"), ROOT / "config.json"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def results_header(name, command):
    """Name, command, date, device, versions and commit: the first fields of every results file."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers_version}
    if importlib.util.find_spec("triton") is not None:
        versions["triton"] = importlib.metadata.version("triton")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "name": name, "command": command, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": device, "versions": versions, "commit": commit or None, "code": code_hash(),
    }  # fmt: skip


def write_json(path, document):
    """Write a results file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def read_results(path, needed=()):
    """The results file at `path`, one without rows if there is none yet; refuses a file that is something else."""
    if not os.path.lexists(path):
        return {"rows": []}
    try:
        old = json.loads(path.read_text("utf-8"))
        if lost := [key for key in ("rows", *needed) if not isinstance(old.get(key), list | dict | str)]:
            raise ValueError(f"it has no {lost[0]}")
        if not all({"case", "metric", "value"} <= item.keys() for item in old["rows"]):
            raise ValueError("its rows lack case, metric or value")
        if not isinstance(old.get("grids", {}), dict):
            raise ValueError("its grids are no object")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = f"is no results file ({type(error).__name__}: {error})"
        refuse(f"--output: {path} {problem}; move it away, or choose another --name or --output")
    return old


def check_folder(flag, folder):
    """Refuse, before any work, a folder that could not be written to."""
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        refuse(f"{flag} {folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        refuse(f"{flag} {folder}: {there} cannot be written to; name another folder")


def check_saved(folder, *names):
    """Refuse, before any work, a folder that lacks one of the files of a saved model."""
    for name in names:
        if not os.path.isfile(folder / name):
            refuse(f"folder {folder} holds no {name}; give that of a saved model")


def check_output(path, needed=()):
    """Refuse, before any work, a results file that could not be written or added to."""
    check_folder("--output", path.parent)
    read_results(path, needed)


@contextmanager
def held(folder):
    """Keep a folder, made if it is missing, from other processes that ask for it in this way."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def merge_results(path, rows, extra, command):
    """Write rows to a results file; rows and entries of `extra` replace earlier ones of the same name. Refuses what is
    not finite: it is no result. `commands` are those that its rows are of, where it holds earlier ones."""
    for item in rows:
        if not math.isfinite(value := item["value"]):
            refuse(f"{item['metric']} of {item['case']} is {value}, which is no result: {path} is left as it was")
    old = read_results(path)
    new = {(item["case"], item["metric"]) for item in rows}
    kept = [item for item in old["rows"] if (item["case"], item["metric"]) not in new]
    merged = {key: old.get(key, {}) | value for key, value in extra.items()}
    if kept:
        merged["commands"] = list(dict.fromkeys([*old.get("commands", [old.get("command", "")]), command]))
    write_json(path, results_header(path.stem, command) | merged | {"rows": kept + rows})


def new_figure(width, height):
    """A matplotlib figure and its axes, or two None with a notice where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return None, None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()
