"""A saved model with its tokenizer, as the clients' users have it."""

from pathlib import Path

import pytest
import torch
from conftest import TINY
from hspmn.tokens import fit_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXTS = ["def area(self, width): return self.height * width\n" * n for n in (2, 3, 5)]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}assistant: "


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = fit_tokenizer(TEXTS * 9, 300, padding=True)
    tokenizer.chat_template = TEMPLATE
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    numbers = TINY | special | {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    config = AutoConfig.from_pretrained(Path(__file__).resolve().parents[2], trust_remote_code=True, **numbers)
    folder = tmp_path_factory.mktemp("saved") / "model"
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def load(folder):
    """Function from an Auto class and options of `from_pretrained` to the saved model in eval mode."""

    def build(auto=AutoModelForCausalLM, **options):
        return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()

    return build
