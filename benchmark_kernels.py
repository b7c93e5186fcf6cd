"""Mode kernels of `benchmark.py`: each kernel checked against its reference, then timed beside its rivals."""

import importlib
import importlib.util
import statistics
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from . import reference_hspmn as reference
from .benchmark_common import LeftOut, measure, random_hidden

CHECKED_TOKENS = 4096  # of the first row, compared with the reference
CHECKED_QUERIES = 512  # the last ones of the last row, over all their keys


class Operation(NamedTuple):
    """One operation on inputs of one shape.

    calls: by backend, functions that run it. sample: the parts of an output that are compared. expected: those parts
    by the reference, from inputs passed through a function (to float64, or as they are). flops, bytes: least work.
    """

    calls: dict
    sample: object
    expected: object
    flops: float
    bytes: float


def relative_rms(got, want):
    """Root mean square of the difference over that of `want`."""
    got, want = got.double(), want.double()
    return ((got - want).square().mean() / want.square().mean().clamp_min(1e-30)).sqrt().item()


def check_operation(call, operation):
    """Largest relative error against float64; ValueError beyond twice that of the eager reference in low precision."""
    got = operation.sample(call())
    exact = operation.expected(lambda x: x.double())
    eager = operation.expected(lambda x: x)
    errors = []
    for part, (mine, right, usual) in enumerate(zip(got, exact, eager, strict=True)):
        rounding = torch.finfo(mine.dtype).eps if mine.is_floating_point() else 0.0
        error, limit = relative_rms(mine, right), 2 * relative_rms(usual, right) + rounding
        if not error <= limit:
            raise ValueError(f"output {part} has a relative error of {error:.2e}, above {limit:.2e}: it is not timed")
        errors.append(error)
    return max(errors)


def random_heads(args, B, T):
    """Queries [B, T, H, E], keys and values [B, T, G, E]; keys of about unit length."""
    H, G, E = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    q, k, v = (torch.randn(B, T, heads, E, device=args.device, dtype=args.dtype) for heads in (H, G, G))
    return q, k / E**0.5, v


def random_route(args, kernels, B, T):
    """Gates [B, T], and index_BK, slot_BT and count_B of `sparsity_k` of the tokens of each row."""
    K = max(1, round(args.sparsity_k * T))
    order_BT = torch.rand(B, T, device=args.device).argsort(1)
    index_BK, slot_BT, count_B = kernels.compact(order_BT < K, K)
    return torch.rand(B, T, device=args.device), index_BK, slot_BT, count_B


def route_operation(args, kernels, B, T):
    """Scores, gates and decisions."""
    h_BTD, n = random_hidden(args, B, T), CHECKED_TOKENS
    weight_D = 0.25 * torch.randn(args.hidden_size, device=args.device)
    bias = torch.tensor(-0.4, device=args.device)

    def sample(out):
        return out[0][:1, :n], out[1][:1, :n], (out[2] != (out[0] + bias > 0))[:1, :n]

    def expected(convert):
        score, gate, routed = reference.route_ref(convert(h_BTD[:1, :n]), convert(weight_D), bias, 0.05)
        return score, gate, torch.zeros_like(routed)

    calls = {"triton": lambda: kernels.route(h_BTD, weight_D, bias, 0.05)}
    moved = h_BTD.nbytes + B * T * 9
    return Operation(calls, sample, expected, 2 * h_BTD.numel(), moved)


def norm_heads_operation(args, kernels, B, T):
    """Norm, head projection and router score of a block's input; beside it what torch.compile makes of the three."""
    K = args.hidden_size
    x_BTD, weight, _ = random_products(args, K, 2 * args.num_attention_heads, B, T)
    norm_D = 1 + 0.1 * torch.randn(K, device=args.device, dtype=args.dtype)
    weights = (norm_D, weight, 0.25 * torch.randn(K, device=args.device))

    def reference_call(x_BTD, norm_D, *weights):
        return reference.norm_heads_ref(x_BTD, norm_D, 1e-6, *weights)

    calls = {"triton": lambda: kernels.norm_heads(x_BTD, norm_D, 1e-6, *weights[1:])}
    return product_operation(args, calls, reference_call, [x_BTD], weights)


def compact_operation(args, kernels, B, T):
    """Ordered compaction of a mask."""
    mask_BT, K = torch.rand(B, T, device=args.device) < args.sparsity_k, max(1, round(2 * args.sparsity_k * T))
    calls = {"triton": lambda: kernels.compact(mask_BT, K)}
    return Operation(calls, lambda out: out, lambda _: reference.compact_ref(mask_BT, K), 0, B * (9 * T + 8 * K))


def take_rows_operation(args, kernels, B, T):
    """Gathering the values of the routed tokens."""
    v_BTGE = random_heads(args, B, T)[2]
    index_BK = random_route(args, kernels, B, T)[1]
    calls = {"triton": lambda: kernels.take_rows(v_BTGE, index_BK)}

    def expected(convert):
        return (reference.take_rows_ref(convert(v_BTGE[:1]), index_BK[:1]),)

    moved = 2 * index_BK.numel() * v_BTGE[0, 0].nbytes + index_BK.nbytes
    return Operation(calls, lambda out: (out[:1],), expected, 0, moved)


def linear_attention_operation(args, kernels, B, T):
    """Gated linear attention, beside fla's simple_gla on keys and values expanded to all heads."""
    (q, k, v), n = random_heads(args, B, T), CHECKED_TOKENS
    H, E, R = *q.shape[2:], args.num_attention_heads // args.num_key_value_heads
    log_decay = -(torch.rand(B, T, H, device=args.device) ** 3)
    inputs = (q, k, v, log_decay)
    calls = {"triton": lambda: kernels.linear_attention(*inputs, None, None, None)[0]}
    if importlib.util.find_spec("fla") is not None and args.device.type == "cuda":
        simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        wide = [x.repeat_interleave(R, 2) for x in (k, v)]
        calls["fla_simple_gla"] = lambda: simple_gla(q, *wide, g=log_decay, scale=1.0)[0]

    def expected(convert):
        return (reference.linear_attention_ref(*(convert(x[:1, :n]) for x in inputs), None, None, None)[0],)

    moved = 2 * q.nbytes + k.nbytes + v.nbytes + log_decay.nbytes
    return Operation(calls, lambda out: (out[:1, :n],), expected, B * T * H * E * (128 + 4 * E), moved)


def linear_attention_step_operation(args, kernels, B, T):
    """One recurrent step of B rows; the state advances in place."""
    (q, k, v), E = random_heads(args, B, 1), args.head_dim
    log_decay = -(torch.rand(B, 1, args.num_attention_heads, device=args.device) ** 3)
    state = torch.randn(B, args.num_attention_heads, E, E, device=args.device)
    held = state.clone()
    calls = {"triton": lambda: (kernels.linear_attention_step(q, k, v, log_decay, None, None, held), held)}

    def expected(convert):
        inputs = (convert(x[:1]) for x in (q, k, v, log_decay))
        return reference.linear_attention_recurrent_ref(*inputs, None, None, convert(state[:1]))

    return Operation(calls, lambda out: [x[:1] for x in out], expected, 4 * state.numel(), 2 * state.nbytes)


def local_attention_operation(args, kernels, B, T):
    """Attention over the last `window` tokens."""
    (q, k, v), n, window = random_heads(args, B, T), CHECKED_TOKENS, args.sliding_window
    calls = {"triton": lambda: kernels.local_attention(q, k, v, None, window)}

    def expected(convert):
        return (reference.local_attention_ref(*(convert(x[:1, :n]) for x in (q, k, v)), None, window)[0],)

    flops = 4 * q.numel() * min(window, T)
    return Operation(calls, lambda out: (out[:1, :n],), expected, flops, 2 * q.nbytes + k.nbytes + v.nbytes)


def reflexive_merge_operation(args, kernels, B, T):
    """Attention over the last `window` tokens, with the norm, gate and sum of the linear attention's output."""
    (q, k, v), n, window = random_heads(args, B, T), CHECKED_TOKENS, args.sliding_window
    linear, norm_E = torch.randn_like(q), 1 + 0.1 * torch.randn(args.head_dim, device=args.device)
    head_gate = torch.randn(B, T, args.num_attention_heads, device=args.device)
    calls = {"triton": lambda: kernels.reflexive_merge(q, k, v, None, window, linear, head_gate, norm_E, 1e-6)}

    def expected(convert):
        heads = [convert(x[:1, :n]) for x in (q, k, v, linear, head_gate)]
        return (reference.reflexive_merge_ref(*heads[:3], None, window, *heads[3:], convert(norm_E), 1e-6),)

    moved = 3 * q.nbytes + k.nbytes + v.nbytes + head_gate.nbytes
    return Operation(calls, lambda out: (out[:1, :n],), expected, 4 * q.numel() * min(window, T), moved)


def split_heads_operation(args, kernels, B, T):
    """Convolution, feature map, norms and RoPE of the shared projection, with four taps."""
    H, G, E, n = args.num_attention_heads, args.num_key_value_heads, args.head_dim, CHECKED_TOKENS
    x_BTC = torch.randn(B, T, (H + 2 * G) * E, device=args.device, dtype=args.dtype)
    weight_CL = torch.randn(x_BTC.shape[2], 4, device=args.device, dtype=args.dtype)
    angle_BTE = torch.rand(1, T, E, device=args.device)
    norms = [1 + 0.1 * torch.randn(E, device=args.device, dtype=args.dtype) for _ in range(2)]
    tables = [x.to(args.dtype) for x in (angle_BTE.cos(), angle_BTE.sin())]
    sizes = {"kv_heads": G, "eps": 1e-6}
    calls = {"triton": lambda: kernels.split_heads(x_BTC, weight_CL, None, None, *tables, *norms, **sizes)}

    def expected(convert):
        angles, weights = [convert(x[:, :n]) for x in tables], [convert(x) for x in norms]
        inputs = (convert(x_BTC[:1, :n]), convert(weight_CL), None, None)
        return reference.split_heads_ref(*inputs, *angles, *weights, **sizes)

    moved = x_BTC.nbytes + (2 * H + 3 * G) * E * B * T * args.dtype.itemsize
    return Operation(calls, lambda out: [x[:1, :n] for x in out], expected, 0, moved)


def split_heads_decode_operation(args, kernels, B, T):
    """`split_heads` of one token of B rows; the history moves on in place."""
    H, G, E = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    x_BTC = torch.randn(B, 1, (H + 2 * G) * E, device=args.device, dtype=args.dtype)
    weight_CL = torch.randn(x_BTC.shape[2], 4, device=args.device, dtype=args.dtype)
    history_BLC = torch.randn(B, 3, x_BTC.shape[2], device=args.device, dtype=args.dtype)
    start_BT = torch.full((B, 1), -9, device=args.device)
    angle_BTE = torch.rand(1, 1, E, device=args.device)
    norms = [1 + 0.1 * torch.randn(E, device=args.device, dtype=args.dtype) for _ in range(2)]
    tables = [x.to(args.dtype) for x in (angle_BTE.cos(), angle_BTE.sin())]
    held, sizes = history_BLC.clone(), {"kv_heads": G, "eps": 1e-6}

    def call():
        heads = kernels.split_heads_decode(x_BTC, weight_CL, held, start_BT, None, *tables, *norms, **sizes)
        return *heads, held

    def expected(convert):
        inputs = (convert(x_BTC), convert(weight_CL), convert(history_BLC), start_BT, None)
        return reference.split_heads_decode_ref(*inputs, *(convert(x) for x in (*tables, *norms)), **sizes)

    moved = 2 * held.nbytes + x_BTC.nbytes + (2 * H + 3 * G) * E * B * args.dtype.itemsize
    return Operation({"triton": call}, lambda out: out, expected, 0, moved)


def sqsk_attention_operation(args, kernels, B, K):
    """Causal attention of K compacted rows, beside SDPA's backends and FlexAttention."""
    (q, k, v), n = random_heads(args, B, K), min(CHECKED_QUERIES, K)
    count_B = torch.full((B,), K, dtype=torch.int32, device=args.device)
    calls = {"triton": lambda: kernels.sqsk_attention(q, k, v, None, None, count_B)}
    if args.device.type == "cuda":
        calls |= {
            "cudnn": lambda: sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION),
            "flash": lambda: sdpa(q, k, v, SDPBackend.FLASH_ATTENTION),
            "flex": flex_call(q, k, v),
        }

    def expected(convert):
        inputs = [convert(x) for x in (q[-1:, K - n :], k[-1:], v[-1:])]
        return (reference.sqsk_attention_ref(*inputs, None, 0 * count_B[:1] + (K - n), 0 * count_B[:1] + n)[0],)

    flops = 2 * B * args.num_attention_heads * args.head_dim * K * (K + 1)
    return Operation(calls, lambda out: (out[-1:, K - n :],), expected, flops, 2 * q.nbytes + k.nbytes + v.nbytes)


def sdpa(q_BKHE, k_BKGE, v_BKGE, backend):
    """Causal attention by one backend of SDPA."""
    q, k, v = (x.transpose(1, 2) for x in (q_BKHE, k_BKGE, v_BKGE))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flex_call(q_BKHE, k_BKGE, v_BKGE):
    """A call of compiled FlexAttention; its mask is made, and its code compiled, by the first call."""
    q, k, v = (x.transpose(1, 2) for x in (q_BKHE, k_BKGE, v_BKGE))
    attend, masks = torch.compile(flex_attention, dynamic=False), []

    def call():
        if not masks:
            K = q.shape[2]
            causal = create_block_mask(lambda b, h, i, j: j <= i, None, None, K, K, device=q.device, _compile=True)
            masks.append(causal)
        return attend(q, k, v, block_mask=masks[0], enable_gqa=True).transpose(1, 2)

    return call


def sqsk_merge_operation(args, kernels, B, T):
    """Gathering, attention of routed tokens, gate and sum, in place."""
    q, k, v = random_heads(args, B, T)
    gate_BT, index_BK, slot_BT, count_B = random_route(args, kernels, B, T)
    reflexive = torch.randn_like(q)
    merged = reflexive.clone()

    def call():
        kernels.sqsk_merge(merged, gate_BT, q, k, v, index_BK, None, None, count_B)
        return merged

    def expected(convert):
        rows = [reference.take_rows_ref(convert(x[:1]), index_BK[:1]) for x in (q, k, v)]
        out = reference.sqsk_attention_ref(*rows, None, 0 * count_B[:1], count_B[:1])[0]
        return (reference.merge_ref(convert(reflexive[:1]), out, gate_BT[:1], slot_BT[:1]),)

    K = index_BK.shape[1]
    moved = B * K * (3 * q[0, 0].nbytes + k[0, 0].nbytes + v[0, 0].nbytes)
    flops = 2 * B * args.num_attention_heads * args.head_dim * K * (K + 1)
    return Operation({"triton": call}, lambda out: (out[:1],), expected, flops, moved)


def attend_decode_operation(args, kernels, B, T):
    """Both streams of one routed token of B rows, over `sparsity_k * T` cached keys, which it extends in place."""
    heads, H, G, E = random_heads(args, B, 1), args.num_attention_heads, args.num_key_value_heads, args.head_dim
    P, W = max(2, round(args.sparsity_k * T)), args.sliding_window
    integers = {"dtype": torch.int32, "device": args.device}
    rates = [torch.randn(H, device=args.device) - 2 for _ in range(2)]
    seen_B = torch.full((B,), T, device=args.device)
    fixed = [heads[0] / E**0.5, heads[1], *heads, torch.randn(B, 1, 2 * H, device=args.device), *rates]
    fixed += [1 / 128, torch.ones(E, device=args.device), 1e-6, seen_B[:, None], -seen_B[:, None], None, seen_B]
    fixed += [torch.rand(B, 1, device=args.device), torch.zeros((), device=args.device), 0.05, T + 1]
    store = [torch.randn(B, H, E, E, device=args.device)]
    store += [torch.randn(B, n, G, E, device=args.device, dtype=args.dtype) for n in (W, W, P + 1, P + 1)]
    store += [torch.zeros(B, P + 1, **integers), torch.full((B,), P - 1, **integers), torch.zeros(B, **integers)]
    store += [torch.zeros(B, 1, G, device=args.device) for _ in range(2)]  # scales, not used
    held = [x.clone() for x in store]

    def call():
        held[6].fill_(P - 1)  # the store has room for one token
        return kernels.attend_decode(*fixed, *held), held[0]

    def sample(out):
        return [x[:1] for x in out]

    def expected(convert):
        def converted(x):
            return convert(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        cache = [converted(x).clone() for x in store]
        return sample(reference.attend_decode_ref(*(converted(x) for x in fixed), *cache))

    moved = 2 * store[0].nbytes + sum(x.nbytes for x in store[1:5])
    return Operation({"triton": call}, sample, expected, 4 * heads[0].numel() * P, moved)


def random_products(args, inputs, outputs, B, T):
    """Random hidden states [B, T, inputs] and two weights [outputs, inputs]."""
    like = {"device": args.device, "dtype": args.dtype}
    return torch.randn(B, T, inputs, **like), *(torch.randn(outputs, inputs, **like) / inputs**0.5 for _ in range(2))


def few_rows(args, B, N, K):
    """One token of B rows [B, 1, K], a norm's weight, and two weights [N, K]."""
    x_BTD, *weights = random_products(args, K, N, B, 1)
    return x_BTD, 1 + 0.1 * torch.randn(K, device=args.device, dtype=args.dtype), *weights


def project_decode_operation(args, kernels, B, T):
    """Norm, shared projection, head projection and router score of one token of B rows."""
    H, G, K = args.num_attention_heads, args.num_key_value_heads, args.hidden_size
    x_BTD, norm_D, weight, other = few_rows(args, B, (H + 2 * G) * args.head_dim, K)
    inputs = (x_BTD, norm_D, 1e-6, weight, other[: 2 * H], torch.randn(K, device=args.device) / K**0.5)
    return rows_operation(kernels.project_decode, reference.project_decode_ref, inputs)


def swiglu_decode_operation(args, kernels, B, T):
    """Norm and SwiGLU's first two products of one token of B rows."""
    x_BTD, norm_D, gate, up = few_rows(args, B, args.intermediate_size, args.hidden_size)
    return rows_operation(kernels.swiglu_decode, reference.swiglu_decode_ref, (x_BTD, norm_D, 1e-6, gate, up))


def linear_add_decode_operation(args, kernels, B, T):
    """SwiGLU's last product of one token of B rows, added to the residual."""
    x_BTD, _, weight, _ = few_rows(args, B, args.hidden_size, args.intermediate_size)
    residual = torch.randn(B, 1, args.hidden_size, device=args.device, dtype=args.dtype)
    return rows_operation(kernels.linear_add_decode, reference.linear_add_ref, (residual, x_BTD, weight))


def place_decode_operation(args, kernels, B, T):
    """Dense tables and numbers of one token of B rows."""
    cos, sin = torch.randn(2, B, 1, args.head_dim, device=args.device, dtype=args.dtype)
    start = torch.zeros(B, 1, dtype=torch.int64, device=args.device)
    return rows_operation(kernels.place_decode, lambda *x: x, (cos, sin, start, start, start[:, 0]))


def rows_operation(kernel, reference_call, inputs):
    """An operation of one token: all inputs are read once, and every output is compared."""

    def outputs(out):
        return out if isinstance(out, tuple) else (out,)

    def expected(convert):
        tensors = (convert(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
        return outputs(reference_call(*tensors))

    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    products = sum(x.numel() for x in tensors if x.dim() == 2 and x.is_floating_point())
    flops = 2 * inputs[0].shape[0] * products
    return Operation({"triton": lambda: kernel(*inputs)}, outputs, expected, flops, sum(x.nbytes for x in tensors))


def product_operation(args, calls, reference_call, inputs, weights):
    """An operation of products, token by token; beside it what torch.compile makes of its reference."""
    n, elements = CHECKED_TOKENS, sum(weight.numel() for weight in weights)
    if args.device.type == "cuda":
        compiled_call = torch.compile(reference_call, dynamic=False)
        calls["compiled"] = lambda: compiled_call(*inputs, *weights)

    def expected(convert):
        return results(reference_call(*(convert(x[:1, :n]) for x in inputs), *map(convert, weights)))

    def results(out):
        return out if isinstance(out, tuple) else (out,)

    tokens = inputs[0].shape[0] * inputs[0].shape[1]
    one = results(reference_call(*(x[:1, :1] for x in inputs), *weights))
    moved = sum(x.nbytes for x in (*inputs, *weights)) + tokens * sum(x.nbytes for x in one)
    return Operation(calls, lambda out: tuple(x[:1, :n] for x in results(out)), expected, 2 * tokens * elements, moved)


def swiglu_operation(args, kernels, B, T):
    """SwiGLU's first two products."""
    x_BTD, *weights = random_products(args, args.hidden_size, args.intermediate_size, B, T)
    if args.device.type != "cuda" or torch.cuda.get_device_capability()[0] not in (9, 10):
        raise LeftOut("it needs sm_90 or sm_100")
    calls = {"triton": lambda: kernels.swiglu(x_BTD, *weights)}
    return product_operation(args, calls, reference.swiglu_ref, [x_BTD], weights)


def linear_add_operation(args, kernels, B, T):
    """SwiGLU's last product, added to the residual; "triton" is cuBLAS in place."""
    x_BTD, weight, _ = random_products(args, args.intermediate_size, args.hidden_size, B, T)
    residual_BTD = random_hidden(args, B, T)
    held_BTD = residual_BTD.clone()

    def call():
        kernels.linear_add(held_BTD, x_BTD, weight)
        return held_BTD

    return product_operation(args, {"triton": call}, reference.linear_add_ref, [residual_BTD, x_BTD], [weight])


OPERATIONS = {
    "norm_heads": norm_heads_operation, "route": route_operation, "compact": compact_operation,
    "take_rows": take_rows_operation, "linear_attention": linear_attention_operation,
    "linear_attention_step": linear_attention_step_operation, "local_attention": local_attention_operation,
    "reflexive_merge": reflexive_merge_operation, "attend_decode": attend_decode_operation,
    "split_heads": split_heads_operation, "split_heads_decode": split_heads_decode_operation,
    "sqsk_attention": sqsk_attention_operation, "sqsk_merge": sqsk_merge_operation,
    "place_decode": place_decode_operation, "project_decode": project_decode_operation,
    "swiglu_decode": swiglu_decode_operation, "linear_add_decode": linear_add_decode_operation,
    "swiglu": swiglu_operation, "linear_add": linear_add_operation,
}  # fmt: skip


FEW_ROWS = ("project_decode", "swiglu_decode", "linear_add_decode")
SINGLE_TOKEN = (*FEW_ROWS, "linear_attention_step", "place_decode")


@torch.no_grad()
def measure_operation(args, name, backend, B, T):
    """One operation by one backend: its error, and on CUDA its time with cold caches."""
    torch.manual_seed(0)
    kernels = importlib.import_module(f"{__package__}.kernels_hspmn")  # needs triton, which the other modes do not
    operation = OPERATIONS[name](args, kernels, B, T)
    if backend not in operation.calls:
        raise LeftOut("flash-linear-attention is not installed" if backend == "fla_simple_gla" else "it needs CUDA")
    call = operation.calls[backend]
    metrics = {"error": check_operation(call, operation)}
    if args.device.type != "cuda":
        return metrics
    # Writing it takes longer than queueing a call, so launches never wait for the host
    flushed = torch.empty(2**29, dtype=torch.int8, device=args.device)
    seconds = 1e-3 * statistics.median(measure(call, args, before=flushed.zero_))
    metrics |= {"ms": 1e3 * seconds, "tb_s": operation.bytes / seconds / 1e12}
    return metrics | ({"tflops": operation.flops / seconds / 1e12} if operation.flops else {})


def kernels_cases(args):
    """`<operation>/<backend>/<shape>`; without CUDA and Triton's interpreter a single case that says so."""
    if args.device.type != "cuda" and not interpreted():
        yield "kernels", lambda: leave_out("Triton kernels need CUDA, or TRITON_INTERPRET=1 to check them on a CPU")
        return
    rivals = {"linear_attention": ("fla_simple_gla",), "sqsk_attention": ("cudnn", "flash", "flex")}
    rivals |= dict.fromkeys(("norm_heads", "swiglu", "linear_add"), ("compiled",))
    for name in OPERATIONS:
        for B, T in args.sqsk_shapes if name == "sqsk_attention" else args.kernel_shapes:
            if name in FEW_ROWS:
                B = min(B, 16)
            shape = f"B{B}_K{T}" if name == "sqsk_attention" else f"B{B}_T{1 if name in SINGLE_TOKEN else T}"
            for backend in ("triton", *rivals.get(name, ())):
                yield (
                    f"{name}/{backend}/{shape}",
                    (lambda n=name, b=backend, rows=B, tokens=T: measure_operation(args, n, b, rows, tokens)),
                )


def interpreted():
    """Whether Triton runs kernels in its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def leave_out(reason):
    """A case that never runs."""
    raise LeftOut(reason)
