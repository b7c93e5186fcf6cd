"""The specification against plainer mathematics, and its gradients against finite differences, in float64 on CPU."""

from unittest import mock

import pytest
import torch
from hspmn import reference_hspmn
from hspmn.block_hspmn import ReflexiveStream
from hspmn.operations_hspmn import take_rows
from hspmn.reference_hspmn import (
    add_sinks_ref,
    causal_conv_ref,
    compact_ref,
    interval_attention_ref,
    linear_attention_recurrent_ref,
    linear_attention_ref,
    local_attention_ref,
    log_decay_ref,
    merge_ref,
    quantize_ref,
    read_slots_ref,
    reflexive_merge_ref,
    route_ref,
    split_heads_ref,
    sqsk_attention_ref,
    take_rows_ref,
    write_slots_ref,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def query_key_value(B, T, G, R, E, V=None, seed=0):
    return normal(B, T, G * R, E, seed=seed), normal(B, T, G, E, seed=seed + 1), normal(B, T, G, V or E, seed=seed + 2)


def naive_attention(q_BTHE, k_BSGE, v_BSGE, visible_BTS):
    """Softmax attention with an explicit mask and expanded heads; rows that see nothing give zeros."""
    R = q_BTHE.shape[2] // k_BSGE.shape[2]
    k, v = k_BSGE.repeat_interleave(R, 2), v_BSGE.repeat_interleave(R, 2)
    scores = torch.einsum("bthe,bshe->bhts", q_BTHE, k) / q_BTHE.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible_BTS[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhts,bshe->bthe", weights, v)


@st.composite
def documents(draw, B, T, past=4):
    """start_BT: documents at drawn places; the first of a row may reach up to `past` tokens back."""
    rows = []
    for _ in range(B):
        starts = sorted(draw(st.sets(st.integers(1, T - 1), max_size=3))) if T > 1 else []
        first = draw(st.integers(-past, 0))
        rows.append([max([first, *(s for s in starts if s <= t)]) for t in range(T)])
    return torch.tensor(rows)


@st.composite
def attention_shapes(draw, longest=40):
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    return B, T, draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))


# Routing and compaction


def test_route_bias_moves_the_decision_and_never_the_gate():
    h, weight = normal(2, 9, 8), normal(8)
    score, gate, low = route_ref(h, weight, torch.tensor(-1.0), 0.0)
    same_score, same_gate, high = route_ref(h, weight, torch.tensor(1.0), 0.0)
    assert torch.equal(score, same_score) and torch.equal(gate, same_gate)
    assert torch.equal(low, score > 1.0) and torch.equal(high, score > -1.0)
    assert low.sum() < high.sum()


def test_route_gate_is_the_sigmoid_above_the_noise_floor_and_zero_below():
    score, gate, _ = route_ref(normal(4, 50, 8), normal(8), torch.tensor(0.0), 0.3)
    probability = score.sigmoid()
    assert ((probability < 0.3).any() and (probability > 0.3).any()).item()
    torch.testing.assert_close(gate, torch.where(probability < 0.3, 0, probability), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_route_computes_in_float32_under_low_precision_and_autocast(dtype):
    h, weight = normal(2, 64, 96).to(dtype), normal(96).float()
    with torch.autocast("cpu", torch.bfloat16):
        score, gate, _ = route_ref(h, weight, torch.tensor(0.0), 0.05)
    assert score.dtype == gate.dtype == torch.float32
    torch.testing.assert_close(score.double(), 2 * (h.double() @ weight.double()) / 96**0.5, rtol=1e-5, atol=1e-5)


@PROPERTY
@given(st.data())
def test_compaction_keeps_order_and_drops_the_latest_past_the_capacity(data):
    B, T, capacity = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 22))
    mask = data.draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B))
    index, slot, count = compact_ref(torch.tensor(mask), capacity)
    assert index.shape == (B, capacity)
    for row in range(B):
        kept = [t for t in range(T) if mask[row][t]][:capacity]
        assert index[row].tolist() == kept + [-1] * (capacity - len(kept))
        assert slot[row].tolist() == [kept.index(t) if t in kept else -1 for t in range(T)]
        assert count[row] == len(kept)


def test_take_rows_gives_zeros_for_empty_slots():
    x = normal(2, 5, 3, 2)
    index = torch.tensor([[4, -1, 0], [-1, -1, 2]])
    taken = take_rows_ref(x, index)
    assert torch.equal(taken[0, [0, 2]], x[0, [4, 0]]) and torch.equal(taken[1, 2], x[1, 2])
    assert not taken[0, 1].any() and not taken[1, :2].any()


def test_take_rows_backward_is_that_of_the_reference():
    index, slot, _ = compact_ref(normal(3, 11) > 0.2, 5)
    x, weight = normal(3, 11, 4).requires_grad_(), normal(3, 5, 4)
    (expected,) = torch.autograd.grad((take_rows_ref(x, index) * weight).sum(), x)
    (grad,) = torch.autograd.grad((take_rows(x, index, slot) * weight).sum(), x)
    assert torch.equal(grad, expected)
    assert grad.any()


def test_merge_adds_gated_rows_at_their_tokens():
    index, slot, count = compact_ref(torch.tensor([[False, True, False, True]]), 3)
    reflexive, contextual = normal(1, 4, 2, 3), normal(1, 3, 2, 3)
    gate = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    merged = merge_ref(reflexive, contextual, gate, slot)
    torch.testing.assert_close(merged[:, 1], reflexive[:, 1] + 0.2 * contextual[:, 0], **EXACT)
    torch.testing.assert_close(merged[:, 3], reflexive[:, 3] + 0.4 * contextual[:, 1], **EXACT)
    assert torch.equal(merged[:, ::2], reflexive[:, ::2])


# Linear attention


@PROPERTY
@given(st.data())
def test_chunkwise_linear_attention_is_the_recurrence(data):
    B, T, G, R, E = data.draw(attention_shapes())
    V = data.draw(st.integers(1, 4))
    q, k, v = query_key_value(B, T, G, R, E, V)
    log_decay = -normal(B, T, G * R).square() * data.draw(st.sampled_from([0.0, 0.1, 3.0]))
    start = data.draw(st.none() | documents(B, T))
    length = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B).map(torch.tensor))
    if start is not None and length is not None:  # no document begins in the padding
        start = start.masked_fill(torch.arange(T) >= length[:, None], -9).cummax(1).values
    state = normal(B, G * R, E, V, seed=9) if data.draw(st.booleans()) else None
    chunk, spans = data.draw(st.sampled_from([1, 3, 8, 64])), data.draw(st.sampled_from([1, 2, 100]))
    with mock.patch.multiple(reference_hspmn, LINEAR_CHUNK=chunk, LINEAR_SPAN=chunk * spans):
        out, last = linear_attention_ref(q, k, v, log_decay, start, length, state)
    zero = q.new_zeros(B, G * R, E, V)
    expected, last_expected = linear_attention_recurrent_ref(
        q, k, v, log_decay, start, length, zero if state is None else state
    )
    real = torch.ones(B, T, dtype=torch.bool) if length is None else torch.arange(T) < length[:, None]
    torch.testing.assert_close(out[real], expected[real], **EXACT)
    torch.testing.assert_close(last, last_expected, **EXACT)


def test_recurrence_is_a_sum_of_decayed_outer_products():
    q, k, v = query_key_value(1, 6, 1, 2, 3)
    log_decay = -normal(1, 6, 2).square()
    out, state = linear_attention_recurrent_ref(q, k, v, log_decay, None, None, q.new_zeros(1, 2, 3, 3))
    for head in range(2):
        total = sum(log_decay[0, s + 1 :, head].sum().exp() * torch.outer(k[0, s, 0], v[0, s, 0]) for s in range(6))
        torch.testing.assert_close(state[0, head], total, **EXACT)
        torch.testing.assert_close(out[0, 5, head], q[0, 5, head] @ total, **EXACT)


def test_every_state_forgets_within_the_horizon(tiny_config):
    stream = ReflexiveStream(tiny_config(linear_attention_horizon=8))
    decay_BTH = 10 * normal(1, 50, 4)
    assert (log_decay_ref(decay_BTH, *stream.decay_parameters()) <= -1 / 8).all()
    with torch.no_grad():
        stream.decay_log_rate.fill_(-200.0)  # the slowest that training could reach
    slowest = log_decay_ref(decay_BTH, *stream.decay_parameters())
    torch.testing.assert_close(slowest, torch.full_like(slowest, -1 / 8), **EXACT)


def test_the_bound_on_states_tightens_in_training_alone(tiny_config):
    stream, decay_BTH = ReflexiveStream(tiny_config(linear_attention_horizon=8)).double(), normal(1, 5, 4)
    bounded = log_decay_ref(decay_BTH, *stream.decay_parameters())
    for progress, least in ((0.0, 0.0), (0.5, 1 / 64), (1.0, 1 / 8)):
        stream.set_progress(progress)
        got = log_decay_ref(decay_BTH, *stream.train().decay_parameters())
        torch.testing.assert_close(got, bounded + 1 / 8 - least, **EXACT)
        assert torch.equal(log_decay_ref(decay_BTH, *stream.eval().decay_parameters()), bounded)


def test_document_start_forgets_the_state_and_everything_before():
    q, k, v = query_key_value(1, 12, 1, 1, 4)
    log_decay, state = -normal(1, 12, 1).square(), normal(1, 1, 4, 4)
    start = torch.tensor([[-3] * 5 + [5] * 7])
    out, last = linear_attention_ref(q, k, v, log_decay, start, None, state)
    alone, last_alone = linear_attention_ref(q[:, 5:], k[:, 5:], v[:, 5:], log_decay[:, 5:], None, None, None)
    torch.testing.assert_close(out[:, 5:], alone, **EXACT)
    torch.testing.assert_close(last, last_alone, **EXACT)


def test_linear_attention_survives_total_forgetting_in_float32():
    q, k, v = (x.float().requires_grad_() for x in query_key_value(1, 130, 1, 2, 4))
    log_decay = torch.full((1, 130, 2), -200.0, requires_grad=True)
    out, _ = linear_attention_ref(q, k, v, log_decay, None, None, None)
    out.sum().backward()
    alone = torch.einsum("bthe,btxe->bth", q, k)[..., None] * v
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)
    assert all(x.grad.isfinite().all() for x in (q, k, v, log_decay))


# Softmax attention


@PROPERTY
@given(st.data())
def test_interval_attention_is_masked_attention(data):
    (B, T, G, R, E), S = data.draw(attention_shapes(20)), data.draw(st.integers(1, 20))
    q, k, v = normal(B, T, G * R, E), normal(B, S, G, E), normal(B, S, G, E, seed=1)
    first = data.draw(st.lists(st.lists(st.integers(0, S), min_size=T, max_size=T), min_size=B, max_size=B))
    last = data.draw(st.lists(st.lists(st.integers(-1, S - 1), min_size=T, max_size=T), min_size=B, max_size=B))
    first, last = torch.tensor(first), torch.tensor(last)
    with mock.patch.object(reference_hspmn, "QUERY_SPAN", data.draw(st.sampled_from([3, 1024]))):
        out, lse = interval_attention_ref(q, k, v, first, last)
    visible = (torch.arange(S) >= first[..., None]) & (torch.arange(S) <= last[..., None])
    torch.testing.assert_close(out, naive_attention(q, k, v, visible), **EXACT)
    assert torch.equal(lse.isneginf(), ~visible.any(-1)[..., None].expand_as(lse))


@PROPERTY
@given(st.data())
def test_banded_local_attention_is_interval_attention(data):
    B, T, G, R, E = data.draw(attention_shapes())
    window = data.draw(st.integers(1, 12))
    q, k, v = query_key_value(B, T, G, R, E)
    start = data.draw(st.none() | documents(B, T, past=window + 2))
    past_k = past_v = None
    if data.draw(st.booleans()):
        past_k, past_v = normal(B, window, G, E, seed=7), normal(B, window, G, E, seed=8)
    out, lse = local_attention_ref(q, k, v, start, window, past_k, past_v)
    token = torch.arange(T)
    first = token - window + 1 if start is None else torch.maximum(start, token - window + 1)
    first = (first.clamp(min=0) if start is None else first).expand(B, T) + window
    zeros = k.new_zeros(B, window, G, E)
    keys = torch.cat([zeros if past_k is None else past_k, k], 1)
    values = torch.cat([zeros if past_v is None else past_v, v], 1)
    expected, expected_lse = interval_attention_ref(q, keys, values, first, (token + window).expand(B, T))
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse, **EXACT)


@PROPERTY
@given(st.data())
def test_sqsk_is_plain_masked_attention_at_the_original_positions(data):
    B, T, G, R, E = data.draw(attention_shapes(30))
    q, k, v = query_key_value(B, T, G, R, E)
    routed = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)))
    start = data.draw(documents(B, T, past=0))
    index, slot, count = compact_ref(routed, max(1, int(routed.sum(1).max()) + data.draw(st.integers(0, 2))))
    first = (routed.long().cumsum(1) - routed.long()).gather(1, start).gather(1, index.clamp(min=0))
    rows = (take_rows_ref(x, index) for x in (q, k, v))
    out, _ = sqsk_attention_ref(*rows, first, torch.zeros_like(count), count)
    token = torch.arange(T)
    visible = (token <= token[:, None]) & (token >= start[..., None]) & routed[:, None] & routed[..., None]
    torch.testing.assert_close(take_rows_ref(out, slot), naive_attention(q, k, v, visible), **EXACT)


def test_sqsk_is_dense_causal_attention_on_the_compacted_rows():
    q, k, v = query_key_value(3, 17, 2, 2, 4)
    index, _, count = compact_ref(normal(3, 17) > 0.3, 17)
    out, _ = sqsk_attention_ref(*(take_rows_ref(x, index) for x in (q, k, v)), None, torch.zeros_like(count), count)
    for row, used in enumerate(count.tolist()):
        tokens = index[row, :used]
        dense = F.scaled_dot_product_attention(
            *(x[row : row + 1, tokens].transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[row, :used], dense[0].transpose(0, 1), **EXACT)
        assert not out[row, used:].any()


def test_sqsk_continues_ragged_cached_slots():
    q, k, v = query_key_value(2, 8, 1, 2, 4)
    cached, count = torch.tensor([3, 0]), torch.tensor([4, 2])
    whole, _ = sqsk_attention_ref(q, k, v, None, torch.zeros(2, dtype=torch.long), cached + count)
    rest, _ = sqsk_attention_ref(torch.stack([q[0, 3:7], q[1, :4]]), k, v, None, cached, count)
    torch.testing.assert_close(rest[0], whole[0, 3:7], **EXACT)
    torch.testing.assert_close(rest[1, :2], whole[1, :2], **EXACT)


@PROPERTY
@given(st.data())
def test_sinks_are_concatenated_keys(data):
    B, T, G, R, E = data.draw(attention_shapes(12))
    N = data.draw(st.integers(1, 3))
    q, k, v = query_key_value(B, T, G, R, E)
    sink_k, sink_v = normal(N, G, E, seed=3), normal(N, G, E, seed=4)
    token = torch.arange(T).expand(B, T)
    first = token - data.draw(st.integers(-1, 3))  # -1: intervals are empty, only the sinks are seen
    out = add_sinks_ref(*interval_attention_ref(q, k, v, first, token), q, sink_k, sink_v)
    keys, values = (torch.cat([s.expand(B, N, G, E), x], 1) for s, x in ((sink_k, k), (sink_v, v)))
    visible = (torch.arange(T) >= first[..., None]) & (torch.arange(T) <= token[..., None])
    visible = torch.cat([torch.ones(B, T, N, dtype=torch.bool), visible], 2)
    torch.testing.assert_close(out, naive_attention(q, keys, values, visible), **EXACT)


@PROPERTY
@given(st.data())
def test_causal_conv_is_a_convolution_of_each_document(data):
    B, T, C, L = 2, data.draw(st.integers(1, 20)), 3, data.draw(st.integers(2, 5))
    x, weight, history = normal(B, T, C), normal(C, L), normal(B, L - 1, C, seed=5)
    start = data.draw(st.none() | documents(B, T, past=6))
    out = causal_conv_ref(x, weight, start, history)
    for row in range(B):
        for t in range(T):
            first = -(L - 1) if start is None else start[row, t].item()
            taps = [s for s in range(t - L + 1, t + 1) if s >= first]
            past = torch.cat([history[row], x[row]])
            expected = sum(weight[:, s - t - 1] * past[s + L - 1] for s in taps)
            torch.testing.assert_close(out[row, t], expected, **EXACT)


# Gradients


def gradient_cases():
    start = torch.tensor([[-2, -2, -2, 3, 3, 3, 3], [0] * 7])
    length, count = torch.tensor([7, 4]), torch.tensor([3, 0])
    q, k, v = query_key_value(2, 7, 1, 2, 2)
    index, slot, _ = compact_ref(torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0]]).bool(), 3)
    sinks = normal(2, 1, 2, seed=3), normal(2, 1, 2, seed=4)
    token = torch.arange(7).expand(2, 7)
    return {
        "linear": (
            lambda *x: linear_attention_ref(*x[:4], start, length, x[4]),
            (q, k, v, -normal(2, 7, 2).square(), normal(2, 2, 2, 2)),
        ),
        "recurrent": (
            lambda *x: linear_attention_recurrent_ref(*x[:4], start, length, x[4]),
            (q, k, v, -normal(2, 7, 2).square(), normal(2, 2, 2, 2)),
        ),
        "local": (
            lambda *x: local_attention_ref(*x[:3], start, 3, *x[3:])[0],
            (q, k, v, normal(2, 3, 1, 2), normal(2, 3, 1, 2, seed=6)),
        ),
        "sqsk": (
            lambda *x: sqsk_attention_ref(*x, None, torch.tensor([2, 1]), count)[0],
            (normal(2, 4, 2, 2), k, v),
        ),
        "sinks": (
            lambda q, k, v, *s: add_sinks_ref(*interval_attention_ref(q, k, v, token - 1, token), q, *s),
            (q, k, v, *sinks),
        ),
        "conv": (
            lambda *x: causal_conv_ref(*x[:2], start, x[2]),
            (normal(2, 7, 3), normal(3, 4), normal(2, 3, 3, seed=2)),
        ),
        "take_rows": (lambda x: take_rows(x, index, slot), (normal(2, 7, 3),)),
        "put_rows": (lambda x: take_rows(x, slot, index), (normal(2, 3, 3),)),
        "route": (lambda h, w: route_ref(h, w, torch.tensor(0.0), 0.0)[:2], (normal(2, 4, 3), normal(3))),
    }


@pytest.mark.parametrize("name", gradient_cases())
def test_gradients_match_finite_differences(name):
    function, inputs = gradient_cases()[name]
    with mock.patch.multiple(reference_hspmn, LINEAR_CHUNK=3, LINEAR_SPAN=6, QUERY_SPAN=3):
        assert gradcheck(function, [x.detach().requires_grad_() for x in inputs])


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(sinks):
    inputs = [x.float().requires_grad_() for x in (*query_key_value(2, 4, 1, 2, 4), normal(2, 1, 4), normal(2, 1, 4))]
    q, k, v, *sink = inputs
    out, lse = sqsk_attention_ref(q, k, v, None, torch.zeros(2, dtype=torch.long), torch.tensor([2, 0]))
    assert not out[0, 2:].any() and not out[1].any() and out[0, :2].any()
    if sinks:
        out = add_sinks_ref(out, lse, q, *sink)
    (out.square().sum() + out.sum()).backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (inputs if sinks else inputs[:3]))


def test_linear_state_stays_float32_under_autocast():
    q, k, v = (x.float() for x in query_key_value(2, 70, 2, 2, 4))
    state = normal(2, 4, 4, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, kept = linear_attention_ref(q, torch.zeros_like(k), v, torch.zeros(2, 70, 4), None, None, state)
    torch.testing.assert_close(kept, state, rtol=1e-6, atol=1e-6)


# The forms that the kernels fuse


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("mode", ["gated", "elu"])
@pytest.mark.parametrize("history", [None, 0.7])
def test_split_heads_is_the_layers_one_by_one(mode, history, taps):
    B, T, H, G, E = 2, 9, 4, 2, 8
    x, weight = normal(B, T, (H + 2 * G) * E), normal((H + 2 * G) * E, taps)
    q_norm, k_norm, cos, sin = normal(E), normal(E, seed=1), normal(B, T, E), normal(B, T, E, seed=1)
    start = torch.tensor([[-2] * 4 + [4] * 5, [0] * 8 + [8]])
    past = x.new_full((B, taps - 1, x.shape[2]), history or 0.0)
    heads = causal_conv_ref(x, weight, start, past) if taps > 1 else x
    q, k, v = heads.unflatten(-1, (-1, E)).split((H, G, G), 2)
    norms = F.rms_norm(q, (E,), q_norm, 1e-6), F.rms_norm(k, (E,), k_norm, 1e-6)
    rotated = apply_rotary_pos_emb(*norms, cos, sin, 2)
    linear = [F.normalize(F.silu(x), dim=-1) if mode == "gated" else F.elu(x).add(1) for x in (q, k)]
    given = None if history is None else past
    got = split_heads_ref(x, weight, given, start, cos, sin, q_norm, k_norm, kv_heads=G, eps=1e-6, mode=mode)
    for out, want in zip(got, (*linear, *rotated, v), strict=True):
        torch.testing.assert_close(out, want, **EXACT)


def test_reflexive_merge_is_the_sum_of_both_attentions():
    q, k, v = query_key_value(2, 11, 2, 2, 4)
    linear, gate, weight = normal(2, 11, 4, 4, seed=5), normal(2, 11, 4), normal(4)
    got = reflexive_merge_ref(q, k, v, None, 3, linear, gate, weight, 1e-6)
    want = F.rms_norm(linear, (4,), weight, 1e-6) * gate.sigmoid()[..., None]
    torch.testing.assert_close(got, want + local_attention_ref(q, k, v, None, 3)[0], **EXACT)


def test_attention_over_no_keys_gives_zeros():
    q, k, v = query_key_value(2, 3, 2, 2, 4)
    nothing = torch.zeros(2, 3, dtype=torch.long)
    for keys, last in ((0, nothing - 1), (3, nothing - 1)):
        q.requires_grad_()
        out, lse = interval_attention_ref(q, k[:, :keys], v[:, :keys], nothing, last)
        assert not out.any() and (lse == float("-inf")).all() and lse.dtype == torch.float64
        if keys:
            out.sum().backward()
            assert not q.grad.any()


def test_whole_numbers_are_within_half_a_step_of_what_they_stand_for():
    x = normal(2, 5, 3, 16) * torch.tensor([1e-20, 1.0, 1e20])[:, None]
    x[0, 0], x[0, 1] = 0.0, 1e-40
    whole, scale = quantize_ref(x.float())
    assert whole.dtype == torch.int8 and torch.equal(whole.abs().amax(-1) == 127, scale > 0)
    assert not whole[0, :2].any() and not scale[0, :2].any()
    error = (whole * scale[..., None] - x).abs() / scale.clamp(min=1e-30)[..., None]
    assert error.max() <= 0.5 + 1e-4 and error.max() > 0.4


def test_a_store_gives_back_what_was_put_into_it():
    x, at = normal(2, 3, 2, 4), (torch.arange(2)[:, None], torch.tensor([[1, 4, 0], [2, 5, 5]]))
    for kind, slots in ((torch.float64, 0), (torch.int8, 6)):
        kept, scales = torch.zeros(2, 6, 2, 4, dtype=kind), torch.zeros(2, slots, 2, dtype=torch.float64)
        write_slots_ref(kept, scales, at, x)
        got = read_slots_ref(kept, scales, torch.float64)
        assert (got[0, [1, 4, 0]] - x[0]).norm() <= 0.01 * x.norm() * (kind == torch.int8)
        assert (got[1, 2] - x[1, 0]).norm() <= 0.01 * x.norm() * (kind == torch.int8)
        assert not got[0, [2, 3, 5]].any() and not got[1, [0, 1, 3, 4]].any()
