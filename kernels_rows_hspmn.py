"""The products of one decoded token, of at most 16 rows: bound by the bytes of weights and by launches.

Meaning and shapes: `project_decode_ref`, `swiglu_decode_ref` and `linear_add_ref` in `reference_hspmn`; M rows, K
features before a product. A norm in front of a product is computed in every program from the rows themselves: they are
few, and a launch costs more. A product is weights times rows, so that the rows, few as they are, fill its narrow side.
"""

import torch

from .kernels_common_hspmn import DTYPES, check_vectors, dependent, operation, router_score
from .kernels_mlp_hspmn import gated

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error

MOST_ROWS = 16  # two narrow tiles of the tensor cores


@triton.jit
def load_rows(x, begin, end, M, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K columns from `begin` of the M rows of x [M, K], zeros outside and from column `end`."""
    m = tl.arange(0, ROWS)
    k = begin + tl.arange(0, BLOCK_K)
    return tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < end)[None, :], other=0.0)


@triton.jit
def load_factor(norm, begin, end, BLOCK_K: tl.constexpr):
    """BLOCK_K values from `begin` of a norm's weight, zeros from `end`."""
    k = begin + tl.arange(0, BLOCK_K)
    return tl.load(norm + k, mask=k < end, other=0.0)


@triton.jit
def load_weight(weight, row, begin, end, rows, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tile [BLOCK_N, BLOCK_K] of weight [rows, K], zeros outside and from column `end`."""
    n = tl.arange(0, BLOCK_N)
    k = begin + tl.arange(0, BLOCK_K)
    inside = (row + n < rows)[:, None] & (k < end)[None, :]
    return tl.load(weight + row.to(tl.int64) * K + n[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def as_tile(rows, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS rows as the TILE rows of a product, repeated; what they sum to is not stored."""
    if ROWS == TILE:
        return rows
    return tl.reshape(tl.broadcast_to(rows[None, :, :], (TILE // ROWS, ROWS, BLOCK_K)), (TILE, BLOCK_K))


@triton.jit
def norm_scale(squares, K: tl.constexpr, EPS: tl.constexpr):
    """What RMSNorm multiplies rows by, float32 [ROWS], given sums of their squares [ROWS, N] by columns."""
    return tl.rsqrt(tl.sum(squares, 1) / K + EPS)


@triton.jit
def load_normed(
    x, norm, squares, begin, end, M,
    K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns of the M rows under RMSNorm as a TILE, not yet divided by the rows' lengths, and their squares.

    The division can follow the product, which then waits for no sum over the rows. Float16 might not hold such rows:
    they are float32 there.
    """
    rows = load_rows(x, begin, end, M, K, ROWS, BLOCK_K)
    wide = rows.to(tl.float32)
    if rows.dtype == tl.float16:
        rows = wide
    rows = (rows * load_factor(norm, begin, end, BLOCK_K)[None, :]).to(rows.dtype)
    return as_tile(rows, ROWS, TILE, BLOCK_K), squares + wide * wide


@triton.jit
def fold_product(total, weight_tile, rows):
    """total [N, TILE] + weight_tile [N, K] @ rows [TILE, K]^T; TF32 holds float16 values as they are."""
    if rows.dtype == weight_tile.dtype:
        total = tl.dot(weight_tile, tl.trans(rows), total, input_precision="tf32x3")
    else:
        total = tl.dot(weight_tile.to(tl.float32), tl.trans(rows), total, input_precision="tf32")
    return total


@triton.jit
def scaled(total, squares, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Products [N, TILE] of the ROWS rows repeated, as if RMSNorm had divided the rows before them."""
    scale = as_tile(tl.reshape(norm_scale(squares, K, EPS), (ROWS, 1)), ROWS, TILE, 1)
    return total * tl.trans(scale)


@triton.jit
def store_columns(out, tile, column, M, N, TILE: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile [BLOCK_N, TILE] as BLOCK_N columns from `column` of out [M, N], in the dtype of `out`."""
    m = tl.arange(0, TILE)
    n = column + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out + m[None, :] * N + n[:, None], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_scores(
    x, norm, weight, score, M, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Scores of the M rows. The decision must be that of `score_ref`: rows rounded by the norm, no tensor cores."""
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_D):
        rows = load_rows(x, begin, K, M, K, ROWS, BLOCK_D).to(tl.float32)
        squares += rows * rows
    scale = norm_scale(squares, K, EPS)
    products = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_D):
        rows = load_rows(x, begin, K, M, K, ROWS, BLOCK_D)
        factor = load_factor(norm, begin, K, BLOCK_D).to(tl.float32)
        normed = (rows.to(tl.float32) * scale[:, None] * factor[None, :]).to(rows.dtype).to(tl.float32)
        products += normed * load_factor(weight, begin, K, BLOCK_D).to(tl.float32)[None, :]
    m = tl.arange(0, ROWS)
    tl.store(score + m, router_score(products, K), mask=m < M)


@triton.jit(do_not_specialize=["M"])
def project_decode_kernel(
    x, norm, qkv_weight, head_weight, score_weight, qkv, head, score, M,
    C: tl.constexpr, X: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of qkv [M, C] or of head [M, X]; a last program, if launched, makes the scores [M]."""
    TILES_C: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = TILES_C + (X + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    weight, column, channels = qkv_weight, tile * BLOCK_N, tl.where(tile < TILES_C, C, X)
    if tile >= TILES_C:
        weight, column = head_weight, (tile - TILES_C) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_wait()
    if tile < TILES:
        low = tl.zeros([BLOCK_N, TILE], tl.float32)
        high = tl.zeros([BLOCK_N, TILE], tl.float32)
        squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for k in range(0, HALF, BLOCK_K):
            rows, squares = load_normed(x, norm, squares, k, HALF, M, K, ROWS, TILE, BLOCK_K)
            low = fold_product(low, load_weight(weight, column, k, HALF, channels, K, BLOCK_N, BLOCK_K), rows)
            rows, squares = load_normed(x, norm, squares, HALF + k, K, M, K, ROWS, TILE, BLOCK_K)
            high = fold_product(high, load_weight(weight, column, HALF + k, K, channels, K, BLOCK_N, BLOCK_K), rows)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        total = scaled(low + high, squares, K, EPS, ROWS, TILE)
        if tile < TILES_C:
            store_columns(qkv, total, column, M, C, TILE, BLOCK_N)
        else:
            store_columns(head, total, column, M, X, TILE, BLOCK_N)
    elif score_weight is not None:
        store_scores(x, norm, score_weight, score, M, K, EPS, ROWS, BLOCK_D)


@triton.jit(do_not_specialize=["M"])
def swiglu_decode_kernel(
    x, norm, gate_weight, up_weight, out, M,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of out [M, N], from two sums over K that share the rows."""
    column = tl.program_id(0) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = tl.zeros([BLOCK_N, TILE], tl.float32)
    up = tl.zeros([BLOCK_N, TILE], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        rows, squares = load_normed(x, norm, squares, k, K, M, K, ROWS, TILE, BLOCK_K)
        gate = fold_product(gate, load_weight(gate_weight, column, k, K, N, K, BLOCK_N, BLOCK_K), rows)
        up = fold_product(up, load_weight(up_weight, column, k, K, N, K, BLOCK_N, BLOCK_K), rows)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    gate, up = scaled(gate, squares, K, EPS, ROWS, TILE), scaled(up, squares, K, EPS, ROWS, TILE)
    store_columns(out, gated(gate, up), column, M, N, TILE, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def linear_add_decode_kernel(
    residual, x, weight, out, M,
    N: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of out [M, N]."""
    column = tl.program_id(0) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, TILE)
    n = column + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (m < M)[None, :]
    low = tl.load(residual + m[None, :] * N + n[:, None], mask=inside, other=0.0).to(tl.float32)
    high = tl.zeros([BLOCK_N, TILE], tl.float32)
    for k in range(0, HALF, BLOCK_K):
        rows = load_rows(x, k, HALF, M, K, TILE, BLOCK_K)
        low = fold_product(low, load_weight(weight, column, k, HALF, N, K, BLOCK_N, BLOCK_K), rows)
        rows = load_rows(x, HALF + k, K, M, K, TILE, BLOCK_K)
        high = fold_product(high, load_weight(weight, column, HALF + k, K, N, K, BLOCK_N, BLOCK_K), rows)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    store_columns(out, low + high, column, M, N, TILE, BLOCK_N)


def project_decode_config(element_size):
    """Block sizes and launch options of `project_decode_kernel`.

    H200, bf16, K=2048, 3104 channels, beside launches of its kind, one row and eight: 5.8 and 7.6 us; 16 channels and
    one warp 5.5 and 16; four warps 9.3 and 12. Before rows took the narrow side of the product 5.8 and 10.
    """
    return {"BLOCK_N": 32, "BLOCK_K": _columns(element_size), "num_warps": 2, "num_stages": 4}


def _columns(element_size):
    """BLOCK_K: float32 products on tensor cores take three times the registers."""
    return 128 if element_size == 2 else 32


def swiglu_decode_config(element_size):
    """Block sizes and launch options of `swiglu_decode_kernel`.

    H200, bf16, K=2048, N=6912, one row and eight: 15.4 and 16.7 us, 3.7 and 3.4 TB/s; one warp of 16 columns 15.7 and
    19; four warps of 64 columns 26 and 23.
    """
    return {"BLOCK_N": 32, "BLOCK_K": _columns(element_size), "num_warps": 2, "num_stages": 5}


def linear_add_decode_config(element_size):
    """Block sizes and launch options of `linear_add_decode_kernel`.

    H200, bf16, N=2048, one row and eight: K=6912 9.6 us, K=2048 4.7; 32 columns and two warps 12.0 and 4.9; 512
    values of K at once 11.5. One sum over all of K instead of two, on the wide side of the product: 11.9 and 5.1.
    """
    return {"BLOCK_N": 16, "BLOCK_K": 2 * _columns(element_size), "num_warps": 1, "num_stages": 4}


def _tiles(M):
    """Rows as powers of two: those that are loaded, and those of a product, whose tiles have 8 columns or more."""
    rows = triton.next_power_of_2(M)
    return {"ROWS": rows, "TILE": max(8, rows)}


def _half(K):
    """Where the columns are cut into two sums: a sum of products is a chain, and two of them overlap."""
    return triton.cdiv(triton.cdiv(K, 2), 16) * 16


@operation("project_decode")
def _project_decode(
    x_BTD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    qkv_weight_CD: torch.Tensor,
    head_weight_XD: torch.Tensor,
    score_weight_D: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (B, _, K), C, X = x_BTD.shape, qkv_weight_CD.shape[0], head_weight_XD.shape[0]
    outputs = _projected(x_BTD, C, X)
    if B:
        weights, norm_D = (qkv_weight_CD.contiguous(), head_weight_XD.contiguous()), norm_D.contiguous()
        score_weight_D = None if score_weight_D is None else score_weight_D.contiguous()
        config = project_decode_config(x_BTD.element_size())
        tiles = sum(triton.cdiv(rows, config["BLOCK_N"]) for rows in (C, X))
        sizes = _tiles(B)
        project_decode_kernel[(tiles + (score_weight_D is not None),)](
            x_BTD.contiguous(), norm_D, *weights, score_weight_D, *outputs, B, C=C, X=X, K=K, EPS=eps, HALF=_half(K),
            BLOCK_D=min(4096 // sizes["ROWS"], triton.next_power_of_2(K)), **sizes, **config,
            **dependent(x_BTD.device),
        )  # fmt: skip
    return outputs


def _projected(x_BTD, C, X):
    """The outputs of `project_decode`, not yet written."""
    B, T, _ = x_BTD.shape
    head_BTX = x_BTD.new_empty(B, T, X, dtype=torch.float32)
    return x_BTD.new_empty(B, T, C), head_BTX, x_BTD.new_empty(B, T, dtype=torch.float32)


@_project_decode.register_fake
def _(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D):
    return _projected(x_BTD, qkv_weight_CD.shape[0], head_weight_XD.shape[0])


@operation("swiglu_decode")
def _swiglu_decode(
    x_BTD: torch.Tensor, norm_D: torch.Tensor, eps: float, gate_weight_ND: torch.Tensor, up_weight_ND: torch.Tensor
) -> torch.Tensor:
    (B, T, K), N = x_BTD.shape, gate_weight_ND.shape[0]
    out_BTN = x_BTD.new_empty(B, T, N)
    if B:
        weights, norm_D = (gate_weight_ND.contiguous(), up_weight_ND.contiguous()), norm_D.contiguous()
        config = swiglu_decode_config(x_BTD.element_size())
        swiglu_decode_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
            x_BTD.contiguous(), norm_D, *weights, out_BTN, B, N=N, K=K, EPS=eps, **_tiles(B), **config,
            **dependent(x_BTD.device),
        )  # fmt: skip
    return out_BTN


@_swiglu_decode.register_fake
def _(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND):
    return x_BTD.new_empty(*x_BTD.shape[:2], gate_weight_ND.shape[0])


@operation("linear_add_decode")
def _linear_add_decode(residual_BTN: torch.Tensor, x_BTD: torch.Tensor, weight_ND: torch.Tensor) -> torch.Tensor:
    (B, T, K), N = x_BTD.shape, weight_ND.shape[0]
    out_BTN = x_BTD.new_empty(B, T, N)
    if B:
        config = linear_add_decode_config(x_BTD.element_size())
        linear_add_decode_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
            residual_BTN.contiguous(), x_BTD.contiguous(), weight_ND.contiguous(), out_BTN, B, N=N, K=K,
            TILE=_tiles(B)["TILE"], HALF=_half(K), **config, **dependent(x_BTD.device),
        )  # fmt: skip
    return out_BTN


@_linear_add_decode.register_fake
def _(residual_BTN, x_BTD, weight_ND):
    return x_BTD.new_empty(*x_BTD.shape[:2], weight_ND.shape[0])


def _check_rows(name, x_BTD, **weights):
    if x_BTD.dim() != 3 or x_BTD.shape[1] != 1 or x_BTD.shape[0] > MOST_ROWS:
        raise ValueError(
            f"x of {name} must be one token of at most {MOST_ROWS} rows, [B, 1, D], got {tuple(x_BTD.shape)}; call "
            "the layers one by one"
        )
    if x_BTD.dtype not in DTYPES:
        raise ValueError(f"x of {name} must be float32, bfloat16 or float16, got {x_BTD.dtype}; cast it")
    for weight_name, weight in weights.items():
        if weight.dim() != 2 or weight.shape[1] != x_BTD.shape[2] or 0 in weight.shape:
            raise ValueError(f"{weight_name} must be [N, {x_BTD.shape[2]}], as x has it, got {tuple(weight.shape)}")
        if weight.dtype != x_BTD.dtype:
            raise ValueError(f"{weight_name} must have the dtype of x ({x_BTD.dtype}), got {weight.dtype}; cast it")


def project_decode(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D=None):
    """`project_decode_ref` in one launch.

    x_BTD: [B, 1, D] of float32, bfloat16 or float16, at most 16 rows. qkv_weight, head_weight: in x's dtype. norm_D:
    any float dtype. score_weight_D: any float dtype, or None for a layer without a router.
    Returns qkv [B, 1, C] in x's dtype, head [B, 1, X] in float32, and score [B, 1] in float32, None without a
    weight of it. Sums are float32. Raises ValueError on shapes or dtypes the kernel does not take.
    """
    _check_rows("project_decode", x_BTD, qkv_weight=qkv_weight_CD, head_weight=head_weight_XD)
    check_vectors(x_BTD, norm=norm_D, score_weight=score_weight_D)
    qkv_BTC, head_BTX, score_BT = _project_decode(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D)
    return qkv_BTC, head_BTX, None if score_weight_D is None else score_BT


def swiglu_decode(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND):
    """`swiglu_decode_ref` in one launch; gate and up are not rounded before SiLU and product.

    x_BTD: [B, 1, D] of float32, bfloat16 or float16, at most 16 rows. gate_weight, up_weight: [N, D] in x's dtype.
    norm_D: any float dtype. Returns [B, 1, N] in x's dtype. Raises ValueError on shapes or dtypes the kernel does not
    take.
    """
    _check_rows("swiglu_decode", x_BTD, gate_weight=gate_weight_ND, up_weight=up_weight_ND)
    check_vectors(x_BTD, norm=norm_D)
    if up_weight_ND.shape != gate_weight_ND.shape:
        raise ValueError(
            f"up_weight must have the shape of gate_weight {tuple(gate_weight_ND.shape)}, got "
            f"{tuple(up_weight_ND.shape)}"
        )
    return _swiglu_decode(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND)


def linear_add_decode(residual_BTN, x_BTD, weight_ND):
    """`linear_add_ref` of one token in one launch, summed in float32 and rounded once.

    residual: [B, 1, N], x: [B, 1, D], weight: [N, D], one dtype of float32, bfloat16, float16; at most 16 rows.
    Returns [B, 1, N]. Raises ValueError on shapes or dtypes the kernel does not take.
    """
    _check_rows("linear_add_decode", x_BTD, weight=weight_ND)
    shape = (*x_BTD.shape[:2], weight_ND.shape[0])
    if residual_BTN.shape != shape or residual_BTN.dtype != x_BTD.dtype:
        raise ValueError(
            f"residual must be {shape} in {x_BTD.dtype}, got {tuple(residual_BTN.shape)} in {residual_BTN.dtype}"
        )
    return _linear_add_decode(residual_BTN, x_BTD, weight_ND)


__all__ = ["MOST_ROWS", "linear_add_decode", "project_decode", "swiglu_decode"]
