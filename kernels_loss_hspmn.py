"""The loss of logits and its gradient, both in the logits' dtype in memory and in float32 while they are computed.

Meaning and shapes in `operations_hspmn`. A program has a row. V is a constant of the model, so that a compiler knows
which rows begin at a multiple of 16 bytes.
"""

import torch

from .kernels_common_hspmn import DTYPES, FLOOR, LOG2E, check, kernel, power_of_2, tl, triton
from .operations_hspmn import IGNORED, token_losses

NO_TARGET = tl.constexpr(IGNORED)
# Logits of a row at a time. H200, 32,768 rows of 16,384 in bf16, ms forward and backward (a copy takes .51): these and
# 4 warps .27 and .66; 8 warps .30 and .64, 16 .34 and .72; 2048 .26 and .75; 8192, 8 warps .32 and .62
LOSS_BLOCK = 4096


@triton.jit
def row_loss(row, target, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Loss of the logits at `row`, NaN for a target that is no token; their peak, and sum of exp(logit - peak). A row
    without a target is not read."""
    peak, total = tl.full([], FLOOR, tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, V, BLOCK_V):
        v = begin + tl.arange(0, BLOCK_V)
        x = tl.load(row + v, mask=(v < V) & (target != NO_TARGET), other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp2((peak - higher) * LOG2E) + tl.exp2((x - higher) * LOG2E)
        peak = higher
    total = tl.sum(total, 0)
    named = (target >= 0) & (target < V)
    at_target = tl.load(row + target, mask=named, other=float("nan")).to(tl.float32)
    return tl.log(total) + (peak - at_target), peak, total


@kernel()
def token_losses_kernel(logits, targets, losses, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Loss of row n."""
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + n)
    loss, _, _ = row_loss(logits + n * V, target, V, BLOCK_V)
    tl.store(losses + n, tl.where(target == NO_TARGET, 0.0, loss))


@kernel()
def token_losses_back_kernel(grad, logits, targets, grad_logits, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """(softmax - one-hot) * grad. The row is read again, out of a cache, for its peak and sum: a log-sum-exp kept in
    float32 would bring its rounding, up to 2^-24 of its size, into every element."""
    n = tl.program_id(0).to(tl.int64)
    target, scale = tl.load(targets + n), tl.load(grad + n)
    loss, peak, total = row_loss(logits + n * V, target, V, BLOCK_V)
    weight = tl.where(target == NO_TARGET, 0.0, scale / tl.where(loss == loss, total, loss))
    # exp(-loss) - 1, the target's share less one, without cancellation: near 0 its series to float32 precision
    series = 1.0 - loss * (1 / 6)
    for i in tl.static_range(5, 1, -1):
        series = 1.0 - loss * (1 / i) * series
    at_target = tl.where(loss < 0.25, -loss * series, tl.exp(-loss) - 1.0) * scale
    for begin in range(0, V, BLOCK_V):
        v = begin + tl.arange(0, BLOCK_V)
        x = tl.load(logits + n * V + v, mask=(v < V) & (target != NO_TARGET), other=float("-inf")).to(tl.float32)
        value = tl.where(v == target, at_target, tl.exp2((x - peak) * LOG2E) * weight)
        tl.store(grad_logits + n * V + v, value.to(grad_logits.dtype.element_ty), mask=v < V)


def _sizes(V):
    return {"V": V, "BLOCK_V": min(LOSS_BLOCK, power_of_2(V)), "num_warps": 4}


@token_losses.kernel
def _token_losses(logits_NV, target_N):
    N, V = logits_NV.shape
    got = f"{target_N.dtype} {tuple(target_N.shape)}"
    check(
        (logits_NV.dtype in DTYPES, f"logits must be float32, bfloat16 or float16, got {logits_NV.dtype}; cast them"),
        (target_N.dtype == torch.int64 and target_N.shape == (N,), f"target must be int64 [{N}], got {got}"),
    )
    loss_N = logits_NV.new_empty(N, dtype=torch.float32)
    if N:
        token_losses_kernel[(N,)](logits_NV, target_N, loss_N, **_sizes(V))
    return loss_N


@token_losses.gradient(wrt=("logits_NV",), takes=lambda logits_NV, target_N: logits_NV.dtype in DTYPES)
def _token_losses_back(grad_N, logits_NV, target_N):
    (N, V), grad_NV = logits_NV.shape, torch.empty_like(logits_NV)
    if N:
        token_losses_back_kernel[(N,)](grad_N, logits_NV, target_N, grad_NV, **_sizes(V))
    return (grad_NV,)
