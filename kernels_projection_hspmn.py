"""From the shared projection to what the attentions read: convolution, feature map, norms and RoPE in one pass.

Meaning and shapes: `split_heads_ref` in `reference_hspmn`; legend in `kernels_common_hspmn`.
"""

import torch

from .kernels_common_hspmn import (
    DTYPES,
    HEAD_WIDTHS,
    check_in_place,
    dependent,
    operation,
    processors,
    rows_of,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error

MODES = ("gated", "elu")


@triton.jit
def convolve(
    x, history, weight, i, t, first, channel, t_begin, T,
    C: tl.constexpr, TAPS: tl.constexpr, CHANNEL_STEP: tl.constexpr, TAP_STEP: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """Causal convolution of tokens `t` [M] and channels `channel` [N] in float32; nothing before `first` is read.

    x points at token t_begin of the row, i = t - t_begin; history points at the token TAPS - 1 before the row's first.
    """
    in_t = t < T
    tile = tl.load(x + i[:, None] * C + channel[None, :], mask=in_t[:, None], other=0.0).to(tl.float32)
    if TAPS > 1:
        weight += channel * CHANNEL_STEP
        tile *= tl.load(weight + (TAPS - 1) * TAP_STEP).to(tl.float32)[None, :]
        for lag in tl.static_range(1, TAPS):
            seen = in_t & (t - lag >= tl.maximum(first, 0))
            past = tl.load(x + (i - lag)[:, None] * C + channel[None, :], mask=seen[:, None], other=0.0)
            tile += past.to(tl.float32) * tl.load(weight + (TAPS - 1 - lag) * TAP_STEP).to(tl.float32)[None, :]
        if HAS_HISTORY:
            if t_begin < TAPS - 1:
                for lag in tl.static_range(1, TAPS):
                    held = in_t & (t < lag) & (t - lag >= first)
                    at = (TAPS - 1 + t - lag)[:, None] * C + channel[None, :]
                    earlier = tl.load(history + at, mask=held[:, None], other=0.0).to(tl.float32)
                    tile += earlier * tl.load(weight + (TAPS - 1 - lag) * TAP_STEP).to(tl.float32)[None, :]
    return tile


@triton.jit
def feature_map(low, high, ELU: tl.constexpr):
    """What the linear attention reads, of both halves of a head: elu + 1, or SiLU divided by its length."""
    if ELU:
        low = tl.where(low > 0, low + 1.0, tl.exp(tl.minimum(low, 0.0)))
        high = tl.where(high > 0, high + 1.0, tl.exp(tl.minimum(high, 0.0)))
    else:
        low, high = low / (1.0 + tl.exp(-low)), high / (1.0 + tl.exp(-high))
        # A length below 1e-12 counts as 1e-12, as in F.normalize
        scale = tl.rsqrt(tl.maximum(tl.sum(low * low + high * high, 1), 1e-24))[:, None]
        low, high = low * scale, high * scale
    return low, high


@triton.jit
def store_halves(out, at, low, high, in_t, HALF: tl.constexpr):
    """Both halves of a head's rows, in the dtype of `out`."""
    tl.store(out + at, low.to(out.dtype.element_ty), mask=in_t[:, None])
    tl.store(out + at + HALF, high.to(out.dtype.element_ty), mask=in_t[:, None])


@triton.jit
def store_query_or_key(
    low, high, norm, cos, sin, linear, rotated, at, i, e, in_t,
    E: tl.constexpr, EPS: tl.constexpr, ELU: tl.constexpr,
):  # fmt: skip
    """The two forms of one query or key head, given as halves: for the linear attention, and normalised with RoPE."""
    HALF: tl.constexpr = E // 2
    feature_low, feature_high = feature_map(low, high, ELU)
    store_halves(linear, at, feature_low, feature_high, in_t, HALF)
    scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / E + EPS)[:, None]
    low = low * scale * tl.load(norm + e).to(tl.float32)[None, :]
    high = high * scale * tl.load(norm + HALF + e).to(tl.float32)[None, :]
    table_at, in_table = i[:, None] * E + e[None, :], in_t[:, None]
    cos_low = tl.load(cos + table_at, mask=in_table, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + table_at, mask=in_table, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + table_at + HALF, mask=in_table, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + table_at + HALF, mask=in_table, other=0.0).to(tl.float32)
    store_halves(rotated, at, low * cos_low - high * sin_low, high * cos_high + low * sin_high, in_t, HALF)


@triton.jit
def push_history(x, history, channel, C: tl.constexpr, TAPS: tl.constexpr):
    """Drop the oldest of the TAPS - 1 tokens of a row's history, for some channels, and append the token at `x`."""
    for i in tl.static_range(0, TAPS - 2):
        tl.store(history + i * C + channel, tl.load(history + (i + 1) * C + channel))
    newest = tl.load(x + channel).to(history.dtype.element_ty)
    tl.store(history + (TAPS - 2) * C + channel, newest)


@triton.jit(do_not_specialize=["T"])
def split_heads_kernel(
    x, weight, history, start, length, cos, sin, q_norm, k_norm, q_linear, k_linear, q_rotated, k_rotated, v, T,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, TAPS: tl.constexpr,
    CHANNEL_STEP: tl.constexpr, TAP_STEP: tl.constexpr, EPS: tl.constexpr, ELU: tl.constexpr,
    ONE_TABLE: tl.constexpr, HAS_START: tl.constexpr, HAS_HISTORY: tl.constexpr, HAS_LENGTH: tl.constexpr,
    PUSH: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of HEADS heads out of the H + 2 G of the projection, one head after the other.

    A head is held as two halves, so that RoPE pairs registers of one thread and the norms stay inside a warp. Programs
    that follow each other take the heads of the same tokens, so together they read and write whole rows.
    PUSH: T is 1, and the token enters the history of its channels, which no other program reads, unless its row's
    length is 0.
    """
    ALL: tl.constexpr = H + 2 * G
    HALF: tl.constexpr = E // 2
    units: tl.constexpr = (ALL + HEADS - 1) // HEADS
    tiles = tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0)
    head_begin = program % units * HEADS
    t_begin = program // units % tiles * BLOCK_T
    b = (program // (units * tiles)).to(tl.int64)
    if PDL:  # only with PUSH
        tl.extra.cuda.gdc_wait()
    i = tl.arange(0, BLOCK_T)
    e = tl.arange(0, HALF)
    t = t_begin + i
    in_t = t < T
    row = b * T + t_begin
    first = tl.full([BLOCK_T], 1 - TAPS if HAS_HISTORY else 0, tl.int32)
    if HAS_START:
        begin = tl.load(start + row + i, mask=in_t, other=0)
        first = tl.maximum(first, tl.maximum(begin, 1 - TAPS).to(tl.int32))
    # What is left for the tiles fits 32 bits, which halves the registers that addresses take
    x += row * (ALL * E)
    table = (t_begin.to(tl.int64) if ONE_TABLE else row) * E
    cos, sin = cos + table, sin + table
    if HAS_HISTORY:
        history += b * ((TAPS - 1) * ALL * E)
    q_linear, q_rotated = q_linear + row * (H * E), q_rotated + row * (H * E)
    k_linear, k_rotated, v = k_linear + row * (G * E), k_rotated + row * (G * E), v + row * (G * E)
    q_at = i[:, None] * (H * E) + e[None, :]
    k_at = i[:, None] * (G * E) + e[None, :]
    for head in range(head_begin, tl.minimum(head_begin + HEADS, ALL)):
        low = convolve(
            x, history, weight, i, t, first, head * E + e, t_begin, T,
            ALL * E, TAPS, CHANNEL_STEP, TAP_STEP, HAS_HISTORY,
        )  # fmt: skip
        high = convolve(
            x, history, weight, i, t, first, head * E + HALF + e, t_begin, T,
            ALL * E, TAPS, CHANNEL_STEP, TAP_STEP, HAS_HISTORY,
        )  # fmt: skip
        if head < H:
            store_query_or_key(
                low, high, q_norm, cos, sin, q_linear, q_rotated, q_at + head * E, i, e, in_t, E, EPS, ELU
            )  # fmt: skip
        elif head < H + G:
            store_query_or_key(
                low, high, k_norm, cos, sin, k_linear, k_rotated, k_at + (head - H) * E, i, e, in_t, E, EPS, ELU
            )  # fmt: skip
        else:
            store_halves(v, k_at + (head - H - G) * E, low, high, in_t, HALF)
    if PUSH:
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        tl.debug_barrier()  # every thread has read the history
        real = True
        if HAS_LENGTH:
            real = tl.load(length + b) > 0
        if real:
            for head in range(head_begin, tl.minimum(head_begin + HEADS, ALL)):
                push_history(x, history, head * E + tl.arange(0, E), ALL * E, TAPS)


def split_heads_config(B, T, heads, E, multiprocessors):
    """Block sizes and launch options of `split_heads_kernel` for `heads` = H + 2 G heads in all.

    32 tokens: the taps reach for 3 rows more, under a tenth, which neighbours have in L2. H200, B=64, T=4096, 16/4
    heads, E=128, bf16: 8 heads per program, so that cos and sin come from L2 once and from L1 7 times, and 32 values
    of a head per thread (128 registers) 1.60 ms; 16 values per thread 1.88, held to 64 registers 1.64; 1, 3, 4, 12 or
    24 heads 1.64 to 2.0. While 8 programs per processor are left; else one head per program, the shortest way for one
    token.
    """
    block_t = min(32, triton.next_power_of_2(T))
    enough = B * triton.cdiv(T, block_t) * heads >= 64 * multiprocessors
    warps = min(8, max(1, block_t * E // (1024 if enough else 512)))
    return {"BLOCK_T": block_t, "HEADS": 8 if enough else 1, "num_warps": warps, "num_stages": 1}


def _head_shapes(x_BTC, q_norm_E, kv_heads):
    """Shapes of the query-like and of the key-like outputs."""
    (B, T, C), E = x_BTC.shape, q_norm_E.shape[0]
    return (B, T, C // E - 2 * kv_heads, E), (B, T, kv_heads, E)


def _empty_heads(x_BTC, q_norm_E, kv_heads):
    """The five outputs, not yet written."""
    q_shape, k_shape = _head_shapes(x_BTC, q_norm_E, kv_heads)
    return tuple(x_BTC.new_empty(shape) for shape in (q_shape, k_shape, q_shape, k_shape, k_shape))


def _launch_split(
    x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, eps, mode,
    length_B=None, push=False,
):  # fmt: skip
    outputs = _empty_heads(x_BTC, q_norm_E, kv_heads)
    B, T, H, E = outputs[0].shape
    if x_BTC.numel() == 0:
        return outputs
    config = split_heads_config(B, T, H + 2 * kv_heads, E, processors(x_BTC.device))
    taps = weight_CL.shape[1]
    if T > 16:
        # Taps of neighbouring channels side by side, so that a thread loads 16 bytes of them; no copy if they are
        weight_CL = weight_CL.t().contiguous().t()
    has_history = history_BLC is not None and taps > 1
    history = history_BLC.contiguous() if has_history else None
    one_table = all(table.shape[0] == 1 or table.stride(0) == 0 for table in (cos_BTE, sin_BTE))
    cos, sin = (table[:1].contiguous() if one_table else rows_of(table, B) for table in (cos_BTE, sin_BTE))
    programs = B * triton.cdiv(T, config["BLOCK_T"]) * triton.cdiv(H + 2 * kv_heads, config["HEADS"])
    split_heads_kernel[(programs,)](
        x_BTC.contiguous(), weight_CL, history, rows_of(start_BT, B), rows_of(length_B, B), cos, sin,
        q_norm_E.contiguous(), k_norm_E.contiguous(), *outputs, T,
        H=H, G=kv_heads, E=E, TAPS=taps, CHANNEL_STEP=weight_CL.stride(0), TAP_STEP=weight_CL.stride(1), EPS=eps,
        ELU=mode == "elu", ONE_TABLE=one_table, HAS_START=start_BT is not None, HAS_HISTORY=has_history,
        HAS_LENGTH=length_B is not None, PUSH=push, **config,
        **(dependent(x_BTC.device) if push else {"PDL": False}),
    )  # fmt: skip
    return outputs


@operation("split_heads")
def _split_heads(
    x_BTC: torch.Tensor,
    weight_CL: torch.Tensor,
    history_BLC: torch.Tensor | None,
    start_BT: torch.Tensor | None,
    cos_BTE: torch.Tensor,
    sin_BTE: torch.Tensor,
    q_norm_E: torch.Tensor,
    k_norm_E: torch.Tensor,
    kv_heads: int,
    eps: float,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E)
    return _launch_split(*tensors, kv_heads, eps, mode)


@_split_heads.register_fake
def _(x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, eps, mode):
    return _empty_heads(x_BTC, q_norm_E, kv_heads)


@operation("split_heads_decode", mutates_args=("history_BLC",))
def _split_heads_decode(
    x_BTC: torch.Tensor,
    weight_CL: torch.Tensor,
    history_BLC: torch.Tensor,
    start_BT: torch.Tensor | None,
    length_B: torch.Tensor | None,
    cos_BTE: torch.Tensor,
    sin_BTE: torch.Tensor,
    q_norm_E: torch.Tensor,
    k_norm_E: torch.Tensor,
    kv_heads: int,
    eps: float,
    feature_map: str,  # not `mode`: torch's functionalisation of mutating operators has a parameter of that name
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E)
    return _launch_split(*tensors, kv_heads, eps, feature_map, length_B, push=True)


@_split_heads_decode.register_fake
def _(
    x_BTC, weight_CL, history_BLC, start_BT, length_B, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, eps,
    feature_map,
):  # fmt: skip
    return _empty_heads(x_BTC, q_norm_E, kv_heads)


def _check_split(x_BTC, weight_CL, history_BLC, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, mode):
    (B, T, C), E = x_BTC.shape, q_norm_E.shape[-1]
    if E not in HEAD_WIDTHS:
        raise ValueError(f"head width must be one of {HEAD_WIDTHS}, got {E}; set backend='reference' for others")
    H = C // E - 2 * kv_heads
    if C % E or kv_heads < 1 or H < 1 or H % kv_heads:
        raise ValueError(
            f"x must have (H + 2 * kv_heads) * {E} channels with H a multiple of kv_heads ({kv_heads}), got {C}"
        )
    if x_BTC.dtype not in DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x_BTC.dtype}; cast it")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if weight_CL.dim() != 2 or weight_CL.shape[0] != C or weight_CL.shape[1] < 1:
        raise ValueError(f"weight must be [{C}, taps], got {tuple(weight_CL.shape)}")
    lags = weight_CL.shape[1] - 1
    if history_BLC is not None and history_BLC.shape != (B, lags, C):
        raise ValueError(f"history must hold the {lags} tokens before, {(B, lags, C)}, got {tuple(history_BLC.shape)}")
    for name, table in (("cos", cos_BTE), ("sin", sin_BTE)):
        if table.shape[0] not in (1, B) or table.shape[1:] != (T, E):
            raise ValueError(f"{name} must be [1 or {B}, {T}, {E}], got {tuple(table.shape)}")
    if k_norm_E.shape != q_norm_E.shape or q_norm_E.dim() != 1:
        raise ValueError(f"norm weights must be [{E}], got {tuple(q_norm_E.shape)} and {tuple(k_norm_E.shape)}")


def split_heads(
    x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E, *, kv_heads, eps, mode="gated"
):
    """`split_heads_ref` in one read of `x_BTC` and one write of each output; one small launch for one token.

    x_BTC: float32, bfloat16, float16, C = (H + 2 * kv_heads) * E; E of 16, 32, 64, 128. weight_CL, cos, sin and the
    norm weights: any float dtype, used as they are. history_BLC, start_BT (integers): may be None.
    All arithmetic is float32 and each output is rounded once: the convolution's result is not rounded to x's dtype
    before the norms, as the layers one by one would do.
    Returns contiguous q_linear [B, T, H, E], k_linear [B, T, G, E], q_rotated [B, T, H, E], k_rotated and
    v [B, T, G, E] in x's dtype. Raises ValueError on shapes, dtypes or a mode the kernel does not take.
    """
    _check_split(x_BTC, weight_CL, history_BLC, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, mode)
    return _split_heads(
        x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, eps, mode
    )


def split_heads_decode(
    x_BTC, weight_CL, history_BLC, start_BT, length_B, cos_BTE, sin_BTE, q_norm_E, k_norm_E, *,
    kv_heads, eps, mode="gated",
):  # fmt: skip
    """`split_heads_decode_ref`: `split_heads` of a single token that moves `history_BLC` on IN PLACE.

    history_BLC: contiguous [B, L - 1, C] with L at least 2, any float dtype. length_B: integers or None. The rest, and
    what is returned, as in `split_heads`. Raises ValueError too if T is not 1.
    """
    _check_split(x_BTC, weight_CL, history_BLC, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, mode)
    (B, T, C), lags = x_BTC.shape, weight_CL.shape[1] - 1
    if T != 1 or lags < 1:
        raise ValueError(f"split_heads_decode takes one token and at least two taps, got T={T} and {lags + 1} taps")
    check_in_place("history", history_BLC, (B, lags, C), (history_BLC.dtype,))
    return _split_heads_decode(
        x_BTC, weight_CL, history_BLC, start_BT, length_B, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, eps, mode
    )


__all__ = ["split_heads", "split_heads_decode"]
