"""TRL: fine-tuning on packed rows, preferences, rewards and samples, each by its plain trainer."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

trl = pytest.importorskip("trl")

COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "logging_steps": 1}
PAIRS = [{"prompt": f"def f{i}", "chosen": "(x): return x", "rejected": " = " * (1 + i % 3)} for i in range(8)]


def biases(model):
    return torch.stack([buffer for name, buffer in model.named_buffers() if name.endswith("router.bias")]).clone()


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_sft_packs_documents_that_do_not_see_each_other(load, tokenizer, tmp_path):
    texts = Dataset.from_list([{"text": "def f(self): return self.x\n" * (1 + i % 4)} for i in range(16)])
    config = trl.SFTConfig(tmp_path, packing=True, max_length=128, per_device_train_batch_size=2, **COMMON)
    trainer = trl.SFTTrainer(load(), config, train_dataset=texts, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    ids, positions = batch["input_ids"], batch["position_ids"]
    begins = (positions == 0).flatten().nonzero().flatten().tolist()
    assert len(begins) > len(ids)
    with torch.no_grad():
        packed = trainer.model.eval()(input_ids=ids, position_ids=positions).logits.flatten(0, 1)
        alone = [
            trainer.model(ids.flatten()[begin:end][None]).logits[0]
            for begin, end in zip(begins, [*begins[1:], ids.numel()], strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    trainer.train()
    assert len(losses(trainer)) == 2 and all(map(math.isfinite, losses(trainer)))


def test_lora_reloads_to_what_was_trained_and_reaches_the_linear_part(load, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    names = ["qkv_proj", "head_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(target_modules=names, r=4, task_type="CAUSAL_LM")
    texts = Dataset.from_list([{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS])
    config = trl.SFTConfig(tmp_path, learning_rate=1e-2, **COMMON)
    trainer = trl.SFTTrainer(load(), config, train_dataset=texts, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()
    reached = {name.split(".lora_B")[0].rsplit(".", 1)[1] for name, weight in trainer.model.named_parameters()
               if "lora_B" in name and weight.any()}  # fmt: skip
    assert reached == set(names)
    ids, plain = torch.arange(3, 40)[None], load()
    with torch.no_grad():
        base, want = plain(ids).logits, trainer.model.eval()(ids).logits
        got = peft.PeftModel.from_pretrained(plain, tmp_path).eval()(ids).logits
    assert not torch.allclose(base, want, atol=1e-3)
    torch.testing.assert_close(got, want)


def test_dpo_starts_from_its_reference_whose_bias_rests(load, tokenizer, tmp_path):
    model = load()
    start = biases(model)
    options = {"per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 1e-3}
    config = trl.DPOConfig(tmp_path, trust_remote_code=True, **options, **COMMON)  # it loads the reference itself
    trainer = trl.DPOTrainer(model, args=config, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are still equal
    assert torch.equal(biases(trainer.ref_model), start)
    assert not torch.equal(biases(model), start)


def test_grpo_moves_the_bias_once_per_optimizer_step(load, tokenizer, tmp_path):
    model = load()
    start, rate = biases(model), model.config.router_bias_rate
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 9}
    config = trl.GRPOConfig(tmp_path, learning_rate=1e-3, **options, **COMMON)
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions], args=config,
        train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS]), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    moved = (biases(model) - start).abs()
    assert 0 < moved.max() <= 2 * rate + 1e-6
    assert any("reward" in log for log in trainer.state.log_history)


def test_a_reward_model_learns_pairs(load, tokenizer, tmp_path):
    model = load(AutoModelForSequenceClassification, num_labels=1)
    options = COMMON | {"per_device_train_batch_size": 8, "max_length": 64, "learning_rate": 1e-2, "max_steps": 6}
    config = trl.RewardConfig(tmp_path, **options)
    trainer = trl.RewardTrainer(model, config, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
