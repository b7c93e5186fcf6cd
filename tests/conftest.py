"""Make this checkout importable as `hspmn`, whatever its folder is called and whether or not it is installed."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():  # before the first import of triton: kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tiny tensors gain nothing from more
sys.path.insert(0, str(Path(__file__).resolve().parent))  # importlib mode leaves it out; caches.py is imported from it
package = ModuleType("hspmn")
package.__path__ = [str(Path(__file__).resolve().parent.parent)]
sys.modules["hspmn"] = package

# Wide weights, so that every part of the model shows in the logits; one layer of each kind
TINY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "sparsity_k": [0.4, 0.0, 0.5],
    "initializer_range": 0.15,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def exact_e4m3():
    """Triton's interpreter loses the carry of a mantissa that is rounded up to e4m3; PyTorch rounds in its place."""
    interpreter = sys.modules.get("triton.runtime.interpreter")  # loaded with the tests of kernels
    if interpreter is None or torch.cuda.is_available():
        yield
        return
    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return convert(x, source, target, mode)
        return torch.from_numpy(x.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


@pytest.fixture
def fresh_dynamo():
    """Nothing is compiled yet, and what will be is counted."""
    from torch._dynamo.utils import counters  # not above: it may import triton

    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def tiny_config():
    """Function from overrides to the configuration of a model that runs in milliseconds."""
    from hspmn.configuration_hspmn import HSPMNConfig

    return lambda **overrides: HSPMNConfig(**TINY | overrides)


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Function from a class (HSPMNForCausalLM) and overrides to a seeded model in eval mode."""
    from hspmn.modeling_hspmn import HSPMNForCausalLM

    def build(kind=HSPMNForCausalLM, **overrides):
        torch.manual_seed(0)
        return kind(tiny_config(**overrides)).eval()

    return build
