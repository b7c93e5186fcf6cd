"""transformers' own tests of every model, as far as its source distribution ships them, on HSPMN.

    pip download --no-binary :all: --no-deps transformers==<the installed version> -d sdist
    tar -xzf sdist/transformers-*.tar.gz -C sdist
    TRANSFORMERS_SOURCE=$(echo sdist/transformers-*/) python -m pytest tests/clients/test_transformers_common.py
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
from hspmn.configuration_hspmn import HSPMNConfig
from hspmn.modeling_hspmn import (
    HSPMNForCausalLM,
    HSPMNForSequenceClassification,
    HSPMNForTokenClassification,
    HSPMNModel,
)
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", ""), "tests")
if not (SOURCE / "test_modeling_common.py").is_file():
    pytest.skip("needs TRANSFORMERS_SOURCE, see the head of this file", allow_module_level=True)
pytest.importorskip("parameterized")


def shipped(name):
    """Module `name` of transformers' tests; mixins of folders that the distribution leaves out have no tests."""
    package = ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE)]
    sys.modules["transformers_tests"] = package
    for missing, mixin in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
        sys.modules[f"transformers_tests.{missing}"] = stand_in = ModuleType(missing)
        setattr(stand_in, mixin, type(mixin, (), {}))
    return importlib.import_module(f"transformers_tests.{name}")


common = shipped("test_modeling_common")


class Tester:
    """Sizes and inputs in the form that the common tests expect."""

    base_model_class, causal_lm_class, is_training = HSPMNModel, HSPMNForCausalLM, True
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 7, 12, 32, 2, 4
    vocab_size = 99

    def get_config(self):
        return HSPMNConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2, head_dim=8, sliding_window=8, sparsity_k=0.5, pad_token_id=0, max_position_embeddings=64,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}


TASKS = ("MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION")


class TestCommon(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        HSPMNModel, HSPMNForCausalLM, HSPMNForSequenceClassification, HSPMNForTokenClassification,
    )  # fmt: skip

    has_attentions = False

    def setUp(self):
        self.model_tester = Tester()
        self.enterContext(patch.dict(CONFIG_MAPPING._extra_content, hspmn=HSPMNConfig))
        for task, kind in zip(TASKS, self.all_model_classes, strict=True):  # as of a model inside the library
            self.enterContext(patch.dict(getattr(auto, f"{task}_MAPPING_NAMES"), hspmn=kind.__name__))
            self.enterContext(patch.dict(getattr(auto, f"{task}_MAPPING")._extra_content, {HSPMNConfig: kind}))

    def test_batching_equivalence(self):
        with patch.object(HSPMNModel, "_router_outputs", return_value={}):  # loads are shares of the whole batch
            super().test_batching_equivalence()

    def test_model_outputs_equivalence(self):
        with patch.object(HSPMNModel, "_router_outputs", return_value={}):  # outputs are subtracted, bool ones too
            super().test_model_outputs_equivalence()
