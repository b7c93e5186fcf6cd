"""From hidden states to what the streams read: norms, narrow products, convolution, feature map, RoPE in few passes.

Meaning and shapes: `norm_heads`, `split_heads` and `add_norm` in `operations_hspmn`; legend in `kernels_common_hspmn`.
"""

import math
from functools import cache

import torch

from .kernels_common_hspmn import (  # isort: skip
    DTYPES, GAIN, HEAD_WIDTHS, cdiv, check, dependent, from_start, kernel, power_of_2, processors,
    refuse_in_place, softplus, tl, triton,
)  # fmt: skip
from .operations_hspmn import NEAR, add_norm, norm_heads, place, split_heads

CLOSE, TURN = tl.constexpr(NEAR), tl.constexpr(math.tau)
FEATURES = ("gated", "elu")
MOST_HEAD_ROWS = 256  # of `norm_heads`, whose sums of all of them are one tile
# Of the gradient: tokens and heads per program, channels per thread. H200, B=32, T=4096, 16/4 heads, E=128, bf16: 2.15
# ms; 4 heads 2.28, then with 128 tokens 2.22, 8 channels 2.38, 2 channels 5.7
BACK = {"span": 256, "HEADS": 2, "values": 4}
COPIED_TAPS = 65536  # tokens from which on the taps of the convolution are laid out for wide loads


@triton.jit
def convolve(
    x, history, weight, i, t, first, channel, t_begin, T, C: tl.constexpr, TAPS: tl.constexpr,
    CHANNEL_STEP: tl.constexpr, TAP_STEP: tl.constexpr,
):  # fmt: skip
    """Causal convolution of tokens `t` [M] and channels `channel` [N] in float32; nothing before `first` is read.
    x is token t_begin of the row, i = t - t_begin; history is the token TAPS - 1 before the row's first."""
    in_t = t < T
    tile = tl.load(x + i[:, None] * C + channel[None, :], mask=in_t[:, None], other=0.0).to(tl.float32)
    if TAPS > 1:
        weight += channel * CHANNEL_STEP
        tile *= tl.load(weight + (TAPS - 1) * TAP_STEP).to(tl.float32)[None, :]
        for lag in tl.static_range(1, TAPS):
            seen = in_t & (t - lag >= tl.maximum(first, 0))
            past = tl.load(x + (i - lag)[:, None] * C + channel[None, :], mask=seen[:, None], other=0.0)
            tile += past.to(tl.float32) * tl.load(weight + (TAPS - 1 - lag) * TAP_STEP).to(tl.float32)[None, :]
        if history is not None:
            if t_begin < TAPS - 1:
                for lag in tl.static_range(1, TAPS):
                    held = in_t & (t < lag) & (t - lag >= first)
                    at = (TAPS - 1 + t - lag)[:, None] * C + channel[None, :]
                    earlier = tl.load(history + at, mask=held[:, None], other=0.0).to(tl.float32)
                    tile += earlier * tl.load(weight + (TAPS - 1 - lag) * TAP_STEP).to(tl.float32)[None, :]
    return tile


@triton.jit
def store_query_or_key(
    low, high, norm, cos, sin, linear, rotated, at, i, e, in_t, E: tl.constexpr, EPS: tl.constexpr, ELU: tl.constexpr
):
    """The two forms of one query or key head, given as halves: for the linear attention (elu + 1, or SiLU divided by
    its length), and normalised with RoPE."""
    HALF: tl.constexpr = E // 2
    if ELU:
        feature_low = tl.where(low > 0, low + 1.0, tl.exp(tl.minimum(low, 0.0)))
        feature_high = tl.where(high > 0, high + 1.0, tl.exp(tl.minimum(high, 0.0)))
    else:
        feature_low, feature_high = low / (1.0 + tl.exp(-low)), high / (1.0 + tl.exp(-high))
        # A length below 1e-12 counts as 1e-12, as in F.normalize
        squares = tl.sum(feature_low * feature_low + feature_high * feature_high, 1)
        scale = tl.rsqrt(tl.maximum(squares, 1e-24))[:, None]
        feature_low, feature_high = feature_low * scale, feature_high * scale
    tl.store(linear + at, feature_low.to(linear.dtype.element_ty), mask=in_t[:, None])
    tl.store(linear + at + HALF, feature_high.to(linear.dtype.element_ty), mask=in_t[:, None])
    scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / E + EPS)[:, None]
    low = low * scale * tl.load(norm + e).to(tl.float32)[None, :]
    high = high * scale * tl.load(norm + HALF + e).to(tl.float32)[None, :]
    table_at, in_table = i[:, None] * E + e[None, :], in_t[:, None]
    cos_low = tl.load(cos + table_at, mask=in_table, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + table_at, mask=in_table, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + table_at + HALF, mask=in_table, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + table_at + HALF, mask=in_table, other=0.0).to(tl.float32)
    low, high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    tl.store(rotated + at, low.to(rotated.dtype.element_ty), mask=in_table)
    tl.store(rotated + at + HALF, high.to(rotated.dtype.element_ty), mask=in_table)


@triton.jit
def push_history(x, history, channel, stop, C: tl.constexpr, TAPS: tl.constexpr):
    """Move a row's history of TAPS - 1 tokens on by the `stop` tokens (at least 1) from x on, for some channels."""
    for i in tl.static_range(0, TAPS - 1):
        token = stop + i - (TAPS - 1)
        new = tl.load(x + token * C + channel, mask=(channel < C) & (token >= 0), other=0.0)
        old = tl.load(history + (stop + i) * C + channel, mask=(channel < C) & (token < 0), other=0.0)
        tl.store(history + i * C + channel, tl.where(token >= 0, new.to(old.dtype), old))


@kernel("T")
def split_heads_kernel(
    x, weight, history, start, length, cos, sin, q_norm, k_norm, q_linear, k_linear, q_rotated, k_rotated, v, T,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, TAPS: tl.constexpr,
    CHANNEL_STEP: tl.constexpr, TAP_STEP: tl.constexpr, EPS: tl.constexpr, ELU: tl.constexpr,
    ONE_TABLE: tl.constexpr, START: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of HEADS heads out of the H + 2 G of the projection, one head after the other. A head is held as
    two halves, so that RoPE pairs registers of one thread and the norms stay inside a warp. Programs that follow each
    other take the heads of the same tokens, so together they read and write whole rows. The programs of a row's first
    tokens, which alone read the history of their channels, move it on at their end."""
    ALL: tl.constexpr = H + 2 * G
    C: tl.constexpr = ALL * E
    HALF: tl.constexpr = E // 2
    units: tl.constexpr = (ALL + HEADS - 1) // HEADS
    tiles = tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0)
    head_begin = program % units * HEADS
    t_begin = program // units % tiles * BLOCK_T
    b = (program // (units * tiles)).to(tl.int64)
    if PDL:  # of a single token
        tl.extra.cuda.gdc_wait()
    i, e = tl.arange(0, BLOCK_T), tl.arange(0, HALF)
    t = t_begin + i
    in_t = t < T
    row = b * T + t_begin
    first = tl.full([BLOCK_T], 0 if history is None else 1 - TAPS, tl.int32)
    first = from_start(first, start, b, row + i, in_t, 1 - TAPS, START)
    # What is left for the tiles fits 32 bits, which halves the registers that addresses take
    x += row * C
    table = (t_begin.to(tl.int64) if ONE_TABLE else row) * E
    cos, sin = cos + table, sin + table
    if history is not None:
        history += b * ((TAPS - 1) * C)
    q_linear, q_rotated = q_linear + row * (H * E), q_rotated + row * (H * E)
    k_linear, k_rotated, v = k_linear + row * (G * E), k_rotated + row * (G * E), v + row * (G * E)
    q_at = i[:, None] * (H * E) + e[None, :]
    k_at = i[:, None] * (G * E) + e[None, :]
    for head in range(head_begin, tl.minimum(head_begin + HEADS, ALL)):
        channel, upper = head * E + e, head * E + HALF + e
        low = convolve(x, history, weight, i, t, first, channel, t_begin, T, C, TAPS, CHANNEL_STEP, TAP_STEP)
        high = convolve(x, history, weight, i, t, first, upper, t_begin, T, C, TAPS, CHANNEL_STEP, TAP_STEP)
        if head < H:
            at = q_at + head * E
            store_query_or_key(low, high, q_norm, cos, sin, q_linear, q_rotated, at, i, e, in_t, E, EPS, ELU)
        elif head < H + G:
            at = k_at + (head - H) * E
            store_query_or_key(low, high, k_norm, cos, sin, k_linear, k_rotated, at, i, e, in_t, E, EPS, ELU)
        else:
            at = k_at + (head - H - G) * E
            tl.store(v + at, low.to(v.dtype.element_ty), mask=in_t[:, None])
            tl.store(v + at + HALF, high.to(v.dtype.element_ty), mask=in_t[:, None])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if history is not None:
        if t_begin == 0:
            tl.debug_barrier()  # every thread has read the history
            stop = T if length is None else tl.minimum(tl.load(length + b).to(tl.int32), T)
            if stop > 0:
                for head in range(head_begin, tl.minimum(head_begin + HEADS, ALL)):
                    push_history(x, history, head * E + tl.arange(0, E), stop, ALL * E, TAPS)


@triton.jit
def go_back(
    grad_linear, grad_rotated, norm, x, weight, start, cos, sin, grad_x, sums, b, t_begin, t_end, T, head, channel,
    HEADS: tl.constexpr, E: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr, ELU: tl.constexpr,
    ONE_TABLE: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Gradients wrt the tokens t_begin .. t_end - 1 of some heads of one kind, which has HEADS; into `sums` those wrt
    the taps and the norm. Values have `grad_linear` alone. From the last token to the first, so that what a token owes
    to the TAPS - 1 before it is carried: nothing is shifted within a tile, and each x is read once."""
    HALF: tl.constexpr = E // 2
    row = b * T + t_begin
    # What is left for the tiles fits 32 bits, which halves the registers that addresses take
    x, grad_x = x + row * C, grad_x + row * C
    grad_linear += row * (HEADS * E)
    e = tl.broadcast_to(tl.arange(0, E)[None, :], channel.shape)
    if norm is not None:
        grad_rotated += row * (HEADS * E)
        table = (t_begin.to(tl.int64) if ONE_TABLE else row) * E
        cos, sin = cos + table, sin + table
        other, sign = (e + HALF) % E, tl.where(e < HALF, 1.0, -1.0)
        factor, sum_of_norm = tl.load(norm + e).to(tl.float32), tl.zeros(channel.shape, tl.float32)
    steps = tl.minimum(t_end + TAPS - 1, T) - t_begin
    taps, taps_sums, xs, owed = (), (), (), ()
    for lag in tl.static_range(TAPS):
        taps += (tl.load(weight + channel * TAPS + (TAPS - 1 - lag)).to(tl.float32),)
        taps_sums += (tl.zeros(channel.shape, tl.float32),)
    for lag in tl.static_range(TAPS - 1):
        i = steps - 1 - lag
        xs += (tl.load(x + i * C + channel, mask=t_begin + i >= 0, other=0.0).to(tl.float32),)
        owed += (tl.zeros(channel.shape, tl.float32),)
    for step in range(steps):
        i = steps - 1 - step
        t, at = t_begin + i, (i * HEADS + head) * E
        earliest = i - (TAPS - 1)
        xs += (tl.load(x + earliest * C + channel, mask=t_begin + earliest >= 0, other=0.0).to(tl.float32),)
        first = from_start(0, start, b, row + i, True, 0, START)
        seen = (xs[0],)
        for lag in tl.static_range(1, TAPS):
            seen += (tl.where(t - lag >= first, xs[lag], 0.0) if START else xs[lag],)
        d = tl.load(grad_linear + at + e).to(tl.float32)
        if norm is not None:
            y = seen[0] * taps[0]
            for lag in tl.static_range(1, TAPS):
                y += seen[lag] * taps[lag]
            if ELU:
                d *= tl.where(y > 0, 1.0, tl.exp(tl.minimum(y, 0.0)))
            else:  # silu over its length, which is a constant where it counts as 1e-12
                gate = 1.0 / (1.0 + tl.exp(-y))
                silu = y * gate
                squares = tl.sum(silu * silu, 1)[:, None]
                scale = tl.rsqrt(tl.maximum(squares, 1e-24))
                silu *= scale
                along = tl.where(squares > 1e-24, tl.sum(d * silu, 1)[:, None], 0.0)
                d = (d - silu * along) * scale * (gate + y * gate * (1.0 - gate))
            turned = tl.load(grad_rotated + at + e).to(tl.float32) * tl.load(cos + i * E + e).to(tl.float32)
            over = tl.load(grad_rotated + at + other).to(tl.float32) * tl.load(sin + i * E + other).to(tl.float32)
            turned += over * sign
            scale = tl.rsqrt(tl.sum(y * y, 1) / E + EPS)[:, None]
            y *= scale
            sum_of_norm += tl.where(t < t_end, turned * y, 0.0)
            turned *= factor
            d += (turned - y * (tl.sum(turned * y, 1) / E)[:, None]) * scale
        tl.store(grad_x + i * C + channel, (d * taps[0] + owed[0]).to(grad_x.dtype.element_ty), mask=t < t_end)
        own = tl.where(t < t_end, d, 0.0)  # tokens past these are counted by the next program
        still_owed, new_sums = (), (taps_sums[0] + own * xs[0],)
        for lag in tl.static_range(1, TAPS):
            d_seen = tl.where(t - lag >= first, d, 0.0) if START else d
            still_owed += (d_seen * taps[lag] + (owed[lag] if lag < TAPS - 1 else 0.0),)
            new_sums += (taps_sums[lag] + own * seen[lag],)
        taps_sums, owed, xs = new_sums, still_owed, xs[1:]
    for lag in tl.static_range(TAPS):
        tl.store(sums + (TAPS - 1 - lag) * C + channel, taps_sums[lag])
    if norm is not None:
        tl.store(sums + TAPS * C + channel, sum_of_norm)


@kernel("T", "span")
def split_heads_back_kernel(
    grad_q_linear, grad_k_linear, grad_q, grad_k, grad_v, x, weight, start, cos, sin, q_norm, k_norm, grad_x, sums, T,
    span, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, TAPS: tl.constexpr, EPS: tl.constexpr,
    ELU: tl.constexpr, ONE_TABLE: tl.constexpr, START: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """`span` tokens of HEADS heads, all of queries, of keys or of values. Programs that follow each other take the
    heads of the same tokens."""
    C: tl.constexpr = (H + 2 * G) * E
    units: tl.constexpr = (H + 2 * G) // HEADS
    spans = tl.cdiv(T, span)
    program = tl.program_id(0)
    begin = program % units * HEADS
    sums += (program // units).to(tl.int64) * ((TAPS + 1) * C)
    t_begin = program // units % spans * span
    t_end = tl.minimum(t_begin + span, T)
    b = (program // (units * spans)).to(tl.int64)
    head = begin + tl.arange(0, HEADS)[:, None]
    channel = head * E + tl.arange(0, E)[None, :]
    if begin < H:
        go_back(
            grad_q_linear, grad_q, q_norm, x, weight, start, cos, sin, grad_x, sums, b, t_begin, t_end, T, head,
            channel, H, E, C, TAPS, EPS, ELU, ONE_TABLE, START,
        )  # fmt: skip
    elif begin < H + G:
        go_back(
            grad_k_linear, grad_k, k_norm, x, weight, start, cos, sin, grad_x, sums, b, t_begin, t_end, T, head - H,
            channel, G, E, C, TAPS, EPS, ELU, ONE_TABLE, START,
        )  # fmt: skip
    else:
        go_back(
            grad_v, None, None, x, weight, start, cos, sin, grad_x, sums, b, t_begin, t_end, T, head - H - G,
            channel, G, E, C, TAPS, EPS, ELU, ONE_TABLE, START,
        )  # fmt: skip


@cache
def _split_plan(shapes, weight_stride, dtype, kv_heads, eps, feature, device):
    """Shapes of query-like and key-like outputs, grid and constants; ValueError for what the kernel does not take."""
    (B, T, C), weight, history, cos, sin, q_norm, k_norm = (None if x is None else tuple(x) for x in shapes)
    E, taps = q_norm[-1], weight[1]
    check((E in HEAD_WIDTHS, f"head width must be one of {HEAD_WIDTHS}, got {E}; set backend='reference' for others"))
    H, lags, heads = C // E - 2 * kv_heads, taps - 1, C // E
    multiple = f"x must have (H + 2 * kv_heads) * {E} channels with H a multiple of kv_heads ({kv_heads}), got {C}"
    past = f"history must hold the {lags} tokens before, {(B, lags, C)}, got {history}"
    check(
        (C % E == 0 and kv_heads >= 1 and H >= 1 and H % max(1, kv_heads) == 0, multiple),
        (dtype in DTYPES, f"x must be float32, bfloat16 or float16, got {dtype}; cast it"),
        (feature in FEATURES, f"feature must be one of {FEATURES}, got {feature!r}"),
        (weight[0] == C and taps >= 1, f"weight must be [{C}, taps], got {weight}"),
        (history is None or history == (B, lags, C), past),
        (k_norm == q_norm == (E,), f"norm weights must be [{E}], got {q_norm} and {k_norm}"),
    )
    for name, (rows, *rest) in (("cos", cos), ("sin", sin)):
        check((rows in (1, B) and rest == [T, E], f"{name} must be [1 or {B}, {T}, {E}], got {(rows, *rest)}"))
    # 32 tokens: the taps reach for 3 rows more, under a tenth, which neighbours have in L2. H200, B=64, T=4096, 16/4
    # heads, E=128, bf16: 8 heads per program, so that cos and sin come from L2 once and from L1 7 times, and 32 values
    # of a head per thread (128 registers) 1.60 ms; 16 values per thread 1.88, held to 64 registers 1.64; 1, 3, 4, 12
    # or 24 heads 1.64 to 2.0. While 8 programs per processor are left; else one head per program, the shortest way
    # for one token
    block_t = min(32, power_of_2(T))
    tiles = B * cdiv(T, block_t)
    enough = tiles * heads >= 64 * processors(device)
    together = 8 if enough else 1
    constants = {
        "H": H, "G": kv_heads, "E": E, "TAPS": taps, "CHANNEL_STEP": weight_stride[0], "TAP_STEP": weight_stride[1],
        "EPS": eps, "ELU": feature == "elu", "BLOCK_T": block_t, "HEADS": together, "num_stages": 1,
        "num_warps": min(8, max(1, block_t * E // (1024 if enough else 512))),
        **(dependent(device) if T == 1 and history is not None else {"PDL": False}),
    }  # fmt: skip
    return (B, T, H, E), (B, T, kv_heads, E), (tiles * cdiv(heads, together),), constants


@split_heads.kernel(strided=("weight_CL", "cos_BTE", "sin_BTE"))
def _split_heads(
    x_BTC, weight_CL, history_BLC, start_BT, length_B, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, eps, feature
):
    """All arithmetic is float32, and each output is rounded once: the convolution's result is not rounded to x's
    dtype before the norms, as the layers one by one would do."""
    B, T = x_BTC.shape[:2]
    if B * T >= COPIED_TAPS:
        # Taps of neighbouring channels side by side, so that a thread loads 16 bytes of them; no copy if they are
        weight_CL = weight_CL.t().contiguous().t()
    q_shape, k_shape, grid, constants = _split_plan(
        (x_BTC.shape, weight_CL.shape, None if history_BLC is None else history_BLC.shape, cos_BTE.shape,
         sin_BTE.shape, q_norm_E.shape, k_norm_E.shape), weight_CL.stride(), x_BTC.dtype, kv_heads, eps, feature,
        x_BTC.device,
    )  # fmt: skip
    if history_BLC is not None and not history_BLC.is_contiguous():
        refuse_in_place("history", history_BLC, history_BLC.shape, history_BLC.dtype)
    q_linear, k_linear, q = x_BTC.new_empty(q_shape), x_BTC.new_empty(k_shape), x_BTC.new_empty(q_shape)
    outputs = q_linear, k_linear, q, x_BTC.new_empty(k_shape), x_BTC.new_empty(k_shape)
    if x_BTC.numel() == 0:
        return outputs
    one_table = cos_BTE.shape[0] == sin_BTE.shape[0] == 1 or cos_BTE.stride(0) == sin_BTE.stride(0) == 0
    if one_table:
        cos, sin = cos_BTE[:1].contiguous(), sin_BTE[:1].contiguous()
    else:
        cos, sin = cos_BTE.expand(B, -1, -1).contiguous(), sin_BTE.expand(B, -1, -1).contiguous()
    split_heads_kernel[grid](
        x_BTC, weight_CL, history_BLC if constants["TAPS"] > 1 else None, start_BT, length_B, cos, sin, q_norm_E,
        k_norm_E, *outputs, T, ONE_TABLE=one_table, START=0 if start_BT is None else min(2, start_BT.shape[1]),
        **constants,
    )  # fmt: skip
    return outputs


def _trains(
    x_BTC, weight_CL, history_BLC, start_BT, length_B, cos_BTE, sin_BTE, q_norm_E, k_norm_E, kv_heads, eps, feature
):
    """Whether the kernels have the gradient of `split_heads`: not of RoPE's tables, and not without a convolution."""
    asked = cos_BTE.requires_grad or sin_BTE.requires_grad
    return not asked and weight_CL.shape[1] > 1 and x_BTC.dtype in DTYPES and q_norm_E.shape[0] in HEAD_WIDTHS


@cache
def _back_plan(B, T, heads, kv_heads, width, device):
    """Tokens per program, programs per head group and constants of the gradient of `split_heads`."""
    together = math.gcd(kv_heads, BACK["HEADS"])
    units, span = heads // together, BACK["span"]
    # The tokens after a span are computed again, TAPS - 1 of them, and a span has sums of its own: long ones while
    # they are enough for all processors
    while span > 32 and B * cdiv(T, span) * units < 16 * processors(device):
        span //= 2
    return span, units, {"HEADS": together, "num_warps": max(1, together * width // (32 * BACK["values"]))}


@split_heads.gradient(wrt=("x_BTC", "weight_CL", "q_norm_E", "k_norm_E"), takes=_trains)
def _split_heads_back(
    grad_q_linear, grad_k_linear, grad_q, grad_k, grad_v, x_BTC, weight_CL, start_BT, length_B, cos_BTE, sin_BTE,
    q_norm_E, k_norm_E, kv_heads, eps, feature,
):  # fmt: skip
    """One pass: the convolution is computed again from x, in float32. Sums over tokens are those of each program, then
    of all of them in a fixed order."""
    (B, T, C), taps, E = x_BTC.shape, weight_CL.shape[1], q_norm_E.shape[0]
    H = grad_q.shape[2]
    span, units, constants = _back_plan(B, T, C // E, kv_heads, E, x_BTC.device)
    grad_x, programs = torch.empty_like(x_BTC), B * cdiv(T, span)
    sums = x_BTC.new_empty(programs, taps + 1, C, dtype=torch.float32)
    one_table = cos_BTE.shape[0] == sin_BTE.shape[0] == 1
    if not one_table:
        cos_BTE, sin_BTE = cos_BTE.expand(B, -1, -1).contiguous(), sin_BTE.expand(B, -1, -1).contiguous()
    if programs:
        split_heads_back_kernel[(programs * units,)](
            grad_q_linear, grad_k_linear, grad_q, grad_k, grad_v, x_BTC, weight_CL, start_BT, cos_BTE, sin_BTE,
            q_norm_E, k_norm_E, grad_x, sums, T, span, H=H, G=kv_heads, E=E, TAPS=taps, EPS=eps, ELU=feature == "elu",
            ONE_TABLE=one_table, START=0 if start_BT is None else min(2, start_BT.shape[1]), **constants,
        )  # fmt: skip
    total = sums.sum(0)
    q_sum, k_sum = (x.view(-1, E).sum(0) for x in total[taps, : (H + kv_heads) * E].split((H * E, kv_heads * E)))
    weight = total[:taps].t().contiguous().to(weight_CL.dtype)
    return grad_x, weight, q_sum.to(q_norm_E.dtype), k_sum.to(k_norm_E.dtype)


@kernel("M")
def norm_heads_kernel(
    x, head_weight, norm, log_rate, rate_bias, score_weight, h, decay, gate, score, M, least, H: tl.constexpr,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h [M, D], decay and gate [M, H], score [M] of BLOCK_M rows, which are read twice: the second time from L2."""
    X: tl.constexpr = 2 * H
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_X)
    real = (m < M)[:, None]
    squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        rows = tl.load(x + m[:, None] * D + d[None, :], mask=real & (d < D)[None, :], other=0.0).to(tl.float32)
        squares += rows * rows
    scale = tl.rsqrt(tl.sum(squares, 1) / D + EPS)
    total, products = tl.zeros([BLOCK_M, BLOCK_X], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        in_d = (d < D)[None, :]
        rows = tl.load(x + m[:, None] * D + d[None, :], mask=real & in_d, other=0.0)
        factor = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        weights = tl.load(head_weight + n[:, None] * D + d[None, :], mask=(n < X)[:, None] & in_d, other=0.0)
        normed = (rows.to(tl.float32) * scale[:, None] * factor[None, :]).to(rows.dtype)
        tl.store(h + m[:, None] * D + d[None, :], normed, mask=real & in_d)
        total = tl.dot(normed, tl.trans(weights), total, input_precision="tf32x3")
        if score_weight is not None:  # a sum without tensor cores, as in `score_ref`
            score_factor = tl.load(score_weight + d, mask=d < D, other=0.0).to(tl.float32)
            products += normed.to(tl.float32) * score_factor[None, :]
    rate = tl.exp(tl.load(log_rate + n, mask=n < H, other=0.0).to(tl.float32))
    rate_input = total + tl.load(rate_bias + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * H + n[None, :]
    tl.store(decay + at, -rate[None, :] * softplus(rate_input) - least, mask=real & (n < H)[None, :])
    tl.store(gate + at - H, total.to(gate.dtype.element_ty), mask=real & ((n >= H) & (n < X))[None, :])
    if score_weight is not None:
        tl.store(score + m, tl.sum(products, 1) * (GAIN * D**-0.5), mask=m < M)


@kernel("M")
def add_norm_kernel(
    x, y, norm, total, h, M, D: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """total = x + y and h = RMSNorm(total) of BLOCK_M rows [D], each a whole tile row."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at, inside = m[:, None] * D + d[None, :], (m < M)[:, None] & (d < D)[None, :]
    rows = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    rounded = (rows + added).to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    rows = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(rows * rows, 1) / D + EPS)
    factor = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(h + at, (rows * scale[:, None] * factor[None, :]).to(h.dtype.element_ty), mask=inside)


@cache
def _norm_plan(shapes, dtype, head_dtype):
    """Grid and constants of `norm_heads`; ValueError for what the kernel does not take."""
    (B, T, D), head, *vectors = (None if x is None else tuple(x) for x in shapes)
    H, kinds = head[0] // 2, "x and head_weight must share a dtype of float32, bfloat16, float16"
    rows = f"head_weight must be [2 to {MOST_HEAD_ROWS}, {D}], an even number of rows, got {head}"
    check(
        (dtype in DTYPES and head_dtype == dtype, f"{kinds}; got {dtype} and {head_dtype}; cast them"),
        (head[1:] == (D,) and head[0] % 2 == 0 and head[0] >= 2, rows),
    )
    widths = {"norm": (D,), "log_rate": (H,), "rate_bias": (H,), "score_weight": (D,)}
    for (name, wanted), shape in zip(widths.items(), vectors, strict=True):
        check((shape is None or shape == wanted, f"{name} must be {wanted}, got {shape}"))
    # 32 rows of 2048 values on all processors are 17 MB, so that the second reading is from L2
    options = {"BLOCK_M": 32, "BLOCK_D": 128 if dtype.itemsize == 2 else 32, "num_warps": 4, "num_stages": 3}
    return (cdiv(B * T, 32),), {"H": H, "D": D, "BLOCK_X": max(16, power_of_2(2 * H)), **options}


@norm_heads.kernel
def _norm_heads(x_BTD, norm_D, eps, head_weight_XD, log_rate_H, rate_bias_H, least, score_weight_D):
    """One pass over memory; the inputs of the decays are not rounded to x's dtype."""
    (B, T, _), X = x_BTD.shape, head_weight_XD.shape[0]
    if X > MOST_HEAD_ROWS:
        return norm_heads.reference(x_BTD, norm_D, eps, head_weight_XD, log_rate_H, rate_bias_H, least, score_weight_D)
    grid, constants = _norm_plan(
        (x_BTD.shape, head_weight_XD.shape, norm_D.shape, log_rate_H.shape, rate_bias_H.shape,
         None if score_weight_D is None else score_weight_D.shape), x_BTD.dtype, head_weight_XD.dtype,
    )  # fmt: skip
    h_BTD, gate_BTH = torch.empty_like(x_BTD), x_BTD.new_empty(B, T, X // 2)
    decay_BTH = x_BTD.new_empty(B, T, X // 2, dtype=torch.float32)
    score_BT = x_BTD.new_empty(B, 0 if score_weight_D is None else T, dtype=torch.float32)
    if B * T:
        norm_heads_kernel[grid](
            x_BTD, head_weight_XD, norm_D, log_rate_H, rate_bias_H, score_weight_D, h_BTD, decay_BTH, gate_BTH,
            score_BT, B * T, least, EPS=eps, **constants,
        )  # fmt: skip
    return h_BTD, decay_BTH, gate_BTH, score_BT


@cache
def _add_plan(x_shape, y_shape, norm_shape, dtype, y_dtype):
    """Grid, rows and constants of `add_norm`: rows of 4096 values per program, which stay in registers."""
    D = x_shape[-1]
    alike = f"y must be {tuple(x_shape)} in {dtype}, as x is, got {tuple(y_shape)} in {y_dtype}"
    check(
        (y_shape == x_shape and y_dtype == dtype, alike),
        (norm_shape == (D,), f"norm must be [{D}], the width of x, got {tuple(norm_shape)}"),
    )
    rows, block_d = x_shape.numel() // max(D, 1), power_of_2(D)
    block_m = max(1, 4096 // block_d)
    sizes = {"D": D, "BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": max(4, min(32, block_d // 1024))}
    return (cdiv(rows, block_m),), rows, sizes


@add_norm.kernel
def _add_norm(x_BTD, y_BTD, norm_D, eps):
    total_BTD, h_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD)
    grid, rows, constants = _add_plan(x_BTD.shape, y_BTD.shape, norm_D.shape, x_BTD.dtype, y_BTD.dtype)
    if rows:
        add_norm_kernel[grid](x_BTD, y_BTD, norm_D, total_BTD, h_BTD, rows, EPS=eps, **constants)
    return total_BTD, h_BTD


@kernel("T", "POSITION_STEP")
def place_kernel(
    position, document_seen, last_position, frequency, cos, sin, start, places, T, POSITION_STEP, scaling,
    E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Positions of BLOCK_T tokens of a row and their rows of RoPE's tables; the row's start by its first program."""
    b = tl.program_id(1).to(tl.int64)
    t, f = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_F)
    seen = tl.load(document_seen + b)
    at, begun = seen + t, -seen
    if position is not None:
        own = tl.load(position + b * POSITION_STEP)
        token, column = tl.load(last_position + 2 * b), tl.load(last_position + 2 * b + 1)
        at, begun = own + t, tl.where((own == token + 1) | (own == column + 1), begun, 0)
    if tl.program_id(0) == 0:
        tl.store(start + b, begun)
    tl.store(places + b * T + t, at, mask=t < T)
    frequency_row = tl.load(frequency + f, mask=f < E // 2, other=0.0).to(tl.float32)[None, :]
    near = at % CLOSE  # and the rest, which is 0 for all but endless streams, in float64
    turn = tl.full([1, 1], TURN, tl.float64)
    turns = (at - near).to(tl.float64)[:, None] * frequency_row.to(tl.float64) / turn
    angle = near.to(tl.float32)[:, None] * frequency_row + ((turns - tl.floor(turns)) * turn).to(tl.float32)
    inside = (t < T)[:, None] & (f < E // 2)[None, :]
    for half in tl.static_range(2):
        to = (b * T + t)[:, None] * E + half * (E // 2) + f[None, :]
        tl.store(cos + to, (tl.cos(angle) * scaling).to(cos.dtype.element_ty), mask=inside)
        tl.store(sin + to, (tl.sin(angle) * scaling).to(sin.dtype.element_ty), mask=inside)


@place.kernel
def _place(tokens, position_BT, document_seen_B, last_position_B2, frequency_F, scaling, dtype):
    """One launch; compiled code would make each layer's tables anew from what it computed itself."""
    B, E = document_seen_B.shape[0], 2 * frequency_F.shape[0]
    check((position_BT is None or tokens == 1, f"position is of a single token, got {tokens}; pass None"))
    cos_BTE = frequency_F.new_empty(B, tokens, E, dtype=dtype)
    sin_BTE = torch.empty_like(cos_BTE)
    start_BT, place_BT = document_seen_B.new_empty(B, 1), document_seen_B.new_empty(B, tokens)
    if B and tokens:
        step = 1 if position_BT is not None and position_BT.shape[0] > 1 else 0
        block = min(32, power_of_2(tokens))
        place_kernel[(cdiv(tokens, block), B)](
            position_BT, document_seen_B, last_position_B2, frequency_F, cos_BTE, sin_BTE, start_BT, place_BT,
            tokens, step, scaling, E=E, BLOCK_T=block, BLOCK_F=power_of_2(E // 2), num_warps=4,
        )  # fmt: skip
    return cos_BTE, sin_BTE, start_BT, place_BT
