"""Training runs in forked children, which share what was imported and can be killed, and the texts they read."""

import os
import signal
import sys
import tempfile
import traceback

from hspmn import train
from safetensors.torch import load_file

AnnealingCallback = train.AnnealingCallback  # `poisoned` ones take its place

FLAGS = (
    "--dim 32 --layers 2 --head_dim 16 --seq_len 32 --batch 4 --vocab_size 300 --validation_blocks 4 --logging_steps 1"
    " --baseline_tokens 0 --use_cpu --disable_tqdm true --steps 6 --save_steps 2 --sample_tokens 4"
).split()


def write_texts(folder, files=4):
    """A folder of short texts to train on."""
    folder.mkdir(parents=True)
    for part in range(files):
        lines = (f"def function_{i % 7}(x):\n    return x + {i * part % 5}\n\n" for i in range(60))
        (folder / f"part{part}.txt").write_text("".join(lines))
    return folder


def arguments(texts, folder, *more):
    """A command line of a small run on `texts` into `folder`."""
    return [*FLAGS, "--dataset", str(texts), "--output_dir", str(folder), *map(str, more)]


def start(argv, prepare=None):
    """A forked child that runs `prepare()` and the command line; (its pid, the file of what it prints)."""
    output = tempfile.TemporaryFile()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid, output
    code = 70
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        if prepare is not None:
            prepare()
        train.main(argv)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(pid, output):
    """Exit code of a child, negative for the signal that ended it, and what it printed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output.seek(0)
    return code, output.read().decode(errors="replace")


def run(argv, prepare=None):
    """Exit code (70 for a traceback) and output of a command line in a child."""
    return finish(*start(argv, prepare))


def die_at_write(number):
    """What `prepare` may be: the child kills itself at its `number`th change of a file below a checkpoint or model."""
    seen = 0

    def count(event, details):
        nonlocal seen
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        changes |= event == "open" and isinstance(details[1], str) and not details[1].startswith("r")
        if changes and any(part in str(details[0]) for part in ("/checkpoint-", "/model.partial", "/run.json")):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(count)


def poisoned(kind, name, place, value, step):
    """`train.AnnealingCallback` that puts `value`, NaN or infinite, into a model as `step` begins: into its "loss",
    the "gradient" of the parameter `name`, or at `place` of the "tensor" of that name."""

    class Poisoned(AnnealingCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            super().on_step_begin(args, state, control, model, **kwargs)
            if state.global_step != step - 1:
                return
            if kind == "loss":
                model.register_forward_hook(lambda model, _, out: out.__setitem__("loss", out["loss"] * value))
            elif kind == "gradient":
                model.get_parameter(name).register_hook(lambda grad: grad * value)
            else:
                model.state_dict()[name].view(-1)[place] = value

    return Poisoned


def not_finite(folder):
    """The first file of weights below a folder that holds a number that is not finite, or None."""
    for path in sorted(folder.rglob("*.safetensors")):
        if not all(tensor.isfinite().all() for tensor in load_file(path).values()):
            return path


def contents(folder):
    """Every file of a folder with its content and time of change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def last_line(text):
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


NUMBERS = ("-1", "0", "1", "3", "0.5", "nan", "inf", "1e300", "4294967296", "nope", "true", "", "{}", '{"a": 1}')
SKIPPED = {"help", "output_dir", "dataset", "push_to_hub", "enable_jit_checkpoint"}  # and what compiles, which is slow
FUZZED = sorted(
    action.option_strings[0]
    for action in train.make_parser()._actions
    if action.dest not in SKIPPED and not action.dest.startswith("torch_compile")
)


def ended_well(code, text):
    """Whether a run was trained, or was refused or stopped in words of the program's own."""
    return code == 0 or (code in (1, 2) and "Traceback" not in text and ": " in last_line(text))
