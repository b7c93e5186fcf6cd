"""HSPMNConfig: defaults, the checkout's config.json, and every refusal by the name of its field."""

import json
from pathlib import Path

import pytest
import torch
from caches import tokens
from hspmn import configuration_hspmn
from hspmn.configuration_hspmn import CHOICES, LIMITS, ROPE_TYPES, HSPMNConfig
from hspmn.modeling_hspmn import HSPMNBlock, HSPMNForCausalLM, HSPMNModel
from hypothesis import given, settings
from hypothesis import strategies as st

CHECKOUT = Path(configuration_hspmn.__file__).parent
COUNTS = ("routed_intermediate_size", "router_initial_tokens", "sliding_window", "num_sink_tokens")
COUNTS += ("linear_attention_horizon",)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
INVALID = [
    *((field, 2.5) for field in ("hidden_size", "num_hidden_layers", "conv_kernel_size", *COUNTS)),
    *((field, "4") for field in ("hidden_size", "router_bias_rate", "sparsity_k", "use_cache")),
    ("hidden_size", True),
    ("num_key_value_heads", 3),
    ("head_dim", 63),
    *((field, "none") for field in ("router_mode", "linear_attention", "backend", "kv_cache_dtype", "hidden_act")),
    *(("sparsity_k", value) for value in (-0.1, 1.5, 1e-9, float("nan"), True, [0.2] * 7, [0.2] * 7 + [1.5], [])),
    ("router_noise_floor", 1.0),
    ("router_bias_rate", 10**400),
    *((field, 16384) for field in ("pad_token_id", "bos_token_id", "eos_token_id")),
    ("pad_token_id", -1),
    ("eos_token_id", [0, 16384]),
    *(("rope_type", {"rope_type": kind, "factor": 4.0}) for kind in ("spiral", "dynamic", "longrope", ["linear"])),
    *(("rope_theta", {"rope_theta": value}) for value in (float("nan"), 0, -1, "x", True)),
    *(("factor", {"rope_type": "linear", "factor": value}) for value in (float("nan"), 0, 0.5, "4")),
    *(("factor", {"rope_type": kind}) for kind in ("linear", "yarn", "llama3")),
    ("high_freq_factor", LLAMA3 | {"high_freq_factor": 1.0}),
    ("partial_rotary_factor", {"rope_type": "proportional", "partial_rotary_factor": -3}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("rope_parameters", [1]),
]
NUMBERS = [(field, low, high) for fields, low, high in LIMITS for field in fields if "[" not in field]
FLOATS = [field for field, kind in HSPMNConfig.__annotations__.items() if kind is float]
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
    ("rope_parameters", {"rope_type": "proportional", "rope_theta": 10000, "partial_rotary_factor": 0.25}),
    ("rope_parameters", LLAMA3),
]


def test_config_json_holds_the_defaults():
    written, defaults = json.loads((CHECKOUT / "config.json").read_text()), HSPMNConfig().to_dict()
    own, stated = set(HSPMNConfig.__annotations__), written.keys() - {"architectures", "auto_map"}
    assert own <= written.keys() and all(written[field] == defaults[field] for field in stated)


@pytest.mark.parametrize("field, value", INVALID, ids=str)
def test_invalid_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        HSPMNConfig(**{"rope_parameters" if isinstance(value, dict) else field: value})


@pytest.mark.parametrize("field, low, high", NUMBERS, ids=str)
def test_numbers_end_where_the_table_says(field, low, high):
    """And that is before memory or float32 does."""
    whole = isinstance(low, int)
    for value in (low - 1, high + 1, 2**40 if whole else 1e300, -(10**12) if whole else float("nan")):
        with pytest.raises(ValueError, match=f"{field} must lie in"):
            HSPMNConfig(**{field: value})


@pytest.mark.parametrize("field", FLOATS)
def test_whole_numbers_are_taken_for_floats(field, tmp_path):
    """In the constructor, as an attribute, in a file that a tool has rewritten, and as an override."""
    whole = 1 if field != "router_noise_floor" else 0
    given, config = HSPMNConfig(**{field: whole}), HSPMNConfig()
    setattr(config, field, whole)
    given.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: whole}))
    for taken in (given, config, *(HSPMNConfig.from_pretrained(tmp_path, **x) for x in ({}, {field: whole}))):
        assert type(getattr(taken, field)) is float and getattr(taken, field) == whole


def test_rope_settings_of_llama_are_taken_and_contradictions_refused(tmp_path):
    HSPMNConfig(rope_theta=500000).save_pretrained(tmp_path)
    config = HSPMNConfig.from_pretrained(tmp_path)
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 500000
    old_form = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}
    scaled = {"rope_type": "linear", "factor": 4}
    assert HSPMNConfig(**old_form).rope_parameters == scaled | {"rope_theta": 5e5}
    for override in ({"rope_theta": 3e4}, {"rope_parameters": {}}, {"rope_parameters": scaled}):
        loaded = HSPMNConfig.from_pretrained(tmp_path, **override)  # a theta that an override leaves out stays
        assert loaded.rope_parameters == config.rope_parameters | override.get("rope_parameters", override)
    part = HSPMNConfig(partial_rotary_factor=0.5, rope_parameters={"rope_type": "proportional"})
    assert part.rope_parameters["partial_rotary_factor"] == part.partial_rotary_factor == 0.5
    with pytest.raises(ValueError, match="rope_theta=10000.0 contradicts"):
        HSPMNConfig(rope_theta=10000.0, rope_parameters={"rope_theta": 5e5})


ODD = [
    -1,
    0,
    1,
    2.5,
    2**62,
    1e300,
    float("nan"),
    float("inf"),
    "4",
    "",
    True,
    None,
    [],
    [0.5],
    [0.2] * 3,
    {},
    {"a": 1},
]


def fields_of_a_config():
    """Any choice, sizes that build at once, other numbers up to their limits, any form of RoPE; often an odd value."""
    small = {
        "vocab_size": (1, 9), "hidden_size": (1, 9), "intermediate_size": (1, 9), "routed_intermediate_size": (0, 4),
        "num_hidden_layers": (1, 3), "num_attention_heads": (2, 4), "num_key_value_heads": (1, 2),
        "conv_kernel_size": (1, 30), "sliding_window": (0, 40), "num_sink_tokens": (0, 3),
    }  # fmt: skip
    sizes = {field: st.integers(*ends) for field, ends in small.items()}
    sizes, fields = sizes | {"head_dim": st.sampled_from([2, 4, 6, 8, None])}, {}
    for field, low, high in NUMBERS:
        if field not in sizes:
            kind = st.integers if isinstance(low, int) else st.floats
            fields[field] = st.sampled_from([low, high]) | kind(low, high)
    share = st.sampled_from([None, 0.0, 1.0, 1e-6]) | st.floats(0, 1)
    rope = {"rope_type": st.sampled_from([*ROPE_TYPES])}
    for keys, low, high in LIMITS:
        rope |= {key[17:-2]: st.sampled_from([low, high]) | st.floats(low, high) for key in keys if "[" in key}
    fields |= {"sparsity_k": share, "rope_parameters": st.fixed_dictionaries({}, optional=rope)}
    fields |= {field: st.sampled_from(valid) for field, valid in CHOICES.items() if field != "backend"}
    odd = st.dictionaries(st.sampled_from([*HSPMNConfig.__annotations__]), st.sampled_from(ODD), max_size=1)
    return st.builds(dict.__or__, st.fixed_dictionaries(sizes, optional=fields), odd)


def check_fields(fields):
    """They are refused by name, or the model that they make gives finite numbers forward and backward."""
    try:
        config = HSPMNConfig(**fields)
    except ValueError as error:
        assert any(field in str(error) for field in fields), error
        return
    torch.manual_seed(0)
    model, ids = HSPMNForCausalLM(config).train(), tokens(2, 9) % config.vocab_size
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    found = [outputs.loss, outputs.logits, *(p.grad for p in model.parameters()), *model.buffers()]
    assert all(x.isfinite().all() for x in found if x is not None)
    assert model.eval()(ids).logits.isfinite().all()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(fields_of_a_config())
def test_what_a_config_accepts_builds_and_stays_finite(fields):
    check_fields(fields)


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


@pytest.mark.parametrize("field, value", [("sparsity_k", 3.0), ("rope_parameters", {"rope_theta": float("nan")})])
def test_override_in_loading_is_refused_at_once(tiny_config, tmp_path, field, value):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=field):
        HSPMNConfig.from_pretrained(tmp_path, **{field: value})


def test_refusals_name_what_would_be_valid():
    with pytest.raises(ValueError, match="router_initial_tokens=4 .*router_mode='threshold'"):
        HSPMNConfig(router_mode="topk", router_initial_tokens=4)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 .*set head_dim=16"):
        HSPMNConfig(kv_cache_dtype="int4", head_dim=12)
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
