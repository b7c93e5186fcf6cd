"""The comparison harness and the evaluation tasks, in their tiny CPU settings."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("hspmn_quality", ROOT / "benchmarks" / "quality.py")
quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quality)
evaluate = quality.evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished tiny comparison of all models, with a checkpoint of one of them."""
    folder = tmp_path_factory.mktemp("quality")
    assert run(folder, "--save", "hspmn") == 0
    return folder


def run(folder, *arguments):
    return quality.main(["--tiny", "--output", str(folder), "--data_cache", str(folder / "data"), *arguments])


def read(folder, name="quality"):
    return json.loads((folder / f"{name}.json").read_text())


def test_results_have_the_documented_form(folder):
    document = read(folder)
    assert {"name", "command", "date", "device", "versions", "commit", "rows"} <= document.keys()
    assert str(folder) not in json.dumps(document)
    values = {(row["case"], row["metric"]): row["value"] for row in document["rows"]}
    for case in quality.MODELS:
        for metric in ("val", "recall", "other", "params", "kv_bytes_per_token", "train_tok_s"):
            assert np.isfinite(values[case, metric])
        assert 1 - quality.PARAMETER_TOLERANCE <= values[case, "params"] / values["dense", "params"]
        assert values[case, "params"] / values["dense", "params"] <= 1 + quality.PARAMETER_TOLERANCE
    for case in ("hspmn", "hspmn_random", "hspmn_annealed"):
        assert 0 <= values[case, "load_min"] <= values[case, "load_max"]
    assert values["hspmn", "kv_bytes_per_token"] == pytest.approx(0.2 * values["dense", "kv_bytes_per_token"])
    for entry in document["runs"]:
        assert len(entry["curve"]) == 3 and entry["curve"][-1][0] == 6
        mean = entry["recall_share"] * entry["recall"] + (1 - entry["recall_share"]) * entry["other"]
        assert entry["val"] == pytest.approx(mean)
    assert (folder / "quality.png").exists() or importlib.util.find_spec("matplotlib") is None


def test_finished_pairs_are_kept_and_new_ones_appended(folder, capsys):
    before = read(folder)["runs"]
    run(folder, "--models", "dense", "hspmn", "--seeds", "0", "1")
    after = read(folder)
    assert capsys.readouterr().out.count("finished before") == 2
    assert all(entry in after["runs"] for entry in before) and len(after["runs"]) == len(before) + 2
    values = {(row["case"], row["metric"]): row["value"] for row in after["rows"]}
    losses = [entry["val"] for entry in after["runs"] if entry["case"] == "dense"]
    assert values["dense", "seeds"] == 2 and values["dense", "val"] == pytest.approx(sum(losses) / 2)
    assert values["dense", "val_std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)


def test_processes_share_a_results_file(folder, tmp_path):
    """A pair that another process has added meanwhile is kept."""
    args = quality.make_parser().parse_args(["--tiny", "--output", str(tmp_path), "--name", "shared"])
    args.command = "quality"
    first, second = (quality.Results(args, {}) for _ in range(2))
    runs = json.loads((folder / "quality.json").read_text())["runs"][:2]
    for results, run in zip((first, second), runs, strict=True):
        results.add({key: value for key, value in run.items() if key != "stamp"})
    written = json.loads((tmp_path / "shared.json").read_text())["runs"]
    assert sorted((run["case"], run["seed"]) for run in written) == sorted((run["case"], run["seed"]) for run in runs)


def test_a_seed_gives_the_same_result_alone_and_after_another(folder, tmp_path):
    run(folder, "--name", "pair", "--models", "hspmn", "--seeds", "2", "3")
    run(folder, "--name", "alone", "--models", "hspmn", "--seeds", "3")
    assert read(folder, "pair")["runs"][1]["val"] == pytest.approx(read(folder, "alone")["runs"][0]["val"], abs=1e-4)


def test_variants_override_fields_and_are_recorded(folder):
    run(folder, "--name", "ablations", "--models", "--variants", "graded:sparsity_k=[0.5,0.1],sliding_window=16")
    (entry,) = read(folder, "ablations")["runs"]
    assert entry["case"] == "graded" and entry["target"] == [0.5, 0.1]
    assert entry["overrides"] == {"sparsity_k": [0.5, 0.1], "sliding_window": 16}


def test_a_variant_may_be_built_like_another_model_and_a_name_runs_once(folder):
    variants = [f"even_random@hspmn_random:sparsity_k={share}" for share in (0.1, 0.2)]
    ((name, model, overrides),) = quality.list_cases(arguments(folder, "--models", "--variants", *variants))
    assert (name, model, overrides) == ("even_random", "hspmn_random", {"sparsity_k": 0.2})


def test_the_time_budget_stops_before_a_pair(folder, capsys):
    count = len(read(folder)["runs"])
    run(folder, "--models", "reflexive", "--seeds", "7", "--time_budget", "0.001")
    assert "not started" in capsys.readouterr().out and len(read(folder)["runs"]) == count


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr", "0.01"], "lr 0.0015 -> 0.01"),
        (["--models", "hspnm"], "use hspmn"),
        (["--set", "sliding_windw=16"], "no such field"),
        (["--set", "sliding_window"], "expected KEY=VALUE"),
        (["--variants", "hspmn:sliding_window=16"], "expected NAME"),
        (["--variants", "other@hspnm:sliding_window=16"], "use hspmn"),
        (["--variants", "other@dense:sliding_window=16"], "no such model"),
        (["--variants", "other@:sliding_window=16"], "no such model"),
        (["--models", "hspmn", "--set", "intermediate_size=256"], "parameters"),
        (["--needle_mix", "1.5"], "--needle_mix"),
        (["--vocab_size", "100"], "--vocab_size"),
        (["--steps", "0"], "--steps"),
        (["--plot_only", "--name", "none"], "--plot_only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(folder, *arguments)


def test_other_code_is_refused_unless_forced(folder, monkeypatch):
    run(folder, "--name", "coded", "--models", "dense")
    monkeypatch.setattr(evaluate, "code_hash", lambda: "other")
    with pytest.raises(ValueError, match="code .* -> other"):
        run(folder, "--name", "coded", "--models", "dense", "--seeds", "1")
    run(folder, "--name", "coded", "--models", "dense", "--seeds", "1", "--force")
    assert read(folder, "coded")["mixed"]


@pytest.mark.parametrize("case", quality.MODELS)
def test_full_size_models_have_equal_parameters(case):
    args = quality.make_parser().parse_args([])
    dense = quality.count_parameters("dense", evaluate.comparison_config("dense", quality.sizes_of(args, "dense")))
    assert 30e6 < dense < 60e6
    config, count = quality.matched_config(case, quality.sizes_of(args, case), {}, dense, quality.PARAMETER_TOLERANCE)
    assert config.initializer_range == (0.04 if case == "dense" else 0.02)
    assert count == pytest.approx(dense, rel=0.01)


def test_a_frozen_router_does_not_learn(folder):
    sizes = quality.sizes_of(arguments(folder), "hspmn_random")
    model = evaluate.build_model("hspmn_random", evaluate.comparison_config("hspmn_random", sizes), 0)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.1.router.weight"]  # the only layer of two that routes by default
    outputs = model.train()(torch.randint(0, 512, (2, 64)))
    assert not outputs.router_scores.requires_grad and outputs.logits.requires_grad


def test_recall_targets_complete_a_bigram_of_the_same_row():
    ids = torch.tensor([[1, 2, 3, 1, 2, 1, 2], [5, 5, 5, 5, 1, 2, 0]])
    wanted = [[0, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert evaluate.recall_targets(ids).tolist() == [[bool(x) for x in row] for row in wanted]


def test_needles_are_where_they_should_be(folder):
    tokenizer, train, _ = quality.prepare_data(arguments(folder))
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


def test_needle_rows_are_the_same_for_every_seed(folder):
    args = arguments(folder)
    quality.check_arguments(args)
    tokenizer, train, _ = quality.prepare_data(args)
    args.needle_mix = 0.5
    batches = quality.Batches(args, tokenizer, train, torch.device("cpu"))
    first, second = (list(batches.of(seed)) for seed in (0, 1))
    assert len(first) == args.steps
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.shape == (4, 64) and not torch.equal(a[:2], b[:2])
        assert torch.equal(a[2:], b[2:]) and torch.equal(a[2], batches.needle_loader.dataset[2 * step])


def arguments(folder, *others):
    parser = quality.make_parser()
    parser.set_defaults(**quality.TINY)
    return parser.parse_args(["--data_cache", str(folder / "data"), *others])


def test_greedy_is_the_same_with_any_prefill_chunk(folder):
    args = evaluate.make_parser().parse_args(["--task", "loss", str(folder / "checkpoints/hspmn-s0")])
    model, tokenizer = evaluate.load(args)
    ids = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0)).to(model.device)
    assert torch.equal(evaluate.greedy(model, ids, 5, 40), evaluate.greedy(model, ids, 5, 7))
    assert tokenizer("def f():", add_special_tokens=False)["input_ids"]


def test_mqar_batches_follow_the_protocol():
    generator = torch.Generator().manual_seed(0)
    ids, query, values = evaluate.mqar_batch(16, 64, 8, 128, generator, torch.device("cpu"))
    for row, places, answers in zip(ids.tolist(), query.tolist(), values.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8 and all(0 < key < 64 <= value < 128 for key, value in pairs.items())
        assert [pairs[row[place]] for place in places] == answers
        assert len(set(places)) == 8 and all(place >= 16 and place % 2 == 0 for place in places)
        assert sum(token != 0 for token in row) == 3 * 8
    with pytest.raises(ValueError, match="pairs do not fit"):
        evaluate.mqar_batch(1, 64, 40, 128, generator, torch.device("cpu"))


def test_tasks_write_their_results(folder):
    checkpoint, out = str(folder / "checkpoints/hspmn-s0"), ["--tiny", "--output", str(folder)]
    assert evaluate.main(["--task", "mqar", *out, "--steps", "2"]) == 0
    cases = {row["case"] for row in read(folder, "mqar")["rows"]}
    assert cases == {"dense/T64_P4", "hspmn/T64_P4", "reflexive/T64_P4"}
    assert evaluate.main(["--tiny", "--task", "loss", checkpoint, "--train_length", "64"]) == 0
    assert np.isfinite([row["value"] for row in read(Path(checkpoint), "loss")["rows"]]).all()
    for label in ("one", "two"):
        assert evaluate.main(["--task", "needle", checkpoint, *out, "--label", label]) == 0
    assert [row["case"] for row in read(folder, "needle")["rows"]] == ["one/x1", "one/x2", "two/x1", "two/x2"]


def test_verify_passes_a_good_model_and_names_what_is_broken(folder, tmp_path):
    checkpoint = folder / "checkpoints/hspmn-s0"
    command = [sys.executable, str(ROOT / "evaluate.py"), "--tiny", "--task", "verify", str(checkpoint)]
    lines = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    assert sum(line.startswith("pass  contract") for line in lines if "contract 7" not in line) == 5
    assert not [line for line in lines if line.startswith("FAIL") and "contract 7" not in line]

    model = evaluate.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, kv_cache_dtype="int8")
    ids = torch.arange(100)[None] % model.config.vocab_size
    names, passed, _ = zip(*evaluate.check_cached(model.eval(), ids), strict=True)
    assert all(passed) and names[1] == "contract 2: chunked equals one call"

    (checkpoint / "reference_hspmn.py").rename(tmp_path / "kept.py")
    assert [passed for _, passed, _ in evaluate.check_files(checkpoint)][0] is False
    assert evaluate.main(["--task", "verify", str(checkpoint)]) == 1
    (tmp_path / "kept.py").rename(checkpoint / "reference_hspmn.py")


def test_non_finite_weights_are_found():
    model = torch.nn.Linear(2, 2)
    info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    assert all(passed for _, passed, _ in evaluate.check_weights(model, info))
    torch.nn.init.constant_(model.bias, float("nan"))
    assert [passed for _, passed, _ in evaluate.check_weights(model, info)] == [True, False]


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        evaluate.main(["--task", "loss", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluate.main(["--task", "loss"])
