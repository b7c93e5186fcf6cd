"""HSPMNConfig: defaults, the checkout's config.json, and every refusal by the name of its field."""

import json
from pathlib import Path

import pytest
from hspmn import configuration_hspmn
from hspmn.configuration_hspmn import HSPMNConfig
from hspmn.modeling_hspmn import HSPMNBlock, HSPMNForCausalLM, HSPMNModel

CHECKOUT = Path(configuration_hspmn.__file__).parent
COUNTS = ("routed_intermediate_size", "router_initial_tokens", "sliding_window", "num_sink_tokens")
COUNTS += ("linear_attention_horizon",)
INVALID = [
    *((field, 0) for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
    *((field, 0) for field in ("num_attention_heads", "num_key_value_heads", "head_dim", "conv_kernel_size")),
    ("max_position_embeddings", 0),
    *((field, -1) for field in COUNTS),
    *((field, 2.5) for field in ("hidden_size", "num_hidden_layers", "conv_kernel_size", *COUNTS)),
    *((field, "4") for field in ("hidden_size", "router_bias_rate", "sparsity_k", "use_cache")),
    ("hidden_size", True),
    ("num_key_value_heads", 3),
    ("head_dim", 63),
    *((field, "none") for field in ("router_mode", "linear_attention", "backend", "kv_cache_dtype", "hidden_act")),
    *(("sparsity_k", value) for value in (-0.1, 1.5, float("nan"), True, [0.2] * 7, [0.2] * 7 + [1.5], [])),
    *(("router_noise_floor", value) for value in (-0.01, 1.0, float("nan"))),
    *((field, -0.1) for field in ("router_bias_rate", "router_token_entropy_coef", "router_load_entropy_coef")),
    *((field, 0.0) for field in ("router_bias_gain", "initializer_range", "rms_norm_eps")),
    *(("sparsity_anneal_fraction", value) for value in (-0.1, 1.1)),
    *(("capacity_factor", value) for value in (0.99, float("inf"))),
    *((field, 16384) for field in ("pad_token_id", "bos_token_id", "eos_token_id")),
    ("pad_token_id", -1),
    ("eos_token_id", [0, 16384]),
    ("rope_parameters", {"rope_type": "spiral", "rope_theta": 10000.0}),
]
EDGES = [
    *(("sparsity_k", value) for value in (None, 0, 1, 0.0, 1.0, [0.0, 1.0] * 4, [0, 1] * 4)),
    *(("router_noise_floor", value) for value in (0.0, 0.99)),
    *((field, 0.0) for field in ("router_bias_rate", "sparsity_anneal_fraction")),
    ("sparsity_anneal_fraction", 1.0),
    ("capacity_factor", 1.0),
    *((field, 0) for field in (*COUNTS, "pad_token_id")),
    ("conv_kernel_size", 1),
    ("eos_token_id", [0, 16383]),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}),
]


def test_config_json_holds_the_defaults():
    written, defaults = json.loads((CHECKOUT / "config.json").read_text()), HSPMNConfig().to_dict()
    own, stated = set(HSPMNConfig.__annotations__), written.keys() - {"architectures", "auto_map"}
    assert own <= written.keys() and all(written[field] == defaults[field] for field in stated)


@pytest.mark.parametrize("field, value", INVALID, ids=str)
def test_invalid_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        HSPMNConfig(**{field: value})


@pytest.mark.parametrize("field, value", EDGES, ids=str)
def test_edge_of_the_range_is_accepted_and_survives_saving(field, value, tmp_path):
    HSPMNConfig(**{field: value}).save_pretrained(tmp_path)
    assert getattr(HSPMNConfig.from_pretrained(tmp_path), field) == value


@pytest.mark.parametrize("kind", [HSPMNBlock, HSPMNModel, HSPMNForCausalLM])
@pytest.mark.parametrize("field, value", [("sparsity_k", 3.0), ("num_hidden_layers", 0), ("capacity_factor", 0.5)])
def test_override_after_construction_is_refused_by_the_model(tiny_config, kind, field, value):
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        kind(config)


def test_refusals_name_what_would_be_valid():
    with pytest.raises(ValueError, match="router_initial_tokens=4 .*router_mode='threshold'"):
        HSPMNConfig(router_mode="topk", router_initial_tokens=4)
    with pytest.raises(ValueError, match="nearest valid: 6"):
        HSPMNConfig(num_attention_heads=8, num_key_value_heads=3)


def test_omitted_fields_follow_the_others():
    config = HSPMNConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=None, head_dim=None)
    assert (config.num_key_value_heads, config.head_dim) == (6, 16)
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("share, layers", [(0.2, [0.2] * 3), ([1, 0.0, 0.3], [1.0, 0.0, 0.3])], ids=str)
def test_layer_sparsity_is_one_share_per_layer(share, layers):
    assert HSPMNConfig(num_hidden_layers=3, sparsity_k=share).layer_sparsity == layers


@pytest.mark.parametrize("layers", [*range(1, 10), 24])
def test_concentrated_share_has_the_average_of_the_even_one(layers):
    shares = HSPMNConfig(num_hidden_layers=layers, sparsity_k=None).layer_sparsity
    assert len(shares) == layers and sum(shares) == pytest.approx(0.2 * layers)
    routing = [share for share in shares if share]
    assert len(routing) == -(-layers // 4) and len(set(routing)) == 1 and shares[-1] == routing[0] <= 0.8
    assert all(shares[3::4])
