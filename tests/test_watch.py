"""watch.py: what it says of a line is what the model says, every line is judged once whatever happens to the log or to
the process, and bad input is one line."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hspmn import watch
from hspmn.tokens import fit_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

LINES = [f"10:{i // 60:02}:{i % 60:02} web{i % 3:02} GET /{'abc'[i % 3]} status={200 + i % 7}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A saved model with a tokenizer of little more than bytes."""
    folder, tokenizer = tmp_path_factory.mktemp("saved") / "model", fit_tokenizer(LINES, 280)
    tiny_model(vocab_size=len(tokenizer), sliding_window=16, head_dim=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def call(folder, tmp_path):
    """Function from further arguments to exit code and judged lines, of the log `tmp_path / "a.log"` by default."""

    def run(*arguments, file=tmp_path / "a.log"):
        out = tmp_path / "out"
        fixed = ["--json", "--dtype", "float32", "-o"]
        code = watch.main([str(folder), str(file), *fixed, str(out), *map(str, arguments)])
        return code, [json.loads(line) for line in out.read_text().splitlines()]

    return run


@torch.no_grad()
def expected(folder, lines):
    """Surprise and routing of lines that are read as one text."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)([f"{line}\n" for line in lines])["input_ids"]
    flat = torch.tensor([sum(ids, [])])
    outputs, losses = model(flat, use_cache=False), torch.zeros(flat.shape[1])
    losses[1:] = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], flat[0, 1:], reduction="none")
    scores = outputs.router_scores[[0, 2], 0].mean(0)
    return [[part.mean().item() for part in each.split([*map(len, ids)])] for each in (losses, scores)]


@pytest.mark.parametrize("size", [4, 64, 1000])
def test_a_line_is_judged_by_its_own_tokens_however_it_is_read(call, folder, tmp_path, size):
    (tmp_path / "a.log").write_text("".join(f"{line}\n" for line in LINES))
    code, found = call("--block", size, "--max_slots", 4000)
    assert code == 0 and [each["text"] for each in found] == LINES
    assert [each["line"] for each in found] == [*range(1, 61)]
    for name, want in zip(watch.NUMBERS, expected(folder, LINES), strict=True):
        torch.testing.assert_close([each[name] for each in found], want, rtol=0, atol=2e-3)


def test_blocks_are_full_and_know_where_in_the_log_they_end(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "READ", 300)
    log, backend = tmp_path / "a.log", AutoTokenizer.from_pretrained(folder).backend_tokenizer
    log.write_text("".join(f"{line}\n" for line in LINES))
    found = [each for each in watch.blocks(watch.Log(log), backend, 100) if each is not None]
    assert [text for each in found for text in each.texts] == LINES
    for i, each in enumerate(found):
        written = sum(len(text) + 1 for before in found[: i + 1] for text in before.texts)
        assert each.place["offset"] == written and len(each.ids) == each.lengths.sum() <= 100
        assert backend.decode(each.ids) == "".join(f"{text}\n" for text in each.texts)
        assert i + 1 == len(found) or len(each.ids) + found[i + 1].lengths[0] > 100


def test_a_number_is_marked_by_how_far_it_is_above_what_is_usual():
    usual, draw = watch.Usual(), torch.Generator().manual_seed(0)
    numbers = (3 + 0.5 * torch.randn(watch.WARM + 900, generator=draw)).tolist()
    above = usual.judge(numbers[:50], 5.0) + usual.judge(numbers[50:], 5.0)
    assert above[: watch.WARM] == [0.0] * watch.WARM and max(above) < 5
    assert abs(usual.mean - 3) < 0.1 and abs(usual.variance - 0.25) < 0.03
    assert 9 < usual.judge([8.0], 5.0)[0] < 11 and abs(usual.mean - 3) < 0.1  # it stands out, and hardly counts itself
    alike = watch.Usual()
    assert {*alike.judge([1.0] * 200, 5.0)} == {0.0} and alike.judge([1.01], 5.0)[0] < 1


def test_only_marked_lines_are_written_on_request(call, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "WARM", 10)
    odd = '~~~~ "\\n" \x1b[2J \u20ac ~~~~'
    (tmp_path / "a.log").write_text("".join(f"{line}\n" for line in [*LINES, odd]))
    every = call("--threshold", 0.5)[1]
    (tmp_path / "out").unlink()
    marked = call("--threshold", 0.5, "--marked")[1]
    assert every[-1]["text"] == odd and 0 < len(marked) < 61 and marked == [each for each in every if each["marked"]]
    for each in every:
        assert each["marked"] == [name for name in watch.NUMBERS if each[f"{name}_z"] > 0.5]


def following(tmp_path, steps):
    """A thread that changes the log, each time waits until so many lines are out, and ends the program by Ctrl-C."""

    def work():
        for change, lines in steps:
            change()
            until = time.monotonic() + 20
            while time.monotonic() < until and len((tmp_path / "out").read_bytes().splitlines()) < lines:
                time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "out").touch()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()


def test_a_log_is_followed_through_rotation_truncation_and_broken_bytes(call, tmp_path):
    log, state = tmp_path / "a.log", tmp_path / "state"
    log.write_bytes(b"first\nsecond\r\n\nhal")

    def append(data):
        with open(log, "ab") as file:
            file.write(data)

    def rotate():
        log.rename(tmp_path / "a.log.1")
        with open(tmp_path / "a.log.1", "ab") as old:  # by a writer that has not noticed yet
            old.write(b"late\nunended")
        log.write_bytes(b"new\n")

    def truncate():
        log.write_bytes(b"t\n")

    def begin():
        append(b"x" * 99)
        time.sleep(0.5)  # it is read by then

    following(tmp_path, [
        (lambda: None, 3), (lambda: append(b"f\nbro\xffken \xe6\x97\n"), 5), (rotate, 8), (begin, 8), (truncate, 10),
        (lambda: append(b"kept"), 10),
    ])  # fmt: skip
    code, found = call("--follow", "--state", state)
    assert code == 130 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    texts = ["first", "second", "", "half", "bro\ufffdken \ufffd", "late", "unended", "new", "x" * 99, "t"]
    assert [each["text"] for each in found] == texts
    append(b" back\n")
    assert call("--state", state)[1][-1] | {"text": "kept back", "line": 11} == call("--state", state)[1][-1]


def test_a_line_without_end_is_read_in_parts(call, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LONGEST", 300)
    monkeypatch.setattr(watch, "READ", 100)
    (tmp_path / "a.log").write_bytes(b"a" * 700 + b"\nb\n")
    assert [each["text"] for each in call("--block", 50)[1]] == ["a" * 300, "a" * 300, "a" * 100, "b"]


def test_a_process_that_is_killed_goes_on_where_it_was(call, folder, tmp_path):
    log, out, state = tmp_path / "a.log", tmp_path / "out", tmp_path / "state"
    log.write_text("".join(f"{line}\n" for line in LINES))
    options = ["--block", "60", "--max_slots", "100", "--dtype", "float32", "--state", str(state)]
    command = [sys.executable, watch.__file__, str(folder), str(log), "--json", "-o", str(out), "--follow", *options]
    with subprocess.Popen([*command, "--save_every", "0"], env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        until = time.monotonic() + 120
        while not (state.exists() and len(out.read_bytes().splitlines()) > 9) and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
    with open(out, "a") as file:
        file.write("written after the last state")
    log.rename(tmp_path / "a.log.1")  # while nobody looks
    log.write_text("after\n")
    code, found = call(*options)
    assert code == 0 and [(each["line"], each["text"]) for each in found] == [*enumerate([*LINES, "after"], 1)]
    out.unlink()
    log.write_text("".join(f"{line}\n" for line in [*LINES, "after"]))
    again = call(*options[:6])[1]
    for name in watch.NUMBERS:
        torch.testing.assert_close([x[name] for x in found], [x[name] for x in again], rtol=0, atol=2e-3)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_pipe_is_read_as_it_comes_and_no_control_character_gets_through(folder, monkeypatch, capfdbinary, terminal):
    monkeypatch.setattr(watch, "on_terminal", lambda: terminal)
    reads, writes = os.pipe()
    with open(reads, "rb") as stdin:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        os.write(writes, b"one\n\x1b]0;title\x07 two\n")
        threading.Timer(0.5, lambda: (os.write(writes, b"three"), os.close(writes))).start()
        assert watch.main([str(folder)]) == 0
    out, error = capfdbinary.readouterr()
    assert [line[17:] for line in out.decode().splitlines()] == ["one", "\ufffd]0;title\ufffd two", "three"]
    assert error.startswith(b"3 lines, ") and b" lines/s" in error and b" MiB of the process" in error


def test_numbers_that_are_not_finite_end_it(call, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.log").write_text("a line\n")
    monkeypatch.setattr(watch.Watcher, "_read", lambda *_: torch.full((7, 2), float("nan")))
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 2 and "not finite; try another --dtype" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["none.log"], "FILE none.log is no file; name a log, or - for standard input"),
    (["-", "--follow"], "--follow is of a file; standard input is read as it comes"),
    (["a.log", "--block", "90", "--max_slots", "80"], "--block 90 is more than --max_slots 80"),
    (["a.log", "--threshold", "nan"], "--threshold: must be at least 0"),
    (["a.log", "--state", "a.log"], "--state a.log does not fit"),
    (["a.log", "--state", "old", "--max_slots", "9", "--block", "9"], "made for max_slots=2048, this cache for 9"),
    (["a.log", "--state", "a.log/b"], "a.log is a file; name a folder"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")  # fmt: skip
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.log").write_text("a line\n")
    if "old" in arguments:
        watch.main([str(folder), "a.log", "--state", "old", "-o", "out"])
        capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        watch.main([str(folder), *arguments])
    assert error.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
