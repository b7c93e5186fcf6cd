"""The Auto classes on the checkout and on saved folders, in processes that have never seen the checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

CHECKOUT = Path(__file__).resolve().parent.parent
TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "intermediate_size": 64, "sliding_window": 8, "sparsity_k": [0.5, 0.2],
}  # fmt: skip
# Triton is hidden from `import` and from `find_spec` alike, as if it had never been installed
LOAD = """
import sys, torch
from importlib.machinery import PathFinder

class WithoutTriton(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)

sys.meta_path = [WithoutTriton if finder is PathFinder else finder for finder in sys.meta_path]
from transformers import AutoModelForCausalLM

folder, inputs, outputs, checkout = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.load(inputs)
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)), outputs)
assert "triton" not in sys.modules
assert not any(path.startswith(checkout) for path in sys.path), sys.path
assert not any((getattr(m, "__file__", None) or "").startswith(checkout) for m in list(sys.modules.values()))
"""


def make_model(auto=AutoModelForCausalLM, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CHECKOUT, trust_remote_code=True, **TINY | overrides)
    return auto.from_config(config, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model-3.0"
    model = make_model()
    model.save_pretrained(folder)
    return folder, model


def logits(model, ids):
    with torch.no_grad():
        return model(ids.to(model.device)).logits.cpu()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_checkout_loads_under_other_spellings_and_overrides_are_validated(monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    for spelling in (".", f"../{CHECKOUT.name}", f"{CHECKOUT}/", CHECKOUT):
        config = AutoConfig.from_pretrained(spelling, trust_remote_code=True, hidden_size=64, num_hidden_layers=3)
        assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("hspmn", 64, 3)
    with pytest.raises(ValueError, match="sparsity_k"):
        make_model(sparsity_k=1.5)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_from_config_on_the_checkout(auto):
    with torch.no_grad():
        hidden = make_model(auto, pad_token_id=0)(torch.arange(1, 11)[None]).last_hidden_state
    assert hidden.shape == (1, 10, 32) and hidden.isfinite().all()


def test_saved_folder_holds_code_and_auto_map_and_is_saved_again_the_same(saved, tmp_path):
    folder, _ = saved
    files = contents(folder)
    assert {"config.json", "model.safetensors", "configuration_hspmn.py", "modeling_hspmn.py"} <= files.keys()
    for name in files:
        assert not name.endswith(".py") or files[name] == (CHECKOUT / name).read_bytes(), name
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"] == "modeling_hspmn.HSPMNForCausalLM"
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path)
    assert contents(tmp_path) == files


@pytest.mark.parametrize("scaling", [None, "rowwise", "mx"])
def test_fresh_process_without_checkout_and_triton_gives_the_same_logits(saved, tmp_path, scaling):
    folder, model = saved
    if scaling is not None:
        chosen = {"quant_method": "hspmn_float8", "scaling": scaling}
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, quantization_config=chosen)
        folder = tmp_path / "float8"
        model.save_pretrained(folder)
    (folder.rename(tmp_path / "elsewhere")).rename(folder)  # nothing may depend on where the folder was written
    ids = torch.randint(1, 64, (2, 21), generator=torch.Generator().manual_seed(1))
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-I", "-c", LOAD, folder, tmp_path / "ids.pt", tmp_path / "out.pt", CHECKOUT]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got, generated = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(got, logits(model, ids), rtol=0, atol=1e-6)
    assert generated.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_the_router_in_float32(saved, dtype):
    model = AutoModelForCausalLM.from_pretrained(saved[0], trust_remote_code=True, dtype=dtype)
    names = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert names["model.layers.0.projection.qkv_proj.weight"] == dtype
    assert all(found == torch.float32 for name, found in names.items() if ".router." in name)
    assert logits(model, torch.arange(10)[None]).isfinite().all()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(saved, device_map):
    folder, model = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map=device_map)
    close = {"rtol": 0, "atol": 1e-5 if loaded.device.type == "cpu" else 1e-2}
    torch.testing.assert_close(*(logits(m, torch.arange(12)[None]) for m in (loaded, model)), **close)
    assert torch.equal(loaded.model.layers[0].router.target.cpu(), model.model.layers[0].router.target)
