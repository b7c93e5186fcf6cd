"""SwiGLU with few passes over memory: two products in one with SiLU between them, and one added to the residual; in
training, of which less is kept, one pass forth and one back between cuBLAS's products.

Meaning and shapes in `operations_hspmn`. M tokens (all leading dimensions), K features before a product, N after it.
"""

import torch
from torch.nn import functional as F

from .kernels_common_hspmn import (  # isort: skip
    DTYPES, Tiles, cdiv, check, has_descriptors, kernel, processors, refuse_in_place, tl, triton,
)  # fmt: skip
from .operations_hspmn import SILU_LIMIT, gated_mlp, linear_add, spans, swiglu

LOWEST = tl.constexpr(-SILU_LIMIT)
FARTHEST = 2**40  # bytes that a tensor descriptor's stride may span


@triton.jit
def halves(tile):
    """Left and right half of a tile's columns; of a product's result both are registers of the same thread."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def gated(gate, up):
    """`gated_product`; NaN stays NaN."""
    gate = tl.where(gate < LOWEST, LOWEST, gate)
    return gate / (1.0 + tl.exp(-gate)) * up


@kernel("M")
def swiglu_kernel(
    x_map, weight_map, out_map, M, N: tl.constexpr, K: tl.constexpr, UP_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of out, one after the other, GROUP blocks of rows sharing the weights in L2.
    weight_map: both weights [2, N, K], the up weight first if UP_FIRST. One product of twice the width makes both
    sums, so that a block of x is read once for them. Tiles and K are one loop, so that a tile's first loads run under
    the end of the one before; half a tile is written at a time, through half the shared memory."""
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
            up, gate = halves(both)
        else:
            gate, up = halves(both)
        left, right = halves(gated(gate, up).to(out_map.dtype))
        out_map.store([row, column], left)
        out_map.store([row, column + BLOCK_N // 2], right)


# H200, M=262144, K=2048, N=8192, bf16 (cuBLAS's two products alone 26.0 ms, SiLU and product after them 3 more): these
# options 26.7 ms; GROUP 32 26.8; not flattened 27.9; two products instead of one 32.3; without descriptors 30.5.
# Registers 168, shared memory 208 of 227 KiB.
SWIGLU_CONFIG = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 16, "num_warps": 8, "num_stages": 4}


@torch.compiler.assume_constant_result
def _reads_descriptors(device, element_size):
    return has_descriptors(device, element_size)


def swiglu_fits(x, gate_weight):
    """Whether the kernel takes these: 16 bits with tensor descriptors, 128 rows or more, sides in multiples of 8."""
    N, K = gate_weight.shape
    sides = N >= 128 and K >= 64 and N % 8 == K % 8 == 0
    return sides and x.numel() >= 128 * K and _reads_descriptors(x.device, x.element_size())


def _aligned(x):
    """`x` from a multiple of 16 bytes, as descriptors want it; a copy only where it is not."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


@swiglu.kernel
def _swiglu(x, gate_weight_NK, up_weight_NK):
    """Sums, SiLU and product are float32 and rounded once; what `swiglu_fits` refuses goes to the reference."""
    (N, K), config = gate_weight_NK.shape, SWIGLU_CONFIG
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    alike = gate_weight_NK.dtype == up_weight_NK.dtype == x.dtype and x.shape[-1] == K
    if not (alike and up_weight_NK.shape == gate_weight_NK.shape):
        raise ValueError(
            f"swiglu takes x [..., K] and weights [N, K] of one dtype; got x {tuple(x.shape)} {x.dtype}, gate_weight "
            f"{tuple(gate_weight_NK.shape)} {gate_weight_NK.dtype}, up_weight {tuple(up_weight_NK.shape)} "
            f"{up_weight_NK.dtype}; cast or transpose them"
        )
    if not swiglu_fits(x, gate_weight_NK):
        return swiglu.reference(x, gate_weight_NK, up_weight_NK)
    out = x.new_empty(*x.shape[:-1], N)
    x_MK, gate, up = _aligned(x.reshape(-1, K)), _aligned(gate_weight_NK), _aligned(up_weight_NK)
    # A descriptor is a base, sizes and strides: the first stride is the distance between the weights' two allocations
    low, high = sorted((gate, up), key=torch.Tensor.data_ptr)
    step = high.data_ptr() - low.data_ptr()
    if not 0 < step < FARTHEST:  # one matrix given twice, or memory that no descriptor spans
        stacked = torch.stack((gate, up))
        low = gate = stacked[0]
        step = stacked.stride(0) * stacked.element_size()
    M = len(x_MK)
    x_map = Tiles.of(x_MK, (M, K), (K, 1), (block_m, block_k))
    weight_map = Tiles.of(low, (2, N, K), (step // low.element_size(), K, 1), (2, block_n, block_k))
    out_map = Tiles.of(out.view(-1, N), (M, N), (N, 1), (block_m, block_n // 2))
    programs = min(cdiv(M, block_m) * cdiv(N, block_n), processors(x.device))
    swiglu_kernel[(programs,)](x_map, weight_map, out_map, M, N=N, K=K, UP_FIRST=low is not gate, **config)
    return out


@linear_add.kernel
def _linear_add(residual, x, weight_NK):
    """cuBLAS adds what is there as it writes, which saves a pass over the product. It is an operator of its own as the
    compiler would copy the residual first."""
    N, K = weight_NK.shape
    if weight_NK.dtype != x.dtype or K != x.shape[-1]:
        got = f"{tuple(weight_NK.shape)} in {weight_NK.dtype}"
        raise ValueError(f"weight must be [N, {x.shape[-1]}] in {x.dtype}, as x has it, got {got}; cast it")
    if residual.shape != (*x.shape[:-1], N) or residual.dtype != x.dtype or not residual.is_contiguous():
        refuse_in_place("residual", residual, (*x.shape[:-1], N), x.dtype)
    residual.view(-1, N).addmm_(x.reshape(-1, K), weight_NK.t())


@kernel("M")
def gated_kernel(
    gate, up, product, gate_grad, up_grad, M, N: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK elements of product [M, N]. BACK: its gradient is read from where it is written, and those of gate and up
    are written too, that of a clamped gate being 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < tl.cast(M, tl.int64) * N  # N being a constant, what divides it is known, and 16 bytes share a mask
    z = tl.load(gate + at, mask=real, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=real, other=0.0).to(tl.float32)
    if BACK:
        grad = tl.load(product + at, mask=real, other=0.0).to(tl.float32)
        least = tl.where(z < LOWEST, LOWEST, z)
        share = 1.0 / (1.0 + tl.exp(-least))
        slope = tl.where(z >= LOWEST, share * (1.0 + least * (1.0 - share)), 0.0)
        tl.store(gate_grad + at, grad * u * slope, mask=real)
        tl.store(up_grad + at, grad * (least * share), mask=real)
    tl.store(product + at, gated(z, u), mask=real)


# H200, 131,072 x 8192, bf16: 1.46 ms (4.4 TB/s) and, of gradients, 3.07 (4.2); BLOCK 2048 1.47 and 3.26, 4096 with 8
# warps 1.47 and 3.31
GATED_CONFIG = {"BLOCK": 1024, "num_warps": 4}
BACK_ROWS = 32768  # of gradients at once: enough for cuBLAS


def _gated(gate_BTN, up_BTN, product, *grads):
    """Launch `gated_kernel`, with `grads` of gate and up to be written BACK; returns `product`."""
    N, elements = gate_BTN.shape[-1], gate_BTN.numel()
    if elements:
        gated_kernel[(cdiv(elements, GATED_CONFIG["BLOCK"]),)](
            gate_BTN, up_BTN, product, *(grads or (None, None)), elements // N, N=N, BACK=bool(grads), **GATED_CONFIG
        )
    return product


@gated_mlp.kernel
def _gated_mlp(x_BTD, gate_weight_ND, up_weight_ND, weight_DN):
    """The product is float32, rounded once."""
    (N, D), dtype = gate_weight_ND.shape, x_BTD.dtype
    wanted = {"gate_weight": (N, D), "up_weight": (N, D), "weight": (weight_DN.shape[0], N)}
    check(
        (dtype in DTYPES, f"x must be float32, bfloat16 or float16, got {dtype}; set backend='reference'"),
        (D == x_BTD.shape[-1], f"x must be [B, T, {D}], as gate_weight has it, got {tuple(x_BTD.shape)}"),
    )
    for (name, shape), weight in zip(wanted.items(), (gate_weight_ND, up_weight_ND, weight_DN), strict=True):
        alike, got = weight.shape == shape and weight.dtype == dtype, f"{tuple(weight.shape)} in {weight.dtype}"
        check((alike, f"{name} must be {shape} in {dtype}, got {got}; cast or transpose it"))
    gate_BTN, up_BTN = F.linear(x_BTD, gate_weight_ND), F.linear(x_BTD, up_weight_ND)
    return F.linear(_gated(gate_BTN, up_BTN, torch.empty_like(gate_BTN)), weight_DN), gate_BTN, up_BTN


@gated_mlp.gradient(
    wrt=("x_BTD", "gate_weight_ND", "up_weight_ND", "weight_DN"), keeps=(1, 2), outputs=1,
    takes=lambda x_BTD, *_: x_BTD.dtype in DTYPES,
)  # fmt: skip
def _gated_mlp_back(grad_BTD, x_BTD, gate_weight_ND, up_weight_ND, weight_DN, gate_BTN, up_BTN):
    """The product is made again where its gradient was, which is read at the same time: `BACK_ROWS` at once, so that
    neither exists as a whole, nor do the gradients of gate and up. Parts of the weights' gradients are summed in
    float32."""
    grad_MD, x_MD, gate_MN, up_MN = (x.reshape(-1, x.shape[-1]) for x in (grad_BTD, x_BTD, gate_BTN, up_BTN))
    x_grad, totals = torch.empty_like(x_MD), [None] * 3
    for begin, end in spans(len(x_MD), BACK_ROWS):
        grad, x, gate, up = (each[begin:end] for each in (grad_MD, x_MD, gate_MN, up_MN))
        gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
        product = _gated(gate, up, grad @ weight_DN, gate_grad, up_grad)
        torch.mm(gate_grad, gate_weight_ND, out=x_grad[begin:end]).addmm_(up_grad, up_weight_ND)
        parts = gate_grad.t() @ x, up_grad.t() @ x, grad.t() @ product
        totals = [part if x is None else x.float().add_(part) for x, part in zip(totals, parts, strict=True)]
    return x_grad.view_as(x_BTD), *(x.to(x_BTD.dtype) for x in totals)
