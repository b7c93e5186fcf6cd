"""The products of one decoded token, of at most 16 rows: bound by the bytes of weights and by launches.

Meaning and shapes: `project_decode_ref`, `swiglu_decode_ref` and `linear_add_ref` in `reference_hspmn`; M rows, K
features before a product. A norm in front of a product is computed in every program from the rows themselves: they are
few, and a launch costs more. Each program makes one tile over all of K, and its weights are on their way to L2 before
it waits for the kernel before it, see `dependent`.
"""

import torch

from .kernels_common_hspmn import DTYPES, aligned, dependent, operation, prefetch
from .kernels_mlp_hspmn import gated

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error

MOST_ROWS = 16  # one tile of the tensor cores
TILE = tl.constexpr(MOST_ROWS)


@triton.jit
def prefetch_rows(
    weight, row, rows, K: tl.constexpr, BLOCK_R: tl.constexpr, AHEAD: tl.constexpr, THREADS: tl.constexpr
):
    """The first AHEAD columns of BLOCK_R rows of weight [rows, K] into L2, one piece per thread."""
    PIECES: tl.constexpr = THREADS // BLOCK_R if THREADS > BLOCK_R else 1
    i = tl.arange(0, BLOCK_R * PIECES)
    r = tl.minimum(row + i // PIECES, rows - 1).to(tl.int64)
    SIZE: tl.constexpr = AHEAD // PIECES
    prefetch(weight + r * K + i % PIECES * SIZE, SIZE * weight.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def prefetch_vector(vector, K: tl.constexpr, THREADS: tl.constexpr):
    """All of vector [K] into L2, one piece per thread, where it divides so."""
    SIZE: tl.constexpr = K * vector.dtype.element_ty.primitive_bitwidth // 8 // THREADS
    if SIZE % 16 == 0:
        prefetch(vector + tl.arange(0, THREADS) * (K // THREADS), SIZE)


@triton.jit
def load_rows(x, begin, M, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K columns from `begin` of the M rows of x [M, K], zeros outside."""
    m = tl.arange(0, ROWS)
    k = begin + tl.arange(0, BLOCK_K)
    return tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def norm_scale(x, M, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """What RMSNorm multiplies each of the M rows of x [M, K] by, float32 [ROWS]."""
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_D):
        tile = load_rows(x, begin, M, K, ROWS, BLOCK_D).to(tl.float32)
        squares += tile * tile
    return tl.rsqrt(tl.sum(squares, 1) / K + EPS)


@triton.jit
def load_normed(x, norm, scale, begin, M, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """`load_rows` after RMSNorm, rounded to x's dtype as the layer does."""
    k = begin + tl.arange(0, BLOCK_K)
    factor = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    tile = load_rows(x, begin, M, K, ROWS, BLOCK_K)
    return (tile.to(tl.float32) * scale[:, None] * factor[None, :]).to(tile.dtype)


@triton.jit
def as_tile(rows, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS rows as the TILE rows of a product, repeated; what they sum to is not stored."""
    if ROWS == TILE:
        return rows
    return tl.reshape(tl.broadcast_to(rows[None, :, :], (TILE // ROWS, ROWS, BLOCK_K)), (TILE, BLOCK_K))


@triton.jit
def load_weight(weight, row, begin, rows, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tile [BLOCK_N, BLOCK_K] of weight [rows, K], zeros outside."""
    n = tl.arange(0, BLOCK_N)
    k = begin + tl.arange(0, BLOCK_K)
    inside = (row + n < rows)[:, None] & (k < K)[None, :]
    return tl.load(weight + row.to(tl.int64) * K + n[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(out, tile, column, M, N, BLOCK_N: tl.constexpr):
    """BLOCK_N columns from `column` of out [M, N], in the dtype of `out`."""
    m = tl.arange(0, TILE)
    n = column + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def project_decode_kernel(
    x, norm, qkv_weight, head_weight, score_weight, qkv, head, score, M,
    C: tl.constexpr, X: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of qkv [M, C] or of head [M, X]; a last program, if launched, makes the scores [M]."""
    TILES_C: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = TILES_C + (X + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    weight, column, channels = qkv_weight, tile * BLOCK_N, tl.where(tile < TILES_C, C, X)
    if tile >= TILES_C:
        weight, column = head_weight, (tile - TILES_C) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            prefetch_vector(norm, K, THREADS)
            prefetch_rows(weight, column, channels, K, BLOCK_N, AHEAD, THREADS)
        tl.extra.cuda.gdc_wait()
    scale = norm_scale(x, M, K, EPS, ROWS, BLOCK_D)
    if tile < TILES:
        total = tl.zeros([TILE, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            weight_tile = load_weight(weight, column, k, channels, K, BLOCK_N, BLOCK_K)
            x_tile = as_tile(load_normed(x, norm, scale, k, M, K, ROWS, BLOCK_K), ROWS, BLOCK_K)
            total = tl.dot(x_tile, tl.trans(weight_tile), total, input_precision="tf32x3")
        if tile < TILES_C:
            store_rows(qkv, total, column, M, C, BLOCK_N)
        else:
            store_rows(head, total, column, M, X, BLOCK_N)
    elif score_weight is not None:
        # A sum of products and no tensor cores: the decision must be that of `route_ref`
        products = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for begin in tl.static_range(0, K, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            factor = tl.load(score_weight + d, mask=d < K, other=0.0).to(tl.float32)
            products += load_normed(x, norm, scale, begin, M, K, ROWS, BLOCK_D).to(tl.float32) * factor[None, :]
        m = tl.arange(0, ROWS)
        tl.store(score + m, tl.sum(products, 1), mask=m < M)


@triton.jit(do_not_specialize=["M"])
def swiglu_decode_kernel(
    x, norm, gate_weight, up_weight, out, M,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of out [M, N], from two sums over K that share the normalised rows."""
    column = tl.program_id(0) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            prefetch_vector(norm, K, THREADS)
            prefetch_rows(gate_weight, column, N, K, BLOCK_N, AHEAD, THREADS)
            prefetch_rows(up_weight, column, N, K, BLOCK_N, AHEAD, THREADS)
        tl.extra.cuda.gdc_wait()
    scale = norm_scale(x, M, K, EPS, ROWS, BLOCK_D)
    gate = tl.zeros([TILE, BLOCK_N], tl.float32)
    up = tl.zeros([TILE, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        gate_tile = load_weight(gate_weight, column, k, N, K, BLOCK_N, BLOCK_K)
        up_tile = load_weight(up_weight, column, k, N, K, BLOCK_N, BLOCK_K)
        x_tile = as_tile(load_normed(x, norm, scale, k, M, K, ROWS, BLOCK_K), ROWS, BLOCK_K)
        gate = tl.dot(x_tile, tl.trans(gate_tile), gate, input_precision="tf32x3")
        up = tl.dot(x_tile, tl.trans(up_tile), up, input_precision="tf32x3")
    store_rows(out, gated(gate, up), column, M, N, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def linear_add_decode_kernel(
    residual, x, weight, out, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of out [M, N]."""
    column = tl.program_id(0) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            prefetch_rows(weight, column, N, K, BLOCK_N, AHEAD, THREADS)
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, TILE)
    n = column + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    total = tl.load(residual + m[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    for k in range(0, K, BLOCK_K):
        weight_tile = load_weight(weight, column, k, N, K, BLOCK_N, BLOCK_K)
        x_tile = load_rows(x, k, M, K, TILE, BLOCK_K)
        total = tl.dot(x_tile, tl.trans(weight_tile), total, input_precision="tf32x3")
    store_rows(out, total, column, M, N, BLOCK_N)


def project_decode_config(element_size):
    """Block sizes and launch options of `project_decode_kernel`; AHEAD: most columns of weights brought into L2 early.

    The tiles are those that measured fastest on an H200 for such a product without the norm; AHEAD is reasoned: all of
    a usual width, because the programs of one launch, 200 at a width of 3,000, bring less than half of L2.
    """
    return {"BLOCK_N": 16, "BLOCK_K": _columns(element_size), "AHEAD": 4096, "num_warps": 2, "num_stages": 5}


def _columns(element_size):
    """BLOCK_K: float32 products on tensor cores take three times the registers."""
    return 256 if element_size == 2 else 64


def swiglu_decode_config(M, element_size):
    """Block sizes and launch options of `swiglu_decode_kernel`; see `project_decode_config`.

    Up to 8 rows two warps hold both tiles in 210 registers per thread in bf16 on sm_90 (compiler's report), 16 rows
    take four.
    """
    tile = {"BLOCK_N": 32, "BLOCK_K": _columns(element_size), "AHEAD": 1024}
    return tile | {"num_warps": 2 if M <= 8 else 4, "num_stages": 3}


def linear_add_decode_config(element_size):
    """Block sizes and launch options of `linear_add_decode_kernel`; see `project_decode_config`."""
    return {"BLOCK_N": 16, "BLOCK_K": _columns(element_size), "AHEAD": 4096, "num_warps": 2, "num_stages": 5}


def _options(config, device, K, weight, *others):
    """`config` with the launch options of `dependent`, and AHEAD as all that is to be prefetched allows it."""
    threads, size = 32 * config["num_warps"], weight.element_size()
    step = max(1, threads // config["BLOCK_N"]) * 16 // size
    ahead = min(config["AHEAD"], K) // step * step if aligned(weight, *others) else 0
    return config | {"AHEAD": ahead, "THREADS": threads} | dependent(device)


def _norm_options(M, K):
    """Options of the kernels that normalise their rows: `BLOCK_D` makes 4096 values at once of them."""
    rows = triton.next_power_of_2(M)
    return {"ROWS": rows, "BLOCK_D": min(4096 // rows, triton.next_power_of_2(K))}


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
        project_decode_kernel[(tiles + (score_weight_D is not None),)](
            x_BTD.contiguous(), norm_D, *weights, score_weight_D, *outputs, B, C=C, X=X, K=K, EPS=eps,
            **_norm_options(B, K), **_options(config, x_BTD.device, K, *weights, norm_D),
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
        config = swiglu_decode_config(B, x_BTD.element_size())
        swiglu_decode_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
            x_BTD.contiguous(), norm_D, *weights, out_BTN, B, N=N, K=K, EPS=eps, **_norm_options(B, K),
            **_options(config, x_BTD.device, K, *weights, norm_D),
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
        weight_ND = weight_ND.contiguous()
        config = linear_add_decode_config(x_BTD.element_size())
        linear_add_decode_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
            residual_BTN.contiguous(), x_BTD.contiguous(), weight_ND, out_BTN, B, N=N, K=K,
            **_options(config, x_BTD.device, K, weight_ND),
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


def _check_vectors(x_BTD, **vectors):
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x_BTD.shape[2:]:
            raise ValueError(f"{name} must be [{x_BTD.shape[2]}], the width of x, got {tuple(vector.shape)}")


def project_decode(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D=None):
    """`project_decode_ref` in one launch.

    x_BTD: [B, 1, D] of float32, bfloat16 or float16, at most 16 rows. qkv_weight, head_weight: in x's dtype. norm_D:
    any float dtype. score_weight_D: any float dtype, or None for a layer without a router.
    Returns qkv [B, 1, C] in x's dtype, head [B, 1, X] in float32, and score [B, 1] in float32, not written if there is
    no weight of it. Sums are float32. Raises ValueError on shapes or dtypes the kernel does not take.
    """
    _check_rows("project_decode", x_BTD, qkv_weight=qkv_weight_CD, head_weight=head_weight_XD)
    _check_vectors(x_BTD, norm=norm_D, score_weight=score_weight_D)
    return _project_decode(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D)


def swiglu_decode(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND):
    """`swiglu_decode_ref` in one launch; gate and up are not rounded before SiLU and product.

    x_BTD: [B, 1, D] of float32, bfloat16 or float16, at most 16 rows. gate_weight, up_weight: [N, D] in x's dtype.
    norm_D: any float dtype. Returns [B, 1, N] in x's dtype. Raises ValueError on shapes or dtypes the kernel does not
    take.
    """
    _check_rows("swiglu_decode", x_BTD, gate_weight=gate_weight_ND, up_weight=up_weight_ND)
    _check_vectors(x_BTD, norm=norm_D)
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
