"""The comparison, associative recall and the evaluation tasks, in their tiny CPU settings."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from hspmn import evaluate
from hspmn.benchmarks import mqar, peers, quality
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished tiny comparison of all models, with a checkpoint of one of them."""
    folder = tmp_path_factory.mktemp("quality")
    run(folder, "--save", "hspmn")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return folder / "checkpoints" / "hspmn-s0"


@pytest.fixture(scope="module")
def args(folder):
    return quality.make_parser().parse(["--tiny", "--data_cache", str(folder / "data")], quality.TINY)


@pytest.fixture(scope="module")
def data(args):
    """The tokenizer and the training tokens."""
    return quality.prepare_data(args)[:2]


def run(folder, *arguments, name="quality"):
    """Run the comparison with results in the file `name`; returns the pairs and the values of that file."""
    command = ["--tiny", "--output", str(folder), "--data_cache", str(folder / "data"), "--name", name]
    assert quality.main([*command, *arguments]) == 0
    document = json.loads((folder / f"{name}.json").read_text())
    return document["runs"], {(row["case"], row["metric"]): row["value"] for row in document["rows"]}


def test_results_have_the_documented_form(folder):
    document = json.loads((folder / "quality.json").read_text())
    assert {"name", "command", "date", "device", "versions", "commit", "rows"} <= document.keys()
    assert str(folder) not in json.dumps(document)
    values = {(row["case"], row["metric"]): row["value"] for row in document["rows"]}
    for case in quality.MODELS:
        assert np.isfinite([values[case, metric] for metric in quality.MEANS]).all()
        assert values[case, "params"] == pytest.approx(values["dense", "params"], rel=0.03)
    for case in ("hspmn", "hspmn_random", "hspmn_annealed"):
        assert 0 <= values[case, "load_min"] <= values[case, "load_max"]
    positions = 4 * 0.2 * quality.TINY["num_hidden_layers"]
    once, *cached = (values["hspmn", f"val_{way}"] for way in ("once", "cache_auto", "cache_int8", "cache_int4"))
    assert cached[0] == pytest.approx(once, abs=1e-4) and cached[1] == pytest.approx(once, abs=1e-2)
    assert len({once, *cached[1:]}) == 3 and cached[2] == pytest.approx(once, abs=0.1)
    keys = values["hspmn", "kv_bytes_per_token"] - positions
    assert keys == pytest.approx(0.2 * values["dense", "kv_bytes_per_token"])
    for entry in document["runs"]:
        assert [step for step, _ in entry["curve"]] == [2, 4, 6]
        mean = entry["recall_share"] * entry["recall"] + (1 - entry["recall_share"]) * entry["other"]
        assert entry["val"] == pytest.approx(mean)
    assert (folder / "quality.png").exists() or importlib.util.find_spec("matplotlib") is None
    assert abs(values["hspmn", "val_float8"] - once) < 0.05 and 0 <= values["hspmn", "val_float8_flips"] < 0.1


def test_finished_pairs_are_kept_and_new_ones_appended(folder, capsys):
    first, _ = run(folder, "--models", "dense", "hspmn", name="seeds")
    both, values = run(folder, "--models", "dense", "hspmn", "--seeds", "0", "1", name="seeds")
    assert capsys.readouterr().out.count("finished before") == 2
    assert all(entry in both for entry in first) and len(both) == 4
    losses = [entry["val"] for entry in both if entry["case"] == "dense"]
    assert values["dense", "seeds"] == 2 and values["dense", "val"] == pytest.approx(np.mean(losses))
    assert values["dense", "val_std"] == pytest.approx(np.std(losses, ddof=1))
    (alone,), _ = run(folder, "--models", "hspmn", "--seeds", "1", name="alone")
    (after,) = (entry for entry in both if (entry["case"], entry["seed"]) == ("hspmn", 1))
    assert alone["val"] == pytest.approx(after["val"], abs=1e-4)  # whatever ran before it in the same process
    run(folder, "--models", "reflexive", "--seeds", "7", "--time_budget", "0.001", name="seeds")
    assert "not started" in capsys.readouterr().out


def test_processes_share_a_results_file(folder, args, tmp_path):
    """A pair that another process has added meanwhile is kept."""
    runs = json.loads((folder / "quality.json").read_text())["runs"][:2]
    here = Namespace(**vars(args) | {"output": tmp_path})
    for results, entry in zip([quality.Results(here, {}) for _ in range(2)], runs, strict=True):
        results.add(entry)
    written = json.loads((tmp_path / "quality.json").read_text())["runs"]
    assert {(run["case"], run["seed"]) for run in written} == {(run["case"], run["seed"]) for run in runs}


def test_variants_override_fields_of_a_model_and_a_name_runs_once(folder, args):
    (entry,), _ = run(folder, "--models", "--variants", "graded:sparsity_k=[0.5,0.1],sliding_window=16", name="other")
    assert entry["case"] == "graded" and entry["target"] == [0.5, 0.1]
    assert entry["overrides"] == {"sparsity_k": [0.5, 0.1], "sliding_window": 16}
    variants = [f"even_random@hspmn_random:sparsity_k={share}" for share in (0.1, 0.2)]
    listed = quality.list_cases(Namespace(**vars(args) | {"models": [], "variants": variants}))
    assert listed == {"even_random": ("hspmn_random", {"sparsity_k": 0.2})}


REFUSED = {
    "--lr 0.01": "lr 0.0015 -> 0.01",
    "--models hspnm": "choose from 'dense'",
    "--set sliding_windw=16": "did you mean sliding_window",
    "--set sliding_window": "expected key=value",
    "--variants hspmn:sliding_window=16": "expected NAME",
    "--variants other@hspnm:sliding_window=16": "did you mean hspmn",
    "--variants other@dense:sliding_window=16": "unknown",
    "--variants other@:sliding_window=16": "unknown",
    "--models hspmn --set intermediate_size=256": "parameters",
    "--models hspmn_delta --save hspmn_delta": "leave it out",
    "--needle_mix 1.5": "--needle_mix",
    "--vocab_size 100": "--vocab_size",
    "--steps 0": "--steps",
    "--plot_only --name none": "--plot_only",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_wrong_arguments_are_refused_in_one_line(folder, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(folder, *arguments.split())
    (message,) = capsys.readouterr().err.splitlines()
    assert REFUSED[arguments] in message


def test_other_code_is_refused_unless_forced(folder, monkeypatch, capsys):
    run(folder, "--models", "dense", name="coded")
    monkeypatch.setattr(quality.results, "code_hash", lambda: "other")
    with pytest.raises(SystemExit):
        run(folder, "--models", "dense", "--seeds", "1", name="coded")
    assert " -> other" in capsys.readouterr().err
    run(folder, "--models", "dense", "--seeds", "1", "--force", name="coded")
    assert json.loads((folder / "coded.json").read_text())["mixed"]


@pytest.mark.parametrize("case", quality.MODELS)
def test_full_size_models_have_equal_parameters(case):
    full = quality.make_parser().parse_args([])
    dense = quality.count_parameters("dense", peers.comparison_config("dense", quality.sizes_of(full, "dense")))
    config, count = quality.matched_config(case, quality.sizes_of(full, case), {}, dense, 0.01)
    assert 30e6 < count < 60e6 and config.initializer_range == (0.04 if case in peers.LLAMAS else 0.02)


def test_a_random_router_keeps_its_weights_and_balances_its_load(args):
    config = peers.comparison_config("hspmn_random", quality.sizes_of(args, "hspmn_random"))
    model = peers.build_model("hspmn_random", config, 0)
    (router,) = filter(None, (layer.router for layer in model.base_model.layers))
    weight, bias = router.weight.detach().clone(), router.bias.clone()

    def loss_function(model, ids):
        outputs = model(ids, labels=ids)
        return outputs.loss, outputs

    list(peers.train_steps(model, torch.randint(0, 512, (2, 2, 64)), loss_function, 2, 1e-3))
    assert torch.equal(router.weight, weight) and not torch.equal(router.bias, bias)


def test_recall_targets_complete_a_bigram_of_the_same_row():
    ids = torch.tensor([[1, 2, 3, 1, 2, 1, 2], [5, 5, 5, 5, 1, 2, 0]])
    assert evaluate.recall_targets(ids).int().tolist() == [[0, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]]


def test_needles_are_where_they_should_be(data):
    tokenizer, train = data
    for depth in (0.0, 0.5, 1.0):
        ids, value = evaluate.needle_prompt(tokenizer, train, 256, depth, np.random.default_rng(0))
        text, answer = tokenizer.decode(ids), tokenizer.decode(value)
        key = text.split('assert SECRET["')[1].split('"]')[0]
        assert len(ids) == 256 and text.endswith(f'assert SECRET["{key}"] == "') and len(answer) == 6
        assert f'SECRET["{key}"] = "{answer}"\n' in text
        assert text.index("SECRET") == pytest.approx(depth * text.index("\nassert SECRET"), abs=160)
    rows = evaluate.NeedleRows(tokenizer, train, 40, 1024, 0)
    assert len(rows) == 40 and all(row.shape == (1024,) for row in rows) and torch.equal(rows[7], rows[7])
    assert any(tokenizer.decode(row.tolist()).startswith("\nSECRET[") for row in rows)
    asked = [tokenizer.decode(row.tolist()).count("assert SECRET[") for row in rows]
    assert 1 <= min(asked) < 4 < 12 < max(asked) <= 1024 // 32


def test_needle_rows_are_the_same_for_every_seed(args, data):
    batches = quality.Batches(Namespace(**vars(args) | {"needle_mix": 0.5}), *data)
    first, second = (list(batches.of(seed)) for seed in (0, 1))
    assert len(first) == args.steps
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.shape == (4, 64) and not torch.equal(a[:2], b[:2])
        assert torch.equal(a[2:], b[2:]) and torch.equal(a[2], batches.needle_loader.dataset[2 * step])


def test_mqar_batches_follow_the_protocol():
    ids, query, values = mqar.mqar_batch(16, 64, 8, 128, torch.Generator().manual_seed(0))
    for row, places, answers in zip(ids.tolist(), query.tolist(), values.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8 and all(0 < key < 64 <= value < 128 for key, value in pairs.items())
        assert [pairs[row[place]] for place in places] == answers
        assert len(set(places)) == 8 and all(place >= 16 and place % 2 == 0 for place in places)
        assert sum(token != 0 for token in row) == 3 * 8


def test_tasks_write_their_results(folder, checkpoint):
    out = ["--tiny", "--output", str(folder)]
    assert mqar.main([*out, "--steps", "2", "--models", "dense", "hspmn", "--kv_cache_dtype", "auto", "int4"]) == 0
    cache = ["--through_cache", "--kv_cache_dtype", "int4"]
    assert evaluate.main([*out, "--task", "loss", str(checkpoint), "--train_length", "100", *cache]) == 0
    for label in ("one", "two"):
        assert evaluate.main([*out, "--task", "needle", str(checkpoint), "--label", label]) == 0
    rows = {name: json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("mqar", "loss", "needle")}
    assert [row["case"] for row in rows["mqar"]] == ["dense/T64_P4", "hspmn/T64_P4", "hspmn/T64_P4"]
    assert [row["metric"] for row in rows["mqar"]] == ["accuracy", "accuracy", "accuracy_int4"]
    once, cached = ([row["value"] for row in rows["loss"]][i : i + 3] for i in (0, 3))
    assert [row["metric"] for row in rows["loss"][3:]] == ["val_cache", "recall_cache", "other_cache"]
    assert once != cached == pytest.approx(once, abs=0.1)
    assert [row["case"] for row in rows["needle"]] == ["one/x1", "one/x2", "two/x1", "two/x2"]
    assert np.isfinite([row["value"] for part in rows.values() for row in part]).all()


def test_parts_of_verify_on_a_good_model(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
    ids = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate.greedy(model, ids, 5, 40), evaluate.greedy(model, ids, 5, 7))
    checks = [*evaluate.check_causality(model, ids), *evaluate.check_cached(model, ids)]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, kv_cache_dtype="int4")
    checks += evaluate.check_cached(model.eval(), ids)
    names, passed, _ = zip(*checks, strict=True)
    assert all(passed) and {f"contract 2: chunked equals {way}" for way in ("uncached", "one call")} <= set(names)


def test_verify_names_a_lost_file_and_wrong_folders_are_refused(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--task", "loss", str(tmp_path)])
    assert "holds no config.json" in capsys.readouterr().err
    lost = checkpoint / "cache_hspmn.py"
    lost.rename(tmp_path / "kept.py")
    assert evaluate.main(["--task", "verify", str(checkpoint)]) == 1
    assert "FAIL" in (output := capsys.readouterr().out) and "missing: cache_hspmn.py" in output
    (tmp_path / "kept.py").rename(lost)


@pytest.mark.slow
def test_verify_passes_a_good_model(checkpoint, tmp_path):
    command = [sys.executable, evaluate.__file__, "--tiny", "--task", "verify", str(checkpoint)]
    lines = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    kept = [line for line in lines if "contract 7" not in line]  # a few steps do not balance a load
    assert sum(line.startswith("pass  contract") for line in kept) == 5
    assert not any(line.startswith("FAIL") for line in kept)
