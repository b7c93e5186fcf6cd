"""The fault suite's long run: `python tests/faults/long_run.py --kills 200 --damaged 400 --flags 500`, a row for each.

Runs of train.py are killed at random moments and writes and resumed, files of checkpoints and models are damaged, and
random flags are given. Prints what was tried and what was right, and every case that was not; exit code 1 if any.
"""

import argparse
import random
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import torch

sys.modules["hspmn"] = ModuleType("hspmn")
sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parents[2])]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import forks  # noqa: E402
from hspmn import runs  # noqa: E402

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


WEIGHTS = "model.safetensors"
KINDS = {"kills": kills, "damaged": damaged, "flags": flags}


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
            count, bad = getattr(args, kind), []
            for case in check(count, texts, whole, folder, random.Random(args.seed)):
                print(case, file=sys.stderr)
                bad.append(case)
            print(f"| {kind} | {count} | {count - len(bad)} right |", flush=True)
            wrong += len(bad)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
