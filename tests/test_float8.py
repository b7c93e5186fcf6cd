"""Weights in float8: which ones, how near, through a cache, with gradients, and what is refused."""

import copy

import pytest
import torch
from caches import CLOSE, feed, tokens
from hspmn.cache_hspmn import HSPMNCache
from hspmn.float8_hspmn import LAYERS, METHOD, Float8Linear
from hspmn.modeling_hspmn import HSPMNForCausalLM
from hspmn.operations_hspmn import SCALINGS, check_float8, dequantize_rows, quantize_rows
from torch import nn

SIZES = {"intermediate_size": 64, "routed_intermediate_size": 96}  # multiples of 32


@pytest.fixture
def quantized(tiny_model, tmp_path):
    """Function from a scaling to a model, and to the same one loaded in float8."""

    def build(scaling):
        model, chosen = tiny_model(**SIZES), {"quant_method": METHOD, "scaling": scaling}
        model.save_pretrained(tmp_path)
        return model, HSPMNForCausalLM.from_pretrained(tmp_path, quantization_config=chosen).eval()

    return build


@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_of_blocks_are_in_float8_and_nothing_else(quantized, scaling):
    """By the dtypes of a cast model; each weight is within half a step of e4m3, of which 8 lie between powers of 2."""
    plain, model = quantized(scaling)
    names = {name for name, layer in plain.named_modules() if name.rpartition(".")[2] in LAYERS}
    assert names == {name for name, layer in model.named_modules() if type(layer) is Float8Linear}
    for name in names:
        layer, weight = model.get_submodule(name), plain.get_submodule(name).weight
        error = (dequantize_rows(layer.weight, layer.weight_scale) - weight).abs()
        assert (error <= weight.abs() / 16 + weight.abs().amax(-1, keepdim=True) * 2**-16).all(), name
    kept = {name: x.dtype for name, x in model.state_dict().items() if x.dtype != torch.float32}
    model.to(torch.bfloat16)
    others = {name: x.dtype for name, x in model.state_dict().items() if x.dtype != torch.bfloat16}
    assert {n: kind for n, kind in others.items() if ".router." not in n and "weight_scale" not in n} == {
        name: kind for name, kind in kept.items() if "weight_scale" not in name
    }
    assert {kind for n, kind in others.items() if "weight_scale" in n} == {SCALINGS[scaling][1]}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_float8_model_is_near_and_the_same_through_a_cache(quantized, scaling):
    plain, model = quantized(scaling)
    ids = tokens(2, 23)
    with torch.no_grad():
        want, got = plain(ids, use_cache=False), model(ids, use_cache=False)
        assert 0 < (got.logits - want.logits).norm() < 0.2 * want.logits.norm()
        pieces = feed(model, ids, HSPMNCache(model.config), [9, 2, 12])
        singles = feed(model, ids, HSPMNCache(model.config), [9, 1, 1, 12])  # whose inputs rowwise does not round
    torch.testing.assert_close(pieces[0], got.logits, **CLOSE)
    assert torch.equal(pieces[1], got.router_mask)
    apart = (singles[0] - got.logits)[:, 9:11].norm() / got.logits[:, 9:11].norm()
    assert 1e-3 * (scaling == "rowwise") < apart < 0.2


def test_an_input_with_gradients_meets_the_weights_that_dequantize_gives(quantized):
    _, model = quantized("rowwise")
    plain = copy.deepcopy(model).dequantize()
    assert not hasattr(plain.config, "quantization_config")
    x, grads = torch.randn(2, 9, 32), []
    for layer in (model.model.layers[0].o_proj, plain.model.layers[0].o_proj):
        given = x.clone().requires_grad_()
        layer(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rows_of_extreme_values_are_quantized(scaling):
    """Nothing overflows to NaN, zeros stay zeros, and NaN is not hidden."""
    x = torch.tensor([0.0, 1e-38, 1e-20, 1.0, 3e38])[:, None] * torch.linspace(-1, 1, 64)
    values, scale = quantize_rows(x, scaling)
    assert values.float().isfinite().all() and scale.float().isfinite().all() and not values[0].float().any()
    near = dequantize_rows(values, scale)
    assert ((near - x)[2:].abs() <= x[2:].abs() / 16 + x[2:].abs().amax(-1, keepdim=True) * 2**-15).all()
    assert quantize_rows(torch.full((1, 32), torch.nan), scaling)[0].float().isnan().all()
    assert dequantize_rows(*quantize_rows(x[:0], scaling)).shape == (0, 64)


@pytest.mark.parametrize("attempt, message", [
    (lambda load: load(scaling="tensorwise"), "scaling must be one of rowwise, mx, got 'tensorwise'"),
    (lambda load: load(bits=4), "has no field bits"),
    (lambda load: Float8Linear.like(nn.Linear(40, 8, bias=False), "mx"), "multiples of 32, got 40"),
    (lambda load: Float8Linear.like(nn.Linear(32, 8), "mx"), "with a bias"),
    (lambda load: Float8Linear.of(nn.Linear(32, 8, bias=False, device="meta"), "mx"), "offloaded"),
    (lambda load: check_float8(80), "8.9 or more, the device has 8.0"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tiny_model, tmp_path, attempt, message):
    tiny_model().save_pretrained(tmp_path)

    def load(**fields):
        HSPMNForCausalLM.from_pretrained(tmp_path, quantization_config={"quant_method": METHOD} | fields)

    with pytest.raises(ValueError, match=message):
        attempt(load)
