"""transformers' own tests of every model, as far as its source distribution ships them, on HSPMN.

pip download --no-binary :all: --no-deps transformers==<the installed version> -d sdist
tar -xzf sdist/transformers-*.tar.gz -C sdist
TRANSFORMERS_SOURCE=$(echo sdist/transformers-*/) python -m pytest tests/clients/test_transformers_common.py
"""

import importlib
import os
import sys
import unittest
from fnmatch import fnmatch
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
    for missing, mixin in (("exporters.test_export", "Export"), ("generation.test_utils", "Generation")):
        sys.modules[f"transformers_tests.{missing}"] = stand_in = ModuleType(missing)
        setattr(stand_in, f"{mixin}TesterMixin", type(mixin, (), {}))
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
            num_key_value_heads=2, head_dim=8, sliding_window=8, sparsity_k=0.5, pad_token_id=0,
            max_position_embeddings=64,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}


SKIPPED = {  # why each kind of test does not apply; a test that is skipped without standing here fails
    "needs a GPU, or a package for one; offloading is in test_inference.py": (
        "test_*flash*", "test_*offload*", "test_*deepspeed*", "test_*device*", "test_*kernels*",
        "test_model_parallelism", "test_sdpa_can_compile_dynamic", "test_flex_attention_with_grads",
        "test_torch_compile_for_training",
    ),
    "asks for attention matrices, or for ways to compute them: none is ever formed": (
        "test_attention_outputs", "test_sliding_window_mask", "test_*sdpa*", "test_*composite*",
    ),
    "of encoders, other modalities or a config of several parts": (
        "test_get_*_features_*", "test_encoder_decoder_*", "test_vision_*", "test_internal_model_config_*",
        "test_resize_position_vector_embeddings",
    ),
    "of mixtures of experts: there is one SwiGLU, and a router of tokens with outputs of its own": (
        "test_moe_*", "test_output_router_logits_*", "test_*batched_and_grouped_inference*",
    ),
    "of models whose checkpoints are renamed, sharded by a plan or recorded by class: none of it is used": (
        "test_reverse_loading_mapping", "test_can_load_from_already_mapped_keys", "test_*tp_plan*",
        "test_capture_outputs_decorator", "test_can_capture_specific_layers_hidden_states",
        "test_can_init_all_missing_weights",
    ),
    "the tester leaves the factor out of its configuration": ("test_model_rope_with_partial_rotation",),
    "RoPE whose frequencies change with the length is refused": ("test_model_rope_scaling_from_config_1_dynamic",),
    "looks for tests/generation, which the distribution does not ship": ("test_generation_tester_mixin_inheritance",),
}  # fmt: skip
TASKS = ("MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION")


def named(test):
    """Why `test` is skipped, None if it should not be."""
    return next((why for why, names in SKIPPED.items() if any(fnmatch(test, name) for name in names)), None)


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

    def skipTest(self, reason):
        assert named(self._testMethodName), f"skipped without a name in SKIPPED: {reason}"
        super().skipTest(reason)

    def test_generation_tester_mixin_inheritance(self):
        self.skipTest(named(self._testMethodName))

    def test_model_rope_scaling_from_config_1_dynamic(self):
        self.skipTest(named(self._testMethodName))

    def test_batching_equivalence(self):
        with patch.object(HSPMNModel, "_router_outputs", return_value={}):  # loads are shares of the whole batch
            super().test_batching_equivalence()

    def test_model_outputs_equivalence(self):
        with patch.object(HSPMNModel, "_router_outputs", return_value={}):  # outputs are subtracted, bool ones too
            super().test_model_outputs_equivalence()


def test_every_skip_by_a_decorator_is_named():
    tests = {name: getattr(TestCommon, name) for name in dir(TestCommon) if name.startswith("test_")}
    assert len(tests) > 150
    assert not [name for name, test in tests.items() if getattr(test, "__unittest_skip__", False) and not named(name)]
