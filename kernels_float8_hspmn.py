"""Float8: rows to e4m3 with scales, and products of such rows and weights.

Meaning and shapes in `operations_hspmn`; M tokens (all leading dimensions), K features before a product, N after it.
"""

from functools import cache

import torch

from .kernels_common_hspmn import (  # isort: skip
    DTYPES, LEAST, capability, cdiv, check, interpreted, kernel, power_of_2, tl, triton,
)  # fmt: skip
from .kernels_mlp_hspmn import gated
from .operations_hspmn import (
    E4M3,
    E4M3_PEAK,
    SCALINGS,
    check_float8,
    float8_linear,
    quantize_product,
    quantize_rows,
)

PEAK = tl.constexpr(E4M3_PEAK)


@triton.jit
def to_e4m3(tile, GROUP: tl.constexpr):
    """Rows [M, K] of float32 as `quantize_rows` makes them, and their scales, [M, 1] or, as bits, [M, K / GROUP]."""
    if GROUP == 0:
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(tile), 1), LEAST), PEAK)[:, None]
        return (tile * tl.div_rn(1.0, scale)).to(tl.float8e4nv), scale
    else:
        groups = tl.reshape(tile, (tile.shape[0], tile.shape[1] // GROUP, GROUP))
        bits = tl.div_rn(tl.maximum(tl.max(tl.abs(groups), 2), LEAST), PEAK).to(tl.int32, bitcast=True)
        scale = tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 254)
        inverse = ((254 - scale) << 23).to(tl.float32, bitcast=True)
        return tl.reshape(groups * inverse[:, :, None], tile.shape).to(tl.float8e4nv), scale.to(tl.uint8)


@triton.jit
def store_e4m3(tile, out, scale, m, M, K: tl.constexpr, GROUP: tl.constexpr):
    """Rows m of float32 [rows, at least K] as rows of out [M, K] and scale [M, K / GROUP or 1]."""
    GROUPS: tl.constexpr = K // GROUP if GROUP else 1
    tile, scales = to_e4m3(tile, GROUP)
    k, g = tl.arange(0, tile.shape[1]), tl.arange(0, scales.shape[1])
    tl.store(out + m[:, None] * K + k[None, :], tile, mask=(m < M)[:, None] & (k < K)[None, :])
    tl.store(scale + m[:, None] * GROUPS + g[None, :], scales, mask=(m < M)[:, None] & (g < GROUPS)[None, :])


@kernel("M")
def quantize_rows_kernel(
    x, up, out, scale, M, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """BLOCK_M rows of x [M, K] or, given `up`, of their gated product, which are held whole."""
    m, k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    at, inside = m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :]
    tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if up is not None:
        tile = gated(tile, tl.load(up + at, mask=inside, other=0.0).to(tl.float32))
    store_e4m3(tile, out, scale, m, M, K, GROUP)


@kernel("M")
def float8_linear_kernel(
    x, scale, weight, weight_scale, out, M, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    UNPACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """A tile of out [M, N]; programs that follow each other take BLOCKS blocks of rows and the same weights. UNPACK:
    groups are scaled before their product, where nothing multiplies them with their scales."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (BLOCKS * tiles_n) * BLOCKS
    height = tl.minimum(tiles_m - first, BLOCKS)
    place = tl.program_id(0) % (BLOCKS * tiles_n)
    m = (first + place % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, k = place // height * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = (m < M)[:, None], (n < N)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, K, BLOCK_K):
        at, in_k = begin + k[None, :], (begin + k < K)[None, :]
        rows = tl.load(x + m[:, None] * K + at, mask=in_m & in_k, other=0.0)
        columns = tl.load(weight + n[:, None] * K + at, mask=in_n & in_k, other=0.0)
        if GROUP == 0:
            total = tl.dot(rows, tl.trans(columns), total)
        else:
            g = begin // GROUP + tl.arange(0, BLOCK_K // GROUP)
            in_g = (g < K // GROUP)[None, :]
            row_scale = tl.load(scale + m[:, None] * (K // GROUP) + g[None, :], mask=in_m & in_g, other=0)
            column_scale = tl.load(weight_scale + n[:, None] * (K // GROUP) + g[None, :], mask=in_n & in_g, other=0)
            if UNPACK:
                total = tl.dot(unpack(rows, row_scale, GROUP), tl.trans(unpack(columns, column_scale, GROUP)), total)
            else:
                total = tl.dot_scaled(rows, row_scale, "e4m3", tl.trans(columns), column_scale, "e4m3", total)
    if GROUP == 0:
        total *= tl.load(scale + m, mask=m < M, other=0.0)[:, None]
        total *= tl.load(weight_scale + n, mask=n < N, other=0.0)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=in_m & (n < N)[None, :])


@triton.jit
def unpack(tile, scale, GROUP: tl.constexpr):
    """What rows [M, K] of e4m3 with scales [M, K / GROUP] stand for, in float32."""
    power = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    groups = tl.reshape(tile.to(tl.float32), (tile.shape[0], tile.shape[1] // GROUP, GROUP))
    return tl.reshape(groups * power[:, :, None], tile.shape)


@cache
def _quantize_plan(K, dtype, scaling, device):
    """Constants of `quantize_rows`: rows of 4096 values per program, which stay in registers."""
    check_float8(capability(device))
    check((dtype in DTYPES, f"rows to quantise must be float32, bfloat16 or float16, got {dtype}; cast them"))
    group, block_k = SCALINGS[scaling][0] or 0, power_of_2(K)
    check((K % (group or 1) == 0, f"rows must have a multiple of {group} features, got {K}; use scaling='rowwise'"))
    block_m, warps = max(1, 4096 // block_k), max(4, min(32, block_k // 1024))
    return {"K": K, "GROUP": group, "BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps}


@quantize_rows.kernel
def _quantize_rows(x, scaling, up=None):
    """Bit for bit the reference."""
    K, (group, kind) = x.shape[-1], SCALINGS[scaling]
    constants = _quantize_plan(K, x.dtype, scaling, x.device)
    x, out = x.contiguous(), torch.empty_like(x, dtype=E4M3)
    scale, M = x.new_empty(*x.shape[:-1], K // group if group else 1, dtype=kind), x.numel() // K
    if M:
        quantize_rows_kernel[(cdiv(M, constants["BLOCK_M"]),)](x, up, out, bits(scale), M, **constants)
    return out, scale


@quantize_product.kernel
def _quantize_product(gate, up, scaling):
    """One pass, in which the product is float32."""
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"up must be {tuple(gate.shape)} in {gate.dtype}, got {tuple(up.shape)} in {up.dtype}")
    return _quantize_rows(gate, scaling, up.contiguous())


def bits(scale):
    """Scales as kernels take them: e8m0, which Triton has no name for, as whole numbers."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


LINEAR_CONFIG = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "BLOCKS": 8, "num_warps": 8, "num_stages": 3}


@cache
def _linear_plan(x_shape, scale_shape, weight_shape, weight_scale_shape, dtypes, dtype, device):
    """Grid (none if cuBLAS makes the product), rows and constants of `float8_linear`."""
    check_float8(capability(device))
    (N, K), M = weight_shape, x_shape.numel() // max(1, x_shape[-1])
    group = next((group for group, kind in SCALINGS.values() if kind == dtypes[1]), None)
    scales = K // group if group else 1
    check(
        (dtypes[0] == dtypes[2] == E4M3, f"x and weight must be {E4M3}, got {dtypes[0]} and {dtypes[2]}"),
        (x_shape[-1] == K, f"x must have the {K} features of the weight, got {tuple(x_shape)}"),
        (dtypes[1] == dtypes[3], f"scales of x and weight must share a dtype, got {dtypes[1]} and {dtypes[3]}"),
        (scale_shape == (*x_shape[:-1], scales), f"scale must be {(*x_shape[:-1], scales)}, got {tuple(scale_shape)}"),
        (weight_scale_shape == (N, scales), f"weight_scale must be {(N, scales)}, got {tuple(weight_scale_shape)}"),
        (dtype in DTYPES, f"dtype must be float32, bfloat16 or float16, got {dtype}"),
    )
    group = group or 0
    if device.type == "cuda" and not group and dtype == torch.bfloat16 and N % 16 == K % 16 == 0:
        if capability(device) in (90, 100):
            return None, M, None
    grid = (cdiv(M, LINEAR_CONFIG["BLOCK_M"]) * cdiv(N, LINEAR_CONFIG["BLOCK_N"]),)
    return grid, M, {"N": N, "K": K, "GROUP": group, "UNPACK": interpreted(), **LINEAR_CONFIG}


@float8_linear.kernel
def _float8_linear(x, scale, weight_NK, weight_scale, dtype):
    """cuBLAS where it has rows of scales, else one product of tiles; sums are float32 and rounded once."""
    dtypes = x.dtype, scale.dtype, weight_NK.dtype, weight_scale.dtype
    grid, M, constants = _linear_plan(
        x.shape, scale.shape, weight_NK.shape, weight_scale.shape, dtypes, dtype, x.device
    )
    shape = (*x.shape[:-1], len(weight_NK))
    if grid is None and M:
        rows = {"scale_a": scale.view(-1, 1), "scale_b": weight_scale.t(), "out_dtype": dtype, "use_fast_accum": True}
        return torch._scaled_mm(x.reshape(-1, x.shape[-1]), weight_NK.t(), **rows).view(shape)
    out = x.new_empty(shape, dtype=dtype)
    if M:
        float8_linear_kernel[grid](
            x.contiguous(), bits(scale.contiguous()), weight_NK, bits(weight_scale), out, M, **constants
        )
    return out
