"""HSPMN's operations as Triton kernels for inference; importing this file registers them all.

Routing is here; `kernels_projection_hspmn` makes what the streams read, which are in `kernels_linear_hspmn` and
`kernels_attention_hspmn`, `kernels_mlp_hspmn` has the SwiGLU and `kernels_decode_hspmn` a single token. Every
operation is a custom operator: no graph break under `torch.compile(fullgraph=True)`, no host synchronisation,
capturable in a CUDA graph. Legend in `kernels_common_hspmn`.
"""

from functools import lru_cache

import torch

from .kernels_attention_hspmn import take_rows
from .kernels_common_hspmn import HEAD_WIDTHS, ROW_START, TOKEN_START, check, dense, interpreted, kernel
from .kernels_decode_hspmn import attend_token
from .kernels_linear_hspmn import linear_attention
from .kernels_mlp_hspmn import swiglu_fits
from .kernels_projection_hspmn import softplus, split_heads
from .operations_hspmn import route

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on operations_hspmn without it") from error

ROUTE_BLOCK = 1024  # tokens per program: one prompt of 4,096 occupies four, the longest of the benchmark 328


@kernel("T", "N")
def decide_kernel(
    score, bias, start, length, gate, mask, counts, sums, T, N, noise_floor,
    INITIAL: tl.constexpr, START: tl.constexpr, HAS_LENGTH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gates and decisions of BLOCK_T tokens of a row, how many are wanted, and sums of entropy and gates."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = t < T
    z = tl.load(score + b * T + t, mask=real, other=0.0).to(tl.float32)
    value = 1.0 / (1.0 + tl.exp(-z))
    tl.store(gate + b * T + t, tl.where(value >= noise_floor, value, 0.0), mask=t < T)
    wanted = z + tl.load(bias).to(tl.float32) > 0
    if INITIAL > 0:
        place = t.to(tl.int64)
        if START == TOKEN_START:
            place -= tl.load(start + b * T + t, mask=real, other=0)
        elif START == ROW_START:
            place -= tl.load(start + b)
        wanted = wanted | (place < INITIAL)
    if HAS_LENGTH:
        real = real & (t < tl.load(length + b))
    wanted = wanted & real
    tl.store(mask + b * T + t, wanted.to(tl.uint8), mask=t < T)
    at = b * N + tl.program_id(0)
    tl.store(counts + at, tl.sum(wanted.to(tl.int32), 0))
    tl.store(sums + at * 2, tl.sum(tl.where(real, softplus(z) - value * z, 0.0), 0))
    tl.store(sums + at * 2 + 1, tl.sum(tl.where(real, value, 0.0), 0))


@kernel("T", "K", "N", "fill")
def compact_kernel(
    mask, counts, sums, index, slot, count, totals, T, K, N, fill, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Slots of one block of tokens, their indices, and -1 in this block's share (`fill`) of the unused slots;
    the first block of a row sums what the blocks counted."""
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    before, total, entropy, gates = 0, 0, 0.0, 0.0
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        held = tl.load(counts + b * N + n, mask=n < N, other=0)
        before += tl.sum(tl.where(n < block, held, 0), 0)
        total += tl.sum(held, 0)
        if block == 0:
            entropy += tl.sum(tl.load(sums + (b * N + n) * 2, mask=n < N, other=0.0), 0)
            gates += tl.sum(tl.load(sums + (b * N + n) * 2 + 1, mask=n < N, other=0.0), 0)
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
        tl.store(totals + b * 4, total.to(tl.float32))
        tl.store(totals + b * 4 + 1, used.to(tl.float32))
        tl.store(totals + b * 4 + 2, entropy)
        tl.store(totals + b * 4 + 3, gates)


@lru_cache(maxsize=1024)
def _route_plan(B, T, capacity):
    """Blocks per row, sizes of both launches, and the share of the unused slots that a block clears."""
    check((capacity >= 0, f"capacity must be at least 0, got {capacity}"))
    N, block = max(1, triton.cdiv(T, ROUTE_BLOCK)), min(ROUTE_BLOCK, triton.next_power_of_2(max(1, T)))
    return N, triton.cdiv(capacity, N), {"BLOCK_T": block, "num_warps": 4}, min(256, triton.next_power_of_2(N))


@route.kernel
def _route(score_BT, bias, start_BT, length_B, noise_floor, initial, capacity):
    """Two launches: tokens are counted in blocks, then placed, so that one long row uses the whole chip."""
    B, T = score_BT.shape
    N, fill, options, block_n = _route_plan(B, T, capacity)
    gate_BT = score_BT.new_empty(B, T, dtype=torch.float32)
    index_BK = score_BT.new_empty(B, capacity, dtype=torch.int64)
    slot_BT = score_BT.new_empty(B, T, dtype=torch.int64)
    count_B, sums_B4 = score_BT.new_empty(B, dtype=torch.int32), score_BT.new_empty(B, 4, dtype=torch.float32)
    if B and T:
        mask_BT = score_BT.new_empty(B, T, dtype=torch.uint8)
        counts_BN, sums_BN2 = score_BT.new_empty(B, N, dtype=torch.int32), gate_BT.new_empty(B, N, 2)
        start = None if start_BT is None else start_BT.expand(B, -1).contiguous()
        decide_kernel[(N, B)](
            score_BT.contiguous(), bias, start, dense(length_B), gate_BT, mask_BT, counts_BN, sums_BN2, T, N,
            noise_floor, INITIAL=initial, START=0 if start is None else min(2, start.shape[1]),
            HAS_LENGTH=length_B is not None, **options,
        )  # fmt: skip
        compact_kernel[(N, B)](
            mask_BT, counts_BN, sums_BN2, index_BK, slot_BT, count_B, sums_B4, T, capacity, N, fill, BLOCK_N=block_n,
            **options,
        )  # fmt: skip
    return gate_BT, index_BK, slot_BT, count_B, sums_B4


__all__ = ["HEAD_WIDTHS", "attend_token", "interpreted", "linear_attention", "split_heads", "swiglu_fits", "take_rows"]
