"""Two processes on a CPU, launched by the examples, train as one does: losses, biases, saved and resumed runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = sorted((CHECKOUT / "examples" / "accelerate").glob("*.yaml"))
# accelerate leaves FSDP out where it finds no GPU; nothing else of it asks for one
JOB = """
import os, sys, torch
from accelerate import state
from accelerate.utils import DistributedType

begin = state.PartialState.__init__
def with_fsdp(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP") and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
state.PartialState.__init__ = with_fsdp

checkout, saved, texts, out, rows, *jobs = sys.argv[1:]
sys.path.insert(0, checkout)
import train
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, AutoTokenizer, Trainer, TrainingArguments

def keep(trainer, name):
    model = trainer.accelerator.unwrap_model(trainer.model)
    buffers = {k: v for k, v in model.named_buffers() if ".router." in k}
    torch.save(buffers, f"{out}/{name}-{trainer.args.process_index}.pt")

numbers = torch.Generator().manual_seed(0)
data = [{"input_ids": torch.randint(2, 200, (n,), generator=numbers).tolist()} for n in range(9, 73, 2)]
data = [row | {"labels": row["input_ids"]} for row in data]
model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=True, padding_side="right")
args = TrainingArguments(
    f"{out}/plain", use_cpu=True, max_steps=4, learning_rate=0.01, logging_steps=1, save_steps=4, report_to="none",
    per_device_train_batch_size=int(rows) // 2, gradient_accumulation_steps=2,
)
trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer), data)
trainer.train()
keep(trainer, "plain")
if "train.py" not in jobs:
    sys.exit()

finish = train.finish
train.finish = lambda trainer, *rest: (finish(trainer, *rest), keep(trainer, "buffers"))
common = f"--dataset {texts} --model_name_or_path {saved} --batch {rows} --seq_len 32 --steps 6 --save_steps 3".split()
common += "--learning_rate 0.01 --logging_steps 1 --validation_blocks 8 --baseline_tokens 0 --use_cpu".split()
train.main([*common, "--output_dir", f"{out}/whole"])
train.main([*common, "--output_dir", f"{out}/resumed", "--resume_from_checkpoint", f"{out}/whole/checkpoint-3"])
"""


def run(launcher, folder, out, rows, *jobs):
    """A Trainer's training and, with "train.py" in `jobs`, two of it; the files they leave are under `out`."""
    (out / "texts").mkdir()
    for part in range(4):
        text = "".join(f"def f{i % 7}(x):\n    return x + {i % 5}\n\n" for i in range(100 + part))
        (out / "texts" / f"{part}.txt").write_text(text)
    (out / "job.py").write_text(JOB)
    arguments = [out / "job.py", CHECKOUT, folder, out / "texts", out, rows, *jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*launcher, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    return run([sys.executable], folder, tmp_path_factory.mktemp("alone"), 4, "train.py")


def losses(out, name):
    state = max((out / name).glob("checkpoint-*/trainer_state.json"))
    history = json.loads(state.read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_two_processes_train_as_one(configuration, alone, folder, tmp_path):
    if "deepspeed" in configuration.stem:
        pytest.importorskip("deepspeed")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
    # under ZeRO-3 from_pretrained() leaves the weights of any model spread, Llama's too (transformers 5.23.0)
    jobs = [] if "zero3" in configuration.stem else ["train.py"]
    two = run(launcher, folder, tmp_path, 2, *jobs)
    for name in ("plain", "whole", "resumed")[: 3 if jobs else 1]:
        assert losses(two, name) == pytest.approx(losses(alone, name), rel=1e-4), name
    for name in ("plain", "buffers")[: 2 if jobs else 1]:
        first, second, one = (torch.load(out / f"{name}-{rank}.pt") for out, rank in ((two, 0), (two, 1), (alone, 0)))
        for key, value in one.items():
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-4)
    for name in ("plain/checkpoint-4", "whole", "resumed")[: 3 if jobs else 1]:
        got, one = (load_file(out / name / "model.safetensors") for out in (two, alone))
        whole = load_file(two / "whole" / "model.safetensors") if name == "resumed" else {}
        assert got.keys() == one.keys()
        for key, weight in got.items():
            torch.testing.assert_close(weight, one[key], rtol=1e-2, atol=1e-3, msg=f"{name}: {key}")
            assert key not in whole or torch.equal(weight, whole[key]), key
        AutoModelForCausalLM.from_pretrained(two / name, trust_remote_code=True)
