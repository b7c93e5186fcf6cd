"""train.py under faults: numbers that are not finite, kills, damaged files, full disks, and flags that cannot work."""

import json
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from hspmn import evaluate, runs, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import forks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
forked = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA cannot be used in a forked child")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return forks.write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def whole_run(texts, tmp_path_factory):
    """An uninterrupted run of 6 steps with checkpoints 2, 4 and 6; tests work on copies."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.main(forks.arguments(texts, folder, "--save_total_limit", 3))
    return folder


@pytest.fixture
def run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "run")


def end(capsys, argv):
    """Exit code and last line on standard error of a command line that is refused or stops."""
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    return stopped.value.code, forks.last_line(capsys.readouterr().err)


def same_weights(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Numbers

PADDING = 32 + 3  # an entry of a row of the embedding that no text reads
POISONS = {
    "the loss": ("loss", None, 0, torch.nan), "the gradient norm": ("gradient", "lm_head.weight", 0, torch.inf),
    "model.embed_tokens.weight": ("tensor", "model.embed_tokens.weight", PADDING, torch.inf),
    "model.layers.1.router.bias": ("tensor", "model.layers.1.router.bias", 0, torch.nan),
}  # fmt: skip


@pytest.mark.parametrize("culprit", POISONS)
def test_training_stops_at_the_first_number_that_is_not_finite(culprit, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "AnnealingCallback", forks.poisoned(*POISONS[culprit], step=5))
    code, line = end(capsys, forks.arguments(texts, tmp_path, "--save_steps", 1, "--save_total_limit", 2))
    assert code == 1 and "step 5: " in line and culprit in line and f"is {tmp_path / 'checkpoint-4'}" in line
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}
    assert not forks.not_finite(tmp_path)


def change_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_bytes(change, name="model.safetensors"):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def flip(place):
    return lambda data: data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :]


HEAD, BIAS = "lm_head.weight", "model.layers.1.router.bias"
BAD_MODELS = {
    "nan weight": (change_weights(lambda w: w[HEAD][3:4].fill_(torch.nan)), f"non-finite weights ({HEAD})"),
    "nan bias": (change_weights(lambda w: w[BIAS].fill_(torch.nan)), f"non-finite weights ({BIAS})"),
    "lost bias": (change_weights(lambda w: w.pop(BIAS)), f"missing weights ({BIAS})"),
    "other shape": (change_weights(lambda w: w.update({BIAS: torch.zeros(3)})), "mismatched weights"),
    "left over": (change_weights(lambda w: w.update(x=torch.zeros(3))), "unexpected weights (x)"),
    "cut": (change_bytes(lambda data: data[:-9]), "cannot be loaded"),
    "empty": (change_bytes(lambda data: b""), "cannot be loaded"),
    "flipped header": (change_bytes(flip(20)), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_model_whose_weights_are_bad_is_refused_before_the_data(kind, texts, run, tmp_path, capsys, monkeypatch):
    damage, words = BAD_MODELS[kind]
    (run / runs.SEAL).unlink()
    damage(run)
    monkeypatch.setattr(train, "load_documents", None)  # a call would fail with a TypeError
    argv = ["--model_name_or_path", run, "--dataset", texts, "--output_dir", tmp_path / "o", "--use_cpu"]
    code, line = end(capsys, list(map(str, argv)))
    assert code == 2 and f"--model_name_or_path {run}" in line and words in line
    assert not (tmp_path / "o").exists()


SEALED = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "modeling_hspmn.py")


@pytest.mark.parametrize("name", SEALED)
def test_a_sealed_model_is_loaded_by_nothing_once_a_file_of_it_has_changed(name, texts, run, tmp_path, capsys):
    change_bytes(lambda data: data.replace(b"1", b"2") if name.endswith(".json") else flip(-50)(data), name)(run)
    (tmp_path / "expected.pt").touch()  # of the task compare
    commands = [(train.main, ["--model_name_or_path", run, "--dataset", texts, "--output_dir", tmp_path / "o"])]
    commands += [(evaluate.main, [run, "--tiny", "--task", task, "--output", run]) for task in evaluate.TASKS]
    before = forks.contents(run)
    for main, argv in commands:
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, argv)))
        line = forks.last_line(capsys.readouterr().err)
        assert stopped.value.code == 2 and f"{run}: {name} is not what was saved; delete its run.json" in line, argv
    assert forks.contents(run) == before and not (tmp_path / "o").exists()


# Checkpoints


@pytest.mark.parametrize("damage", ["remove", "cut", "flip"])
def test_the_newest_whole_checkpoint_is_found_whatever_file_is_damaged(damage, run):
    (run / "checkpoint-99999").mkdir()
    newest = run / "checkpoint-6"
    for path in sorted(newest.iterdir()):
        data = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "cut" else flip(len(data) // 2)(data))
        whole, passed = runs.newest_whole(run)
        if whole == newest:  # a changed flag in the record: it is compared with those that are given
            assert path.name == runs.SEAL and damage == "flip"
        else:
            assert whole == run / "checkpoint-4"
            assert [text.split(" ")[0] for text in passed] == ["checkpoint-99999", "checkpoint-6"]
            assert path.name in passed[1]
        path.write_bytes(data)
    assert runs.newest_whole(run)[0] == newest


def test_last_goes_on_from_the_newest_whole_checkpoint_and_says_what_it_passed_over(texts, whole_run, run, capsys):
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    (run / "run.json").unlink()
    train.main(forks.arguments(texts, run, "--save_total_limit", 3, "--resume_from_checkpoint", "last"))
    said = capsys.readouterr().err
    assert f"resuming {run / 'checkpoint-4'}; passed over checkpoint-6 (it has no trainer_state.json)" in said
    assert same_weights(run, whole_run) and same_weights(run / "checkpoint-6", whole_run)


@pytest.mark.parametrize("named", ["last", "{run}/checkpoint-6"])
def test_a_finished_run_is_finished(named, texts, run, capsys):
    before = forks.contents(run)
    results = train.main(forks.arguments(texts, run, "--resume_from_checkpoint", named.replace("{run}", str(run))))
    assert forks.contents(run) == before and results == json.loads((run / "results.json").read_text())
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_killed_after_its_last_step_ends_without_another(texts, tmp_path, capsys):
    flags = ["--lr_scheduler_type", "constant", "--steps", 3]
    train.main(forks.arguments(texts, tmp_path, *flags))
    checkpoint = shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "kept")
    for name in runs.CARD_FILES:
        (tmp_path / name).unlink()
    results = train.main(forks.arguments(texts, tmp_path, *flags, "--resume_from_checkpoint", "last"))
    assert results["steps"] == 3 and same_weights(tmp_path, checkpoint) and runs.damage(tmp_path) is None
    assert not (tmp_path / "checkpoint-4").exists()


OTHER_FLAGS = {
    "--learning_rate 1": "--learning_rate 0.0 and not 1.0", "--seed 7": "--seed 42 and not 7",
    "--vocab_size 400": "--vocab_size 300 and not 400", "--seq_len 64": "--seq_len 32 and not 64",
    "--layers 3": "--num_hidden_layers 2 and not 3", "--dim 64": "--hidden_size 32 and not 64",
    "--batch 2": "--per_device_train_batch_size 4 and not 2", "--steps 9": "--max_steps 6 and not 9",
    "--config_overrides sliding_window=4": '--config_overrides [] and not ["sliding_window=4"]',
    "--lr_scheduler_type constant": '--lr_scheduler_type "cosine" and not "constant"',
}  # fmt: skip


@pytest.mark.parametrize("flags", OTHER_FLAGS)
def test_other_flags_than_the_run_had_are_refused_with_the_difference(flags, texts, run, capsys):
    before = forks.contents(run)
    code, line = end(capsys, forks.arguments(texts, run, *flags.split(), "--resume_from_checkpoint", "last"))
    assert code == 2 and OTHER_FLAGS[flags] in line and "--accept_changes" in line and forks.contents(run) == before


def test_other_data_than_the_run_had_are_refused_and_accepted_by_a_flag(texts, run, tmp_path, capsys):
    moved = shutil.copytree(texts, tmp_path / "moved")
    (run / runs.SEAL).unlink()
    resume = forks.arguments(moved, run, "--resume_from_checkpoint", run / "checkpoint-4", "--save_total_limit", 3)
    train.main(resume)  # the same texts in another place
    (run / runs.SEAL).unlink()
    with (moved / "part0.txt").open("a") as file:
        file.write("one more line\n" * 50)
    code, line = end(capsys, resume)
    assert code == 2 and "made from other data" in line
    assert train.main([*resume, "--accept_changes"])["steps"] == 6


def test_accepted_flags_go_on_but_sizes_cannot_change(texts, run, capsys):
    resume = ["--resume_from_checkpoint", "last", "--accept_changes"]
    assert train.main(forks.arguments(texts, run, *resume, "--steps", 8))["steps"] == 8
    assert runs.read_json(run / "checkpoint-8" / runs.SEAL)["flags"]["max_steps"] == 8
    for flags in (["--dim", 64], ["--layers", 3]):
        code, line = end(capsys, forks.arguments(texts, run, *resume, "--steps", 9, *flags))
        assert code == 2 and "holds a model of other sizes" in line
    code, line = end(capsys, forks.arguments(texts, run, "--resume_from_checkpoint", run / "checkpoint-6"))
    assert code == 2 and "holds checkpoint-8 of another run" in line


def test_a_new_run_leaves_the_checkpoints_of_another_alone(texts, run, capsys):
    before = forks.contents(run)
    for flags in ([], ["--seed", 5]):
        code, line = end(capsys, forks.arguments(texts, run, *flags))
        assert code == 2 and "holds checkpoint-6 of an earlier run" in line and "--resume_from_checkpoint last" in line
    assert forks.contents(run) == before


@forked
def test_a_second_process_is_refused_and_a_dead_one_keeps_no_lock(texts, tmp_path, capsys):
    argv = forks.arguments(texts, tmp_path / "run", "--steps", 10_000, "--save_steps", 1)
    pid, output = forks.start(argv)
    while not (tmp_path / "run" / "checkpoint-1" / runs.SEAL).exists():
        time.sleep(0.05)
    for flags in ([], ["--seed", 5], ["--resume_from_checkpoint", "last"]):
        code, line = end(capsys, [*argv, *map(str, flags)])
        assert code == 2 and "another process is training there" in line
    forks.os.kill(pid, forks.signal.SIGKILL)
    assert forks.finish(pid, output)[0] == -9
    with runs.alone_in(tmp_path / "run"):
        assert runs.newest_whole(tmp_path / "run")[0] is not None


@forked
@pytest.mark.parametrize("write", [1, 20, 33, 45, 48, 64, 70, 78, 82, 86, 1000])
def test_a_run_killed_at_any_write_goes_on_and_ends_the_same(write, texts, whole_run, tmp_path, capsys):
    argv = forks.arguments(texts, tmp_path / "run", "--save_total_limit", 1)
    code, text = forks.run(argv, forks.die_at_write(write))
    assert code == (0 if write == 1000 else -9), text
    folder = tmp_path / "run"
    assert (folder / runs.SEAL).exists() == (write == 1000)
    whole, passed = runs.newest_whole(folder)
    train.main([*argv, "--resume_from_checkpoint", "last"] if whole else argv)
    assert same_weights(folder, whole_run) and runs.damage(folder) is None
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoint-6"}
    assert not (folder / runs.LOCK).exists()


@pytest.mark.parametrize("stop", range(1, 30, 4))
def test_weights_card_and_results_belong_together_at_every_moment(stop, run, tmp_path, monkeypatch):
    new, target, done = tmp_path / "new", tmp_path / "run", 0
    new.mkdir()
    for name in ("model.safetensors", *runs.CARD_FILES[:-1], "extra.txt"):
        (new / name).write_text("new")
    runs.seal(new, {"flags": {}})

    def limited(method):
        def call(*args, **kwargs):
            nonlocal done
            done += 1
            if done > stop:
                raise KeyboardInterrupt
            return method(*args, **kwargs)

        return call

    for name in ("unlink", "replace"):
        monkeypatch.setattr(Path, name, limited(getattr(Path, name)))
    try:
        runs.publish(new, target)
    except KeyboardInterrupt:
        pass
    present = [name for name in runs.CARD_FILES if (target / name).exists()]
    if runs.SEAL in present:
        assert runs.damage(target) is None and len(present) == 4
    elif present:  # then all of them are of one model, with its weights
        assert len({(target / name).read_bytes() == b"new" for name in ("model.safetensors", *present)}) == 1


@forked
@pytest.mark.parametrize("limit, file", [(250_000, "optimizer.pt"), (150_000, "model.safetensors")])
def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_whole(limit, file, texts, tmp_path, capsys):
    argv = forks.arguments(texts, tmp_path / "run")

    def fill():
        """Files may not grow once the first checkpoint is sealed."""
        seal = runs.seal

        def seal_and_fill(*args):
            seal(*args)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        runs.seal = seal_and_fill

    code, text = forks.run(argv, fill)
    line = forks.last_line(text)
    assert code == 1 and "Traceback" not in text, text
    assert f"cannot write {tmp_path / 'run' / 'checkpoint-4' / file}" in line and "(disk mounted at /" in line
    assert f"the last whole checkpoint is {tmp_path / 'run' / 'checkpoint-2'}" in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert runs.checkpoint_damage(tmp_path / "run" / "checkpoint-2") is None


# Command lines


def test_a_sample_that_fails_does_not_take_the_report_with_it(texts, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("probability tensor contains nan")

    monkeypatch.setattr(train.transformers.generation.GenerationMixin, "generate", fail)
    monkeypatch.setattr(train.AutoModelForCausalLM, "from_config", patched_generate(fail))
    results = train.main(forks.arguments(texts, tmp_path, "--steps", 1, "--save_strategy", "no"))
    assert "probability tensor contains nan" in results["sample"]
    assert json.loads((tmp_path / "results.json").read_text()) == results and runs.damage(tmp_path) is None


def patched_generate(fail):
    """`from_config` whose models generate nothing."""
    original = train.AutoModelForCausalLM.from_config

    def from_config(*args, **kwargs):
        model = original(*args, **kwargs)
        model.generate = fail.__get__(model)
        return model

    return from_config


def test_exactly_k_tokens_train_without_a_sample_and_use_cache_is_kept(texts, tmp_path):
    flags = ["--config_overrides", "router_mode=topk", "use_cache=false", "--sample_tokens", 0, "--steps", 1]
    assert train.main(forks.arguments(texts, tmp_path, *flags))["sample"] == ""
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is False


REFUSED = {
    "--dim 0": "--hidden_size must be at least 1, got 0", "--dim -1": "--hidden_size must be at least 1, got -1",
    "--dim 32 --head_dim 17": "head_dim must be even for RoPE, got 17",
    "--head_dim 0": "--head_dim must be at least 1, got 0", "--layers 0": "--num_hidden_layers must be at least 1",
    "--config_overrides hidden_size=x": "--config_overrides hidden_size=x must be a whole number",
    "--config_overrides vocab_size=5": "--config_overrides vocab_size=5: the tokenizer decides it",
    "--config_overrides sliding_window=": "sliding_window",
    "--config_overrides rope_parameters=[1]": "rope_parameters",
    "--config_overrides router_mode=topk": "router_mode=topk cannot generate the sample",
    "--prompt=": "--prompt is empty", "--output_dir=": "--output_dir is empty", "--dataset=": "--dataset is empty",
    "--resume_from_checkpoint=": "--resume_from_checkpoint is empty",
    "--per_device_eval_batch_size 0": "--per_device_eval_batch_size must be at least 1, got 0",
    "--per_device_eval_batch_size -1": "--per_device_eval_batch_size must be at least 1, got -1",
    "--seed -1": "--seed must lie in [0, 4294967296), got -1", "--seed 4294967296": "--seed must lie in",
    "--steps -5": "--max_steps must be at least 1, or -1 for epochs, got -5", "--steps 0": "--max_steps must be",
    "--num_train_epochs nan": "--num_train_epochs must be at least 0, got nan",
    "--max_grad_norm nan": "--max_grad_norm must be at least 0, got nan", "--max_grad_norm -1": "--max_grad_norm must",
    "--warmup_steps nan": "--warmup_steps must be at least 0, got nan",
    "--learning_rate inf": "--learning_rate must be a number below", "--weight_decay nan": "--weight_decay must be",
    "--adam_beta1 1": "--adam_beta1 must lie in [0, 1), got 1.0", "--adam_beta2 -1": "--adam_beta2 must lie in [0, 1)",
    "--adam_epsilon 0": "--adam_epsilon must lie in (0, inf), got 0.0",
    "--dataloader_num_workers -1": "--dataloader_num_workers must be at least 0, got -1",
    "--dataloader_persistent_workers true": "--dataloader_persistent_workers needs workers",
    "--save_strategy best": "--save_strategy best needs a metric", "--save_strategy nope": "--save_strategy",
    "--metric_for_best_model f1": "--metric_for_best_model f1 is unknown", "--save_steps 0": "--save_steps must lie",
    "--label_names x": "--label_names x cannot work", "--report_to nope": "--report_to nope is unknown",
    "--report_to mlflow": "pip install mlflow",
    "--optim nope": "--optim", "--optim lion_8bit": "--optim lion_8bit cannot work",
    "--lr_scheduler_type warmup_stable_decay": "--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs None",
    "--lr_scheduler_type cosine_with_min_lr": "cosine_with_min_lr", "--lr_scheduler_kwargs x": "--lr_scheduler_kwargs",
    "--lr_scheduler_kwargs {": "--lr_scheduler_kwargs", "--model_name_or_path={texts}": "{texts}",
    "--torch_compile_backend nope": "--torch_compile_backend nope is unknown",
    "--output_dir={checkout}": "is this checkout", "--output_dir={texts}/part0.txt": "is a file",
    "--tokenizer_name={texts} --vocab_size 300": "--vocab_size 300 contradicts --tokenizer_name",
}  # fmt: skip


@pytest.mark.parametrize("flags", REFUSED)
def test_a_users_mistake_is_one_line_before_anything_is_read(flags, texts, tmp_path, capsys, monkeypatch):
    fill = {"{texts}": str(texts), "{checkout}": str(train.ROOT)}
    words = REFUSED[flags].replace("{texts}", str(texts))
    monkeypatch.setattr(train, "load_documents", None)  # a call would fail with a TypeError
    argv = ["--dataset", str(texts), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    for flag in flags.split(" "):
        for name, value in fill.items():
            flag = flag.replace(name, value)
        argv.append(flag)
    code, line = end(capsys, argv)
    assert code == 2 and words in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", ["--dim 32 --head_dim 24", "--dim 96", "--num_key_value_heads 3"])
def test_heads_that_no_flag_gives_suit_those_that_flags_give(sizes):
    config = train.make_config(train.parse_arguments(["--use_cpu", *sizes.split()])[0], 300, 32)
    assert config.num_attention_heads % config.num_key_value_heads == 0


def test_one_of_few_files_is_left_to_train_on_whatever_is_held_out(texts, tmp_path):
    assert train.main(forks.arguments(texts, tmp_path, "--validation_fraction", 0.99, "--steps", 1))["steps"] == 1


@forked
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(forks.FUZZED), st.sampled_from(forks.NUMBERS)), min_size=1, max_size=3))
def test_no_command_line_ends_in_a_traceback(texts, tmp_path_factory, flags):
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    more = [f"{flag}={value}" for flag, value in flags]
    code, text = forks.run(forks.arguments(texts, folder, *more, "--steps", 1))
    assert forks.ended_well(code, text), (flags, text)
