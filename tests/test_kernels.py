"""Kernels equal the reference: no further from float64 than twice what the eager low-precision reference is.

Without a GPU the kernels run in Triton's interpreter, on small shapes and without bfloat16 (its interpreter multiplies
the bit patterns of bfloat16); with one, on larger shapes, compiled, and from a CUDA graph.
"""

import pytest
import torch
from hspmn import (
    kernels_attention_hspmn,
    kernels_decode_hspmn,
    kernels_hspmn,
    kernels_linear_hspmn,
    kernels_mlp_hspmn,
    kernels_projection_hspmn,
    operations_hspmn,
    reference_hspmn,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[True, False] if CUDA else [False, True], ids=lambda on: "descriptors" if on else "pointers")
def descriptors(request, monkeypatch):
    """Read tiles through tensor descriptors, where shape and dtype allow, or not, on any device."""
    if not CUDA or not request.param:
        for module in (kernels_attention_hspmn, kernels_linear_hspmn):
            monkeypatch.setattr(module, "has_descriptors", lambda x: request.param)


@pytest.fixture
def poison(monkeypatch):
    """Make every `empty` tensor hold NaN, or a wild number, so that an output nobody wrote cannot pass."""

    def poisoned(allocate):
        def wrapped(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else True if out.dtype == torch.bool else 77)

        return wrapped

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def relative_rms(got, want):
    return ((got.double() - want).square().mean() / want.square().mean().clamp_min(1e-30)).sqrt().item()


def assert_as_accurate(name, kernel, eager, exact):
    assert kernel.dtype == eager.dtype and kernel.shape == exact.shape, name
    if exact.numel():
        limit = 2 * relative_rms(eager, exact) + torch.finfo(kernel.dtype).eps
        assert relative_rms(kernel, exact) <= limit, f"{name}: {relative_rms(kernel, exact):.2e} > {limit:.2e}"


def exactly(tensors):
    """The same inputs in float64; integers and None as they are."""
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors]


def heads(B, T, H, G, E, F, dtype):
    shapes = ((B, T, H, E), (B, T, G, E), (B, T, G, F))
    q, k, v = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes)
    return q, k / E**0.5, v


def documents(B, T, past=0, length=None):
    """start_BT of rows of packed documents; the first reaches `past` tokens back, none begins in the padding."""
    begins = torch.rand(B, T, device=DEVICE) < 4 / T
    token = torch.arange(T, device=DEVICE).expand(B, T)
    if length is not None:
        begins &= token < length[:, None]
    return torch.where(begins, token, -past).cummax(1).values


def lengths(B, T):
    return torch.tensor([T, 0, T // 2, max(T - 1, 0)], device=DEVICE)[:B]


def projection(B, T, H, G, E, taps, dtype, tables):
    """x_BTC, the convolution's weights, RoPE tables with `tables` rows and both norm weights."""
    C = (H + 2 * G) * E
    x, weight = torch.randn(B, T, C, device=DEVICE).to(dtype), torch.randn(C, taps, device=DEVICE).to(dtype)
    angle = torch.rand(tables, T, E, device=DEVICE) * 6
    norms = [torch.rand(E, device=DEVICE).to(dtype) + 0.5 for _ in range(2)]
    return x, weight, angle.cos().to(dtype), angle.sin().to(dtype), *norms


NAMES = ("q_linear", "k_linear", "q_rotated", "k_rotated", "v")
SPLIT = [(1, 1, 1, 1, 16, 4), (3, 75, 6, 2, 32, 4), (2, 19, 4, 4, 16, 1), (2, 2, 4, 1, 128, 5)]
SPLIT += [(4, 1000, 16, 4, 128, 4), (64, 1, 16, 4, 128, 4), (2, 517, 8, 1, 64, 2)] * CUDA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "packed", "history", "continued"])
@pytest.mark.parametrize("mode", ["gated", "elu"])
@pytest.mark.parametrize("B, T, H, G, E, taps", SPLIT, ids=str)
def test_split_heads(B, T, H, G, E, taps, mode, case, dtype, poison):
    x, weight, cos, sin, *norms = projection(B, T, H, G, E, taps, dtype, tables=1 if case == "plain" else B)
    history = start = None
    if case in ("history", "continued"):
        history = torch.randn(B, taps - 1, x.shape[-1], device=DEVICE).to(dtype)
    if case == "history":  # tables and weights may be wider than x
        cos, sin, *norms = (x.float() for x in (cos, sin, *norms))
    if case in ("packed", "continued"):  # of the history, the last token alone is visible
        start = documents(B, T, past=1 if case == "continued" else 0)
    inputs, options = (x, weight, history, start, cos, sin, *norms), dict(kv_heads=G, eps=1e-6, mode=mode)
    eager = reference_hspmn.split_heads_ref(*inputs, **options)
    exact = reference_hspmn.split_heads_ref(*exactly(inputs), **options)
    if case == "continued":
        history[:, :-1] = float("nan")
    got = kernels_hspmn.split_heads(*inputs, **options)
    for name, kernel, low, high in zip(NAMES, got, eager, exact, strict=True):
        assert kernel.is_contiguous(), name
        assert_as_accurate(name, kernel, low, high)


def test_split_heads_gives_the_same_with_one_and_with_several_heads_per_program(monkeypatch):
    x, weight, cos, sin, *norms = projection(2, 20, 5, 1, 16, 4, torch.float32, tables=2)
    outputs = []
    for heads_each in (1, 4, 8):
        config = {"BLOCK_T": 16, "HEADS": heads_each, "num_warps": 1}
        monkeypatch.setattr(kernels_projection_hspmn, "split_heads_config", lambda *sizes, config=config: config)
        outputs.append(kernels_hspmn.split_heads(x, weight, None, None, cos, sin, *norms, kv_heads=1, eps=1e-6))
    for name, *results in zip(NAMES, *outputs, strict=True):
        assert all(torch.equal(result, results[0]) for result in results), name


def test_split_heads_token_by_token_is_one_call():
    """Continued with the last tokens of the projection, as the cache keeps them; a document begins at token 6."""
    B, T, G, taps = 2, 9, 2, 4
    x, weight, cos, sin, *norms = projection(B, T, 4, G, 32, taps, torch.float32, tables=B)
    start = torch.tensor([0] * 6 + [6] * 3, device=DEVICE).expand(B, T)
    want = kernels_hspmn.split_heads(x, weight, None, start, cos, sin, *norms, kv_heads=G, eps=1e-6)
    history, steps = torch.zeros_like(x[:, : taps - 1]), []
    for t in range(T):
        one = slice(t, t + 1)
        tables = (cos[:, one], sin[:, one])
        steps.append(
            kernels_hspmn.split_heads(
                x[:, one], weight, history, start[:, one] - t, *tables, *norms, kv_heads=G, eps=1e-6
            )
        )
        history = torch.cat([history[:, 1:], x[:, one]], 1)
    for name, whole, parts in zip(NAMES, want, zip(*steps, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: n + text)


def test_split_heads_survives_extreme_values():
    """A zero head keeps length zero, and SiLU of a large negative value is zero: nothing is NaN."""
    x, weight, cos, sin, *norms = projection(1, 6, 2, 1, 16, 4, torch.float32, tables=1)
    x[:, :3], x[:, 3:] = 0.0, -1e4
    outputs = kernels_hspmn.split_heads(x, weight.abs(), None, None, cos, sin, *norms, kv_heads=1, eps=1e-6)
    assert all(out.isfinite().all() for out in outputs)
    assert not outputs[0][:, :3].any() and not outputs[0][:, 3:].any()


LINEAR = [(1, 1, 1, 1, 16, 16), (3, 67, 4, 2, 16, 32), (2, 130, 6, 2, 32, 17)]
LINEAR += [(4, 1000, 8, 2, 128, 128), (2, 517, 4, 4, 64, 129), (1, 5000, 16, 4, 128, 128)] * CUDA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "state", "length", "packed", "segments"])
@pytest.mark.parametrize("B, T, H, G, E, F", LINEAR, ids=str)
def test_linear_attention(B, T, H, G, E, F, case, dtype, descriptors, poison):
    q, k, v = heads(B, T, H, G, E, F, dtype)
    log_decay = -(torch.rand(B, T, H, device=DEVICE) ** 3)
    length = lengths(B, T) if case in ("length", "segments") else None
    start = documents(B, T, past=3, length=length) if case in ("packed", "segments") else None
    state = torch.randn(B, H, E, F, device=DEVICE) if case != "plain" else None
    inputs = (q, k, v, log_decay, start, length, state)
    got = kernels_hspmn.linear_attention(*inputs, segments=3 if case == "segments" else 0)
    eager = reference_hspmn.linear_attention_ref(*inputs)
    exact = reference_hspmn.linear_attention_ref(*exactly(inputs))
    if length is not None:
        real = torch.arange(T, device=DEVICE) < length[:, None]
        assert not got[0][~real].any()
        got, eager, exact = ((out[real], last) for out, last in (got, eager, exact))
    assert_as_accurate("out", got[0], eager[0], exact[0])
    assert_as_accurate("state", got[1], eager[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_attention_step(dtype, poison):
    B, T, H, G, E, F = 4, 3, 4, 2, 16, 33
    q, k, v = heads(B, T, H, G, E, F, dtype)
    log_decay = -torch.rand(B, T, H, device=DEVICE)
    start = torch.tensor([[-5, 1, 1], [-1, -1, -1], [0, 0, 0], [-2, -2, 2]], device=DEVICE)
    length = torch.tensor([3, 0, 2, 3], device=DEVICE)
    state = torch.randn(B, H, E, F, device=DEVICE)
    inputs = (q, k, v, log_decay, start, length, state)
    held, outputs = state.clone(), []
    for t in range(T):
        one = (x[:, t : t + 1] for x in (q, k, v, log_decay, start - t))
        outputs.append(kernels_hspmn.linear_attention_step(*one, (length - t).clamp(0, 1), held))
    real = torch.arange(T, device=DEVICE) < length[:, None]
    eager = reference_hspmn.linear_attention_recurrent_ref(*inputs)
    exact = reference_hspmn.linear_attention_recurrent_ref(*exactly(inputs))
    assert_as_accurate("out", torch.cat(outputs, 1)[real], eager[0][real], exact[0][real])
    assert_as_accurate("state", held, eager[1], exact[1])


DECODE = [(1, 1, 16, 1, 3, 1), (6, 2, 32, 13, 700, 16), (4, 4, 16, 40, 260, 4)]
DECODE += [(16, 4, 128, 128, 5000, 132), (16, 4, 128, 130, 700, 16), (4, 1, 64, 100, 300, 4)] * CUDA


def decoded(H, G, E, window, P, dtype):
    """Inputs of `attend_decode` for five rows, by name.

    They are routed, routed after few tokens, at the start of a document, not routed (padding, if the row has no
    length), and routed with a full store.
    """
    B, integers = 5, {"dtype": torch.int32, "device": DEVICE}
    features = [x.div(x.float().norm(dim=-1, keepdim=True)).to(dtype) for x in heads(B, 1, H, G, E, E, dtype)[:2]]
    tensors, inputs = [*features, *heads(B, 1, H, G, E, E, dtype)], {}
    inputs |= zip(("q_linear", "k_linear", "q", "k", "v"), tensors, strict=True)
    inputs["head"] = torch.randn(B, 1, 2 * H, device=DEVICE)
    inputs |= {"log_rate": torch.randn(H, device=DEVICE) - 2, "rate_bias": torch.randn(H, device=DEVICE) * 4}
    inputs |= {"least_decay": 0.125, "norm": torch.rand(E, device=DEVICE), "eps": 1e-6}
    inputs["position"] = torch.arange(1000, 1005, device=DEVICE)[:, None]
    inputs["start"] = torch.tensor([[-500], [-3], [0], [-1], [-9]], device=DEVICE)
    inputs |= {"length": None, "seen": torch.tensor([500, 77, 5, 2, 9], device=DEVICE)}
    inputs |= {"score": torch.tensor([[0.5], [2.0], [-0.2], [-1.0], [0.1]], device=DEVICE)}
    inputs |= {"bias": torch.tensor(0.3, device=DEVICE), "noise_floor": 0.05, "initial": 0}
    inputs["state"] = torch.randn(B, H, E, E, device=DEVICE)
    inputs |= {name: torch.randn(B, window, G, E, device=DEVICE).to(dtype) for name in ("ring_k", "ring_v")}
    inputs |= {name: torch.randn(B, P + 1, G, E, device=DEVICE).to(dtype) for name in ("keys", "values")}
    inputs["positions"] = torch.zeros(B, P + 1, **integers)
    inputs["count"] = torch.tensor([P - 1, 1, 2, 2, P], **integers)
    inputs["document_slot"] = torch.tensor([min(70, P - 2), 0, 0, 1, 0], **integers)
    inputs |= {name: torch.zeros(B, 1, G, device=DEVICE) for name in ("key_scales", "value_scales")}
    return inputs


def copied(inputs):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "padded", "initial", "no_router", "int8"])
@pytest.mark.parametrize("H, G, E, window, P, processors", DECODE, ids=str)
def test_attend_decode(H, G, E, window, P, processors, case, dtype, poison, monkeypatch):
    monkeypatch.setattr(kernels_decode_hspmn, "processors", lambda device: processors)
    if not CUDA:  # several blocks of window and state
        config = kernels_decode_hspmn.attend_decode_config
        small = {"BLOCK_N": 16, "COLUMNS": 16}
        monkeypatch.setattr(kernels_decode_hspmn, "attend_decode_config", lambda *sizes: config(*sizes) | small)
    inputs, B = decoded(H, G, E, window, P, dtype), 5
    inputs["head"] = inputs["head"].to(dtype) if case == "initial" else inputs["head"]
    if case == "padded":
        inputs["length"] = torch.tensor([1, 1, 1, 0, 1], device=DEVICE)
        inputs["score"][3] = 1.0
    elif case == "no_router":
        inputs["score"] = inputs["bias"] = None
    elif case == "initial":
        inputs["initial"], inputs["score"][1::2] = 3, -4.0  # row 3 is routed, with a gate below the noise floor
    elif case == "int8":
        inputs["k"][1] = 0.0  # a key without a scale
        for kept, scales in (("keys", "key_scales"), ("values", "value_scales")):
            inputs[kept], inputs[scales] = reference_hspmn.quantize_ref(inputs[kept])
    eager_inputs, exact_inputs = copied(inputs), dict(zip(inputs, exactly(copied(inputs).values()), strict=True))
    eager = reference_hspmn.attend_decode_ref(*eager_inputs.values())
    exact = reference_hspmn.attend_decode_ref(*exact_inputs.values())
    slot = torch.arange(window, device=DEVICE)
    hidden = (inputs["seen"][:, None] - slot) % window > -inputs["start"]  # before the document: never read as values
    for name in ("ring_k", "ring_v"):
        inputs[name][hidden] = float("nan")
    slot = torch.arange(P + 1, device=DEVICE)
    unused = (slot >= inputs["count"][:, None]) | (slot < inputs["document_slot"][:, None])
    poisoned = ("key_scales", "value_scales") if case == "int8" else ("keys", "values")
    for name in poisoned:
        inputs[name][unused] = float("nan")
    got = kernels_hspmn.attend_decode(*inputs.values())
    real = torch.ones(B, dtype=torch.bool, device=DEVICE) if inputs["length"] is None else inputs["length"] > 0
    assert_as_accurate("merged", got[real], eager[0][real], exact[0][real])
    assert got.isfinite().all()
    assert_as_accurate("state", inputs["state"], eager[1], exact[1])
    for name in ("ring_k", "ring_v"):
        assert torch.equal(inputs[name][~hidden], eager_inputs[name][~hidden]), name
        assert inputs[name][hidden].isnan().all(), name
    kept = {"no_router": {}, "initial": {0: P - 1, 2: 2, 3: 2}}.get(case, {0: P - 1, 1: 1, 2: 2})
    for name in ("count", "document_slot"):
        assert torch.equal(inputs[name], eager_inputs[name]), name
    for row, place in kept.items():
        for name in {"keys", "values", "positions", *poisoned}:
            assert torch.equal(inputs[name][row, place], eager_inputs[name][row, place]), name
        unused[row, place] = False
    assert inputs["positions"].count_nonzero() == len(kept)
    assert all(inputs[name][unused].isnan().all() for name in poisoned)


def test_place_decode_is_dense_and_the_same():
    cos, sin = torch.randn(2, 6, 1, device=DEVICE).mT
    place = (cos[:, None], sin[:, None], torch.tensor([[-4], [0]], device=DEVICE), torch.tensor([[7]], device=DEVICE))
    for length in (None, torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)):
        for tables in (place[:2], [x[:1] for x in place[:2]]):
            got = kernels_hspmn.place_decode(*tables, *place[2:], length)
            assert all(x.is_contiguous() for x in got[:4])
            for x, y in zip(got, (*tables, *place[2:], length), strict=True):
                assert (x is None) == (y is None)
                assert x is None or torch.equal(x, y.expand(x.shape).to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("B, T, X, D", [(2, 19, 4, 40), (1, 9, 32, 300)] + [(4, 1000, 32, 2048)] * CUDA, ids=str)
def test_norm_heads(B, T, X, D, scored, dtype, poison):
    x, norm = 3 * torch.randn(B, T, D, device=DEVICE).to(dtype), torch.rand(D, device=DEVICE) + 0.5
    score_weight = torch.randn(D, device=DEVICE) / D**0.5 if scored else None
    inputs = (x, norm, 1e-6, (torch.randn(X, D, device=DEVICE) / D**0.5).to(dtype), score_weight)
    eager, exact = (reference_hspmn.norm_heads_ref(*tensors) for tensors in (inputs, exactly(inputs)))
    got = kernels_hspmn.norm_heads(*inputs)
    for name, i in (("h", 0), ("head", 1)) + (("score", 2),) * scored:
        assert_as_accurate(name, got[i], eager[i], exact[i])
    assert scored or got[2] is eager[2] is None


@pytest.mark.parametrize("rows", [256, 258])
def test_any_number_of_heads_is_normed(rows):
    x, weight = torch.randn(1, 3, 16, device=DEVICE), torch.randn(rows, 16, device=DEVICE)
    inputs = (x, weight[0], 1e-6, weight, None)
    got, want = (operations_hspmn.norm_heads(*inputs, backend) for backend in ("triton", "reference"))
    for i in range(2):
        torch.testing.assert_close(got[i], want[i], rtol=1e-4, atol=1e-4)
    assert got[2] is want[2] is None


def test_norm_heads_errors_name_what_is_wrong():
    x, weight = torch.zeros(1, 2, 16, device=DEVICE), torch.zeros(4, 16, device=DEVICE)
    with pytest.raises(ValueError, match="share a dtype"):
        kernels_hspmn.norm_heads(x, weight[0], 1e-6, weight.half())
    with pytest.raises(ValueError, match=r"head_weight must be \[1 to 256, 16\]"):
        kernels_hspmn.norm_heads(x, weight[0], 1e-6, weight[:, :8])
    with pytest.raises(ValueError, match=r"score_weight must be \[16\]"):
        kernels_hspmn.norm_heads(x, weight[0], 1e-6, weight, weight[0, :8])


ROWS = [(1, 48, 16), (3, 40, 40), (16, 17, 300)] + [(1, 6912, 2048), (8, 2048, 6912), (13, 520, 1000)] * CUDA


def few_rows(B, N, K, dtype):
    """x [B, 1, K], the norm's weight, and two weights [N, K]."""
    x, norm = 3 * torch.randn(B, 1, K, device=DEVICE).to(dtype), torch.rand(K, device=DEVICE).to(dtype) + 0.5
    return x, norm, *((torch.randn(N, K, device=DEVICE) / K**0.5).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("B, N, K", ROWS, ids=str)
def test_project_decode(B, N, K, scored, dtype, poison):
    x, norm, weight, other = few_rows(B, N, K, dtype)
    score_weight = torch.randn(K, device=DEVICE) / K**0.5 if scored else None
    inputs = (x, norm, 1e-6, weight, other[: N // 2], score_weight)
    eager, exact = (reference_hspmn.project_decode_ref(*tensors) for tensors in (inputs, exactly(inputs)))
    got = kernels_hspmn.project_decode(*inputs)
    assert_as_accurate("qkv", got[0], eager[0], exact[0])
    assert got[1].dtype == torch.float32
    assert_as_accurate("head", got[1].to(dtype), eager[1].to(dtype), exact[1])
    if scored:
        assert_as_accurate("score", got[2], eager[2], exact[2])
    else:
        assert got[2] is eager[2] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, N, K", ROWS, ids=str)
def test_products_of_few_rows(B, N, K, dtype, poison):
    x, norm, gate, up = few_rows(B, N, K, dtype)
    inputs, residual = (x, norm, 1e-6, gate, up), torch.randn(B, 1, N, device=DEVICE).to(dtype)
    eager, exact = (reference_hspmn.swiglu_decode_ref(*tensors) for tensors in (inputs, exactly(inputs)))
    assert_as_accurate("swiglu", kernels_hspmn.swiglu_decode(*inputs), eager, exact)
    inputs = (residual, x, gate)
    eager, exact = (reference_hspmn.linear_add_ref(*tensors) for tensors in (inputs, exactly(inputs)))
    assert_as_accurate("linear_add", kernels_hspmn.linear_add_decode(*inputs), eager, exact)


def test_products_of_few_rows_errors_name_what_is_wrong():
    x, norm, gate, up = few_rows(2, 8, 16, torch.float32)
    with pytest.raises(ValueError, match="at most 16 rows"):
        kernels_hspmn.linear_add_decode(x, x.repeat(9, 1, 1), gate)
    with pytest.raises(ValueError, match="qkv_weight must have the dtype of x"):
        kernels_hspmn.project_decode(x, norm, 1e-6, gate.half(), up)
    with pytest.raises(ValueError, match=r"score_weight must be \[16\]"):
        kernels_hspmn.project_decode(x, norm, 1e-6, gate, up, norm[:8])
    with pytest.raises(ValueError, match="up_weight must have the shape"):
        kernels_hspmn.swiglu_decode(x, norm, 1e-6, gate, up[:4])
    with pytest.raises(ValueError, match=r"gate_weight must be \[N, 16\]"):
        kernels_hspmn.swiglu_decode(x, norm, 1e-6, gate.t(), up)
    with pytest.raises(ValueError, match=r"residual must be \(2, 1, 8\)"):
        kernels_hspmn.linear_add_decode(x, x, gate)


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_chain_of_overlapping_launches_is_in_order(captured):
    """Every launch reads what the one before wrote, and memory is used again: each result is that of a lone launch."""
    x, norm, *weights = few_rows(4, 1024, 1024, torch.bfloat16)
    weights = [torch.randn(1024, 1024, device=DEVICE).bfloat16() / 64 for _ in range(12)]

    def chain(wait):
        out, y = [], x
        for gate, up in zip(weights, weights[::-1], strict=True):
            y = kernels_hspmn.linear_add_decode(y, kernels_hspmn.swiglu_decode(y, norm, 1e-6, gate, up), up)
            wait()
            out.append(y.clone() if len(out) % 3 else y)
        return out

    want = chain(torch.cuda.synchronize)
    got = chain(lambda: None)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain(lambda: None)
        for _ in range(20):
            graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_split_heads_decode_moves_the_history_on():
    B, G, taps = 4, 2, 4
    x, weight, cos, sin, *norms = projection(B, 1, 4, G, 32, taps, torch.float32, tables=B)
    start, length = torch.tensor([[-9], [-1], [0], [-2]], device=DEVICE), torch.tensor([1, 1, 1, 0], device=DEVICE)
    for held in (None, length):
        for lags in (1, taps - 1):
            history = torch.randn(B, lags, x.shape[-1], device=DEVICE)
            inputs, options = (x, weight[:, -lags - 1 :], history, start), dict(kv_heads=G, eps=1e-6)
            want = kernels_hspmn.split_heads(*inputs, cos, sin, *norms, **options)
            moved = reference_hspmn.split_heads_decode_ref(*inputs, held, cos, sin, *norms, **options)[-1]
            got = kernels_hspmn.split_heads_decode(*inputs, held, cos, sin, *norms, **options)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
            assert torch.equal(history, moved)


LOCAL = [(1, 1, 1, 1, 16, 1), (2, 75, 4, 2, 16, 24), (2, 50, 6, 2, 32, 7), (1, 40, 2, 2, 16, 64)]
LOCAL += [(4, 1000, 16, 4, 128, 128), (2, 517, 4, 1, 64, 100)] * CUDA


def local_inputs(B, T, H, G, E, window, case, dtype):
    """q, k, v, start, window and both histories: one document a row, several, or some that began before the call."""
    q, k, v = heads(B, T, H, G, E, E, dtype)
    start = None if case == "plain" else documents(B, T, past=0 if case == "packed" else window // 2 + 1)
    history = [None, None]
    if case == "history":
        history = [torch.randn(B, window, G, E, device=DEVICE).to(dtype) for _ in range(2)]
    return q, k, v, start, window, *history


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "packed", "history"])
@pytest.mark.parametrize("B, T, H, G, E, window", LOCAL, ids=str)
def test_local_attention(B, T, H, G, E, window, case, dtype, descriptors, poison):
    inputs = local_inputs(B, T, H, G, E, window, case, dtype)
    out, lse = kernels_hspmn.local_attention(*inputs, with_lse=True)
    eager = reference_hspmn.local_attention_ref(*inputs)
    exact = reference_hspmn.local_attention_ref(*exactly(inputs))
    assert_as_accurate("out", out, eager[0], exact[0])
    assert_as_accurate("lse", lse, eager[1], exact[1])
    assert torch.equal(out, kernels_hspmn.local_attention(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "packed", "history"])
@pytest.mark.parametrize("B, T, H, G, E, window", LOCAL, ids=str)
def test_reflexive_merge(B, T, H, G, E, window, case, dtype, descriptors, poison):
    *attended, history_k, history_v = local_inputs(B, T, H, G, E, window, case, dtype)
    linear, norm = torch.randn(B, T, H, E, device=DEVICE).to(dtype), torch.rand(E, device=DEVICE).to(dtype) + 0.5
    _, gate = torch.randn(B, T, 2 * H, device=DEVICE).chunk(2, -1)  # strided, as the model's projection gives it
    gate = gate if case == "packed" else gate.contiguous()
    inputs = (*attended, linear, gate, norm, 1e-6, history_k, history_v)
    eager = reference_hspmn.reflexive_merge_ref(*inputs)
    exact = reference_hspmn.reflexive_merge_ref(*exactly(inputs))
    assert_as_accurate("merged", kernels_hspmn.reflexive_merge(*inputs), eager, exact)


SQSK = [(1, 1, 0, 1, 1, 16), (4, 40, 0, 6, 2, 16), (4, 40, 51, 4, 1, 16), (3, 70, 20, 4, 2, 32)]
SQSK += [(4, 820, 0, 16, 4, 128), (4, 300, 1000, 16, 4, 64), (2, 2500, 130, 4, 4, 128)] * CUDA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("B, K, past, H, G, E", SQSK, ids=str)
def test_sqsk_attention(B, K, past, H, G, E, first, dtype, descriptors, poison):
    P = past + K + 5
    q, k, v = heads(B, P, H, G, E, E, dtype)
    q = q[:, :K].contiguous()
    cached = torch.tensor([past, past // 2, 0, past], dtype=torch.int32, device=DEVICE)[:B] if past else None
    count = torch.tensor([K, K // 3, 0, max(K - 1, 1)], dtype=torch.int32, device=DEVICE)[:B]
    begin = cached if past else torch.zeros_like(count)
    first = (documents(B, K) + begin[:, None]) if first else None
    eager = reference_hspmn.sqsk_attention_ref(q, k, v, first, begin, count)
    exact = reference_hspmn.sqsk_attention_ref(*exactly((q, k, v)), first, begin, count)
    for x in (k, v):
        x[torch.arange(P, device=DEVICE) >= (begin + count)[:, None]] = float("nan")
    q[torch.arange(K, device=DEVICE) >= count[:, None]] = float("nan")
    out, lse = kernels_hspmn.sqsk_attention(q, k, v, first, cached, count, with_lse=True)
    assert_as_accurate("out", out, eager[0], exact[0])
    assert torch.equal(lse == float("-inf"), exact[1] == float("-inf"))
    assert_as_accurate("lse", *(x.masked_fill(x == float("-inf"), 0) for x in (lse, eager[1], exact[1])))
    assert torch.equal(out, kernels_hspmn.sqsk_attention(q, k, v, first, cached, count))


def test_a_store_with_spare_slots_is_read_in_place(poison):
    """Keys and values that are the first slots of a longer buffer, as a growing cache hands them over."""
    B, K, P, H, G, E = 2, 9, 20, 4, 2, 16
    q = torch.randn(B, K, H, E, device=DEVICE)
    k, v = (torch.randn(B, P + 3, G, E, device=DEVICE)[:, :P] for _ in range(2))
    cached, count = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([11, 4], [9, 5]))
    out = kernels_hspmn.sqsk_attention(q, k, v, None, cached, count)
    assert torch.equal(out, kernels_hspmn.sqsk_attention(q, k.contiguous(), v.contiguous(), None, cached, count))
    assert kernels_attention_hspmn._store_rows(k, v)[0] is k


def routed(B, T, capacity, share):
    mask = torch.rand(B, T, device=DEVICE) < share
    mask[-1] = False
    return reference_hspmn.compact_ref(mask, capacity)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("past", [0, 30])
@pytest.mark.parametrize("B, T, capacity, share", [(2, 1, 1, 1.0), (3, 90, 90, 0.6), (3, 90, 20, 0.4)], ids=str)
def test_sqsk_merge(B, T, capacity, share, past, dtype, descriptors, poison):
    H, G, E = 6, 2, 16
    q, k, v = heads(B, T, H, G, E, E, dtype)
    reflexive, gate = torch.randn(B, T, H, E, device=DEVICE).to(dtype), torch.rand(B, T, device=DEVICE)
    index, slot, count = routed(B, T, capacity, share)
    cached = torch.full((B,), past, dtype=torch.int32, device=DEVICE)
    first = None if past else documents(B, capacity)
    keys, values = (reference_hspmn.take_rows_ref(x, index) for x in (k, v))
    if past:
        earlier = [torch.randn(B, past, G, E, device=DEVICE).to(dtype) for _ in range(2)]
        keys, values = (torch.cat(pair, 1) for pair in zip(earlier, (keys, values), strict=True))

    def whole(reflexive, gate, q, keys, values):
        rows = reference_hspmn.take_rows_ref(q, index)
        contextual, _ = reference_hspmn.sqsk_attention_ref(rows, keys, values, first, cached, count)
        return reference_hspmn.merge_ref(reflexive, contextual, gate, slot)

    eager = whole(reflexive, gate, q, keys, values)
    exact = whole(*exactly((reflexive, gate, q, keys, values)))
    got = reflexive.clone()
    store = (keys, values) if past else (k, v)
    kernels_hspmn.sqsk_merge(got, gate, q, *store, index, first, cached if past else None, count)
    assert_as_accurate("merged", got, eager, exact)
    assert torch.equal(got[slot < 0], reflexive[slot < 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [700, 300])
def test_decoding_splits_the_keys(P, dtype, poison, monkeypatch):
    """One query per row over many cached keys: parts of the keys are combined, rows of any count included."""
    monkeypatch.setattr(kernels_attention_hspmn, "processors", lambda device: 16)
    B, H, G, E = 4, 4, 2, 16
    q, k, v = heads(B, P, H, G, E, E, dtype)
    q, cached = q[:, :1].contiguous(), torch.tensor([P - 1, 0, 5, 260], dtype=torch.int32, device=DEVICE)
    count, gate = torch.tensor([1, 1, 0, 1], dtype=torch.int32, device=DEVICE), torch.rand(B, 1, device=DEVICE)
    eager = reference_hspmn.sqsk_attention_ref(q, k, v, None, cached, count)
    exact = reference_hspmn.sqsk_attention_ref(*exactly((q, k, v)), None, cached, count)
    out, lse = kernels_hspmn.sqsk_attention(q, k, v, None, cached, count, with_lse=True)
    assert_as_accurate("out", out, eager[0], exact[0])
    assert_as_accurate("lse", *(x.masked_fill(x == float("-inf"), 0) for x in (lse, eager[1], exact[1])))
    index, slot = count.long()[:, None] - 1, count.long()[:, None] - 1
    merged = torch.randn_like(q)
    want = reference_hspmn.merge_ref(merged.double(), exact[0], gate.double(), slot)
    eager = reference_hspmn.merge_ref(merged, eager[0], gate, slot)
    kernels_hspmn.sqsk_merge(merged, gate, q, k, v, index, None, cached, count)
    assert_as_accurate("merged", merged, eager, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, D", [(1, 1, 8), (2, 37, 100), (1, 9, 2048)], ids=str)
def test_route(B, T, D, dtype, poison):
    h, weight = torch.randn(B, T, D, device=DEVICE).to(dtype), torch.randn(D, device=DEVICE) / D**0.5
    bias = torch.tensor(0.1, device=DEVICE)
    score, gate, decision = kernels_hspmn.route(h, weight, bias, 0.3)
    eager = reference_hspmn.route_ref(h, weight, bias, 0.3)
    exact = reference_hspmn.route_ref(*exactly((h, weight, bias)), 0.3)
    assert_as_accurate("score", score, eager[0], exact[0])
    clear = (exact[0].sigmoid() - 0.3).abs() > 1e-5
    assert_as_accurate("gate", gate[clear], eager[1][clear], exact[1][clear])
    clear = (exact[0] + bias).abs() > 1e-5
    assert torch.equal(decision[clear], exact[2][clear])


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "B, T, capacity", [(1, 1, 1), (3, 100, 30), (2, 5000, 1100), (1, 2048, 4100), (2, 9, 0)], ids=str
)
def test_compact(B, T, capacity, share, poison):
    mask = torch.rand(B, T, device=DEVICE) < share
    got, want = kernels_hspmn.compact(mask, capacity), reference_hspmn.compact_ref(mask, capacity)
    for name, kernel, reference in zip(("index", "slot", "count"), got, want, strict=True):
        assert kernel.dtype == reference.dtype and torch.equal(kernel, reference), name


def test_take_rows(poison):
    x = torch.randn(2, 20, 3, 7, device=DEVICE)
    index = torch.tensor([[4, 4, -1, 19, 0, 1, 2, 3, -1], [-1] * 9], device=DEVICE)
    want = reference_hspmn.take_rows_ref(x, index)
    assert torch.equal(kernels_hspmn.take_rows(x, index), want)
    count = torch.tensor([4, 0], dtype=torch.int32, device=DEVICE)
    used = torch.arange(9, device=DEVICE) < count[:, None]
    got = kernels_attention_hspmn._launch_take_rows(x, index, count)
    assert torch.equal(got[used], want[used]) and got[~used].isnan().all()  # the poison: nothing was written there


def test_errors_name_what_is_wrong():
    q, k, v = heads(1, 4, 3, 2, 16, 16, torch.float32)
    decay, state = torch.zeros(1, 4, 3, device=DEVICE), torch.zeros(1, 4, 16, 16, device=DEVICE)
    with pytest.raises(ValueError, match="multiple of key/value heads"):
        kernels_hspmn.linear_attention(q, k, v, decay, None, None, None)
    q, k, v = heads(1, 4, 4, 2, 16, 16, torch.float32)
    with pytest.raises(ValueError, match="head width"):
        kernels_hspmn.local_attention(q[..., :8], k[..., :8], v[..., :8], None, 4)
    with pytest.raises(ValueError, match="window"):
        kernels_hspmn.local_attention(q, k, v, None, 0)
    with pytest.raises(ValueError, match="dtype"):
        kernels_hspmn.local_attention(q.half(), k, v, None, 4)
    with pytest.raises(ValueError, match="head_gate"):
        kernels_hspmn.reflexive_merge(q, k, v, None, 4, q, decay, decay, 1e-6)
    with pytest.raises(ValueError, match="one token"):
        kernels_hspmn.linear_attention_step(q, k, v, decay, None, None, state)
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    one, ring, step = [x[:, :1].contiguous() for x in (q, k, v)], torch.zeros(1, 3, 2, 16, device=DEVICE), decay[:, :1]
    place, router = (count[:, None], count[:, None], None, count), (step[..., 0], count, 0.05, 0)
    store = (ring, ring, torch.zeros(1, 3, dtype=torch.int32, device=DEVICE), count, count, ring[..., 0], ring[..., 0])
    fixed = (one[0], one[1], *one, torch.zeros(1, 1, 8, device=DEVICE), *decay[0, :2], 0.0, q[0, 0, 0], 1e-6, *place)
    with pytest.raises(ValueError, match="state must be contiguous torch.float32"):
        kernels_hspmn.attend_decode(*fixed, *router, state.half(), ring, ring, *store)
    with pytest.raises(ValueError, match="ring_v must be contiguous"):
        kernels_hspmn.attend_decode(*fixed, *router, state, ring, ring[:, :2], *store)
    with pytest.raises(ValueError, match="positions must be contiguous torch.int32"):
        kernels_hspmn.attend_decode(*fixed, *router, state, ring, ring, *store[:2], ring[..., 0, 0], *store[3:])
    with pytest.raises(ValueError, match="key_scales must be contiguous"):
        whole = ring.to(torch.int8)
        kernels_hspmn.attend_decode(*fixed, *router, state, ring, ring, whole, whole, *store[2:5], count, count)
    with pytest.raises(ValueError, match="head must be"):
        kernels_hspmn.attend_decode(*fixed[:5], step, *fixed[6:], *router, state, ring, ring, *store)
    with pytest.raises(ValueError, match="score must be"):
        kernels_hspmn.attend_decode(*fixed, step[0], *router[1:], state, ring, ring, *store)
    with pytest.raises(ValueError, match="at least two taps"):
        norms = (torch.ones(16, device=DEVICE),) * 2
        tables = (torch.ones(1, 1, 16, device=DEVICE),) * 2
        x, taps, history = (torch.ones(*shape, device=DEVICE) for shape in ((1, 1, 64), (64, 1), (1, 0, 64)))
        kernels_hspmn.split_heads_decode(x, taps, history, None, None, *tables, *norms, kv_heads=1, eps=1e-6)
    with pytest.raises(ValueError, match="contiguous float32"):
        kernels_hspmn.linear_attention_step(q[:, :1], k[:, :1], v[:, :1], decay, None, None, state.half())
    with pytest.raises(ValueError, match="bool"):
        kernels_hspmn.compact(torch.zeros(1, 3, device=DEVICE), 3)
    with pytest.raises(ValueError, match="width of h"):
        kernels_hspmn.route(q[0], torch.zeros(3, device=DEVICE), torch.zeros(1, device=DEVICE), 0.1)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(kv_heads=3), "multiple of kv_heads"),
        (dict(mode="relu"), "mode must be one of"),
        (dict(x_BTC=torch.zeros(2, 5, 128, dtype=torch.float64)), "float64"),
        (dict(weight_CL=torch.zeros(64, 4)), "weight must be"),
        (dict(history_BLC=torch.zeros(2, 4, 128)), "history must hold the 3 tokens"),
        (dict(sin_BTE=torch.zeros(3, 5, 16)), "sin must be"),
        (dict(k_norm_E=torch.zeros(32)), "norm weights must be"),
        (dict(q_norm_E=torch.zeros(8), k_norm_E=torch.zeros(8)), "head width"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_split_heads_errors_name_what_is_wrong(change, match):
    x, weight, cos, sin, *norms = projection(2, 5, 4, 2, 16, 4, torch.float32, tables=1)
    inputs = dict(x_BTC=x, weight_CL=weight, history_BLC=None, start_BT=None, cos_BTE=cos, sin_BTE=sin)
    inputs |= dict(q_norm_E=norms[0], k_norm_E=norms[1], kv_heads=2, eps=1e-6)
    with pytest.raises(ValueError, match=match):
        kernels_hspmn.split_heads(**inputs | change)


def reflexive_and_contextual(h, weight, bias, x, taps, cos, sin, q_norm, k_norm, heads_BTX, gate_scale, capacity):
    """All kernels in one call, as a block would make them."""
    _, gate, decision = kernels_hspmn.route(h, weight, bias, 0.05)
    index, _, count = kernels_hspmn.compact(decision, capacity)
    options = dict(kv_heads=2, eps=1e-6)
    q_linear, k_linear, q, k, v = kernels_hspmn.split_heads(x, taps, None, None, cos, sin, q_norm, k_norm, **options)
    log_decay, head_gate = -heads_BTX.chunk(2, -1)[0].exp(), heads_BTX.chunk(2, -1)[1]
    out, state = kernels_hspmn.linear_attention(q_linear, k_linear, v, log_decay, None, None, None)
    out = kernels_hspmn.reflexive_merge(q, k, v, None, 128, out, head_gate, q_norm, 1e-6)
    kernels_hspmn.sqsk_merge(out, gate * gate_scale, q, k, v, index, None, None, count)
    one = (x[:, :1].contiguous() for x in (q_linear, k_linear, v, log_decay))
    step = kernels_hspmn.linear_attention_step(*one, None, None, state)
    return out, state, step, kernels_hspmn.local_attention(q, k, v, None, 128)


def block_inputs(B=2, T=700, H=8, G=2, E=64, D=256, dtype=torch.bfloat16):
    h, weight = torch.randn(B, T, D, device=DEVICE).to(dtype), torch.randn(D, device=DEVICE) / D**0.5
    projected = projection(B, T, H, G, E, 4, dtype, tables=1)
    return [h, weight, torch.zeros(1, device=DEVICE), *projected, torch.randn(B, T, 2 * H, device=DEVICE)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
def test_compile_sees_no_graph_break(backend):
    """Full graph, and bit-equal to the eager calls of the same kernels."""
    inputs = block_inputs() if CUDA else block_inputs(1, 40, 4, 2, 16, 8, torch.float32)
    capacity = inputs[0].shape[1] // 2
    want = reflexive_and_contextual(*inputs, 1.0, capacity)
    torch.compiler.reset()
    got = torch.compile(reflexive_and_contextual, fullgraph=True, backend=backend)(*inputs, 1.0, capacity)
    for name, kernel, eager in zip(("out", "state", "step", "local"), got, want, strict=True):
        assert torch.equal(kernel, eager), name


@needs_gpu
def test_cuda_graph_replay_is_bit_equal():
    """Captured without a host synchronisation and replayed with other routed counts."""
    static, fresh = block_inputs(), block_inputs()
    run = lambda: reflexive_and_contextual(*static, 1.0, 350)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for held, new in zip(static, fresh, strict=True):
        held.copy_(new)
    graph.replay()
    want = reflexive_and_contextual(*fresh, 1.0, 350)
    for name, kernel, eager in zip(("out", "state", "step", "local"), got, want, strict=True):
        assert torch.equal(kernel, eager), name


@pytest.fixture
def mapped(monkeypatch):
    """Tensor descriptors on any device, and three processors, so that programs take several tiles each."""
    if not CUDA:
        monkeypatch.setattr(kernels_mlp_hspmn, "has_descriptors", lambda x: True)
        monkeypatch.setattr(kernels_mlp_hspmn, "processors", lambda device: 3)
    elif torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("the kernel runs on sm_90 and sm_100")


@pytest.mark.parametrize("dtype", DTYPES if not CUDA else [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M, N, K", [(128, 128, 64), (300, 264, 72)] + [(4096, 1024, 512)] * CUDA, ids=str)
def test_swiglu(M, N, K, dtype, mapped, poison):
    x = torch.randn(M, K, device=DEVICE).to(dtype)
    weights = [(torch.randn(N, K, device=DEVICE) / K**0.5).to(dtype) for _ in range(2)]
    for gate, up in (weights, weights[::-1], weights[:1] * 2):  # whichever lies first in memory, and one given twice
        eager = reference_hspmn.swiglu_ref(x, gate, up)
        exact = reference_hspmn.swiglu_ref(*exactly((x, gate, up)))
        assert_as_accurate("swiglu", kernels_mlp_hspmn.swiglu(x, gate, up), eager, exact)


def test_swiglu_survives_extreme_values(mapped):
    """SiLU of a very negative value is zero, and NaN is not hidden."""
    x = torch.tensor([-1e4, 1e4, float("nan"), 1.0], device=DEVICE).repeat_interleave(32)[:, None].expand(128, 64)
    weight = torch.ones(128, 64, device=DEVICE) / 64
    x, gate, up = (tensor.to(torch.float16) for tensor in (x, weight, weight / 1e4))
    out = kernels_mlp_hspmn.swiglu(x, gate, up)
    assert out[:32].abs().max() < 1e-6 and out[32:64].isfinite().all() and out[64:96].isnan().all()


def test_linear_add_is_in_place():
    residual, x, weight = torch.randn(2, 5, 24), torch.randn(2, 5, 40), torch.randn(24, 40)
    inputs = [tensor.to(DEVICE) for tensor in (residual, x, weight)]
    want = reference_hspmn.linear_add_ref(*exactly(inputs))
    assert kernels_mlp_hspmn.linear_add(*inputs) is None
    torch.testing.assert_close(inputs[0].double(), want, rtol=1e-5, atol=1e-4)


def test_product_errors_name_what_is_wrong(mapped):
    x, weight = torch.zeros(128, 64, device=DEVICE), torch.zeros(128, 64, device=DEVICE)
    with pytest.raises(ValueError, match="at least 128 rows"):
        kernels_mlp_hspmn.swiglu(x[:127], weight, weight)
    with pytest.raises(ValueError, match=r"up_weight \(64, 64\)"):
        kernels_mlp_hspmn.swiglu(x, weight, weight[:64])
    with pytest.raises(ValueError, match=r"weight must be \[N, 64\]"):
        kernels_mlp_hspmn.linear_add(x, x, weight.half())
    with pytest.raises(ValueError, match="residual must be contiguous"):
        kernels_mlp_hspmn.linear_add(x, x, weight)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
def test_products_compile_without_a_graph_break(backend, mapped):
    dtype = torch.bfloat16 if CUDA else torch.float32
    x, residual = (torch.randn(2, 128, width, device=DEVICE).to(dtype) for width in (64, 40))
    gate, up = (torch.randn(128, 64, device=DEVICE).to(dtype) for _ in range(2))
    down = torch.randn(40, 128, device=DEVICE).to(dtype)

    def layers(residual, x):
        hidden = kernels_mlp_hspmn.swiglu(x.mT.contiguous().mT, gate, up)
        total = 2 * residual
        kernels_mlp_hspmn.linear_add(total, hidden, down)
        return total, hidden

    torch.compiler.reset()
    got = torch.compile(layers, fullgraph=True, backend=backend)(residual, x)
    for name, kernel, eager in zip(("linear_add", "swiglu"), got, layers(residual, x), strict=True):
        assert torch.equal(kernel, eager), name
