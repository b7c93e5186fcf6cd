"""The gated delta rule of the comparison against its recurrence, in float64 and as it trains."""

import pytest
import torch
from hspmn import operations_hspmn as ops
from hspmn.benchmarks.delta import use_delta_rule, written_values
from torch.autograd import gradcheck
from torch.nn import functional as F

DOCUMENTS = torch.tensor([[0] * 5 + [5] * 15 + [20] * 17, [0] * 16 + [16] * 21])


def inputs(B, T, G, R, E, V, dtype=torch.float64):
    """q, k of unit length, v, log-decays and strengths."""
    draw = torch.Generator().manual_seed(T)
    q, k, v, a, b = (
        torch.randn(B, T, *shape, generator=draw, dtype=torch.float64)
        for shape in ((G * R, E), (G, E), (G, V), (G * R,), (G * R,))
    )
    kinds = 3 * [dtype] + 2 * [torch.promote_types(dtype, torch.float32)]
    data = q, F.normalize(k, dim=-1), v, -0.3 * a.square(), b.sigmoid()
    return [x.to(kind) for x, kind in zip(data, kinds, strict=True)]


def delta_attention(q, k, v, a, b, start=None, **options):
    u = written_values(k, v, a, b, start, **options)
    return ops.linear_attention.reference(q, k.repeat_interleave(b.shape[2] // k.shape[2], 2), u, a, start, None, None)


def recurrence(q, k, v, a, b, start):
    """S_t = g_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T and S_t^T q_t, token by token."""
    k, v = (x.repeat_interleave(b.shape[2] // x.shape[2], 2) for x in (k, v))
    state, outputs = q.new_zeros(*b.shape[::2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[1]):
        key, beta, decay = k[:, t, :, :, None], b[:, t, :, None, None], a[:, t].exp()[..., None, None]
        if start is not None:
            decay = decay * (start[:, t] < t)[:, None, None, None]
        state = decay * (state - beta * key @ (key.mT @ state)) + beta * key @ v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("start", [None, DOCUMENTS], ids=["row", "documents"])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_chunks_of_the_delta_rule_are_the_recurrence(chunk, start):
    data = inputs(2, 37, 2, 3, 6, 5)
    torch.testing.assert_close(delta_attention(*data, start, chunk=chunk), recurrence(*data, start))


def test_gradients_of_written_values_are_those_of_finite_differences():
    data = [x.requires_grad_() for x in inputs(1, 11, 2, 2, 3, 3)[1:]]
    start = torch.tensor([[0] * 3 + [3] * 8])
    assert gradcheck(lambda *x: written_values(*x, start, 4), data)


def test_equal_keys_and_total_forgetting_in_bfloat16_under_autocast():
    """Powers of the system of equal keys would reach 1e18 where the values stay small; 200 nats have no inverse."""
    q, k, v, a, b = inputs(1, 200, 1, 2, 32, 32, torch.bfloat16)
    k, b = k[:, :1].expand_as(k), torch.ones_like(b)
    for decay in (torch.full_like(a, -1 / 128), torch.where(a < -0.5, -200.0, a)):
        expected = recurrence(*(x.double() for x in (q, k, v, decay, b)), None)
        data = [x.clone().requires_grad_() for x in (q, k, v, decay, b)]
        with torch.autocast("cpu", torch.bfloat16):
            out = delta_attention(*data)
        assert (out - expected).norm() < 0.05 * expected.norm()  # equal keys add up what u is rounded by
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().sum(), data))


def test_the_arm_is_one_graph_keeps_documents_apart_and_refuses_a_cache(tiny_model):
    model = tiny_model(num_hidden_layers=1, sparsity_k=0.4)
    use_delta_rule(model)
    ids, places = torch.arange(90)[None] % model.config.vocab_size, torch.cat([torch.arange(40), torch.arange(50)])
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, use_cache=True)
    alone = model(ids[:, 40:], use_cache=False).logits
    (layer,) = model.base_model.layers
    layer.compile(backend="eager", fullgraph=True)
    packed = model(ids, position_ids=places[None], use_cache=False).logits
    torch.testing.assert_close(packed[:, 40:], alone, rtol=1e-4, atol=1e-5)
    packed.square().sum().backward()
    assert layer.reflexive.beta_proj.weight.grad.norm() > 0
