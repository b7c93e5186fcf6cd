"""HSPMN's operations as Triton kernels for inference (forward only), each the twin of a `*_ref` of `reference_hspmn`.

Routing and compaction are here; `kernels_projection_hspmn` makes what the streams read, which are in
`kernels_linear_hspmn` and `kernels_attention_hspmn`, and for a decoded token in `kernels_decode_hspmn`, its products
in `kernels_rows_hspmn`. All operations are exported from here. Every one is a custom operator: no graph break under
`torch.compile(fullgraph=True)`, no host synchronisation, capturable in a CUDA graph. Legend in `kernels_common_hspmn`.
"""

import torch

from .kernels_attention_hspmn import local_attention, reflexive_merge, sqsk_attention, sqsk_merge, take_rows
from .kernels_common_hspmn import DTYPES, check_vectors, operation, router_score
from .kernels_decode_hspmn import attend_decode, place_decode
from .kernels_linear_hspmn import linear_attention, linear_attention_step
from .kernels_mlp_hspmn import linear_add, swiglu
from .kernels_projection_hspmn import split_heads, split_heads_decode
from .kernels_rows_hspmn import linear_add_decode, project_decode, swiglu_decode

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error

MOST_HEAD_ROWS = 256  # of `norm_heads`, whose sums of all of them are one tile
COMPACT_BLOCK = 2048  # tokens per program; 164 programs for the longest single row of the benchmark


@triton.jit
def route_kernel(
    h, weight, bias, score, gate, routed, rows, noise_floor,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Score, gate and decision of BLOCK_N tokens, as sums of float32 products."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = n < rows
    products = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x = tl.load(h + n[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        products += x.to(tl.float32) * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    z = router_score(products, D)
    value = 1.0 / (1.0 + tl.exp(-z))
    tl.store(score + n, z, mask=real)
    tl.store(gate + n, tl.where(value >= noise_floor, value, 0.0), mask=real)
    tl.store(routed + n, z + tl.load(bias).to(tl.float32) > 0, mask=real)


@triton.jit(do_not_specialize=["M"])
def norm_heads_kernel(
    x, norm, head_weight, score_weight, h, head, score, M,
    X: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h [M, D], head [M, X] and score [M] of BLOCK_M rows, which are read twice: the second time they are in L2."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_X)
    real = (m < M)[:, None]
    squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        rows = tl.load(x + m[:, None] * D + d[None, :], mask=real & (d < D)[None, :], other=0.0).to(tl.float32)
        squares += rows * rows
    scale = tl.rsqrt(tl.sum(squares, 1) / D + EPS)
    total = tl.zeros([BLOCK_M, BLOCK_X], tl.float32)
    products = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        in_d = (d < D)[None, :]
        rows = tl.load(x + m[:, None] * D + d[None, :], mask=real & in_d, other=0.0)
        factor = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        weights = tl.load(head_weight + n[:, None] * D + d[None, :], mask=(n < X)[:, None] & in_d, other=0.0)
        normed = (rows.to(tl.float32) * scale[:, None] * factor[None, :]).to(rows.dtype)
        tl.store(h + m[:, None] * D + d[None, :], normed, mask=real & in_d)
        total = tl.dot(normed, tl.trans(weights), total, input_precision="tf32x3")
        if score_weight is not None:  # a sum without tensor cores, as in `score_ref`
            score_factor = tl.load(score_weight + d, mask=d < D, other=0.0).to(tl.float32)
            products += normed.to(tl.float32) * score_factor[None, :]
    tl.store(head + m[:, None] * X + n[None, :], total.to(head.dtype.element_ty), mask=real & (n < X)[None, :])
    if score_weight is not None:
        tl.store(score + m, router_score(products, D), mask=m < M)


@triton.jit(do_not_specialize=["T", "N"])
def count_kernel(mask, counts, T, N, BLOCK_T: tl.constexpr):
    """True entries of each block of BLOCK_T tokens."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    value = tl.load(mask + b * T + t, mask=t < T, other=0) != 0
    tl.store(counts + b * N + tl.program_id(0), tl.sum(value.to(tl.int32), 0))


@triton.jit(do_not_specialize=["T", "K", "N", "fill"])
def compact_kernel(
    mask, counts, index, slot, count, T, K, N, fill, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Slots of one block of tokens, their indices, and -1 in this block's share (`fill`) of the unused slots."""
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    before, total = 0, 0
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        held = tl.load(counts + b * N + n, mask=n < N, other=0)
        before += tl.sum(tl.where(n < block, held, 0), 0)
        total += tl.sum(held, 0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    chosen = tl.load(mask + b * T + t, mask=t < T, other=0) != 0
    place = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
    kept = chosen & (place < K)
    tl.store(slot + b * T + t, tl.where(kept, place, -1).to(tl.int64), mask=t < T)
    tl.store(index + b * K + place, t.to(tl.int64), mask=kept)
    used = tl.minimum(total, K)
    for begin in range(block * fill, tl.minimum((block + 1) * fill, K), BLOCK_T):
        k = begin + tl.arange(0, BLOCK_T)
        empty = (k >= used) & (k < tl.minimum((block + 1) * fill, K))
        tl.store(index + b * K + k, tl.full([BLOCK_T], -1, tl.int64), mask=empty)
    if block == 0:
        tl.store(count + b, used)


@operation("route")
def _route(
    h_BTD: torch.Tensor, weight_D: torch.Tensor, bias: torch.Tensor, noise_floor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h_BTD, D = h_BTD.contiguous(), h_BTD.shape[-1]
    score_BT = h_BTD.new_empty(h_BTD.shape[:2], dtype=torch.float32)
    gate_BT = torch.empty_like(score_BT)
    routed_BT = torch.empty_like(score_BT, dtype=torch.bool)
    rows = score_BT.numel()
    route_kernel[(triton.cdiv(rows, 8),)](
        h_BTD, weight_D.contiguous(), bias, score_BT, gate_BT, routed_BT, rows, noise_floor,
        D=D, BLOCK_N=8, BLOCK_D=min(1024, triton.next_power_of_2(D)), num_warps=4,
    )  # fmt: skip
    return score_BT, gate_BT, routed_BT


@_route.register_fake
def _(h_BTD, weight_D, bias, noise_floor):
    score_BT = h_BTD.new_empty(h_BTD.shape[:2], dtype=torch.float32)
    return score_BT, torch.empty_like(score_BT), torch.empty_like(score_BT, dtype=torch.bool)


def route(h_BTD, weight_D, bias, noise_floor):
    """`route_ref`: score_BT and gate_BT in float32, routed_BT in bool, from one read of `h_BTD` (any float dtype).

    weight_D: any float dtype. bias: a tensor of one element; it steers the decision alone (arXiv 2408.15664).
    Where `h` has just been computed by compiled code, inductor's fusion of `route_ref` saves this read.
    Raises ValueError if the widths differ.
    """
    if weight_D.shape != h_BTD.shape[-1:]:
        raise ValueError(f"weight must have the width of h ({h_BTD.shape[-1]}), got {tuple(weight_D.shape)}")
    return _route(h_BTD, weight_D, bias, noise_floor)


def norm_heads_config(element_size):
    """Block sizes and launch options of `norm_heads_kernel`; 32 rows of 2048 values on all processors are 17 MB."""
    return {"BLOCK_M": 32, "BLOCK_D": 128 if element_size == 2 else 32, "num_warps": 4, "num_stages": 3}


@operation("norm_heads")
def _norm_heads(
    x_BTD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    head_weight_XD: torch.Tensor,
    score_weight_D: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, T, D), X = x_BTD.shape, head_weight_XD.shape[0]
    outputs = _normed_heads(x_BTD, X)
    config = norm_heads_config(x_BTD.element_size())
    if B * T:
        score_weight_D = None if score_weight_D is None else score_weight_D.contiguous()
        norm_heads_kernel[(triton.cdiv(B * T, config["BLOCK_M"]),)](
            x_BTD.contiguous(), norm_D.contiguous(), head_weight_XD.contiguous(), score_weight_D, *outputs, B * T,
            X=X, D=D, EPS=eps, BLOCK_X=max(16, triton.next_power_of_2(X)), **config,
        )  # fmt: skip
    return outputs


def _normed_heads(x_BTD, X):
    """The outputs of `norm_heads`, not yet written; the score stays so without a weight of it."""
    B, T, D = x_BTD.shape
    return x_BTD.new_empty(B, T, D), x_BTD.new_empty(B, T, X), x_BTD.new_empty(B, T, dtype=torch.float32)


@_norm_heads.register_fake
def _(x_BTD, norm_D, eps, head_weight_XD, score_weight_D):
    return _normed_heads(x_BTD, head_weight_XD.shape[0])


def norm_heads(x_BTD, norm_D, eps, head_weight_XD, score_weight_D=None):
    """`norm_heads_ref` in one pass over memory.

    x_BTD: float32, bfloat16 or float16. head_weight_XD: in x's dtype, at most `MOST_HEAD_ROWS` rows. norm_D,
    score_weight_D: any float dtype. Raises ValueError on shapes or dtypes the kernel does not take.
    """
    D = x_BTD.shape[-1]
    if x_BTD.dtype not in DTYPES or head_weight_XD.dtype != x_BTD.dtype:
        raise ValueError(
            f"x and head_weight must share a dtype of float32, bfloat16, float16; got {x_BTD.dtype} and "
            f"{head_weight_XD.dtype}; cast them"
        )
    if head_weight_XD.dim() != 2 or head_weight_XD.shape[1] != D or not 0 < head_weight_XD.shape[0] <= MOST_HEAD_ROWS:
        wanted = f"[1 to {MOST_HEAD_ROWS}, {D}]"
        raise ValueError(f"head_weight must be {wanted}, as x has it, got {tuple(head_weight_XD.shape)}")
    check_vectors(x_BTD, norm=norm_D, score_weight=score_weight_D)
    h_BTD, head_BTX, score_BT = _norm_heads(x_BTD, norm_D, eps, head_weight_XD, score_weight_D)
    return h_BTD, head_BTX, None if score_weight_D is None else score_BT


@operation("compact")
def _compact(mask_BT: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, T), mask = mask_BT.shape, mask_BT.contiguous().view(torch.uint8)
    index_BK = mask.new_empty(B, capacity, dtype=torch.int64)
    slot_BT = mask.new_empty(B, T, dtype=torch.int64)
    count_B = mask.new_empty(B, dtype=torch.int32)
    N = triton.cdiv(T, COMPACT_BLOCK)
    block_t = min(COMPACT_BLOCK, triton.next_power_of_2(T))
    counts_BN = mask.new_empty(B, N, dtype=torch.int32)
    count_kernel[(N, B)](mask, counts_BN, T, N, BLOCK_T=block_t, num_warps=4)
    compact_kernel[(N, B)](
        mask, counts_BN, index_BK, slot_BT, count_B, T, capacity, N, triton.cdiv(capacity, N),
        BLOCK_T=block_t, BLOCK_N=min(256, triton.next_power_of_2(N)), num_warps=4,
    )  # fmt: skip
    return index_BK, slot_BT, count_B


@_compact.register_fake
def _(mask_BT, capacity):
    B, T = mask_BT.shape
    long = torch.int64
    return (
        mask_BT.new_empty(B, capacity, dtype=long),
        mask_BT.new_empty(B, T, dtype=long),
        mask_BT.new_empty(B, dtype=torch.int32),
    )


def compact(mask_BT, capacity):
    """`compact_ref`: index_BK (int64, -1 for an empty slot), slot_BT (int64, -1 for none), count_B (int32).

    mask_BT: bool. Blocks of a row are counted, then placed, so one long row uses the whole chip.
    Raises ValueError if the mask is not bool or capacity is negative.
    """
    if mask_BT.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask_BT.dtype}")
    if capacity < 0:
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    return _compact(mask_BT, capacity)


__all__ = [
    "attend_decode",
    "compact",
    "linear_add",
    "linear_add_decode",
    "linear_attention",
    "linear_attention_step",
    "local_attention",
    "norm_heads",
    "place_decode",
    "project_decode",
    "reflexive_merge",
    "route",
    "split_heads",
    "split_heads_decode",
    "sqsk_attention",
    "sqsk_merge",
    "swiglu",
    "swiglu_decode",
    "take_rows",
]
