"""train.py: it learns, resumes exactly, refuses what cannot work, and saves a folder that loads anywhere."""

import json
import math
import time
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hspmn import corpus, runs, tokens, train
from hspmn.results import config_with
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

TINY = (
    "--dim 32 --layers 2 --head_dim 16 --seq_len 32 --batch 4 --vocab_size 300 --validation_blocks 8 "
    "--logging_steps 1 --use_cpu --config_overrides sliding_window=8 sparsity_anneal_fraction=0.6"
).split()


def text(lines=400):
    return "".join(f"def function_{i % 7}(x):\n    return x + {i % 5}\n\n" for i in range(lines))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for part in range(4):
        (folder / f"part{part}.txt").write_text(text(100 + part))
    return folder


def run_arguments(texts, folder):
    return [*TINY, "--dataset", str(texts), "--output_dir", str(folder), "--steps", "8", "--save_steps", "4"]


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """One uninterrupted run of 8 steps with a checkpoint in the middle of its annealing."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train.main(run_arguments(texts, folder))


def history(folder, step):
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    names = ("step", "loss", "load/0", "load/1")
    return [{name: log[name] for name in names} for log in state["log_history"] if "loss" in log]


def test_training_lowers_the_loss_and_saves_a_complete_folder_that_generates(run):
    folder, results = run
    assert results["loss_after"] < results["loss_before"] - 0.2 and results["steps"] == 8
    assert results["loss_before"] == pytest.approx(math.log(300), abs=0.5)
    code = {"configuration_hspmn.py", "modeling_hspmn.py", "operations_hspmn.py", "cache_hspmn.py"}
    saved = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert code | saved | {"README.md", "results.json"} <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["sample"] in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(["def function", "x"], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert ids.shape[0] == 2 and ids.shape[1] > inputs["input_ids"].shape[1]
    assert tokenizer.decode(tokenizer("def f(x):\n  é\t✓")["input_ids"]) == "def f(x):\n  é\t✓"


def test_resumed_run_equals_uninterrupted_run(run, texts, tmp_path):
    folder, _ = run
    train.main([*run_arguments(texts, tmp_path), "--resume_from_checkpoint", str(folder / "checkpoint-4")])
    assert history(tmp_path, 8) == history(folder, 8)
    whole, resumed = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert whole.keys() == resumed.keys() and any("router.bias" in name for name in whole)
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_annealing_of_every_layer_is_logged_and_ends_at_its_share(run):
    folder, _ = run
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    shares = AutoConfig.from_pretrained(folder, trust_remote_code=True).layer_sparsity
    assert any(shares)
    for layer, share in enumerate(shares):
        targets = [log[f"target/{layer}"] for log in state["log_history"] if "loss" in log]
        assert targets[-1] == pytest.approx(share)
        assert targets[0] > targets[1] > targets[3] > targets[-1] if share else not any(targets)


def test_fine_tuning_goes_on_from_the_saved_model(run, texts, tmp_path):
    folder, results = run
    arguments = f"--seq_len 32 --batch 4 --steps 1 --validation_blocks 8 --use_cpu --model_name_or_path {folder}"
    arguments += f" --dataset {texts} --output_dir {tmp_path} --isolate_documents --sparsity_k 0.2 0.5"
    tuned = train.main(arguments.split())
    assert abs(tuned["loss_before"] - results["loss_after"]) < 0.2
    assert json.loads((tmp_path / "config.json").read_text())["sparsity_k"] == [0.2, 0.5]


@pytest.mark.parametrize("file, flags", {
    "data.txt": "",  # one document: its end is held out
    "data.parquet": "--text_column content",
    "data.jsonl": "--text_column content --streaming --tokenizer_documents 8",
}.items())  # fmt: skip
def test_kinds_of_datasets(file, flags, tmp_path):
    source, rows = tmp_path / file, datasets.Dataset.from_dict({"content": [text(40)] * 12, "id": list(range(12))})
    write = {"txt": lambda path: path.write_text(text()), "parquet": rows.to_parquet, "jsonl": rows.to_json}
    write[file.split(".")[1]](source)
    arguments = ["--dataset", str(source), "--output_dir", str(tmp_path / "run"), "--steps", "2", *flags.split()]
    results = train.main([*TINY, *arguments])
    assert math.isfinite(results["loss_after"]) and math.isfinite(results["bigram_loss"])


def test_short_flags(monkeypatch, capsys):
    flags = "--batch 3 --seq_len 64 --dim 96 --steps 7 --grad_accum 2 --wandb name".split()
    monkeypatch.setattr(train, "is_wandb_available", lambda: True)
    model, data, training = train.parse_arguments(flags)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (3, 2)
    assert (training.max_steps, data.seq_len, model.hidden_size) == (7, 64, 96)
    assert (training.report_to, training.run_name) == (["wandb"], "name")
    monkeypatch.setattr(train, "is_wandb_available", lambda: False)
    with pytest.raises(SystemExit):
        train.parse_arguments(flags)
    assert "pip install wandb" in capsys.readouterr().err


REFUSED = {
    "--stepz 3": ["argument --stepz is unknown", "did you mean --steps"],
    "--step 3": ["argument --step is unknown"],
    "--steps many": ["--steps", "many"],
    "--seq_len 1": ["--seq_len must be at least 2, got 1"],
    "--batch 0": ["--per_device_train_batch_size must be at least 1, got 0"],
    "--vocab_size 10": ["--vocab_size must be at least 258, got 10"],
    "--validation_fraction 1.5": ["--validation_fraction must lie in (0, 1), got 1.5"],
    "--config_overrides sliding_windw=4": ["--config_overrides sliding_windw", "did you mean sliding_window"],
    "--config_overrides sliding_window": ["key=value"],
    "--config_overrides num_attention_heads=3": ["num_attention_heads (3)", "num_key_value_heads (2)"],
    "--sparsity_k 1.5": ["sparsity_k must lie in", "got 1.5"],
    "--dataset {here}/missing.txt": ["missing.txt does not exist"],
    "--dataset {here}/empty.txt": ["empty.txt", "is empty"],
    "--dataset {here}/empty.jsonl": ["empty.jsonl", "is empty"],
    "--dataset {here}/bad.jsonl": ["bad.jsonl cannot be read"],
    "--dataset {here}/bad.parquet": ["bad.parquet cannot be read"],
    "--dataset {here}/latin.txt": ["latin.txt cannot be read"],
    "--dataset {here}/none": ["holds no file of a known type"],
    "--dataset {here}/mixed": ["files of one type"],
    "--dataset {here}/rows.jsonl": ["--text_column text is no text column", "content"],
    "--dataset {here}/short.txt --seq_len 512": ["--seq_len 512 is longer than the data"],
    "--dataset {here}/short.txt --validation_split test": ["--validation_split test needs a named dataset"],
    "--resume_from_checkpoint {here}": ["is no checkpoint folder"],
    "--resume_from_checkpoint last --output_dir {here}/none": ["no checkpoint in --output_dir"],
    "--model_name_or_path {here}/none": ["none"],
    "--float8": ["--float8 needs"],
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    for name, content in {
        "empty.txt": b"", "empty.jsonl": b"", "bad.jsonl": b"{no json\n", "bad.parquet": b"not parquet",
        "latin.txt": "\xe9".encode("latin-1") * 100, "short.txt": b"a few words",
        "rows.jsonl": b'{"content": "words"}\n',
        "none/data.bin": b"x", "mixed/a.txt": b"words", "mixed/b.jsonl": b'{"text": "words"}\n',
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused_before_any_work(arguments, here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "fit_tokenizer", None)  # a call would fail with a TypeError
    command = arguments.replace("{here}", str(here)).split()
    command += [] if "--output_dir" in arguments else ["--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as refusal:
        train.main([*command, "--use_cpu"])
    message = capsys.readouterr().err.strip().splitlines()[-1]  # below the progress of reading
    assert refusal.value.code == 2 and all(words in message for words in REFUSED[arguments])
    assert not list(tmp_path.iterdir())


def test_bigram_is_a_distribution_and_learns_pairs():
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 5, (40, 64)) * 2
    blocks[:, 1::2] = blocks[:, ::2] + 1  # every odd token follows from the even one before it
    bigram = corpus.Bigram(blocks, 11)
    every_pair = np.stack(np.meshgrid(np.arange(11), np.arange(11), indexing="ij"), -1).reshape(-1, 2)
    mass = np.exp([-bigram.loss(pair[None], 0.5) for pair in every_pair]).reshape(11, 11)
    np.testing.assert_allclose(mass.sum(1), 1.0, rtol=1e-6)
    assert bigram.loss(blocks, 0.5) < 0.6 * math.log(10)


def test_packing_keeps_every_token_in_order_and_isolated_documents_restart_their_positions():
    tokenizer = tokens.fit_tokenizer([text(20)], 300, padding=True)
    documents = datasets.Dataset.from_dict({"text": ["def f(x)", "", "return x + 1 and more"]})
    packed = corpus.pack(documents, tokenizer, 4)["input_ids"]
    ids = [*tokenizer("def f(x)")["input_ids"], 0, *tokenizer("return x + 1 and more")["input_ids"], 0]
    assert [token for block in packed for token in block] == ids[: len(ids) // 4 * 4]
    batch = corpus.collate([{"input_ids": [5, 0, 6, 7, 0, 8]}], isolate_after=0)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]


SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32,
}  # fmt: skip


@pytest.mark.parametrize("saved", [None, ["router"]], ids=["frozen", "router"])
def test_lora_trains_adapters_alone_and_reloads_to_what_was_trained(tmp_path, saved):
    config = config_with(SIZES | {"router_bias_rate": 0.5})
    base = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    lora = LoraConfig(target_modules=["qkv_proj", "o_proj"], r=4, task_type="CAUSAL_LM", modules_to_save=saved)
    model = get_peft_model(base, lora)
    arguments = train.HSPMNTrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, learning_rate=1e-2)
    rows = [{"input_ids": [i % 300 for i in range(k, k + 32)]} for k in range(64)]
    anneal = [train.AnnealingCallback()]
    train.HSPMNTrainer(model, arguments, corpus.collate, rows, rows[:4], callbacks=anneal).train()
    state = {n.replace(".base_layer", "").replace(".original_module", ""): w for n, w in model.state_dict().items()}
    for name, weight in before.items():
        assert torch.equal(weight, state["base_model.model." + name]), name
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    fresh.load_state_dict(before)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, plain = (m.eval()(ids).logits for m in (model, fresh))
        adapted = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        loaded = adapted(ids).logits
    assert not torch.allclose(plain, expected, atol=1e-4) and torch.allclose(loaded, expected, atol=1e-5)
    biases = [m.base_model.model.model.layers[1].router.bias for m in (model, adapted)]
    assert torch.equal(*biases) and torch.equal(biases[0], before["model.layers.1.router.bias"]) == (saved is None)


RAGGED = [{"input_ids": [(7 * k + i) % 300 for i in range(k)]} for k in range(5, 29, 3)]
LABELS = {
    AutoModelForCausalLM: lambda ids: ids,
    AutoModelForSequenceClassification: lambda ids: len(ids) % 2,
    AutoModelForTokenClassification: lambda ids: [i % 2 for i in ids],
}


def pad(rows):
    """Right-padded batch of rows with labels per token or per row, as a collator of transformers makes it."""
    batch = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    batch["attention_mask"] = [torch.ones_like(ids) for ids in batch["input_ids"]]
    fill = dict.fromkeys(batch, 0) | {"labels": -100}
    return {name: pad_sequence(x, True, fill[name]) if x[0].dim() else torch.stack(x) for name, x in batch.items()}


@pytest.mark.parametrize("auto", LABELS, ids=lambda auto: auto.__name__)
def test_a_plain_trainer_cuts_steps_as_it_likes_and_predicts_logits(auto, tmp_path):
    config, runs = config_with(SIZES | {"router_load_entropy_coef": 10.0}), []
    rows = [row | {"labels": LABELS[auto](row["input_ids"])} for row in RAGGED]
    for batch, accumulated in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = auto.from_config(config, trust_remote_code=True)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, use_cpu=True, per_device_train_batch_size=batch, optim="sgd", logging_steps=1,
            gradient_accumulation_steps=accumulated, learning_rate=0.1, report_to="none", save_strategy="no",
            per_device_eval_batch_size=3,
        )  # fmt: skip
        trainer = Trainer(model, arguments, pad, rows)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        runs.append((losses, model.model.layers[1].router.bias.item()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5) and runs[0][1] == runs[1][1]
    predictions = trainer.predict(rows).predictions
    shape = model(**pad(rows)).logits.shape
    assert isinstance(predictions, np.ndarray) and predictions.shape == shape


def trainer_of(folder, kind=train.HSPMNTrainer, arguments=train.HSPMNTrainingArguments, rows=None, **options):
    """A trainer of a fresh model of two layers, the second of which routes, and 4 steps of 2 rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_with(SIZES | {"sliding_window": 8}), trust_remote_code=True)
    rows = rows or [{"input_ids": [i % 300 for i in range(k, k + 32)]} for k in range(64)]
    fixed = {"max_steps": 4, "use_cpu": True, "logging_steps": 1, "report_to": "none", "save_steps": 2}
    fixed |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True}
    collate = corpus.collate if kind is train.HSPMNTrainer else pad
    return kind(model, arguments(str(folder), **fixed | options), collate, rows, rows[:4])


def logged(trainer, name="loss"):
    return [log[name] for log in trainer.state.log_history if "loss" in log]


def test_costs_are_those_of_this_process_without_evaluation_and_saving(tmp_path, monkeypatch):
    """A clock that only work moves: a batch 0.25 s, a forward and backward pass 1 s, anything else far more."""
    now = [0.0]

    def takes(seconds, work):
        return lambda *args, **kwargs: (now.__setitem__(0, now[0] + seconds), work(*args, **kwargs))[1]

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic))
    monkeypatch.setattr(runs, "seal", takes(1000, runs.seal))
    monkeypatch.setattr(corpus, "collate", takes(0.25, corpus.collate))
    monkeypatch.setattr(train.Trainer, "training_step", takes(1, Trainer.training_step))
    monkeypatch.setattr(train.Trainer, "evaluation_loop", takes(100, Trainer.evaluation_loop))
    states = []
    for resumed in (None, str(tmp_path / "checkpoint-2")):
        options = {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
        trainer = trainer_of(tmp_path, **options)
        trainer.train(resume_from_checkpoint=resumed)
        steps, first = (2, 2) if resumed else (4, 0)  # the first step reads one batch ahead
        seconds, waited = [3.75] * 4, [0.75] * 4
        seconds[0], waited[0], seconds[first], waited[first] = 4.0, 1.0, 4.0, 1.0
        assert logged(trainer, "tok_s") == pytest.approx([3 * 64 / x for x in seconds])
        assert logged(trainer, "data_wait") == pytest.approx([x / y for x, y in zip(waited, seconds, strict=True)])
        flops = steps * 3 * 3 * trainer.model.estimate_flops(32, 2)
        spent = (steps * 3.75 + 0.25, steps * 3 * 64, flops, steps * 0.75 + 0.25)
        assert trainer.costs.total == pytest.approx(spent)
        assert trainer.costs.since() == pytest.approx({"tok_s": spent[1] / spent[0], "data_wait": spent[3] / spent[0]})
        states.append(trainer.state.total_flos)
    assert states[0] == states[1] == flops * 2


def test_documents_kept_apart_spare_operations(tmp_path):
    trainer = trainer_of(tmp_path)
    lengths = [[20, 12], [32]]
    positions = torch.tensor([[i for length in row for i in range(length)] for row in lengths])
    whole = trainer.floating_point_ops({"input_ids": torch.zeros_like(positions), "position_ids": positions})
    documents = 3 * sum(trainer.model.estimate_flops(length) for row in lengths for length in row)
    assert whole - float(trainer.apart) == pytest.approx(documents, rel=1e-6) and whole > documents


def test_costs_of_a_known_device(monkeypatch):
    """Two processes on H200s, one of which took 1 GB before training and 30 GB at most in it, 90 GB in evaluation."""
    memory, name = {"now": 2e9, "peak": 30e9}, "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=memory["now"]))
    costs = train.CostCallback(SimpleNamespace(device=torch.device("cuda"), world_size=2))
    with costs.aside():
        memory["peak"] = 90e9
        assert costs.memory() == 30e9
    assert costs.memory() == 30e9
    costs.total = (10.0, 1e6, 0.4 * 2 * 989e12 * 10, 0.5)
    known = {"tok_s": 1e5, "data_wait": 0.05, "peak_gb": 30.0, "mfu": 0.4, "peak_tflops": 989}
    assert costs.since() == pytest.approx(known)
    assert train.costs_in_words(known) == "100,000 tok/s  MFU 0.400 of 989 TFLOP/s  30.0 GB  data wait 0.050"
    name = "NVIDIA H20"
    assert "mfu" not in costs.since()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True, "bf16": True}], ids=["plain", "checkpointed"]
)
def test_compiled_training_has_a_graph_per_kind_of_layer_and_equals_eager(options, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")  # a break of the graph is an error
    monkeypatch.setitem(SIZES, "num_hidden_layers", 4)
    monkeypatch.setitem(SIZES, "sparsity_k", [0.0, 0.4, 0.0, 0.4])
    monkeypatch.setitem(SIZES, "sparsity_anneal_fraction", 1.0)
    losses = []
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    for more, resumed in (({}, None), (compiled, None), (compiled, str(tmp_path / "checkpoint-2"))):
        trainer = trainer_of(tmp_path, **options | more)
        trainer.add_callback(train.AnnealingCallback())
        trainer.train(resume_from_checkpoint=resumed)
        losses.append(logged(trainer))
    # of both kinds of layers, the embedding, RoPE, the norm and the head; of a resumed run no more
    assert counters["stats"]["unique_graphs"] == 2 + 4
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-6)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == trainer.model.state_dict().keys() - trainer.model.all_tied_weights_keys.keys()
    assert not torch.equal(saved["model.layers.1.router.bias"], saved["model.layers.3.router.bias"])


@pytest.mark.usefixtures("fresh_dynamo")
def test_float8_products_train_alike_in_one_graph_and_leave_no_trace(run, texts, tmp_path, monkeypatch):
    """By torchao's emulation, which rounds as the tensor cores do."""
    float8 = pytest.importorskip("torchao.float8")
    monkeypatch.setattr(float8, "Float8LinearConfig", partial(float8.Float8LinearConfig, emulate=True))
    monkeypatch.setattr(train, "check_float8", lambda args: None)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    models, finish = [], train.finish
    monkeypatch.setattr(train, "finish", lambda trainer, *args: (models.append(trainer.model), finish(trainer, *args)))
    train.main([*run_arguments(texts, tmp_path), "--float8", "--torch_compile_backend", "eager"])
    kinds = {name: type(module).__name__ for name, module in models[0].named_modules()}
    converted = {name.rpartition(".")[2] for name, kind in kinds.items() if kind == "Float8Linear"}
    assert converted == set(train.FLOAT8)
    plain, losses = ([log["loss"] for log in history(folder, 8)] for folder in (run[0], tmp_path))
    assert losses != plain and losses == pytest.approx(plain, rel=0.05)
    weights = [load_file(folder / "model.safetensors") for folder in (run[0], tmp_path)]
    assert [(name, w.shape, w.dtype) for name, w in weights[0].items()] == [
        (name, w.shape, w.dtype) for name, w in weights[1].items()
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_plain_trainer_compiles_rows_of_many_lengths_twice(tmp_path, monkeypatch):
    """For the first length, and for all others."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    monkeypatch.setitem(SIZES, "num_hidden_layers", 1)
    rows, losses = [row | {"labels": row["input_ids"]} for row in RAGGED], []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_of(tmp_path, Trainer, TrainingArguments, rows, save_strategy="no", **options)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert 5 < counters["stats"]["unique_graphs"] <= 2 * 5
