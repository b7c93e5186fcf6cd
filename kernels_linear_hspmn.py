"""Linear attention on the GPU: chunks in matrix products, the state in registers.

Meaning and shapes: `linear_attention` in `operations_hspmn`; legend in `kernels_common_hspmn`.
"""

from functools import lru_cache

import torch

from .kernels_common_hspmn import (  # isort: skip
    LOG2E, ROW_START, TOKEN_START, capability, cdiv, check_heads, has_descriptors, kernel, power_of_2,
    processors, tile_maps, tl, triton,
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


@triton.jit
def advance_state(state, k_tile, v_tile, to_end):
    """State [F, E] after a block, given the decayed one before it: keys times values decayed to the block's end."""
    v_scaled = (tl.trans(v_tile) * to_end[None, :]).to(v_tile.dtype)
    return tl.dot(v_scaled, k_tile, state, input_precision="tf32x3")


@triton.jit
def block_output(held, q_tile, k_tile, v_tile, decay, from_begin, visible):
    """Output of a block: the state held before it, decayed by `from_begin`, and the visible part of the block."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
    # The mask goes into the exponent: above the diagonal the difference is positive and may overflow
    weight = tl.exp2(tl.where(visible, decay[:, None] - decay[None, :], float("-inf")))
    tile = tl.dot(q_tile, tl.trans(held), input_precision="tf32x3") * from_begin[:, None]
    return tl.dot((scores * weight).to(v_tile.dtype), v_tile, tile, input_precision="tf32x3")


@kernel("T", "span", "S")
def linear_attention_kernel(
    q, k, v, q_map, k_map, v_map, decays, start, length, state_in, out, state_out, carry, T, span, S,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    START: tl.constexpr, KEPT: tl.constexpr, STATE_ONLY: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """One program walks `span` tokens of one head and one block of value columns; the state [E, F] stays in registers.
    q_map, k_map, v_map: tensor descriptors of q, k, v as [B * T, heads * width], or None; they carry the whole blocks.
    STATE_ONLY leaves out the outputs and stores, for segment s, the state that its tokens alone give (state_out) and
    the log2 of the decay over all of them (carry, -inf where a document starts inside)."""
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0).to(tl.int64)
    column = (program % blocks).to(tl.int32) * BLOCK_F
    h, s, b = program // blocks % H, program // (blocks * H) % S, program // (blocks * H) // S
    g = h // (H // G)
    t, e, f = tl.arange(0, BLOCK_T), tl.arange(0, E), column + tl.arange(0, BLOCK_F)
    in_f = f[None, :] < F
    stop = T if length is None else tl.minimum(tl.load(length + b).to(tl.int32), T)
    begin = (s * span).to(tl.int32)
    end = tl.minimum(begin + span, T)
    stop = tl.minimum(stop, end)
    if STATE_ONLY:  # nothing follows the last segment
        stop = tl.where(s == S - 1, begin, stop)
    state_at = e[None, :] * F + f[:, None]
    segment = ((b * H + h) * S + s) * E * F
    state = tl.zeros([BLOCK_F, E], tl.float32)
    if state_in is not None:
        state = tl.load(state_in + segment + state_at, mask=(f < F)[:, None], other=0.0).to(tl.float32)
        if START == ROW_START and KEPT:  # of an earlier call, which a document that begins here does not see
            state = tl.where(tl.load(start + b) < 0, state, 0.0)
    # Offsets inside a tile fit 32 bits, which halves the registers that addresses take
    out_at = t[:, None] * (H * F) + f[None, :]
    sum_decay = 0.0
    decays += (b * H + h) * T
    causal = t[:, None] >= t[None, :]
    whole = begin
    if k_map is not None:
        whole = begin + tl.maximum(stop - begin, 0) // BLOCK_T * BLOCK_T
        total = tl.load(decays + tl.minimum(begin + BLOCK_T, end) - 1)
        ready = tl.zeros([BLOCK_T, BLOCK_F], q.dtype.element_ty)
        for c in range(begin, whole, BLOCK_T):
            row = b * T + c
            # What needs no load comes first, the store of the step before too: it hides the wait for this step's loads
            if not STATE_ONLY:
                tl.store(out + ((row - BLOCK_T) * H + h) * F + out_at, ready, mask=(c > begin) & in_f)
            held = state.to(k.dtype.element_ty)
            keep = tl.exp2(total)
            if START == TOKEN_START:
                last_first = tl.load(start + row + BLOCK_T - 1).to(tl.int32)
                keep = tl.where(last_first < c, keep, 0.0)
            state *= keep
            # One step ahead, because the compiler does not prefetch a scalar
            next_total = tl.load(decays + tl.minimum(c + 2 * BLOCK_T, end) - 1)
            decay = tl.load(decays + c + t)
            k_tile = k_map.load([row.to(tl.int32), (g * E).to(tl.int32)])
            v_tile = v_map.load([row.to(tl.int32), (g * F).to(tl.int32) + column])
            to_end, from_begin, visible = tl.exp2(total - decay), tl.exp2(decay), causal
            if START == TOKEN_START:
                first = tl.load(start + row + t).to(tl.int32)
                to_end = tl.where(c + t >= last_first, to_end, 0.0)
                from_begin = tl.where(first < c, from_begin, 0.0)
                visible = visible & (c + t[None, :] >= first[:, None])
                total = tl.where(last_first < c, total, float("-inf"))
            if not STATE_ONLY:
                q_tile = q_map.load([row.to(tl.int32), (h * E).to(tl.int32)])
                tile = block_output(held, q_tile, k_tile, v_tile, decay, from_begin, visible)
                ready = tile.to(q.dtype.element_ty)
            state = advance_state(state, k_tile, v_tile, to_end)
            sum_decay += total
            total = next_total
        if not STATE_ONLY:
            row = b * T + whole - BLOCK_T
            tl.store(out + (row * H + h) * F + out_at, ready, mask=(whole > begin) & in_f)
    k_at = t[:, None] * (G * E) + e[None, :]
    v_at = t[:, None] * (G * F) + f[None, :]
    q_at = t[:, None] * (H * E) + e[None, :]
    for c in tl.range(whole, stop, BLOCK_T, num_stages=TAIL_STAGES):
        real = c + t < stop
        row = b * T + c
        total = tl.load(decays + tl.minimum(c + BLOCK_T, end) - 1)
        decay = tl.load(decays + c + t, mask=c + t < end, other=0.0)
        k_tile = tl.load(k + (row * G + g) * E + k_at, mask=real[:, None], other=0.0)
        v_tile = tl.load(v + (row * G + g) * F + v_at, mask=real[:, None] & in_f, other=0.0)
        to_end, from_begin, visible = tl.exp2(total - decay), tl.exp2(decay), causal
        if START == TOKEN_START:
            first = tl.load(start + row + t, mask=real, other=0).to(tl.int32)
            last_first = tl.load(start + b * T + tl.minimum(c + BLOCK_T, stop) - 1).to(tl.int32)
            to_end = tl.where(c + t >= last_first, to_end, 0.0)
            from_begin = tl.where(first < c, from_begin, 0.0)
            visible = visible & (c + t[None, :] >= first[:, None])
            total = tl.where(last_first < c, total, float("-inf"))
        if not STATE_ONLY:
            q_tile = tl.load(q + (row * H + h) * E + q_at, mask=real[:, None], other=0.0)
            tile = block_output(state.to(q_tile.dtype), q_tile, k_tile, v_tile, decay, from_begin, visible)
            tl.store(out + (row * H + h) * F + out_at, tile.to(out.dtype.element_ty), mask=real[:, None] & in_f)
        state = advance_state(state * tl.exp2(total), k_tile, v_tile, to_end)
        sum_decay += total
    if STATE_ONLY:
        tl.store(state_out + segment + state_at, state, mask=(f < F)[:, None])
        if column == 0:
            tl.store(carry + (b * H + h) * S + s, sum_decay)
    else:
        # Tokens past the length give zeros: nothing reads them, but they must be finite
        for c in range(tl.maximum(stop, begin), end, BLOCK_T):
            empty = tl.zeros([BLOCK_T, BLOCK_F], out.dtype.element_ty)
            tl.store(out + ((b * T + c) * H + h) * F + out_at, empty, mask=(c + t < end)[:, None] & in_f)
        if s == S - 1:
            tl.store(state_out + (b * H + h) * E * F + state_at, state, mask=(f < F)[:, None])


@kernel("S")
def segment_states_kernel(
    state_in, start, states, carry, S, H: tl.constexpr, X: tl.constexpr, BLOCK_X: tl.constexpr, START: tl.constexpr
):  # fmt: skip
    """Replace, in place, what each segment adds to the state by the state before that segment; X = E * F."""
    row = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    in_x = x < X
    state = tl.zeros([BLOCK_X], tl.float32)
    if state_in is not None:
        state = tl.load(state_in + row * X + x, mask=in_x, other=0.0).to(tl.float32)
        if START == ROW_START:
            state = tl.where(tl.load(start + row // H) < 0, state, 0.0)
    for s in range(S):
        at = states + (row * S + s) * X + x
        added = tl.load(at, mask=in_x & (s < S - 1), other=0.0)
        keep = tl.exp2(tl.load(carry + row * S + s, mask=s < S - 1, other=0.0))
        tl.store(at, state, mask=in_x)
        state = state * keep + added


def _segments(programs, T, device):
    """Into how many segments a row is cut: one where whole rows fill the chip, else about eight programs each.
    H200, B=1, T=335,872, 16/4 heads, E=128: 33 segments (the result) 2.49 ms, 16 segments 2.62, 8 segments 2.60."""
    fill = processors(device)
    if programs >= 1.5 * fill or T <= 1024:
        return 1
    return max(1, min(8 * fill // programs, cdiv(T, 512)))


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
    # H200, B=64, T=4096, 16/4 heads, E=F=128, bf16: 64 tokens and 64 columns 1.40 ms with descriptors, 1.73 without;
    # three stages (one program per processor instead of two) 1.87; 128 columns with 8 warps 2.02; 128 by 128 1.99. On
    # sm_80 and sm_120, whose products keep their operands in registers, 4 warps spill; so do float32 tiles of more
    # than 16 tokens (compiler's report, not timed)
    half, columns = element_size == 2, power_of_2(F)
    block_t, block_f, stages = 64 if half else 16, max(16, min(64, columns)), 2 if half else 1
    few_warps = half and (capability(device) in (90, 100) or E * columns <= 64 * 64)
    blocks = cdiv(F, block_f)
    span = cdiv(cdiv(T, _segments(B * H * blocks, T, device)), block_t) * block_t
    # A tile of columns must not reach into the next head
    tiled = has_descriptors(device, element_size) and F % block_f == 0 and B * T >= block_t
    sizes = {
        "H": H, "G": G, "E": E, "F": F, "BLOCK_T": block_t, "BLOCK_F": block_f, "TAIL_STAGES": 1 if tiled else stages,
        "num_warps": 4 if few_warps else 8, "num_stages": stages,
    }  # fmt: skip
    decay = {"H": H, "HEADS": power_of_2(H), "BLOCK_T": block_t, "num_warps": 4}
    S = cdiv(T, span)
    return S, span, (cdiv(T, block_t), B), decay, tiled, (B * H * S * blocks,), sizes


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
    before, inputs = state, (q, k, v, *maps, decays, start_BT, length_B)
    last = q.new_empty(B, H, E, F, dtype=torch.float32) if state is None else state
    if S > 1:
        before = q.new_empty(B, H, S, E, F, dtype=torch.float32)
        carry = q.new_empty(B, H, S, dtype=torch.float32)
        linear_attention_kernel[grid](
            *inputs, None, None, before, carry, T, span, S, START=mode, KEPT=False, STATE_ONLY=True, **sizes
        )
        segment_states_kernel[(B * H, cdiv(E * F, 1024))](
            state, start_BT, before, carry, S, H=H, X=E * F, BLOCK_X=1024, START=mode, num_warps=4
        )
    linear_attention_kernel[grid](
        *inputs, before, out_BTHF, last, None, T, span, S, START=mode, KEPT=S == 1, STATE_ONLY=False, **sizes
    )
    return out_BTHF
