"""SwiGLU with few passes over memory: two products in one with SiLU between them, and one added to the residual.

Meaning and shapes: `swiglu_ref` and `linear_add_ref` in `reference_hspmn`. M tokens (all leading dimensions), K
features of a token before a product, N after it.
"""

import torch

from .kernels_common_hspmn import check_in_place, has_descriptors, operation, processors
from .reference_hspmn import SILU_LIMIT

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error

LOWEST = tl.constexpr(-SILU_LIMIT)
FARTHEST = 2**40  # bytes that a tensor descriptor's stride may span


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile's columns; of a product's result both are registers of the same thread."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def gated(gate, up):
    """`gated_product_ref`; NaN stays NaN."""
    gate = tl.where(gate < LOWEST, LOWEST, gate)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["M"])
def swiglu_kernel(
    x_map, weight_map, out_map, M, N: tl.constexpr, K: tl.constexpr, UP_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of out, one after the other, GROUP blocks of rows sharing the weights in L2.

    weight_map: both weights [2, N, K], the up weight first if UP_FIRST. One product of twice the width makes both
    sums, so that a block of x is read once for them. Tiles and K are one loop, so that a tile's first loads run under
    the end of the one before; half a tile is written at a time, through half the shared memory.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        place = tile % (GROUP * tiles_n)
        row, column = (first + place % height) * BLOCK_M, place // height * BLOCK_N
        both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            x_tile = x_map.load([row, k])
            weights = tl.reshape(weight_map.load([0, column, k]), (2 * BLOCK_N, BLOCK_K))
            both = tl.dot(x_tile, tl.trans(weights), both)
        if UP_FIRST:
            up, gate = halves(both, BLOCK_M, 2 * BLOCK_N)
        else:
            gate, up = halves(both, BLOCK_M, 2 * BLOCK_N)
        left, right = halves(gated(gate, up).to(out_map.dtype), BLOCK_M, BLOCK_N)
        out_map.store([row, column], left)
        out_map.store([row, column + BLOCK_N // 2], right)


# H200, M=262144, K=2048, N=8192, bf16 (cuBLAS's two products alone 26.0 ms, SiLU and product after them 3 more): these
# options 26.7 ms; GROUP 32 26.8; not flattened 27.9; two products instead of one 32.3; without descriptors 30.5.
# Registers 168, shared memory 208 of 227 KiB.
SWIGLU_CONFIG = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 16, "num_warps": 8, "num_stages": 4}


def swiglu_fits(x, gate_weight, up_weight):
    """Whether the kernel takes these: 16 bits with tensor descriptors, 128 rows or more, sides in multiples of 8."""
    N, K = gate_weight.shape
    alike = gate_weight.dtype == up_weight.dtype == x.dtype and x.shape[-1] == K and up_weight.shape == (N, K)
    return alike and has_descriptors(x) and x.numel() >= 128 * K and N >= 128 and K >= 64 and N % 8 == K % 8 == 0


def _aligned(x):
    """`x` contiguous from a multiple of 16 bytes, as descriptors want it; a copy only where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _weight_map(gate_weight_NK, up_weight_NK):
    """One tensor descriptor of both weights, [2, N, K], and whether the up weight comes first.

    A descriptor is a base, sizes and strides: the first stride is the distance between the two allocations.
    """
    gate, up = _aligned(gate_weight_NK), _aligned(up_weight_NK)
    low, high = sorted((gate, up), key=torch.Tensor.data_ptr)
    step = high.data_ptr() - low.data_ptr()
    if not 0 < step < FARTHEST:  # one matrix given twice, or memory that no descriptor spans
        stacked = torch.stack((gate, up))
        low, high = stacked
        gate, step = low, stacked.stride(0) * stacked.element_size()
    (N, K), block = low.shape, [2, SWIGLU_CONFIG["BLOCK_N"], SWIGLU_CONFIG["BLOCK_K"]]
    return TensorDescriptor(low, [2, N, K], [step // low.element_size(), K, 1], block), low is not gate


@operation("swiglu")
def _swiglu(x: torch.Tensor, gate_weight_NK: torch.Tensor, up_weight_NK: torch.Tensor) -> torch.Tensor:
    (N, K), config = gate_weight_NK.shape, SWIGLU_CONFIG
    out = x.new_empty(*x.shape[:-1], N)
    x_MK, out_MN = _aligned(x.reshape(-1, K)), out.view(-1, N)
    M, half = len(x_MK), config["BLOCK_N"] // 2
    x_map = TensorDescriptor(x_MK, [M, K], [K, 1], [config["BLOCK_M"], config["BLOCK_K"]])
    out_map = TensorDescriptor(out_MN, [M, N], [N, 1], [config["BLOCK_M"], half])
    weight_map, up_first = _weight_map(gate_weight_NK, up_weight_NK)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    swiglu_kernel[(min(tiles, processors(x.device)),)](
        x_map, weight_map, out_map, M, N=N, K=K, UP_FIRST=up_first, **config
    )
    return out


@_swiglu.register_fake
def _(x, gate_weight_NK, up_weight_NK):
    return x.new_empty(*x.shape[:-1], gate_weight_NK.shape[0])


def swiglu(x, gate_weight, up_weight):
    """`swiglu_ref` in one pass over what `swiglu_fits` allows.

    x: [..., K], bfloat16 or float16. gate_weight, up_weight: [N, K], in x's dtype, as nn.Linear holds them.
    Sums, SiLU and product are float32 and rounded once, where the layers one by one round gate and up before.
    Returns a contiguous [..., N] in x's dtype. Raises ValueError on shapes, dtypes or devices it does not take.
    """
    if not swiglu_fits(x, gate_weight, up_weight):
        raise ValueError(
            "swiglu takes 16-bit x [..., K] of at least 128 rows and weights [N, K] of its dtype, N and K multiples "
            f"of 8, N >= 128, K >= 64, on sm_90 or sm_100; got x {tuple(x.shape)} {x.dtype}, gate_weight "
            f"{tuple(gate_weight.shape)} {gate_weight.dtype}, up_weight {tuple(up_weight.shape)} {up_weight.dtype} on "
            f"{x.device}; use swiglu_ref for others"
        )
    return _swiglu(x, gate_weight, up_weight)


@operation("linear_add", mutates_args=("residual",))
def _linear_add(residual: torch.Tensor, x: torch.Tensor, weight_NK: torch.Tensor) -> None:
    N, K = weight_NK.shape
    residual.view(-1, N).addmm_(x.reshape(-1, K), weight_NK.t())


def linear_add(residual, x, weight):
    """`linear_add_ref` IN PLACE of `residual`, [..., N] and contiguous; x: [..., K], weight: [N, K], of one dtype.

    cuBLAS adds what is there as it writes, which saves a pass over the product. It is an operator of its own because
    the compiler would copy the residual first. Raises ValueError on shapes, dtypes or layouts that do not fit.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    if weight.dtype != x.dtype or weight.shape[1:] != x.shape[-1:]:
        raise ValueError(
            f"weight must be [N, {x.shape[-1]}] in {x.dtype}, got {tuple(weight.shape)} in {weight.dtype}; cast it"
        )
    check_in_place("residual", residual, shape, (x.dtype,))
    _linear_add(residual, x, weight)


__all__ = ["linear_add", "swiglu", "swiglu_fits"]
