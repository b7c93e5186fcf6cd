"""The fault suite's long run, a row for each kind of fault:

    python tests/faults/long_run.py --kills 200 --damaged 400 --flags 500 --refusals 300 --numbers 200 --configs 2000

Runs of train.py are killed at random moments and writes and resumed, files of checkpoints and models are damaged,
random flags are given, runs are gone on with by others' flags or beside another process, numbers that are not finite
are put into them, and random configurations are built. Prints what was tried and what was right, and every case that
was not; exit code 1 if any.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType

import torch

sys.modules["hspmn"] = ModuleType("hspmn")
sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parents[2])]
sys.path.insert(0, str(Path(__file__).resolve().parent))

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import forks  # noqa: E402
import test_configuration  # noqa: E402
from hspmn import runs, train  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402

SAVE_STEPS, WRITES, SECONDS = 2, 110, 3.0  # of a run of `forks.arguments`: about as many writes, and as long


def kills(count, texts, whole, folder, rng):
    """A run killed one to three times and then finished has the weights of one that was not. Yields what is wrong."""
    for number in range(count):
        run = folder / f"kill{number}"
        argv = forks.arguments(texts, run, "--save_total_limit", rng.choice([1, 2]))
        for attempt in range(4):
            at, _ = runs.newest_whole(run)
            resume = ["--resume_from_checkpoint", "last"] if at else []
            begin = int(at.name[11:]) if at else 0
            if attempt == 3 or (attempt and rng.random() < 0.5):
                break
            by_write = rng.random() < 0.5
            prepare = forks.die_at_write(rng.randint(1, WRITES)) if by_write else None
            pid, output = forks.start(argv + resume, prepare)
            timer = threading.Timer(rng.uniform(0, SECONDS), forks.os.kill, (pid, forks.signal.SIGKILL))
            if not by_write:
                timer.start()
            code, text = forks.finish(pid, output)
            timer.cancel()
            after, _ = runs.newest_whole(run)
            done, kept = begin + text.count("{'loss'"), int(after.name[11:]) if after else 0
            if code not in (0, -9) or done - kept > SAVE_STEPS:
                yield f"kill {number}: exit code {code}, {kept} of {done} steps kept; {forks.last_line(text)}"
        code, text = forks.run(argv + resume)
        if code or runs.damage(run) or runs.digest(run / WEIGHTS) != runs.digest(whole / WEIGHTS):
            yield f"kill {number}: ends with exit code {code}, {runs.damage(run)}; {forks.last_line(text)}"
        shutil.rmtree(run)


def damaged(count, texts, whole, folder, rng):
    """A file that is cut, flipped, emptied or removed is named, or the run ends as it would have without it."""
    run = shutil.copytree(whole, folder / "damaged")
    for name in runs.CARD_FILES[1:]:
        (run / name).unlink()
    model = shutil.copytree(whole, folder / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    checkpoint = sorted(path for path in (run / "checkpoint-4").iterdir())
    for number in range(count):
        resumed = rng.random() < 0.7
        path = rng.choice(checkpoint) if resumed else model / WEIGHTS
        data, kind = path.read_bytes(), rng.choice(["cut", "flip", "empty", "remove"])
        place = rng.randrange(len(data))
        bad = {
            "cut": data[:place],
            "flip": data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :],
        }
        path.write_bytes(bad.get(kind, b""))
        if kind == "remove":
            path.unlink()
        more = ["--resume_from_checkpoint", run / "checkpoint-4"] if resumed else ["--model_name_or_path", model]
        target = run if resumed else folder / "tuned"
        flags = forks.arguments(texts, target, "--save_total_limit", 3)
        flags = flags if resumed else flags[flags.index("--seq_len") :]
        flags = [*flags, *map(str, more)]
        if not resumed:  # the tokenizer is the model's
            at = flags.index("--vocab_size")
            del flags[at : at + 2]
        code, text = forks.run(flags)
        named = code == 2 and "Traceback" not in text and (path.name in text or str(path.parent) in text)
        harmless = code == 0 and resumed and runs.digest(run / WEIGHTS) == runs.digest(whole / WEIGHTS)
        if not (named or harmless):
            yield f"damage {number}: {kind} {path.name} at {place}: exit code {code}; {forks.last_line(text)}"
        path.write_bytes(data)
        if code == 0:
            shutil.rmtree(target)
            if resumed:
                shutil.copytree(whole, run)
                for name in runs.CARD_FILES[1:]:
                    (run / name).unlink()


def flags(count, texts, whole, folder, rng):
    """Random flags with odd values end in training, or in one line."""
    for number in range(count):
        more = [f"{rng.choice(forks.FUZZED)}={rng.choice(forks.NUMBERS)}" for _ in range(rng.randint(1, 3))]
        code, text = forks.run(forks.arguments(texts, folder / "flags", *more, "--steps", 1))
        if not forks.ended_well(code, text):
            yield f"flags {number}: {' '.join(more)}: exit code {code}; {forks.last_line(text)}"
        shutil.rmtree(folder / "flags", ignore_errors=True)


def other_flags(record, rng):
    """One or two flags of a run's record with other values than they have there, as words, and their names."""
    values = {name: value for name, value in record.items() if isinstance(value, int | float)}
    names = rng.sample(sorted(values.keys() - {"num_processes", "enable_jit_checkpoint"}), rng.choice([1, 2]))
    words = []
    for name in names:
        value, more = values[name], rng.randint(1, 3)
        more /= 1 if isinstance(value, int) else 1000
        words.append(f"--{name}={not value if isinstance(value, bool) else type(value)(value + more)}")
    return words, names


def refusals(count, texts, whole, folder, rng):
    """Other flags, a run in another's folder and a second process are refused by name, and change no file."""
    record = runs.read_json(whole / runs.SEAL)["flags"]
    other, busy, resume = folder / "other", folder / "busy", "--resume_from_checkpoint"
    code, text = forks.run(forks.arguments(texts, other, "--seed", 7))
    assert code == 0, text
    pid, output = forks.start(forks.arguments(texts, busy, "--steps", 10**6, "--save_steps", 1))
    while runs.newest_whole(busy)[0] is None:
        time.sleep(0.1)
    forks.os.kill(pid, forks.signal.SIGSTOP)  # it keeps its lock
    ways = {  # the folder, what is given beside the flags, and what the line says
        "other flags": (whole, [resume, rng.choice(["last", whole / "checkpoint-4"])], "was made with"),
        "a new run": (whole, [], "of an earlier run"),
        "another's checkpoint": (whole, ["--seed", 7, resume, other / "checkpoint-4"], "of another run"),
        "a second process": (busy, rng.choice([[], [resume, "last"]]), "another process is training there"),
    }
    for number in range(count):
        way = rng.choice(sorted(ways))
        run, more, words = ways[way]
        others, names = other_flags(record, rng) if way != "another's checkpoint" else ([], [])
        before = forks.contents(run)
        code, text = forks.run(forks.arguments(texts, run, *more, *others))
        line = forks.last_line(text)
        named = words in line and (way != "other flags" or all(f"--{name} " in line for name in names))
        invalid = any(name.partition("_")[0] in line for name in names)  # before the folder is looked at
        if code != 2 or "Traceback" in text or not (named or invalid) or forks.contents(run) != before:
            yield f"refusal {number}: {way} {' '.join(others)}: exit code {code}; {line}"
    forks.os.kill(pid, forks.signal.SIGKILL)
    forks.finish(pid, output)
    code, text = forks.run(forks.arguments(texts, busy, resume, "last", "--accept_changes", "--steps", 1))
    if code:  # a dead process keeps no lock
        yield f"refusals: after the second process has died, exit code {code}; {forks.last_line(text)}"


def numbers(count, texts, whole, folder, rng):
    """A loss, gradient, weight or bias that is not finite ends the run at its step, and no file ever holds it."""
    sizes = {name: tensor.numel() for name, tensor in forks.load_file(whole / WEIGHTS).items()}
    for number in range(count):
        run, kind, step = folder / "numbers", rng.choice(["loss", "gradient", "weight", "bias"]), rng.randint(1, 6)
        name = rng.choice(sorted(name for name in sizes if name.endswith("router.bias") == (kind == "bias")))
        value = rng.choice([torch.nan, torch.inf, -torch.inf])
        case = kind if kind in ("loss", "gradient") else "tensor", name, rng.randrange(sizes[name]), value, step
        save_steps = rng.choice([1, 2])

        def prepare(case=case):
            train.AnnealingCallback = forks.poisoned(*case)

        code, text = forks.run(forks.arguments(texts, run, "--save_steps", save_steps), prepare)
        bad, (kept, _) = forks.not_finite(run), runs.newest_whole(run)
        last = (step - 1) // save_steps * save_steps
        stopped = code == 1 and f"step {step}: " in forks.last_line(text) and "Traceback" not in text
        if bad or not stopped or (kept is None) != (last == 0) or kept and kept.name != f"checkpoint-{last}":
            yield f"numbers {number}: {case}: exit code {code}, keeps {kept}, spoils {bad}; {forks.last_line(text)}"
        shutil.rmtree(run, ignore_errors=True)


def configs(count, texts, whole, folder, rng):
    """Random fields are refused by name, or make a model whose numbers are finite forward and backward."""
    bad, tried = [], 0

    @seed(rng.randrange(2**32))
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(test_configuration.fields_of_a_config())
    def check(fields):
        nonlocal tried
        tried += 1
        try:
            test_configuration.check_fields(fields)
        except Exception as error:
            bad.append(f"config {fields}: {error!r}")

    logging.disable()  # of settings that a kind of RoPE has no use for, and of overflow
    check()
    logging.disable(logging.NOTSET)
    yield from bad
    if tried < count:
        yield f"configs: only {tried} were tried"


WEIGHTS = "model.safetensors"
KINDS = {
    "kills": kills, "damaged": damaged, "flags": flags, "refusals": refusals, "numbers": numbers, "configs": configs,
}  # fmt: skip


def main():
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args, wrong = parser.parse_args(), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        texts, whole = forks.write_texts(folder / "texts"), folder / "whole"
        code, text = forks.run(forks.arguments(texts, whole, "--save_total_limit", 3))
        assert code == 0, text
        for kind, check in KINDS.items():
            if not (count := getattr(args, kind)):
                continue
            bad = []
            for case in check(count, texts, whole, folder, random.Random(args.seed)):
                print(case, file=sys.stderr)
                bad.append(case)
            print(f"| {kind} | {count} | {count - len(bad)} right |", flush=True)
            wrong += len(bad)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
