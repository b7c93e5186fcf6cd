"""Which implementation runs an operation: the reference on CPU, FlexAttention for gradients on CUDA, kernels without.

The one place of that choice. Shapes and meaning of every operation are those of `reference_hspmn`; `backend` is what
`pick_backend` returned.
"""

import functools
import math

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers.utils.import_utils import is_triton_available

from .reference_hspmn import (
    add_sinks_ref,
    attend_decode_ref,
    compact_ref,
    gated_norm_ref,
    linear_add_ref,
    linear_attention_recurrent_ref,
    linear_attention_ref,
    local_attention_ref,
    norm_heads_ref,
    project_decode_ref,
    route_ref,
    split_heads_decode_ref,
    split_heads_ref,
    sqsk_attention_ref,
    swiglu_decode_ref,
    swiglu_ref,
    take_rows_ref,
)

HAS_TRITON = is_triton_available()
if HAS_TRITON:
    from .kernels_common_hspmn import HEAD_WIDTHS, interpreted
    from .kernels_hspmn import MOST_HEAD_ROWS
    from .kernels_hspmn import attend_decode as attend_decode_kernel
    from .kernels_hspmn import compact as compact_kernel
    from .kernels_hspmn import linear_add as linear_add_kernel
    from .kernels_hspmn import linear_add_decode as linear_add_decode_kernel
    from .kernels_hspmn import linear_attention as linear_attention_kernel
    from .kernels_hspmn import linear_attention_step as linear_attention_step_kernel
    from .kernels_hspmn import local_attention as local_attention_kernel
    from .kernels_hspmn import norm_heads as norm_heads_kernel
    from .kernels_hspmn import place_decode as place_decode_kernel
    from .kernels_hspmn import project_decode as project_decode_kernel
    from .kernels_hspmn import reflexive_merge as reflexive_merge_kernel
    from .kernels_hspmn import route as route_kernel
    from .kernels_hspmn import split_heads as split_heads_kernel
    from .kernels_hspmn import split_heads_decode as split_heads_decode_kernel
    from .kernels_hspmn import sqsk_attention as sqsk_attention_kernel
    from .kernels_hspmn import sqsk_merge as sqsk_merge_kernel
    from .kernels_hspmn import swiglu as swiglu_kernel
    from .kernels_hspmn import swiglu_decode as swiglu_decode_kernel
    from .kernels_hspmn import take_rows as take_rows_kernel
    from .kernels_mlp_hspmn import swiglu_fits
    from .kernels_rows_hspmn import MOST_ROWS

FLEX_BLOCK = 128  # query and key block of the FlexAttention masks


def pick_backend(requested, device, head_dim):
    """What runs the operations on `device` now: "reference", "flex" (with gradients) or "triton" (without).

    "auto" takes the reference on CPU; on CUDA the kernels where no gradient is recorded, else FlexAttention.
    Raises ValueError if the requested one cannot run there; a forced choice is never replaced silently.
    """
    if requested == "auto":
        if device.type != "cuda":
            return "reference"
        usable = HAS_TRITON and head_dim in HEAD_WIDTHS and not torch.is_grad_enabled()
        return "triton" if usable else "flex"
    if requested == "flex" and device.type != "cuda":
        raise ValueError(f"backend='flex' needs a CUDA device, got {device.type}; set backend='auto' or 'reference'")
    if requested == "triton":
        if not HAS_TRITON:
            raise ValueError("backend='triton' needs the triton package; install it or set backend='auto'")
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"backend='triton' needs a CUDA device, got {device.type}; set backend='auto'")
        if torch.is_grad_enabled():
            raise ValueError("backend='triton' computes no gradients; use torch.no_grad(), or backend='auto' to train")
    return requested


def takes_rows(x_BTD, backend):
    """Whether `project_decode`, `swiglu_decode` and `linear_add_decode` take a token of so many rows."""
    return backend != "triton" or x_BTD.shape[0] <= MOST_ROWS


class _TakeRows(torch.autograd.Function):
    """`take_rows_ref` whose backward is a gather too: `inverse` maps rows of `x` to slots of the result."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        return take_rows_ref(x, index)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return take_rows_ref(grad, inverse), None, None


def take_rows(x_BTX, index_BK, inverse_BT, backend="reference"):
    """Rows of `x` named by `index` (-1: zeros); `inverse`, the opposite map, spares backward an atomic scatter."""
    if backend == "triton":
        return take_rows_kernel(x_BTX, index_BK)
    return _TakeRows.apply(x_BTX, index_BK, inverse_BT)


def route(h_BTD, weight_D, bias, noise_floor, backend):
    """See `route_ref`. Compiled code fuses the reference into what computes `h`; the kernel serves eager calls."""
    if backend == "triton" and not torch.compiler.is_compiling():
        return route_kernel(h_BTD, weight_D, bias, noise_floor)
    return route_ref(h_BTD, weight_D, bias, noise_floor)


def norm_heads(x_BTD, norm_D, eps, head_weight_XD, score_weight_D, backend):
    """See `norm_heads_ref`; more rows of `head_weight` than the kernel takes go to separate products."""
    normed = norm_heads_ref if backend != "triton" or head_weight_XD.shape[0] > MOST_HEAD_ROWS else norm_heads_kernel
    return normed(x_BTD, norm_D, eps, head_weight_XD, score_weight_D)


def compact(mask_BT, capacity, backend):
    """See `compact_ref`; a single token is its own slot or has none."""
    if mask_BT.shape[1] == capacity == 1:
        slot_BT = mask_BT.long() - 1
        return slot_BT, slot_BT, mask_BT[:, 0].to(torch.int32)
    return compact_kernel(mask_BT, capacity) if backend == "triton" else compact_ref(mask_BT, capacity)


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


def _flex(q_BTHE, k_BSGE, v_BSGE, block_mask):
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSGE, v_BSGE))
    # Fewer than 128 queries would go to a kernel for decoding, which inductor does not find for masks of ours
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    out, aux = attend(
        q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


def _block_mask(counts_BN, indices_BNM, full_counts_BN, full_indices_BNM, visible, length):
    """`BlockMask` of key blocks per query block, the same for all heads; the full ones (or None) need no mask.

    FlexAttention's kernels take the tensors for row-major, also in the head dimension of size 1, but inductor lays out
    what it computes itself as it likes: in inference, where nothing keeps them for backward, row b of a [B, 1, N]
    tensor with strides (N, B * N, 1) was read B rows further on. `as_strided` fixes the layout.
    """

    def row_major(x):
        x = x[:, None].to(torch.int32).contiguous()
        strides = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
        return x.as_strided(x.shape, strides)

    tensors = (None if x is None else row_major(x) for x in (counts_BN, indices_BNM, full_counts_BN, full_indices_BNM))
    return BlockMask.from_kv_blocks(*tensors, BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=(length, length))


def _blocks(first_BN, last_BN, columns):
    """Counts and indices of the key blocks first .. last (both included) of each query block."""
    count_BN = (last_BN - first_BN + 1).clamp(min=0)
    index_BNM = first_BN[..., None] + torch.arange(columns, device=first_BN.device)
    return count_BN, index_BNM.clamp(max=columns - 1)


def _local_flex(q_BTHE, k_BTGE, v_BTGE, start_BT, window):
    B, T = q_BTHE.shape[:2]
    N = -(-T // FLEX_BLOCK)
    block_N = torch.arange(N, device=q_BTHE.device)
    first_BN = ((block_N * FLEX_BLOCK - window + 1).clamp(min=0) // FLEX_BLOCK).expand(B, N)
    counts, indices = _blocks(first_BN, block_N.expand(B, N), N)

    def visible(b, h, query, key):
        near = (key <= query) & (key > query - window)
        return near if start_BT is None else near & (key >= start_BT[b, query])

    return _flex(q_BTHE, k_BTGE, v_BTGE, _block_mask(counts, indices, None, None, visible, T))


def _sqsk_flex(q_BKHE, k_BKGE, v_BKGE, first_BK, count_B):
    """Compacted causal attention; blocks past a row's count are not visited, so no [K, K] mask exists."""
    B, K = q_BKHE.shape[:2]
    N = -(-K // FLEX_BLOCK)
    block_N = torch.arange(N, device=q_BKHE.device)
    used_BN = block_N * FLEX_BLOCK < count_B[:, None]
    if first_BK is None:
        counts, indices = used_BN, block_N[:, None].expand(B, N, N)
        full_counts, full_indices = torch.where(used_BN, block_N, 0), block_N.expand(B, N, N)
    else:
        first_BN = first_BK[:, ::FLEX_BLOCK] // FLEX_BLOCK
        counts, indices = _blocks(first_BN, torch.where(used_BN, block_N, -1), N)
        full_counts = full_indices = None

    def visible(b, h, query, key):
        causal = key <= query
        return causal if first_BK is None else causal & (key >= first_BK[b, query])

    mask = _block_mask(counts, indices, full_counts, full_indices, visible, K)
    return _flex(q_BKHE, k_BKGE, v_BKGE, mask)


def split_heads(
    x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E, *, kv_heads, eps, mode, backend
):
    """See `split_heads_ref`."""
    split = split_heads_kernel if backend == "triton" else split_heads_ref
    tensors = (x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E)
    return split(*tensors, kv_heads=kv_heads, eps=eps, mode=mode)


def split_heads_decode(
    x_BTC, weight_CL, history_BLC, start_BT, length_B, cos_BTE, sin_BTE, q_norm_E, k_norm_E, *,
    kv_heads, eps, mode, backend,
):  # fmt: skip
    """See `split_heads_decode_ref`; the kernel moves the history on in place."""
    tensors = (x_BTC, weight_CL, history_BLC, start_BT, length_B, cos_BTE, sin_BTE, q_norm_E, k_norm_E)
    if backend == "triton":
        return *split_heads_decode_kernel(*tensors, kv_heads=kv_heads, eps=eps, mode=mode), history_BLC
    return split_heads_decode_ref(*tensors, kv_heads=kv_heads, eps=eps, mode=mode)


def linear_attention(q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, length_B, state_BHEF, backend):
    """See `linear_attention_ref`; the kernel of a single token advances a given state in place."""
    inputs = (q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, length_B, state_BHEF)
    single = q_BTHE.shape[1] == 1 and state_BHEF is not None
    if backend != "triton":
        return (linear_attention_recurrent_ref if single else linear_attention_ref)(*inputs)
    if single:
        return linear_attention_step_kernel(*inputs), state_BHEF
    return linear_attention_kernel(*inputs)


def local_attention(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history, backend):
    """See `local_attention_ref`; `history` is None or the keys and values of the window before this call."""
    if history is None and backend == "flex":
        return _local_flex(q_BTHE, k_BTGE, v_BTGE, start_BT, window)
    attend = functools.partial(local_attention_kernel, with_lse=True) if backend == "triton" else local_attention_ref
    return attend(q_BTHE, k_BTGE, v_BTGE, start_BT, window, *(history or (None, None)))


def reflexive_merge(
    q_BTHE, k_BTGE, v_BTGE, start_BT, window, linear_BTHE, head_gate_BTH, norm_E, eps, history, backend
):
    """See `reflexive_merge_ref`; `history` as in `local_attention`."""
    if backend == "triton":
        inputs = (q_BTHE, k_BTGE, v_BTGE, start_BT, window, linear_BTHE, head_gate_BTH, norm_E, eps)
        return reflexive_merge_kernel(*inputs, *(history or (None, None)))
    local_BTHE, _ = local_attention(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history, backend)
    return (local_BTHE + gated_norm_ref(linear_BTHE, head_gate_BTH, norm_E, eps)).to(q_BTHE.dtype)


def place_decode(cos_BTE, sin_BTE, start_BT, position_BT, length_B, backend):
    """Where a single token stands, dense tensors in the order given: the kernel makes them once for all layers."""
    place = (cos_BTE, sin_BTE, start_BT, position_BT, length_B)
    return place_decode_kernel(*place) if backend == "triton" else place


def attend_decode(heads, head_BTX, parameters, eps, stream, router, state_BHEE, ring, store, backend):
    """See `attend_decode_ref`; the kernel advances the state in place, and both ring, store and counts.

    heads: the five tensors of `split_heads`. parameters: of the decays and the norm. stream: the call's `Stream`.
    router: score_BT, bias, noise_floor and initial. ring: keys and values of the window. store: what the `store` of
    a layer's cache gives.
    """
    place = (stream.position_BT, stream.start_BT, stream.length_B, stream.seen_B)
    inputs = (*heads, head_BTX, *parameters, eps, *place, *router, state_BHEE, *ring, *store)
    return (attend_decode_kernel(*inputs), state_BHEE) if backend == "triton" else attend_decode_ref(*inputs)


def project_decode(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D, backend):
    """See `project_decode_ref`."""
    project = project_decode_kernel if backend == "triton" else project_decode_ref
    return project(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D)


def swiglu_decode(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND, backend):
    """See `swiglu_decode_ref`."""
    swiglu = swiglu_decode_kernel if backend == "triton" else swiglu_decode_ref
    return swiglu(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND)


def linear_add_decode(residual_BTN, x_BTD, weight_ND, backend):
    """See `linear_add_ref`, here of a single token."""
    return (linear_add_decode_kernel if backend == "triton" else linear_add_ref)(residual_BTN, x_BTD, weight_ND)


def sqsk_attention(q_BKHE, k_BPGE, v_BPGE, first_BK, cached_B, count_B, backend):
    """See `sqsk_attention_ref`; `cached_B` None means that no slot precedes this call."""
    if backend == "triton":
        return sqsk_attention_kernel(q_BKHE, k_BPGE, v_BPGE, first_BK, cached_B, count_B, with_lse=True)
    if cached_B is None and backend == "flex":
        return _sqsk_flex(q_BKHE, k_BPGE, v_BPGE, first_BK, count_B)
    cached_B = torch.zeros_like(count_B) if cached_B is None else cached_B
    return sqsk_attention_ref(q_BKHE, k_BPGE, v_BPGE, first_BK, cached_B, count_B)


def sqsk_merge(reflexive_BTHE, q_BTHE, kv, route, first_BK, cached_B, sinks, backend):
    """`reflexive` + gate * SQSK attention at the routed tokens; the kernel adds in place.

    kv: keys and values in token order if `cached_B` is None, else the sparse store whose first `cached_B` slots
    precede this call's. route: the `Route` of the layer. sinks: learned keys and values, or None.
    """
    index_BK, slot_BT, gate_BT, count_B = route.index_BK, route.slot_BT, route.gate_BT, route.count_B
    if backend == "triton" and sinks is None:
        sqsk_merge_kernel(reflexive_BTHE, gate_BT, q_BTHE, *kv, index_BK, first_BK, cached_B, count_B)
        return reflexive_BTHE
    q_BKHE = take_rows(q_BTHE, index_BK, slot_BT, backend)
    if cached_B is None:
        kv = [take_rows(x, index_BK, slot_BT, backend) for x in kv]
    out_BKHE, lse_BKH = sqsk_attention(q_BKHE, *kv, first_BK, cached_B, count_B, backend)
    if sinks is not None:
        out_BKHE = add_sinks_ref(out_BKHE, lse_BKH, q_BKHE, *sinks)
    contextual_BTHE = take_rows(out_BKHE, slot_BT, index_BK, backend)
    return reflexive_BTHE + contextual_BTHE * gate_BT[..., None, None].to(contextual_BTHE.dtype)


def swiglu(x_BTD, gate_weight_ND, up_weight_ND, backend):
    """See `swiglu_ref`; the kernel where it is the faster one, see `swiglu_fits`."""
    if backend == "triton" and swiglu_fits(x_BTD, gate_weight_ND, up_weight_ND):
        return swiglu_kernel(x_BTD, gate_weight_ND, up_weight_ND)
    return swiglu_ref(x_BTD, gate_weight_ND, up_weight_ND)


def linear_add(residual_BTN, x_BTD, weight_ND, backend):
    """See `linear_add_ref`; the kernel adds in place."""
    if backend != "triton":
        return linear_add_ref(residual_BTN, x_BTD, weight_ND)
    linear_add_kernel(residual_BTN, x_BTD, weight_ND)
    return residual_BTN
