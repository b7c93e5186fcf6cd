"""The block's large products in one pass with what follows them: SwiGLU's two, and those added to the residual.

Meaning and shapes: `swiglu_ref` and `linear_add_ref` in `reference_hspmn`. M tokens (all leading dimensions), K
features of a token before the product, N after it.
"""

import torch

from .kernels_common_hspmn import DTYPES, has_descriptors, operation, processors

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error

SILU_LIMIT = tl.constexpr(30.0)  # as in `block_hspmn`


@triton.jit
def tile_origin(tile, tiles_m, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of a tile; tiles that run together share GROUP blocks of rows, which stay in L2."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    place = tile % (GROUP * tiles_n)
    return (first + place % height) * BLOCK_M, place // height * BLOCK_N


@triton.jit
def load_block(
    x, x_map, row, k_begin, rows, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows from `row` of x [rows, K] and BLOCK_K columns from `k_begin`; zeros outside."""
    if x_map is not None:
        return x_map.load([row, k_begin])
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    inside = (row + r < rows)[:, None] & (k_begin + k < K)[None, :]
    # What is left for the block fits 32 bits, which halves the registers that addresses take
    return tl.load(x + row.to(tl.int64) * K + k_begin + r[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def store_block(
    out, out_map, tile, row, column, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile of out [M, N] at (row, column), in the dtype of `out`."""
    tile = tile.to(out.dtype.element_ty)
    if out_map is not None:
        out_map.store([row, column], tile)
    else:
        m = tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        inside = (row + m < M)[:, None] & (column + n < N)[None, :]
        tl.store(out + row.to(tl.int64) * N + column + m[:, None] * N + n[None, :], tile, mask=inside)


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile's columns; of a product's result both are registers of the same thread."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def gated(gate, up):
    """silu(max(gate, -SILU_LIMIT)) * up; NaN stays NaN."""
    gate = tl.where(gate < -SILU_LIMIT, -SILU_LIMIT, gate)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["M"])
def swiglu_kernel(
    x, gate_weight, up_weight, out, x_map, gate_map, up_map, pair_map, out_map, M,
    N: tl.constexpr, K: tl.constexpr, UP_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
    SUBTILE: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of out, one after the other, each from two sums over K that share the blocks of x.

    The maps are tensor descriptors, or None. pair_map is one of both weights [2, N, K], the up weight first if
    UP_FIRST: one product of twice the width then makes both sums, and shared memory is read less often. FLATTEN makes
    one loop of tiles and K, so that a tile's first loads run under the end of the one before; SPECIALIZE leaves that
    to warps of their own. SUBTILE writes half a tile at a time, through half the shared memory.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * ((N + BLOCK_N - 1) // BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE):
        row, column = tile_origin(tile, tiles_m, N, BLOCK_M, BLOCK_N, GROUP)
        if pair_map is not None:
            both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
            for k in range(0, K, BLOCK_K):
                x_tile = load_block(x, x_map, row, k, M, K, BLOCK_M, BLOCK_K)
                weights = tl.reshape(pair_map.load([0, column, k]), (2 * BLOCK_N, BLOCK_K))
                both = tl.dot(x_tile, tl.trans(weights), both, input_precision="tf32x3")
            if UP_FIRST:
                up, gate = halves(both, BLOCK_M, 2 * BLOCK_N)
            else:
                gate, up = halves(both, BLOCK_M, 2 * BLOCK_N)
        else:
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, K, BLOCK_K):
                x_tile = load_block(x, x_map, row, k, M, K, BLOCK_M, BLOCK_K)
                gate_tile = load_block(gate_weight, gate_map, column, k, N, K, BLOCK_N, BLOCK_K)
                up_tile = load_block(up_weight, up_map, column, k, N, K, BLOCK_N, BLOCK_K)
                gate = tl.dot(x_tile, tl.trans(gate_tile), gate, input_precision="tf32x3")
                up = tl.dot(x_tile, tl.trans(up_tile), up, input_precision="tf32x3")
        result = gated(gate, up).to(out.dtype.element_ty)
        if SUBTILE:
            left, right = halves(result, BLOCK_M, BLOCK_N)
            store_block(out, out_map, left, row, column, M, N, BLOCK_M, BLOCK_N // 2)
            store_block(out, out_map, right, row, column + BLOCK_N // 2, M, N, BLOCK_M, BLOCK_N // 2)
        else:
            store_block(out, out_map, result, row, column, M, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def linear_add_kernel(
    residual, x, weight, out, residual_map, x_map, weight_map, out_map, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr, SUBTILE: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of out, one after the other; maps and switches as in `swiglu_kernel`."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * ((N + BLOCK_N - 1) // BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE):
        row, column = tile_origin(tile, tiles_m, N, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            x_tile = load_block(x, x_map, row, k, M, K, BLOCK_M, BLOCK_K)
            weight_tile = load_block(weight, weight_map, column, k, N, K, BLOCK_N, BLOCK_K)
            total = tl.dot(x_tile, tl.trans(weight_tile), total, input_precision="tf32x3")
        if SUBTILE:
            HALF: tl.constexpr = BLOCK_N // 2
            # Both loads before the first use, so that memory is waited for once
            before = load_block(residual, residual_map, row, column, M, N, BLOCK_M, HALF)
            after = load_block(residual, residual_map, row, column + HALF, M, N, BLOCK_M, HALF)
            left, right = halves(total, BLOCK_M, BLOCK_N)
            store_block(out, out_map, left + before.to(tl.float32), row, column, M, N, BLOCK_M, HALF)
            store_block(out, out_map, right + after.to(tl.float32), row, column + HALF, M, N, BLOCK_M, HALF)
        else:
            total += load_block(residual, residual_map, row, column, M, N, BLOCK_M, BLOCK_N).to(tl.float32)
            store_block(out, out_map, total, row, column, M, N, BLOCK_M, BLOCK_N)


def _product_config(M, element_size, mapped, wide):
    """Options of a product: tiles with `wide` columns with descriptors, half without, a quarter for few rows."""
    pointers = {"GROUP": 16, "FLATTEN": False, "SPECIALIZE": False, "SUBTILE": False, "num_warps": 8, "num_stages": 3}
    if mapped:
        tile = {"BLOCK_M": 128, "BLOCK_N": wide, "BLOCK_K": 64, "FLATTEN": True, "SUBTILE": True, "num_stages": 4}
        return pointers | tile
    if M < 128:
        rows, warps = (16, 4) if M <= 16 else (64, 8)
        depth = 128 // element_size
        return pointers | {"BLOCK_M": rows, "BLOCK_N": wide // 4, "BLOCK_K": depth, "num_warps": warps}
    if element_size == 4:
        return pointers | {"BLOCK_M": 64, "BLOCK_N": wide // 2, "BLOCK_K": 32, "num_stages": 2}
    return pointers | {"BLOCK_M": 128, "BLOCK_N": wide // 2, "BLOCK_K": 64}


def swiglu_config(M, element_size, mapped):
    """Block sizes and launch options of `swiglu_kernel`; FLATTEN also means one program per processor.

    mapped: whether tensors of M >= 128 rows have descriptors in tiles [128, 64].
    Reasoned, not yet measured. On sm_90 in 16 bits each thread holds 128 sums in 168 registers (compiler's report),
    and four stages and half a tile of the output take 208 of 227 KiB; without descriptors three stages take up to 80
    of the 99 KiB of sm_120, four up to 112. Few tokens: narrow tiles, so that all processors read weights.
    """
    return _product_config(M, element_size, mapped, 128)


def linear_add_config(M, element_size, mapped):
    """Block sizes and launch options of `linear_add_kernel`, with as many sums per tile as `swiglu_config`.

    mapped: whether tensors have descriptors, in tiles [128, 64] of x and [256, 64] of the weight.
    Reasoned, not yet measured. On sm_90 in 16 bits 196 registers (compiler's report); the residual passes through
    shared memory too, which leaves room for three stages.
    """
    return _product_config(M, element_size, mapped, 256) | ({"num_stages": 3} if mapped else {})


def _has_map(x, rows, columns):
    """Whether hardware, dtype, alignment and size of a matrix allow a descriptor in tiles [rows, columns]."""
    aligned = x.data_ptr() % 16 == 0 and x.shape[1] * x.element_size() % 16 == 0
    return has_descriptors(x) and aligned and x.shape[0] >= rows and x.shape[1] >= columns


def _map(x, rows, columns):
    """Tensor descriptor of a matrix in tiles, or None where it has none."""
    if not _has_map(x, rows, columns):
        return None
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [rows, columns])


def _pair_map(gate_weight, up_weight, rows, columns):
    """One tensor descriptor of two matrices [2, N, K], the one at the lower address first, or None.

    A descriptor is a base, sizes and strides: the first stride is the distance between the two allocations.
    """
    low, high = sorted((gate_weight, up_weight), key=torch.Tensor.data_ptr)
    step = high.data_ptr() - low.data_ptr()
    if not _has_map(low, rows, columns) or not _has_map(high, rows, columns) or not 0 < step < 2**40:
        return None
    return TensorDescriptor(low, [2, *low.shape], [step // low.element_size(), low.shape[1], 1], [2, rows, columns])


def _programs(M, N, config, device):
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    return min(tiles, processors(device)) if config["FLATTEN"] or config["SPECIALIZE"] else tiles


def _launch_swiglu(x_MK, gate_weight_NK, up_weight_NK, out_MN, config, paired=True):
    """Fill out_MN; `paired`: one product for both weights where a descriptor can span them."""
    (M, K), N = x_MK.shape, gate_weight_NK.shape[0]
    BLOCK_M, BLOCK_N, BLOCK_K = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    x_map = _map(x_MK, BLOCK_M, BLOCK_K)
    weight_maps = [_map(weight, BLOCK_N, BLOCK_K) for weight in (gate_weight_NK, up_weight_NK)]
    pair_map = out_map = None
    if x_map is None or None in weight_maps:
        x_map, weight_maps = None, [None, None]
    elif not config["SPECIALIZE"]:  # Triton 3.6 divides the tiles of specialised warps, but not of stored descriptors
        out_map = _map(out_MN, BLOCK_M, BLOCK_N // 2 if config["SUBTILE"] else BLOCK_N)
        pair_map = _pair_map(gate_weight_NK, up_weight_NK, BLOCK_N, BLOCK_K) if paired else None
        weight_maps = weight_maps if pair_map is None else [None, None]
    up_first = pair_map is not None and pair_map.base is up_weight_NK
    swiglu_kernel[(_programs(M, N, config, x_MK.device),)](
        x_MK, gate_weight_NK, up_weight_NK, out_MN, x_map, *weight_maps, pair_map, out_map, M,
        N=N, K=K, UP_FIRST=up_first, **config,
    )  # fmt: skip


def _launch_linear_add(residual_MN, x_MK, weight_NK, out_MN, config, residual_mapped=True):
    """Fill out_MN; `residual_mapped`: read the residual through a descriptor too, where there are any."""
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    BLOCK_M, BLOCK_N, BLOCK_K = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    x_map, weight_map = _map(x_MK, BLOCK_M, BLOCK_K), _map(weight_NK, BLOCK_N, BLOCK_K)
    residual_map = out_map = None
    if x_map is None or weight_map is None:
        x_map = weight_map = None
    elif not config["SPECIALIZE"]:  # as in `_launch_swiglu`
        columns = BLOCK_N // 2 if config["SUBTILE"] else BLOCK_N
        residual_map = _map(residual_MN, BLOCK_M, columns) if residual_mapped else None
        out_map = _map(out_MN, BLOCK_M, columns)
    linear_add_kernel[(_programs(M, N, config, x_MK.device),)](
        residual_MN, x_MK, weight_NK, out_MN, residual_map, x_map, weight_map, out_map, M, N=N, K=K, **config
    )


@operation("swiglu")
def _swiglu(x: torch.Tensor, gate_weight_NK: torch.Tensor, up_weight_NK: torch.Tensor) -> torch.Tensor:
    N, K = gate_weight_NK.shape
    out = x.new_empty(*x.shape[:-1], N)
    if out.numel() == 0:
        return out
    x_MK = x.reshape(-1, K).contiguous()
    weights = gate_weight_NK.contiguous(), up_weight_NK.contiguous()
    mapped = all(_has_map(matrix, 128, 64) for matrix in (x_MK, *weights))
    _launch_swiglu(x_MK, *weights, out.view(-1, N), swiglu_config(x_MK.shape[0], x.element_size(), mapped))
    return out


@_swiglu.register_fake
def _(x, gate_weight_NK, up_weight_NK):
    return x.new_empty(*x.shape[:-1], gate_weight_NK.shape[0])


@operation("linear_add")
def _linear_add(residual: torch.Tensor, x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    N, K = weight_NK.shape
    out = x.new_empty(*x.shape[:-1], N)
    if out.numel() == 0:
        return out
    x_MK = x.reshape(-1, K).contiguous()
    residual_MN, weight_NK = residual.reshape(-1, N).contiguous(), weight_NK.contiguous()
    mapped = _has_map(x_MK, 128, 64) and _has_map(weight_NK, 256, 64)
    config = linear_add_config(x_MK.shape[0], x.element_size(), mapped)
    _launch_linear_add(residual_MN, x_MK, weight_NK, out.view(-1, N), config)
    return out


@_linear_add.register_fake
def _(residual, x, weight_NK):
    return x.new_empty(*x.shape[:-1], weight_NK.shape[0])


def _check_product(x, **weights):
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}; cast it")
    for name, weight in weights.items():
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
            raise ValueError(f"{name} must be [N, {x.shape[-1]}], as x has it last, got {tuple(weight.shape)}")
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x ({x.dtype}), got {weight.dtype}; cast one of them")


def swiglu(x, gate_weight, up_weight):
    """`swiglu_ref` in one pass: neither of the two products is written to memory.

    x: [..., K], float32, bfloat16 or float16. gate_weight, up_weight: [N, K], in x's dtype, as nn.Linear holds them.
    Sums, SiLU and product are float32 and rounded once, where the layers one by one round gate and up before.
    Returns a contiguous [..., N] in x's dtype. Raises ValueError on shapes or dtypes the kernel does not take.
    """
    _check_product(x, gate_weight=gate_weight, up_weight=up_weight)
    if up_weight.shape != gate_weight.shape:
        raise ValueError(
            f"up_weight must have the shape of gate_weight {tuple(gate_weight.shape)}, got {tuple(up_weight.shape)}"
        )
    return _swiglu(x, gate_weight, up_weight)


def linear_add(residual, x, weight):
    """`linear_add_ref` in one pass: the product is not written to memory before the residual is added.

    residual: [..., N], x: [..., K], float32, bfloat16 or float16. weight: [N, K], as nn.Linear holds it. One dtype.
    Returns a contiguous [..., N], summed in float32 and rounded once. Raises ValueError on shapes or dtypes the kernel
    does not take.
    """
    _check_product(x, weight=weight)
    shape = (*x.shape[:-1], weight.shape[0])
    if residual.shape != shape or residual.dtype != x.dtype:
        raise ValueError(f"residual must be {shape} in {x.dtype}, got {tuple(residual.shape)} in {residual.dtype}")
    return _linear_add(residual, x, weight)


__all__ = ["linear_add", "swiglu"]
