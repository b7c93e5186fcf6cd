"""Linear attention on the GPU: chunks in matrix products, the state in registers.

Meaning and shapes: `linear_attention` in `operations_hspmn`; legend in `kernels_common_hspmn`.
"""

from functools import lru_cache

import torch

from .kernels_common_hspmn import (  # isort: skip
    LOG2E, ROW_START, TOKEN_START, capability, cdiv, check_heads, has_descriptors, kernel, power_of_2,
    processors, takes_heads, tile_maps, tl,
)  # fmt: skip
from .operations_hspmn import linear_attention


@kernel("T")
def decay_kernel(
    log_decay, length, decays, T, H: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """decays[b, h, t]: log2 of the decay from the begin of its block of BLOCK_T tokens through token t.
    Done ahead, for all heads at once: inside the scan it costs each step two exchanges between warps."""
    b = tl.program_id(1).to(tl.int64)
    t, h = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, HEADS)
    stop = T if length is None else tl.minimum(tl.load(length + b).to(tl.int32), T)
    at = (b * T + t)[:, None] * H + h[None, :]
    logs = tl.load(log_decay + at, mask=(t < stop)[:, None] & (h < H)[None, :], other=0.0).to(tl.float32) * LOG2E
    at = (b * H + h)[None, :] * T + t[:, None]
    tl.store(decays + at, tl.cumsum(logs, 0), mask=(t < T)[:, None] & (h < H)[None, :])


@kernel("T", "span", "S")
def linear_attention_kernel(
    q, k, v, x, q_map, k_map, v_map, x_map, decays, start, length, state_in, out, state_out, carry, sums, borders,
    paths, T, span, S, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, F: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BORDER: tl.constexpr, START: tl.constexpr, KEPT: tl.constexpr,
    STATE_ONLY: tl.constexpr, BACK: tl.constexpr, TURNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program walks `span` tokens of one head and one block of value columns; the state [E, F] stays in registers.
    q_map, k_map, v_map, x_map: tensor descriptors of q, k, v, x as [B * T, heads * width], or None; they carry the
    whole blocks.
    STATE_ONLY leaves out the outputs and stores, for segment s, the state that its tokens alone give (state_out) and
    the log2 of the decay over all of them (carry, -inf where a document starts inside).
    BACK walks from the last token to the first, each of which reads itself and those after it: the G heads are q's and
    the H heads those of k and v. TURNED: state_in is [F, E].
    x, of q's heads and v's width, makes sums[block of columns, b, h, t] = x_t . out_t. Sums over many tokens of the
    differences of two such cancel but for the rounding of the states, so every BORDER tokens they start anew, from
    paths[block of columns, b, h, n]: the walk forward leaves its state in borders[b, h, n, F, E], in the products'
    dtype, of which that with BACK makes the product with its own.
    """
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    SUMS: tl.constexpr = sums is not None
    READERS: tl.constexpr = G if BACK else H
    KEYS: tl.constexpr = H if BACK else G
    STEP: tl.constexpr = -BLOCK_T if BACK else BLOCK_T
    program = tl.program_id(0).to(tl.int64)
    block = (program % blocks).to(tl.int32)
    column = block * BLOCK_F
    h, s, b = program // blocks % H, program // (blocks * H) % S, program // (blocks * H) // S
    g, reader = h // (H // KEYS), h // (H // READERS)
    t, e, f = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), column + tl.arange(0, BLOCK_F)
    in_e, in_f = e[None, :] < E, f[None, :] < F
    stop = T if length is None else tl.minimum(tl.load(length + b).to(tl.int32), T)
    begin = (s * span).to(tl.int32)
    end = tl.minimum(begin + span, T)
    stop = tl.minimum(stop, end)
    if STATE_ONLY:  # nothing follows the last segment
        stop = tl.where(s == (0 if BACK else S - 1), begin, stop)
    state_at = f[:, None] * E + e[None, :] if TURNED else e[None, :] * F + f[:, None]
    in_state = (f < F)[:, None] & in_e
    segment = ((b * H + h) * S + s) * E * F
    state = tl.zeros([BLOCK_F, BLOCK_E], tl.float32)
    if state_in is not None:
        state = tl.load(state_in + segment + state_at, mask=in_state, other=0.0).to(tl.float32)
        if START == ROW_START and KEPT:  # of an earlier call, which a document that begins here does not see
            state = tl.where(tl.load(start + b) < 0, state, 0.0)
    # Offsets inside a tile fit 32 bits, which halves the registers that addresses take
    out_at = t[:, None] * (H * F) + f[None, :]
    k_at, q_at = t[:, None] * (KEYS * E) + e[None, :], t[:, None] * (READERS * E) + e[None, :]
    v_at, x_at = t[:, None] * (KEYS * F) + f[None, :], t[:, None] * (READERS * F) + f[None, :]
    sum_decay = 0.0
    decays += (b * H + h) * T
    if SUMS:
        sums += ((block * (tl.num_programs(0) // (blocks * H * S)) + b) * H + h) * T
    whole = begin  # up to here in whole blocks; the rest comes last in time
    if k_map is not None:
        whole = begin + tl.maximum(stop - begin, 0) // BLOCK_T * BLOCK_T
    for WHOLE in tl.static_range(0 if BACK else 1, 2 if BACK else -1, 1 if BACK else -1):
        low, high = begin if WHOLE else whole, whole if WHOLE else stop
        if k_map is not None or not WHOLE:
            last = low + (tl.maximum(high - low + BLOCK_T - 1, 0) // BLOCK_T - 1) * BLOCK_T
            one, past = last if BACK else low, low - 1 if BACK else high
            total = tl.load(decays + tl.maximum(tl.minimum(one + BLOCK_T, end) - 1, begin))
            ready = tl.zeros([BLOCK_T, BLOCK_F], q.dtype.element_ty)
            for c in tl.range(one, past, STEP, num_stages=STAGES if WHOLE or k_map is None else 1):
                row = b * T + c
                real = c + t < stop
                # What needs no load comes first, the last step's store too: it hides the wait for this step's loads
                if WHOLE and not STATE_ONLY:
                    tl.store(out + ((row - STEP) * H + h) * F + out_at, ready, mask=(c != one) & in_f)
                if SUMS:
                    edge = c + BLOCK_T if BACK else c
                    if (edge % BORDER == 0) & (edge < T):
                        n, count = edge // BORDER, (T + BORDER - 1) // BORDER
                        at = borders + ((b * H + h) * count + n) * E * F + f[:, None] * E + e[None, :]
                        if BACK:
                            product = tl.sum(state * tl.load(at, mask=in_state, other=0.0).to(tl.float32))
                            rows = tl.num_programs(0) // (blocks * S)
                            tl.store(paths + (block.to(tl.int64) * rows + b * H + h) * count + n, product)
                        else:
                            tl.store(at, state.to(borders.dtype.element_ty), mask=in_state)
                held, kept = state.to(k.dtype.element_ty), total
                if START == TOKEN_START:
                    last_first = tl.load(start + b * T + tl.minimum(c + BLOCK_T, stop) - 1).to(tl.int32)
                    kept = tl.where(last_first < c, total, float("-inf"))
                state *= tl.exp2(kept)
                sum_decay += kept
                # One step ahead, because the compiler does not prefetch a scalar
                after = tl.load(decays + tl.maximum(tl.minimum(c + STEP + BLOCK_T, end) - 1, begin))
                if WHOLE:
                    decay = tl.load(decays + c + t)
                    k_tile = k_map.load([row.to(tl.int32), (g * E).to(tl.int32)])
                    v_tile = v_map.load([row.to(tl.int32), (g * F).to(tl.int32) + column])
                else:
                    decay = tl.load(decays + c + t, mask=c + t < end, other=0.0)
                    k_tile = tl.load(k + (row * KEYS + g) * E + k_at, mask=real[:, None] & in_e, other=0.0)
                    v_tile = tl.load(v + (row * KEYS + g) * F + v_at, mask=real[:, None] & in_f, other=0.0)
                to_end, from_begin = tl.exp2(total - decay), tl.exp2(decay)
                visible = t[:, None] <= t[None, :] if BACK else t[:, None] >= t[None, :]
                if START == TOKEN_START:
                    first = tl.load(start + row + t, mask=None if WHOLE else real).to(tl.int32)
                    to_end = tl.where(c + t >= last_first, to_end, 0.0)
                    from_begin = tl.where(first < c, from_begin, 0.0)
                    earlier = c + t[:, None] >= first[None, :] if BACK else c + t[None, :] >= first[:, None]
                    visible = visible & earlier
                entering, leaving = (from_begin, to_end) if BACK else (to_end, from_begin)
                total = after
                if not STATE_ONLY:
                    if WHOLE:
                        q_tile = q_map.load([row.to(tl.int32), (reader * E).to(tl.int32)])
                    else:
                        q_tile = tl.load(q + (row * READERS + reader) * E + q_at, mask=real[:, None] & in_e, other=0.0)
                    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
                    # The mask goes into the exponent: where it hides the difference is positive and may overflow
                    over = decay[None, :] - decay[:, None] if BACK else decay[:, None] - decay[None, :]
                    weight = tl.exp2(tl.where(visible, over, float("-inf")))
                    tile = tl.dot(q_tile, tl.trans(held), input_precision="tf32x3")
                    if SUMS:
                        if WHOLE:
                            x_tile = x_map.load([row.to(tl.int32), (reader * F).to(tl.int32) + column])
                        else:
                            at = x + (row * READERS + reader) * F + x_at
                            x_tile = tl.load(at, mask=real[:, None] & in_f, other=0.0)
                    tile = tile * leaving[:, None]
                    tile = tl.dot((scores * weight).to(v_tile.dtype), v_tile, tile, input_precision="tf32x3")
                    if SUMS:
                        tl.store(sums + c + t, tl.sum(x_tile.to(tl.float32) * tile, 1), mask=real)
                    ready = tile.to(q.dtype.element_ty)
                    if not WHOLE:
                        tl.store(out + (row * H + h) * F + out_at, ready, mask=real[:, None] & in_f)
                v_scaled = (tl.trans(v_tile) * entering[None, :]).to(v_tile.dtype)
                state = tl.dot(v_scaled, k_tile, state, input_precision="tf32x3")
            if WHOLE and not STATE_ONLY:
                row = b * T + (begin if BACK else last)
                tl.store(out + (row * H + h) * F + out_at, ready, mask=(high > low) & in_f)
    if STATE_ONLY:
        tl.store(state_out + segment + state_at, state, mask=in_state)
        if block == 0:
            tl.store(carry + (b * H + h) * S + s, sum_decay)
    else:
        # Tokens past the length give zeros: nothing reads them, but they must be finite
        for c in range(tl.maximum(stop, begin), end, BLOCK_T):
            empty = tl.zeros([BLOCK_T, BLOCK_F], out.dtype.element_ty)
            tl.store(out + ((b * T + c) * H + h) * F + out_at, empty, mask=(c + t < end)[:, None] & in_f)
        if state_out is not None:
            if s == S - 1:
                tl.store(state_out + (b * H + h) * E * F + state_at, state, mask=in_state)


@kernel("S")
def segment_states_kernel(
    state_in, start, states, carry, S, H: tl.constexpr, X: tl.constexpr, BLOCK_X: tl.constexpr, START: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """Replace, in place, what each segment adds to the state by the state before that segment, or after it with BACK;
    X = E * F."""
    row = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    in_x = x < X
    state = tl.zeros([BLOCK_X], tl.float32)
    if state_in is not None:
        state = tl.load(state_in + row * X + x, mask=in_x, other=0.0).to(tl.float32)
        if START == ROW_START:
            state = tl.where(tl.load(start + row // H) < 0, state, 0.0)
    for i in range(S):
        s = S - 1 - i if BACK else i
        at = states + (row * S + s) * X + x
        added = tl.load(at, mask=in_x & (i < S - 1), other=0.0)
        keep = tl.exp2(tl.load(carry + row * S + s, mask=i < S - 1, other=0.0))
        tl.store(at, state, mask=in_x)
        state = state * keep + added


@kernel("T")
def decay_gradient_kernel(
    q_sums, k_sums, paths, start, length, out, T, H: tl.constexpr, PARTS: tl.constexpr, BORDER: tl.constexpr,
    BLOCK_T: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Gradient of the log-decay of token t: how much all paths from before it to itself or after count. Those that
    pass t + 1 instead lack the ones that end at t (q . dq), but not those that begin there (k . dk).
    q_sums, k_sums: [PARTS, B, H, T], to be summed; paths: [PARTS, B, H, N], those into each span of BORDER tokens."""
    row, rows, n = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64), tl.program_id(1)
    h, b, end = row % H, row // H, (n + 1) * BORDER
    t = tl.arange(0, BLOCK_T)
    stop = T if length is None else tl.minimum(tl.load(length + b).to(tl.int32), T)
    carry = 0.0
    for part in tl.static_range(PARTS):
        carry += tl.load(paths + (part * rows + row) * tl.num_programs(1) + n + 1, mask=end < stop, other=0.0)
    for i in range(BORDER // BLOCK_T):
        c = end - (i + 1) * BLOCK_T
        real = c + t < stop
        ends = tl.zeros([BLOCK_T], tl.float32)
        for part in tl.static_range(PARTS):
            at = (part * rows + row) * T + c + t
            ends += tl.load(q_sums + at, mask=real, other=0.0) - tl.load(k_sums + at, mask=real, other=0.0)
        follows, reaches, starts = t[:, None] <= t[None, :], t >= 0, c + t == 0
        if START == TOKEN_START:
            first = tl.load(start + b * T + c + t, mask=real, other=0).to(tl.int32)
            after = c + BLOCK_T
            next_first = tl.load(start + b * T + after, mask=after < stop, other=0).to(tl.int32)
            follows = follows & (first[None, :] <= c + t[:, None])
            reaches, starts = next_first <= c + t, starts | (first >= c + t)
        passing = tl.sum(tl.where(follows, ends[None, :], 0.0), 1) + tl.where(reaches, carry, 0.0)
        carry = tl.sum(tl.where(t == 0, passing, 0.0))
        # Nothing precedes a document's first token; the sum is zero but for rounding errors
        tl.store(out + (b * T + c + t) * H + h, tl.where(real & ~starts, passing, 0.0), mask=c + t < T)


@kernel("N")
def sum_heads_kernel(x, out, N, R: tl.constexpr, X: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr):
    """out[n, x], of N rows: the sum of x[n, r, x] over the R query heads of a key head, made in float32."""
    n, i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_X)
    real = (n < N)[:, None] & (i < X)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_X], tl.float32)
    for r in tl.static_range(R):
        total += tl.load(x + (n * R + r)[:, None] * X + i[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(out + n[:, None] * X + i[None, :], total, mask=real)


def _segments(programs, T, device):
    """Into how many segments a row is cut: one where whole rows fill the chip, else about eight programs each.
    H200, B=1, T=335,872, 16/4 heads, E=128: 33 segments (the result) 2.49 ms, 16 segments 2.62, 8 segments 2.60."""
    fill = processors(device)
    if programs >= 1.5 * fill or T <= 1024:
        return 1
    return max(1, min(8 * fill // programs, cdiv(T, 512)))


def _tiling(tokens, H, G, E, F, device, element_size, wide=False, sums=False):
    """Constants of a walk over B * T = `tokens`, and whether its tiles come through descriptors. wide: whether any
    walk over blocks of the same tokens is over heads wider than 128. sums: whether it makes sums."""
    # H200, B=64, T=4096, 16/4 heads, E=F=128, bf16: 64 tokens and 64 columns 1.40 ms with descriptors, 1.73 without;
    # three stages (one program per processor instead of two) 1.87; 128 columns with 8 warps 2.02; 128 by 128 1.99. On
    # sm_80 and sm_120, whose products keep their operands in registers, 4 warps spill, and on sm_100 where there are
    # sums or no descriptors; so do float32 tiles of more than 16 tokens or, with sums, 32 columns, and those of 64
    # tokens of a head wider than 128 (compiler's report, not timed)
    half, columns, block_e, chip = element_size == 2, power_of_2(F), max(16, power_of_2(E)), capability(device)
    narrow = E > 128 or (sums and not half)
    block_t, block_f = (32 if wide else 64) if half else 16, max(16, min(32 if narrow else 64, columns))
    # A tile of columns must not reach into the next head
    fits = E == block_e and F % block_f == 0 and tokens >= block_t
    tiled, stages = has_descriptors(device, element_size) and fits, 2 if half else 1
    few_warps = half and not wide and (E * columns <= 64 * 64 or chip == 90 or (chip == 100 and tiled and not sums))
    # Error of the decay's gradient in bf16, T from 1100 to 4096, made on a CPU: borders every 128 tokens 0.9 to 1.6
    # times that of eager autograd, every 256 up to 2.3 times. In float32 the reference's sums are over 64 tokens
    sizes = {
        "H": H, "G": G, "E": E, "F": F, "BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_F": block_f,
        "BORDER": 128 if half else 64, "STAGES": stages, "num_warps": 4 if few_warps else 8, "num_stages": stages,
    }  # fmt: skip
    return sizes, tiled


@lru_cache(maxsize=1024)
def _plan(q_shape, k_shape, v_shape, dtypes, device, element_size, state):
    """Segments, tokens of each, grids and constants of the decays, whether tiles come through descriptors, and grid
    and constants; `state`: shape, dtype and contiguity of the state that is written in place, or None."""
    check_heads(q_shape, k_shape, v_shape, *dtypes)
    (B, T, H, E), (G, F) = q_shape, v_shape[2:]
    wanted = ((B, H, E, F), torch.float32, True)
    if state not in (None, wanted):
        got = f"{state[1]} {tuple(state[0])}, contiguous={state[2]}"
        raise ValueError(f"state must be contiguous float32 {wanted[0]} to be updated in place, got {got}")
    sizes, tiled = _tiling(B * T, H, G, E, F, device, element_size)
    sizes |= {"BACK": False, "TURNED": False}
    block_t, blocks = sizes["BLOCK_T"], cdiv(F, sizes["BLOCK_F"])
    span = cdiv(cdiv(T, _segments(B * H * blocks, T, device)), block_t) * block_t
    S = cdiv(T, span)
    grid, decay = (B * H * S * blocks,), {"H": H, "HEADS": power_of_2(H), "BLOCK_T": block_t, "num_warps": 4}
    return S, span, (cdiv(T, block_t), B), decay, tiled, grid, sizes


@linear_attention.kernel
def _linear_attention(q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, length_B, state_BHEF):
    """One pass over the tokens, over k and v two if a row is cut; tokens past `length_B` give zeros. Products are of
    q's dtype, sums and states float32."""
    (B, T, H, E), (G, F) = q_BTHE.shape, v_BTGF.shape[2:]
    q, k, v, state = q_BTHE, k_BTGE, v_BTGF, state_BHEF
    S, span, decay_grid, decay, tiled, grid, sizes = _plan(
        q.shape, k.shape, v.shape, (q.dtype, k.dtype, v.dtype), q.device, q.element_size(),
        None if state is None else (state.shape, state.dtype, state.is_contiguous()),
    )  # fmt: skip
    out_BTHF = q.new_empty(B, T, H, F)
    if not out_BTHF.numel():
        return out_BTHF
    mode, maps = 0 if start_BT is None else min(2, start_BT.shape[1]), (None, None, None)
    if tiled:
        block_t, block_f = sizes["BLOCK_T"], sizes["BLOCK_F"]
        maps = tile_maps(
            (q, (B * T, H * E), (H * E, 1), (block_t, E)), (k, (B * T, G * E), (G * E, 1), (block_t, E)),
            (v, (B * T, G * F), (G * F, 1), (block_t, block_f)),
        )  # fmt: skip
    decays = q.new_empty(B, H, T, dtype=torch.float32)
    decay_kernel[decay_grid](log_decay_BTH, length_B, decays, T, **decay)
    before, inputs = state, (q, k, v, None, *maps, None, decays, start_BT, length_B)
    last = q.new_empty(B, H, E, F, dtype=torch.float32) if state is None else state
    if S > 1:
        before = q.new_empty(B, H, S, E, F, dtype=torch.float32)
        carry = q.new_empty(B, H, S, dtype=torch.float32)
        linear_attention_kernel[grid](
            *inputs, None, None, before, carry, None, None, None, T, span, S, START=mode, KEPT=False, STATE_ONLY=True,
            **sizes,
        )  # fmt: skip
        segment_states_kernel[(B * H, cdiv(E * F, 1024))](
            state, start_BT, before, carry, S, H=H, X=E * F, BLOCK_X=1024, START=mode, BACK=False, num_warps=4
        )
    linear_attention_kernel[grid](
        *inputs, before, out_BTHF, last, None, None, None, None, T, span, S, START=mode, KEPT=S == 1,
        STATE_ONLY=False, **sizes,
    )  # fmt: skip
    return out_BTHF


@lru_cache(maxsize=1024)
def _gradient_plan(q_shape, v_shape, device, element_size):
    """Segments, tokens of each, the walks that give the gradients of q, k and v (constants, whether tiles come through
    descriptors, and grid), and the constants of the other kernels."""
    (B, T, H, E), (G, F), walks = q_shape, v_shape[2:], []
    for i, widths in enumerate(((F, E), (F, E), (E, F))):
        sizes, tiled = _tiling(B * T, H, G, *widths, device, element_size, F > 128, i < 2)
        # H200, B=32, T=4096, ms by one and by two stages: q 1.49, 1.22; k 1.69, 1.81; v 1.13, .85. In all, before
        # borders were kept: 32 columns 7 % more, 128 columns 20 %, 8 warps 50 %
        stages = 2 if element_size == 2 and i != 1 else 1
        sizes |= {"BACK": i > 0, "TURNED": i == 2, "STAGES": stages, "num_stages": stages}
        walks.append((sizes, tiled, B * H * cdiv(widths[1], sizes["BLOCK_F"])))
    block_t, blocks, border = walks[0][0]["BLOCK_T"], cdiv(E, walks[0][0]["BLOCK_F"]), walks[0][0]["BORDER"]
    span = cdiv(cdiv(T, _segments(walks[0][2], T, device)), block_t) * block_t
    S, heads = cdiv(T, span), {"H": H, "num_warps": 4}
    walks = [(sizes, tiled, (S * programs,)) for sizes, tiled, programs in walks]
    decay, scan = heads | {"HEADS": power_of_2(H), "BLOCK_T": block_t}, heads | {"X": E * F, "BLOCK_X": 1024}
    last = heads | {"PARTS": blocks, "BORDER": border, "BLOCK_T": 64}
    return S, span, walks, decay, scan, last


def _takes(q_BTHE, k_BTGE, v_BTGF, *_):
    """Whether the gradient has kernels: those of float32 values wider than 128 would spill 5 KB per thread."""
    return takes_heads(q_BTHE, k_BTGE, v_BTGF) and (v_BTGF.shape[3] <= 128 or q_BTHE.dtype != torch.float32)


@linear_attention.gradient(wrt=("q_BTHE", "k_BTGE", "v_BTGF", "log_decay_BTH"), takes=_takes)
def _linear_attention_back(grad_BTHF, q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, length_B):
    """Each of q, k and v has for its gradient a linear attention among the others and that of the output: dq reads, as
    the output does, states of the tokens before, dk and dv those of the tokens after. Keys and values have the sum of
    the gradients by all query heads, each of which is rounded to their dtype."""
    (B, T, H, E), (G, F), q, k, v = q_BTHE.shape, v_BTGF.shape[2:], q_BTHE, k_BTGE, v_BTGF
    if not q.numel() or not v.numel():
        return [torch.zeros_like(x) for x in (q, k, v, log_decay_BTH)]
    S, span, walks, decay, scan, last = _gradient_plan(q.shape, v.shape, q.device, q.element_size())
    mode, grads, states = 0 if start_BT is None else min(2, start_BT.shape[1]), [], None
    parts, N = last["PARTS"], cdiv(T, last["BORDER"])
    decays, q_sums, k_sums = (q.new_empty(*X, B, H, T, dtype=torch.float32) for X in ((), (parts,), (parts,)))
    borders, paths = q.new_empty(B, H, N, E, F), q.new_empty(parts, B, H, N, dtype=torch.float32)
    decay_kernel[cdiv(T, decay["BLOCK_T"]), B](log_decay_BTH, length_B, decays, T, **decay)
    roles = (grad_BTHF, v, k, q), (v, grad_BTHF, q, k), (k, q, grad_BTHF, None)
    made = [(None, None, None), (k_sums, borders, paths), (q_sums, borders, None)]
    del borders  # with the last that is made of them, before there is a gradient of v
    for i, (tensors, (sizes, tiled, grid)) in enumerate(zip(roles, walks, strict=True)):
        sums = made.pop()
        maps = [None] * 4
        if tiled:
            shapes = [(B * T, x.shape[2] * x.shape[3]) for x in tensors if x is not None]
            blocks = [(sizes["BLOCK_T"], sizes[each]) for each in ("BLOCK_E", "BLOCK_E", "BLOCK_F", "BLOCK_F")]
            fields = zip(tensors, shapes, [(shape[1], 1) for shape in shapes], blocks, strict=False)
            maps[: len(shapes)] = tile_maps(*fields)
        inputs = *tensors, *maps, decays, start_BT, length_B
        if S > 1 and i < 2:  # the states that dk reads are those of dv too
            states, carry = (q.new_empty(B, H, S, *X, dtype=torch.float32) for X in ((F, E), ()))
            linear_attention_kernel[grid](
                *inputs, None, None, states, carry, None, None, None, T, span, S, START=mode, KEPT=False,
                STATE_ONLY=True, **sizes,
            )  # fmt: skip
            segment_states_kernel[B * H, cdiv(E * F, 1024)](
                None, start_BT, states, carry, S, START=mode, BACK=sizes["BACK"], **scan
            )
        out = q.new_empty(B, T, H, sizes["F"])
        linear_attention_kernel[grid](
            *inputs, states, out, None, None, *sums, T, span, S, START=mode, KEPT=False, STATE_ONLY=False, **sizes
        )
        if sizes["BACK"] and H > G:
            of_heads, out = out, q.new_empty(B, T, G, sizes["F"])
            sum_heads_kernel[(cdiv(B * T * G, 16),)](
                of_heads, out, B * T * G, R=H // G, X=sizes["F"], BLOCK_N=16, BLOCK_X=power_of_2(sizes["F"]),
                num_warps=4,
            )  # fmt: skip
            del of_heads
        grads.append(out)
    log_decay_grad = torch.empty_like(log_decay_BTH)
    decay_gradient_kernel[B * H, N](
        q_sums, k_sums, paths, start_BT, length_B, log_decay_grad, T, START=mode, **last
    )  # fmt: skip
    return *grads, log_decay_grad
