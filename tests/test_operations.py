"""The specification against plainer mathematics, and its gradients against finite differences, in float64 on CPU."""

from inspect import signature
from unittest import mock

import pytest
import torch
from hspmn import operations_hspmn as ops
from hspmn.benchmarks.cases import CASES, Sizes, case
from hspmn.block_hspmn import ReflexiveStream
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


def naive_attention(q_BTHE, k_BSGE, v_BSGE, visible_BTS, log_gate_BS=None):
    """Softmax attention with an explicit mask and expanded heads; rows that see nothing give zeros."""
    R = q_BTHE.shape[2] // k_BSGE.shape[2]
    k, v = k_BSGE.repeat_interleave(R, 2), v_BSGE.repeat_interleave(R, 2)
    scores = torch.einsum("bthe,bshe->bhts", q_BTHE, k) / q_BTHE.shape[-1] ** 0.5
    scores = scores if log_gate_BS is None else scores + log_gate_BS[:, None, None]
    scores = scores.masked_fill(~visible_BTS[:, None], float("-inf"))
    return torch.einsum("bhts,bshe->bthe", scores.softmax(-1).nan_to_num(0.0), v), scores.logsumexp(-1).mT


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


def masks(B, T):
    """Strategy of boolean tensors [B, T]."""
    return st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B).map(torch.tensor)


def lengths(B, T):
    return st.lists(st.integers(0, T), min_size=B, max_size=B).map(torch.tensor)


def unpadded(start_BT, length_B):
    """No document begins in the padding."""
    return start_BT.masked_fill(torch.arange(start_BT.shape[1]) >= length_B[:, None], -99).cummax(1).values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_are_float32_sums_under_low_precision_and_autocast(dtype):
    h, weight = normal(2, 64, 96).to(dtype), normal(96).float()
    with torch.autocast("cpu", torch.bfloat16):
        score = ops.router_score(h, weight)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), 2 * (h.double() @ weight.double()) / 96**0.5, rtol=1e-5, atol=1e-5)


@PROPERTY
@given(st.data())
def test_route_decides_token_by_token(data):
    """The bias moves the decision and never the gate; the noise floor the gate and never the decision."""
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    score, bias = normal(B, T), data.draw(st.floats(-1, 1))
    initial = data.draw(st.sampled_from([0, 3, ops.EVERY_TOKEN]))
    capacity, length = data.draw(st.integers(0, 22)), data.draw(st.none() | lengths(B, T))
    start = data.draw(st.none() | documents(B, T) | documents(B, 1))
    inputs = (score, torch.tensor(bias), start, length, 0.3, initial, capacity)
    gate, index, slot, count, sums = ops.route.reference(*inputs)
    probability = score.sigmoid()
    torch.testing.assert_close(gate, torch.where(probability < 0.3, 0, probability), **EXACT)
    for row in range(B):
        real = T if length is None else length[row]
        begins = [0] * T if start is None else start[row].expand(T).tolist()
        wanted = [t for t in range(real) if score[row, t] + bias > 0 or t - begins[t] < initial]
        kept = wanted[:capacity]
        assert index[row].tolist() == kept + [-1] * (capacity - len(kept))
        assert slot[row].tolist() == [kept.index(t) if t in kept else -1 for t in range(T)]
        assert sums[row, :2].tolist() == [len(wanted), len(wanted) - len(kept)] and count[row] == len(kept)
        entropy = torch.distributions.Bernoulli(logits=score[row, :real]).entropy().sum()
        torch.testing.assert_close(sums[row, 2:], torch.stack([entropy, probability[row, :real].sum()]), **EXACT)


@PROPERTY
@given(st.data())
def test_chunkwise_linear_attention_is_the_recurrence(data):
    B, T, G, R, E = data.draw(attention_shapes())
    V = data.draw(st.integers(1, 4))
    q, k, v = query_key_value(B, T, G, R, E, V)
    decay = -normal(B, T, G * R).square() * data.draw(st.sampled_from([0.0, 0.1, 3.0]))
    start, length = data.draw(st.none() | documents(B, T) | documents(B, 1)), data.draw(st.none() | lengths(B, T))
    if start is not None and length is not None:
        start = unpadded(start, length)
    state = normal(B, G * R, E, V, seed=9) if data.draw(st.booleans()) else None
    chunk, spans = data.draw(st.sampled_from([1, 3, 8, 64])), data.draw(st.sampled_from([1, 2, 100]))
    before = q.new_zeros(B, G * R, E, V) if state is None else state.clone()
    with mock.patch.multiple(ops, LINEAR_CHUNK=chunk, LINEAR_SPAN=chunk * spans):
        out = ops.linear_attention.reference(q, k, v, decay, start, length, state)
    expected, last = ops.linear_attention_recurrent(q, k, v, decay, start, length, before)
    real = torch.ones(B, T, dtype=torch.bool) if length is None else torch.arange(T) < length[:, None]
    torch.testing.assert_close(out[real], expected[real], **EXACT)
    if state is not None:
        torch.testing.assert_close(state, last, **EXACT)


def test_recurrence_is_a_sum_of_decayed_outer_products():
    """A document's start forgets the state before the call and everything since."""
    (q, k, v), decay, before = query_key_value(1, 6, 1, 2, 3), -normal(1, 6, 2).square(), normal(1, 2, 3, 3)
    for begin, start in ((0, None), (2, torch.tensor([[-3, -3, 2, 2, 2, 2]]))):
        out, state = ops.linear_attention_recurrent(q, k, v, decay, start, None, before)
        for head in range(2):
            total = decay[0, :, head].sum().exp() * before[0, head] * (start is None)
            for s in range(begin, 6):
                total = total + decay[0, s + 1 :, head].sum().exp() * torch.outer(k[0, s, 0], v[0, s, 0])
            torch.testing.assert_close(state[0, head], total, **EXACT)
            torch.testing.assert_close(out[0, 5, head], q[0, 5, head] @ total, **EXACT)


def test_every_state_forgets_within_the_horizon_and_its_bound_tightens_in_training_alone(tiny_config):
    stream, decay_BTH = ReflexiveStream(tiny_config(linear_attention_horizon=8)), 10 * normal(1, 50, 4)
    for progress, least in ((0.0, 0.0), (0.5, 1 / 64), (1.0, 1 / 8)):
        stream.set_progress(progress)
        assert stream.train().least_decay == least and stream.eval().least_decay == 1 / 8
    decays = (decay_BTH, stream.decay_log_rate, stream.decay_bias, stream.least_decay)
    assert (ops.log_decay(*decays) <= -1 / 8).all()
    with torch.no_grad():
        stream.decay_log_rate.fill_(-200.0)  # the slowest that training could reach
    torch.testing.assert_close(ops.log_decay(*decays), torch.full_like(decay_BTH, -1 / 8), **EXACT)


def test_linear_attention_in_float32_survives_total_forgetting_and_keeps_its_state_under_autocast():
    q, k, v = (x.float().requires_grad_() for x in query_key_value(1, 130, 1, 2, 4))
    decay = torch.full((1, 130, 2), -200.0, requires_grad=True)
    out = ops.linear_attention.reference(q, k, v, decay, None, None, None)
    alone = torch.einsum("bthe,btxe->bth", q, k)[..., None] * v
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, decay)))
    state = normal(1, 2, 4, 4).float()
    kept = state.clone()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ops.linear_attention.reference(q, torch.zeros_like(k), v, torch.zeros(1, 130, 2), None, None, kept)
    torch.testing.assert_close(kept, state, rtol=1e-6, atol=1e-6)


@PROPERTY
@given(st.data())
def test_local_attention_is_masked_attention_over_the_window_and_merges_with_the_linear_one(data):
    B, T, G, R, E = data.draw(attention_shapes())
    window, ring = data.draw(st.integers(1, 12)), (None, None, None)
    q, k, v = query_key_value(B, T, G, R, E)
    start = data.draw(st.none() | documents(B, T, past=window + 2) | documents(B, 1, past=window + 2))
    past = normal(2, B, window, G, E, seed=7)
    if data.draw(st.booleans()):
        seen = torch.tensor(data.draw(st.lists(st.integers(0, 99), min_size=B, max_size=B)))
        slot = (seen[:, None] + torch.arange(window)) % window  # of the tokens from the oldest on
        ring = (*torch.empty_like(past).scatter_(2, slot[None, ..., None, None].expand_as(past), past), seen)
    out, lse = ops.local_attention.reference(q, k, v, start, window, *ring)
    token = torch.arange(T)[:, None]
    begin = torch.zeros(B, 1, dtype=torch.long) if start is None else start
    begin = begin if ring[0] is not None else begin.clamp(min=0)
    key = torch.arange(-window, T)
    visible = (key <= token) & (key > token - window) & (key >= begin[..., None])
    keys, values = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    expected, expected_lse = naive_attention(q, keys, values, visible)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse, **EXACT)
    linear, gate, weight = normal(B, T, G * R, E, seed=5), normal(B, T, G * R), normal(E)
    merged = ops.reflexive_merge.reference(q, k, v, start, window, *ring, linear, gate, weight, 1e-6)
    added = F.rms_norm(linear, (E,), weight, 1e-6) * gate.sigmoid()[..., None]
    torch.testing.assert_close(merged, expected + added, **EXACT)


@PROPERTY
@given(st.data())
def test_sqsk_is_plain_masked_attention_at_the_original_positions(data):
    """Of routed tokens or, with log gates, of all: from tokens and, added to the reflexive stream, from the store."""
    B, T, G, R, E = data.draw(attention_shapes(30))
    q, k, v = query_key_value(B, T, G, R, E)
    start, every = data.draw(documents(B, T, past=0)), data.draw(st.booleans())
    index, slot, count = ops.compact(data.draw(masks(B, T)), data.draw(st.integers(1, T + 2)))
    reflexive, score = normal(B, T, G * R, E, seed=5), normal(B, T, seed=6)
    first, end = ops.first_slot(None if every else index, slot, start), ops.end_slot(slot) if every else None
    gate, log_gate = score.sigmoid(), F.logsigmoid(score) if every else None
    token, routed = torch.arange(T), slot >= 0
    visible = (token <= token[:, None]) & (token >= start[..., None]) & routed[:, None]
    expected, _ = naive_attention(q, k, v, visible if every else visible & routed[..., None], log_gate)
    with mock.patch.object(ops, "QUERY_SPAN", data.draw(st.sampled_from([3, 1024]))):
        kept = [None if x is None else ops.take_rows(x, index, slot) for x in (k, v, log_gate)]
        queries = q if every else ops.take_rows(q, index, slot)
        out, _ = ops.sqsk_attention.reference(queries, *kept, first, None, count, end)
        torch.testing.assert_close(out if every else ops.take_rows(out, slot, index), expected, **EXACT)
        merged = reflexive.clone()
        ops.sqsk_merge.reference(merged, gate, q, k, v, log_gate, index, first, None, count, end)
    added = expected if every else gate[..., None, None] * expected
    torch.testing.assert_close(merged, reflexive + added, **EXACT)


@PROPERTY
@given(st.data())
def test_sinks_are_concatenated_keys(data):
    B, T, G, R, E = data.draw(attention_shapes(12))
    N = data.draw(st.integers(1, 3))
    q, k, v = query_key_value(B, T, G, R, E)
    sink_k, sink_v = normal(N, G, E, seed=3), normal(N, G, E, seed=4)
    count = torch.full((B,), data.draw(st.integers(0, T)))  # the other rows see the sinks alone
    log_gate = F.logsigmoid(normal(B, T, seed=6)) if data.draw(st.booleans()) else torch.zeros(B, T)
    kept = ops.sqsk_attention.reference(q, k, v, log_gate, None, None, count, None)
    out = ops.add_sinks(*kept, q, sink_k, sink_v)
    keys, values = (torch.cat([s.expand(B, N, G, E), x], 1) for s, x in ((sink_k, k), (sink_v, v)))
    token = torch.arange(T)
    visible = ((token <= token[:, None]) & (token[:, None] < count[0])).expand(B, T, T)
    visible = torch.cat([torch.ones(B, T, N, dtype=torch.bool), visible], 2)
    log_gate = F.pad(log_gate, (N, 0))
    torch.testing.assert_close(out, naive_attention(q, keys, values, visible, log_gate)[0], **EXACT)


@pytest.mark.parametrize("keys", [4, 0])
def test_rows_that_see_nothing_give_zeros_and_sinks_have_finite_gradients_there(keys):
    inputs = [x.requires_grad_() for x in (*query_key_value(2, 4, 1, 2, 4), normal(2, 1, 4), normal(2, 1, 4))]
    count = torch.tensor([keys // 2, 0])
    seen = torch.arange(4) < count[:, None]

    def attend(q, k, v):
        return ops.sqsk_attention.reference(q, k[:, :keys], v[:, :keys], None, None, None, count, None)

    def attend_with_sinks(q, k, v, *sink):
        return ops.add_sinks(*attend(q, k, v), q, *sink)

    out, lse = attend(*inputs[:3])
    assert not out[~seen].any() and lse[~seen].isneginf().all() and (out[seen] != 0).all()
    assert out[seen].numel() == 0 or gradcheck(lambda *x: attend(*x)[0], inputs[:3])
    assert gradcheck(attend_with_sinks, inputs)


@PROPERTY
@given(st.data())
def test_causal_conv_is_a_convolution_of_each_document(data):
    """One tap leaves the input as it is; the history ends with the row's last real tokens."""
    B, T, C, L = 2, data.draw(st.integers(1, 20)), 3, data.draw(st.integers(1, 5))
    x, weight, before = normal(B, T, C), normal(C, L), normal(B, L - 1, C, seed=5)
    start, length = data.draw(st.none() | documents(B, T, past=6)), data.draw(st.none() | lengths(B, T))
    history = before.clone() if data.draw(st.booleans()) else None
    out = ops.causal_conv(x, weight, history, start, length)
    for row in range(B):
        past = torch.cat([before[row] * (history is not None), x[row]])
        for t in range(T):
            first = -(L - 1) if start is None else start[row, t].item()
            taps = [s for s in range(t - L + 1, t + 1) if s >= first]
            expected = sum(weight[:, s - t - 1] * past[s + L - 1] for s in taps) if L > 1 else x[row, t]
            torch.testing.assert_close(out[row, t], expected, **EXACT)
        if history is not None:
            real = T if length is None else length[row]
            assert torch.equal(history[row], past[real : real + L - 1])


@PROPERTY
@given(st.data())
def test_extend_keeps_each_rows_last_and_routed_tokens(data):
    """Over several calls, as lists of tokens; in a full store the latest have no slot. Log gates if they are held."""
    B, W, P, G, E = 2, data.draw(st.integers(0, 6)), data.draw(st.integers(1, 9)), 1, 2
    ring, store = torch.zeros(2, B, W, G, E), torch.zeros(2, B, P + 1, G, E)
    positions, (seen, held, document) = torch.zeros(B, P + 1, dtype=torch.int32), torch.zeros(3, B, dtype=torch.int32)
    scored, every = data.draw(st.booleans()), data.draw(st.booleans())
    log_gates = torch.zeros(B, P + 1 if scored else 1)
    tokens, kept, opened = [[], []], [[], []], [0, 0]
    for call in range(3):
        T = data.draw(st.integers(1, 7))
        kv, position = normal(2, B, T, G, E, seed=call).float(), torch.arange(T).expand(B, T) + 100 * call
        start, length, wanted = data.draw(documents(B, T)), data.draw(lengths(B, T)), data.draw(masks(B, T))
        start, wanted = unpadded(start, length), wanted & (torch.arange(T) < length[:, None])
        score = normal(B, T, seed=9 + call).float()
        first, numbers, held, document = ops.extend.reference(
            *kv, position, start, length, seen, score, *ops.compact(wanted, T), every, *ring, *store, positions, held,
            document, *torch.zeros(2, B, 1, G), log_gates,
        )  # fmt: skip
        for row in range(B):
            fresh, before = wanted[row].nonzero()[:, 0].tolist(), len(kept[row])
            begins = [opened[row] if s < 0 else before + sum(t < s for t in fresh) for s in start[row].tolist()]
            assert (
                first[row].tolist() == begins
                if every
                else first[row, : len(fresh)].tolist() == [begins[t] for t in fresh]
            )
            tokens[row] += kv[:, row, : length[row]].unbind(1)
            kept[row] += [(kv[:, row, t], 100 * call + t, F.logsigmoid(score[row, t])) for t in fresh]
            opened[row], total = begins[-1], len(kept[row])
            used = min(before, P)
            assert numbers[:, row].tolist() == [used, min(total, P) - used]
            assert (held[row], document[row]) == (total, opened[row])
            for i in range(max(0, len(tokens[row]) - W), len(tokens[row])):
                assert torch.equal(ring[:, row, i % W], tokens[row][i])
            for slot, (token, place, gate) in enumerate(kept[row][:P]):
                assert torch.equal(store[:, row, slot], token) and positions[row, slot] == place
                assert log_gates[row, slot] == gate if scored else not log_gates.any()
        seen = seen + length


@pytest.mark.parametrize("kind", ops.LEVELS, ids=str)
def test_whole_numbers_are_within_half_a_step_of_what_they_stand_for(kind):
    levels, x = ops.LEVELS[kind], normal(2, 5, 3, 64) * torch.tensor([1e-20, 1.0, 1e20])[:, None]
    x[0, 0], x[0, 1] = 0.0, 1e-40
    whole, scale = ops.quantize(x.float(), kind)
    read, scale = ops.dequantize(whole, scale, torch.float64), scale.double()
    assert whole.dtype == kind and not scale[0, :2].any() and not read[0, :2].any() and scale[1].all()
    assert (scale - x.abs().amax(-1) / levels <= 2**-7 * scale).all()
    error = (read - x).abs() / scale.clamp(min=1e-30)[..., None]  # in halves of a step
    assert 0.9 < error.max() <= 1.0002


@pytest.mark.parametrize("kind, close", [(torch.float64, 0.0), (torch.int8, 0.01), (torch.int32, 0.15)], ids=str)
def test_a_store_gives_back_what_was_put_into_it(kind, close):
    x, at = normal(2, 3, 2, 8), (torch.arange(2)[:, None], torch.tensor([[1, 4, 0], [2, 5, 5]]))
    width = 1 if kind == torch.int32 else 8
    kept, scales = torch.zeros(2, 6, 2, width, dtype=kind), torch.zeros(2, 6, 2, dtype=torch.bfloat16)
    ops.write_slots(kept, scales, at, x)
    got, error = ops.read_slots(kept, scales, torch.float64), close * x.norm()
    assert (got[0, [1, 4, 0]] - x[0]).norm() <= error and (got[1, 2] - x[1, 0]).norm() <= error
    assert not got[0, [2, 3]].any() and not got[1, [0, 1, 3, 4]].any()


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("feature", ["gated", "elu"])
@pytest.mark.parametrize("history", [None, 0.7])
def test_split_heads_is_the_layers_one_by_one(feature, history, taps):
    B, T, H, G, E = 2, 9, 4, 2, 8
    x, weight = normal(B, T, (H + 2 * G) * E), normal((H + 2 * G) * E, taps)
    q_norm, k_norm, cos, sin = normal(E), normal(E, seed=1), normal(B, T, E), normal(B, T, E, seed=1)
    start = torch.tensor([[-2] * 4 + [4] * 5, [0] * 8 + [8]])
    past = None if history is None else x.new_full((B, taps - 1, x.shape[2]), history)
    heads = ops.causal_conv(x, weight, None if past is None else past.clone(), start, None)
    q, k, v = heads.unflatten(-1, (-1, E)).split((H, G, G), 2)
    norms = F.rms_norm(q, (E,), q_norm, 1e-6), F.rms_norm(k, (E,), k_norm, 1e-6)
    rotated = apply_rotary_pos_emb(*norms, cos, sin, 2)
    linear = [F.normalize(F.silu(x), dim=-1) if feature == "gated" else F.elu(x).add(1) for x in (q, k)]
    got = ops.split_heads.reference(x, weight, past, start, None, cos, sin, q_norm, k_norm, G, 1e-6, feature)
    for out, want in zip(got, (*linear, *rotated, v), strict=True):
        torch.testing.assert_close(out, want, **EXACT)
    assert past is None or torch.equal(past, x[:, T - taps + 1 :])


def test_norms_and_products_are_the_layers_one_by_one():
    x, y, norm, eps = normal(3, 1, 6), normal(3, 1, 6, seed=1), normal(6), 1e-6
    weight, up, down, heads = normal(7, 6), normal(7, 6, seed=1), normal(6, 7), normal(4, 6)
    rate, score = normal(2), normal(6, seed=1)
    h = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    decay, gate = (h @ heads.mT).chunk(2, -1)
    scores, hidden, total, added = ops.router_score(h, score), F.silu(h @ weight.mT) * (h @ up.mT), x + y, y.clone()
    ops.linear_add.reference(added, hidden, down)
    for got, want in (
        (ops.norm_heads.reference(x, norm, eps, heads, rate, rate, 0.1, score),
         (h, ops.log_decay(decay, rate, rate, 0.1), gate, scores)),
        (ops.project_token.reference(x, norm, eps, weight, heads, score, None), (h @ weight.mT, h @ heads.mT, scores)),
        (ops.add_norm.reference(x, y, norm, eps), (total, F.rms_norm(total, (6,), norm, eps))),
        (ops.swiglu.reference(h, weight, up), hidden),
        (ops.swiglu_token.reference(x, norm, eps, weight, up, None, None), hidden),
        (ops.gated_mlp.reference(h, weight, up, down), (hidden @ down.mT, h @ weight.mT, h @ up.mT)),
        (ops.linear_add_token.reference(y, hidden, down, None), y + hidden @ down.mT),
        (added, y + hidden @ down.mT),
    ):  # fmt: skip
        torch.testing.assert_close(got, want, **EXACT)
    assert ops.project_token.reference(x, norm, eps, weight, heads, None, None)[2].shape == (3, 0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position", [None, [[1004], [9], [3]], [[1004]]], ids=["counted", "given", "shared"])
def test_tokens_are_placed_after_the_last_or_begin_a_document(position, kind):
    """In float32 also where a model is cast, and its frequencies with it."""
    seen, frequency = torch.tensor([1004, 2, 3]), torch.tensor([1.0, 0.1]).to(kind)
    last = torch.tensor([[1003, 1003], [3, 3], [0, 2]])  # of the last token, and of the last column
    given, tokens = (None, 3) if position is None else (torch.tensor(position), 1)
    places = seen[:, None] + torch.arange(3) if given is None else given.expand(3, 1)
    start = torch.where((places[:, :1] == last + 1).any(1, keepdim=True) | (given is None), -seen[:, None], 0)
    angle = (places[..., None] * frequency.float()).repeat(1, 1, 2)
    got = ops.place.reference(tokens, given, seen, last, frequency, 1.5, torch.float32)
    torch.testing.assert_close(got, (angle.cos() * 1.5, angle.sin() * 1.5, start, places))


def test_angles_of_an_endless_stream_are_as_precise_as_those_of_its_first_million_tokens():
    frequency = (10000.0 ** -torch.linspace(0, 1, 16)).float()
    for seen in (0, 2**20 - 5, 2**24 + 1, 2**31 - 20):
        [cos, sin, _, places] = ops.place.reference(
            9, None, torch.tensor([seen]), torch.zeros(1, 2, dtype=torch.long), frequency, 1.0, torch.float32
        )
        angle = (places[..., None] * frequency.double()).repeat(1, 1, 2)
        assert max((cos - angle.cos()).abs().max(), (sin - angle.sin()).abs().max()) < 2**20 * 2**-24


@pytest.mark.parametrize("every", [False, True], ids=["routed", "all"])
def test_attend_token_by_token_is_one_call(every):
    """Documents that begin in between, padding, and a store that is too small for one row included."""
    B, T, G, R, E, W, P = 3, 12, 2, 2, 4, 5, 4
    q_linear, k_linear, _ = query_key_value(B, T, G, R, E)
    q, k, v = query_key_value(B, T, G, R, E, seed=5)
    head, rate, norm, score = normal(B, T, 2 * G * R), normal(G * R), normal(E), normal(B, T)
    start = torch.tensor([[0] * 12, [0] * 5 + [5] * 7, [0] * 2 + [2] * 6 + [8] * 4])
    position, length, bias = torch.arange(T).expand(B, T), torch.tensor([12, 9, 12]), torch.tensor(0.3)
    zeros, caches = torch.zeros(B, dtype=torch.int32), []
    for _ in range(2):
        state, ring, store = normal(B, G * R, E, E), normal(2, B, W, G, E), normal(2, B, P + 1, G, E)
        counts = torch.zeros(B, P + 1, dtype=torch.int32), zeros.clone(), zeros.clone()
        caches.append((state, *ring, *store, *counts, *torch.zeros(2, B, 1, G), torch.zeros(B, P + 1 if every else 1)))
    outputs, slots = zip(*(
        ops.attend_token.reference(
            *(x[:, t : t + 1] for x in (q_linear, k_linear, q, k, v, head)), rate, rate, 0.1, norm, 1e-6,
            position[:, t : t + 1], start[:, t : t + 1] - t, (length - t).clamp(0, 1), length.clamp(max=t),
            score[:, t : t + 1], bias, 0.3, 1, every, *caches[0],
        ) for t in range(T)
    ), strict=True)  # fmt: skip
    state, ring_k, ring_v, keys, values, *counts = caches[1]
    decay = ops.log_decay(head[..., : G * R], rate, rate, 0.1)
    linear = ops.linear_attention.reference(q_linear, k_linear, v, decay, start, length, state)
    window = (q, k, v, start, W, ring_k, ring_v, zeros)
    merged = ops.reflexive_merge.reference(*window, linear, head[..., G * R :], norm, 1e-6)
    gate, *route_of, _ = ops.route.reference(score, bias, start, length, 0.3, 1, T)
    call, end = (start, length, zeros, score, *route_of, every), ops.end_slot(route_of[1]) if every else None
    first, (used, kept), *now = ops.extend.reference(k, v, position, *call, *caches[1][1:])
    store = keys[:, :-1], values[:, :-1], caches[1][-1][:, :-1] if every else None
    ops.sqsk_merge.reference(merged, gate, q, *store, route_of[0], first, used, kept, end)
    real, used = torch.arange(T) < length[:, None], torch.arange(P) < now[0].clamp(max=P)[:, None]
    found = torch.where(real & (route_of[1] >= 0) & (route_of[1] < P), 0, -1)
    assert (now[0] > P).any() and torch.equal(torch.cat(slots, 1), found)
    torch.testing.assert_close(torch.cat(outputs, 1)[real], merged[real], **EXACT)
    for i, (got, want) in enumerate(zip(caches[0], caches[1], strict=True)):
        want = dict(zip((6, 7), now, strict=True)).get(i, want)
        got, want = (x[:, :-1][used] for x in (got, want)) if i in (3, 4, 5, 10)[: 3 + every] else (got, want)
        torch.testing.assert_close(got, want, **EXACT)


TINY = Sizes(B=2, T=4, H=2, G=1, E=2, D=4, N=3, W=3, P=3, taps=3, share=0.7)
# The cache's writers and float8's rounding have no gradient worth the name; one decoded token is never trained on
UNTRAINED = {"extend", "place", "quantize_rows", "quantize_product", "float8_linear"}
TRAINED = [name for name in CASES if name not in UNTRAINED and not name.endswith("_token")]


@pytest.mark.parametrize("operation, variant", [(name, variant) for name in TRAINED for variant in CASES[name]])
def test_gradients_match_finite_differences(operation, variant):
    """Of all outputs and of what is written in place, by all floating-point arguments."""
    torch.manual_seed(0)
    args = [
        x.double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in case(operation, variant, TINY, torch.float32, "cpu").args
    ]
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.requires_grad]

    def call(*inputs):
        given, op = list(args), ops.REGISTRY[operation]
        for i, x in zip(places, inputs, strict=True):
            given[i] = x.clone()  # which may be written in place
        out = op(*given)
        written = [x for name, x in zip(signature(op.reference).parameters, given, strict=True) if name in op.mutates]
        outputs = [*(out if isinstance(out, tuple) else (out,)), *written]
        return [x[x.isfinite()] for x in outputs if x is not None and x.is_floating_point()]

    with mock.patch.multiple(ops, LINEAR_CHUNK=3, LINEAR_SPAN=6, QUERY_SPAN=3):
        assert gradcheck(call, [args[i] for i in places], fast_mode=True)
