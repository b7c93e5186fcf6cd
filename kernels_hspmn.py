"""HSPMN's operations as Triton kernels, most with gradients; importing this file registers them all.

Routing is here; `kernels_projection_hspmn` makes what the streams read, which are in `kernels_linear_hspmn` and
`kernels_attention_hspmn`, `kernels_mlp_hspmn` has the SwiGLU, `kernels_float8_hspmn` products in float8,
`kernels_loss_hspmn` the loss and `kernels_decode_hspmn` a single token. Every operation is a custom operator: no graph
break under `torch.compile(fullgraph=True)`, no host synchronisation, capturable in a CUDA graph. Legend in
`kernels_common_hspmn`.
"""

from functools import lru_cache

import torch

from .kernels_common_hspmn import (  # isort: skip
    HEAD_WIDTHS, ROW_START, TOKEN_START, cdiv, check, interpreted, kernel, power_of_2, softplus, tl, triton,
)  # fmt: skip
from .kernels_attention_hspmn import take_rows
from .kernels_decode_hspmn import attend_token
from .kernels_float8_hspmn import float8_linear
from .kernels_linear_hspmn import linear_attention
from .kernels_loss_hspmn import token_losses
from .kernels_mlp_hspmn import swiglu_fits
from .kernels_projection_hspmn import split_heads
from .operations_hspmn import route

ROUTE_BLOCK = 1024  # tokens per program: the longest row of the benchmark occupies 328
ROUTE_WHOLE = 4096  # tokens up to which one program and one launch decide and place a row


@triton.jit
def place_tokens(
    chosen, before, total, entropy, gates, index, slot, count, totals, b, block, fill, t, T, K, BLOCK_T: tl.constexpr
):
    """Slots of a block of tokens, `before` of the row's `total` being earlier ones, and their indices; -1 in its share
    (`fill`) of the row's unused slots. All blocks of a row store its count, and the first its four sums."""
    place = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
    kept = chosen & (place < K)
    tl.store(slot + b * T + t, tl.where(kept, place, -1).to(tl.int64), mask=t < T)
    tl.store(index + b * K + place, t.to(tl.int64), mask=kept)
    used = tl.minimum(total, K)
    end = tl.minimum(block * fill + fill, K)
    for first in range(block * fill, end, BLOCK_T):
        k = first + tl.arange(0, BLOCK_T)
        tl.store(index + b * K + k, tl.full([BLOCK_T], -1, tl.int64), mask=(k >= used) & (k < end))
    tl.store(count + b, used)
    if block == 0:
        tl.store(totals + b * 4, total.to(tl.float32))
        tl.store(totals + b * 4 + 1, (total - used).to(tl.float32))
        tl.store(totals + b * 4 + 2, entropy)
        tl.store(totals + b * 4 + 3, gates)


@kernel("T", "K", "N")
def decide_kernel(
    score, bias, start, length, gate, index, slot, count, sums, T, K, N, noise_floor,
    INITIAL: tl.constexpr, START: tl.constexpr, BLOCK_T: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gates of BLOCK_T tokens of a row, -1 as `slot` of those not wanted, their number, sums of entropy and gates.
    WHOLE: the block is the whole row, and all of `route` is done."""
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
    if length is not None:
        real = real & (t < tl.load(length + b))
    wanted = wanted & real
    total = tl.sum(wanted.to(tl.int32), 0)
    entropy = tl.sum(tl.where(real, softplus(z) - value * z, 0.0), 0)
    gates = tl.sum(tl.where(real, value, 0.0), 0)
    if WHOLE:
        place_tokens(wanted, 0, total, entropy, gates, index, slot, count, sums, b, 0, K, t, T, K, BLOCK_T)
    else:
        tl.store(slot + b * T + t, wanted.to(tl.int64) - 1, mask=t < T)
        at = sums + (b * N + tl.program_id(0)) * 3
        tl.store(at, total.to(tl.float32))
        tl.store(at + 1, entropy)
        tl.store(at + 2, gates)


@kernel("T", "K", "N", "fill")
def compact_kernel(
    sums, index, slot, count, totals, T, K, N, fill, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What `place_tokens` does, with the sums of what all blocks of the row counted."""
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    before, total, entropy, gates = 0, 0, 0.0, 0.0
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        at = sums + (b * N + n) * 3
        held = tl.load(at, mask=n < N, other=0.0).to(tl.int32)
        before += tl.sum(tl.where(n < block, held, 0), 0)
        total += tl.sum(held, 0)
        if block == 0:
            entropy += tl.sum(tl.load(at + 1, mask=n < N, other=0.0), 0)
            gates += tl.sum(tl.load(at + 2, mask=n < N, other=0.0), 0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    chosen = tl.load(slot + b * T + t, mask=t < T, other=-1) >= 0
    place_tokens(chosen, before, total, entropy, gates, index, slot, count, totals, b, block, fill, t, T, K, BLOCK_T)


@lru_cache(maxsize=1024)
def _route_plan(B, T, capacity):
    """Blocks per row, sizes of the launches, and the share of the unused slots that a block clears."""
    check((capacity >= 0, f"capacity must be at least 0, got {capacity}"))
    block = power_of_2(max(1, T)) if T <= ROUTE_WHOLE else ROUTE_BLOCK
    N = cdiv(max(1, T), block)
    return N, cdiv(capacity, N), {"BLOCK_T": block, "num_warps": 4}, min(256, power_of_2(N))


@route.kernel
def _route(score_BT, bias, start_BT, length_B, noise_floor, initial, capacity):
    """One launch for short rows; else tokens are counted in blocks, then placed, so that a row uses the whole chip."""
    B, T = score_BT.shape
    N, fill, options, block_n = _route_plan(B, T, capacity)
    gate_BT = score_BT.new_empty(B, T, dtype=torch.float32)
    index_BK = score_BT.new_empty(B, capacity, dtype=torch.int64)
    slot_BT = score_BT.new_empty(B, T, dtype=torch.int64)
    count_B, sums_B4 = score_BT.new_empty(B, dtype=torch.int32), score_BT.new_empty(B, 4, dtype=torch.float32)
    if B and T:
        sums = sums_B4 if N == 1 else gate_BT.new_empty(B, N, 3)
        decide_kernel[(N, B)](
            score_BT, bias, start_BT, length_B, gate_BT, index_BK, slot_BT, count_B, sums, T, capacity, N, noise_floor,
            INITIAL=initial, START=0 if start_BT is None else min(2, start_BT.shape[1]), WHOLE=N == 1, **options,
        )  # fmt: skip
        if N > 1:
            compact_kernel[(N, B)](
                sums, index_BK, slot_BT, count_B, sums_B4, T, capacity, N, fill, BLOCK_N=block_n, **options
            )
    return gate_BT, index_BK, slot_BT, count_B, sums_B4


__all__ = [
    "HEAD_WIDTHS", "attend_token", "float8_linear", "interpreted", "linear_attention", "split_heads", "swiglu_fits",
    "take_rows", "token_losses",
]  # fmt: skip
