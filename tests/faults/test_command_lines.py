"""Command lines of evaluate.py, benchmark.py and benchmarks/: a mistake is one line, exit code 2, before the work."""

import json
from types import SimpleNamespace

import pytest
import torch
from hspmn import benchmark, evaluate, results, tokens
from hspmn.benchmarks import logs, mqar, quality, report
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8, "sparsity_k": 0.5,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A saved model with its tokenizer."""
    config = results.config_with(SIZES)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(tmp_path / "model")
    tokens.fit_tokenizer(["SECRET = some words"], 300).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(main, words, capsys):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


def evaluate_words(folder, task="loss"):
    return ["--tiny", "--task", task, folder, "--output", folder.parent / "out"]


def test_evaluate_gives_a_result_where_nothing_is_wrong(folder):
    assert evaluate.main(list(map(str, [*evaluate_words(folder), "--train_length", "64"]))) == 0
    assert (folder.parent / "out" / "loss.json").exists()


NUMBERS = ("-1", "0", "nan", "inf", "1e400", "1.5x", "", "99999999999999999999999")
COUNTS = ("batch_size", "train_length", "tokens", "depths", "samples", "prefill_chunk")
NAMES = ("", ".", "..", "../x", "a/b", "/tmp/x", "a\nb", "\0", "x" * 300)
REFUSED = [f"--{flag}={value}" for flag in COUNTS for value in (*NUMBERS, "1.5")]
REFUSED += [f"--multiples={value}" for value in NUMBERS]
REFUSED += [f"--{flag}={name}" for flag in ("name", "label") for name in NAMES]
REFUSED += ["--seed=-1", "--seed=4294967296", "--device=tpu", "--dtype=int8", "--task=los", "--sample=3", "word"]


def test_evaluate_refuses_senseless_values_by_flag(folder, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)  # a call would fail with a TypeError
    for word in REFUSED:
        line = refusal(evaluate.main, [*evaluate_words(folder), word], capsys)
        assert word.split("=")[0] in line, word
    assert not (folder.parent / "out").exists()


def write(path, content):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content)


WORK = (evaluate, "load"), (mqar, "build_model"), (quality, "prepare_data"), (logs, "run_all")
BROKEN_RESULTS = (b"", b"{", b"[]", b"5", b"{}", b'{"rows": [5]}', b'{"rows": [{"case": 1}]}', b"\xff", b"[" * 100_000)


@pytest.mark.parametrize("content", BROKEN_RESULTS)
def test_a_broken_results_file_is_refused_before_the_work_and_kept(content, folder, capsys, monkeypatch):
    out = folder.parent / "out"
    for module, name in (*WORK, (benchmark, "run")):
        monkeypatch.setattr(module, name, None)
    tiny = ["--tiny", "--output", out]
    commands = {
        "loss": (evaluate.main, evaluate_words(folder)), "needle": (evaluate.main, evaluate_words(folder, "needle")),
        "mqar": (mqar.main, tiny), "quality": (quality.main, tiny), "logs": (logs.main, tiny),
        "train": (benchmark.main, [*tiny, "--mode", "train"]), "decode": (benchmark.main, [*tiny, "--mode", "all"]),
    }  # fmt: skip
    for name, (main, words) in commands.items():
        write(out / f"{name}.json", content)
        assert f"{name}.json" in refusal(main, words, capsys)
        assert (out / f"{name}.json").read_bytes() == content
        (out / f"{name}.json").unlink()


def test_an_output_that_cannot_be_a_folder_is_refused(folder, capsys, monkeypatch):
    file = folder / "config.json"
    for module, name in (*WORK, (benchmark, "run")):
        monkeypatch.setattr(module, name, None)
    for out in (file, file / "inside", "/dev/null/x"):
        for main, words in ((evaluate.main, evaluate_words(folder)[:-2]), (mqar.main, ["--tiny"]),
                            (quality.main, ["--tiny"]), (logs.main, ["--tiny"]),
                            (benchmark.main, ["--tiny", "--mode", "train"])):  # fmt: skip
            line = refusal(main, [*words, "--output", out], capsys)
            assert f"--output {out}" in line and "is a file" in line


def spoil(folder, kind):
    """Damage the saved model."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if {"bias": "router.bias"}.get(kind, "qkv_proj") in name)
    if kind in ("nan", "bias"):
        weights[name].view(-1)[-1] = float("nan")
    if kind == "inf":
        weights[name].view(-1)[0] = float("inf")
    if kind == "missing":
        del weights[name]
    if kind == "unexpected":
        weights["model.layers.9.mlp.weight"] = torch.ones(2)
    if kind == "shape":
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, {"format": "pt"})
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "header":
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    for broken in ("config.json", "tokenizer.json"):
        if kind == broken:
            (folder / broken).write_text((folder / broken).read_text()[:200])
    if kind == "tokenizer":
        tokens.fit_tokenizer([f"many{i} words{i}" for i in range(999)], 900).save_pretrained(folder)


SPOILT = {
    "nan": "non-finite weights (", "bias": "router.bias", "inf": "non-finite", "missing": "1 missing weights",
    "unexpected": "1 unexpected weights", "shape": "1 mismatched weights", "cut": "cannot be loaded",
    "header": "cannot be loaded", "config.json": "cannot be loaded", "tokenizer.json": "cannot be loaded",
    "tokenizer": "do not belong together",
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_model_gives_no_result(kind, folder, capsys):
    spoil(folder, kind)
    write(folder.parent / "expected.pt", b"")  # of the task compare
    for task in evaluate.TASKS:
        line = refusal(evaluate.main, evaluate_words(folder, task), capsys)
        assert SPOILT[kind] in line and str(folder) in line
    assert not (folder.parent / "out").exists()


def test_results_that_are_not_finite_are_not_written(tmp_path, capsys):
    for value in (float("nan"), float("inf")):
        rows = [results.row("model", "val", value)]
        line = refusal(lambda words, rows=rows: results.merge_results(tmp_path / "a.json", rows, {}, ""), [], capsys)
        assert "val of model is" in line and not list(tmp_path.iterdir())


def test_evaluate_refuses_folders_that_are_none(folder, capsys):
    for word in ("", "/", "x" * 300, "a\0b", folder / "config.json", folder / "none"):
        assert "holds no " in refusal(evaluate.main, ["--tiny", "--task", "loss", word], capsys)
    assert "run --task verify" in refusal(evaluate.main, evaluate_words(folder, "compare"), capsys)
    config = json.loads((folder / "config.json").read_text()) | {"router_mode": "topk"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot generate" in refusal(evaluate.main, evaluate_words(folder, "needle"), capsys)


MQAR = ["--steps=0", "--lr=nan", "--lr=-1", "--lr=0", "--seed=-1", "--lengths=8", "--lengths=100000", "--name=../x",
        "--set=x", "--set=sliding_window=-1", "--step=3", "--lr=1e5"]  # fmt: skip
QUALITY = ["--lr=nan", "--lr=0", "--seeds=-1", "--time_budget=nan", "--time_budget=-1", "--needle_mix=nan",
           "--name=a/b", "--needle_mix=1", "--initializer_range=nan", "--initializer_range=-1", "--save=hspnm",
           "--parameter_tolerance=nan", "--variants=../x:sliding_window", "--num_attention_heads=3", "--length=1",
           "--num_key_value_heads=3", "--checkpoints=/dev/null/x",
           "--data_cache=/dev/null"]  # fmt: skip


@pytest.mark.parametrize("main, words", [(mqar.main, MQAR), (quality.main, QUALITY)], ids=["mqar", "quality"])
def test_comparisons_refuse_senseless_values_by_flag(main, words, tmp_path, capsys):
    for word in words:
        line = refusal(main, ["--tiny", "--output", tmp_path, "--models", "hspmn", word], capsys)
        assert word.split("=")[-2].strip("-").split("_")[-1] in line, word  # Llama's errors name no field
    assert not list(tmp_path.glob("*.json"))


def test_report_refuses_what_it_cannot_read(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"<!-- results:{name} -->\n<!-- /results -->" for name in report.SECTIONS))
    for content in (*BROKEN_RESULTS, b'{"rows": [], "versions": {}}'):
        write(tmp_path / "serve.json", content)
        assert "serve.json" in refusal(report.main, ["--pages", page, "--results", tmp_path], capsys)
    for words in (["--pages", tmp_path / "none.md"], ["--results", page], ["--chek"], ["--pages"]):
        assert words[0] in refusal(report.main, words, capsys)


WORDS = st.sampled_from([*NUMBERS, *NAMES, "1", "2", "nan", "[1]", "a=1", "é", "None", "true"]) | st.text(max_size=9)
EVALUATE = st.sampled_from(["--name", "--label", "--seed", "--multiples", *(f"--{flag}" for flag in COUNTS)])
BENCHMARK = st.sampled_from([action.option_strings[0] for action in benchmark.make_parser()._actions
                             if action.nargs != 0 and action.dest != "output"])  # fmt: skip


def said_by(main, words):
    """Standard error of a refusal with exit code 2; None if there is none."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", SimpleNamespace(write=lines.append, flush=lambda: None))
        try:
            main(words)
        except SystemExit as ended:
            assert ended.code == 2, words
            return "".join(lines)


@settings(deadline=None, max_examples=150)
@given(lines=st.lists(st.tuples(EVALUATE, WORDS), max_size=3))
def test_random_command_lines_of_evaluate_are_refused_or_make_sense(lines, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "random"
    for name in ("config.json", "tokenizer.json"):
        write(path / name, b"{}")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluate.TASKS, "loss", lambda args: seen.append(args) or 0)
        said = said_by(evaluate.main, ["--task", "loss", *(f"{flag}={word}" for flag, word in lines), str(path)])
    assert said is None or len(said.splitlines()) == 1
    for args in seen:
        assert all(getattr(args, count) >= 1 for count in COUNTS) and 0 <= args.seed < 2**32
        assert all(0 < multiple < 1e5 for multiple in args.multiples)
        assert all((path / name).parent == path for name in (args.name, args.label))


@settings(deadline=None, max_examples=150)
@given(lines=st.lists(st.tuples(BENCHMARK, WORDS), max_size=3))
def test_random_command_lines_of_benchmark_are_refused_or_make_sense(lines):
    words = ["--mode", "train", "--tiny", *(f"{flag}={word}" for flag, word in lines)]
    said = said_by(benchmark.parse_arguments, words)
    assert said is None or len(said.splitlines()) == 1
