"""The two softmax attentions on the GPU, the local window and SQSK, and what they leave in the cache.

Meaning and shapes in `operations_hspmn`; legend in `kernels_common_hspmn`. The R query heads that share a key head are
rows of one tile, so keys and values are read once for all of them and a tile spans few slots, which keeps the wasted
part of the diagonal small.
"""

from functools import cache, lru_cache

import torch

from .kernels_common_hspmn import (  # isort: skip
    FLOOR, LEAST, LN2, LOG2E, TOKEN_START, capability, cdiv, check, check_heads, from_start, has_descriptors,
    kernel, power_of_2, processors, softplus, takes_heads, tile_maps, tl, triton,
)  # fmt: skip
from .operations_hspmn import (  # isort: skip
    LEVELS, contextual, extend, local_attention, reflexive_merge, sqsk_attention, sqsk_merge, take_rows,
)  # fmt: skip

STORE_BLOCK = 32  # slots that one program of `extend_kernel` writes
# Rows, keys, warps and stages of the gradients of queries and of keys, on chips with descriptors and on the others.
# H200, B=32, ms of queries and keys: 3277 of 4096 slots, 64 by 64 4.13 and 6.25, 128 by 64 (8 warps, 3 stages) 3.69,
# keys 64 by 128 7.3; 820 of 1230 slots, 64 by 64 .69 and .64, 128 by 64 .76
GRADIENT_TILES = {
    "float32": ((16, 32, 4, 1), (32, 32, 8, 1)),
    "window": ((64, 32, 4, 2), (64, 64, 4, 2)),
    "rows": ((64, 64, 4, 2), (64, 64, 4, 2)),
    "long": ((128, 64, 8, 3), (64, 64, 4, 2)),
}
OTHER_GRADIENT_TILES = GRADIENT_TILES | dict.fromkeys(("window", "rows", "long"), ((64, 32, 4, 2), (32, 64, 8, 2)))


@triton.jit
def fold_block(scores, v_tile, visible, acc, peak, total, SCALE: tl.constexpr):
    """Take the visible keys of a block (None: all) into the running softmax; SCALE turns scores into log2 units."""
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="tf32x3")
    return acc, new_peak, total


@triton.jit
def finish(acc, peak, total):
    """Attention output and natural log-sum-exp of each row; a row that saw no key gives 0 and -inf."""
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    return out, tl.where(total > 0, (peak + tl.log2(total)) * LN2, float("-inf"))


@kernel("T")
def local_attention_kernel(
    q, k, v, k_map, v_map, start, ring_k, ring_v, seen, linear, head_gate, norm, out, lse, T, H: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr, GATE_STEP: tl.constexpr,
    EPS: tl.constexpr, START: tl.constexpr, R_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of the heads of one key head; row m of the tile is query m // R_ROWS, head m % R_ROWS. out: the
    attention, with lse, or attention + RMSNorm(linear) * sigmoid(head_gate), GATE_STEP from token to token."""
    R: tl.constexpr = H // G
    BEHIND: tl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(T, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    t_begin = (program % tiles).to(tl.int32) * BLOCK_Q
    g, b = program // tiles % G, program // (tiles * G)
    m, n, e = tl.arange(0, BLOCK_Q * R_ROWS), tl.arange(0, BLOCK_N), tl.arange(0, E)
    t = t_begin + m // R_ROWS
    real = (t < T) & (m % R_ROWS < R)
    # Offsets inside a tile fit 32 bits, which halves the registers that addresses take
    row = (b * T + t_begin) * H + g * R
    row_at = m // R_ROWS * H + m % R_ROWS
    q_at = row_at[:, None] * E + e[None, :]
    kv_at = n[:, None] * (G * E) + e[None, :]
    q_tile = tl.load(q + row * E + q_at, mask=real[:, None], other=0.0)
    first = from_start(t - WINDOW + 1, start, b, b * T + t, t < T, -WINDOW, START)
    # Blocks start at multiples of BLOCK_N, so each lies wholly in the ring or wholly in this call
    low = (t_begin - WINDOW + 1 + BEHIND) // BLOCK_N * BLOCK_N - BEHIND
    acc = tl.zeros([BLOCK_Q * R_ROWS, E], tl.float32)
    peak, total = tl.full([BLOCK_Q * R_ROWS], FLOOR, tl.float32), tl.zeros([BLOCK_Q * R_ROWS], tl.float32)
    if ring_k is not None:
        lies = (tl.load(seen + b) % WINDOW).to(tl.int32) + WINDOW  # so that key -1 lies one slot before it
        for s in range(low, 0, BLOCK_N):
            key = s + n
            held = (key >= -WINDOW) & (key < 0)
            at = (b * WINDOW * G + g) * E + ((lies + key) % WINDOW)[:, None] * (G * E) + e[None, :]
            k_tile = tl.load(ring_k + at, mask=held[:, None], other=0.0).to(q_tile.dtype)
            v_tile = tl.load(ring_v + at, mask=held[:, None], other=0.0).to(q_tile.dtype)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
            visible = (key[None, :] >= first[:, None]) & held[None, :]
            acc, peak, total = fold_block(scores, v_tile, visible, acc, peak, total, SCALE)
    for s in range(tl.maximum(low, 0), tl.minimum(t_begin + BLOCK_Q, T), BLOCK_N):
        key = s + n
        if k_map is not None:
            k_tile = k_map.load([b.to(tl.int32), s, g.to(tl.int32), 0]).reshape(BLOCK_N, E)
            v_tile = v_map.load([b.to(tl.int32), s, g.to(tl.int32), 0]).reshape(BLOCK_N, E)
        else:
            at = ((b * T + s) * G + g) * E
            k_tile = tl.load(k + at + kv_at, mask=(key < T)[:, None], other=0.0)
            v_tile = tl.load(v + at + kv_at, mask=(key < T)[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
        visible = (key[None, :] <= t[:, None]) & (key[None, :] >= first[:, None])
        acc, peak, total = fold_block(scores, v_tile, visible, acc, peak, total, SCALE)
    tile, row_lse = finish(acc, peak, total)
    if linear is not None:
        linear_tile = tl.load(linear + row * E + q_at, mask=real[:, None], other=0.0).to(tl.float32)
        gate_at = (b * T + t_begin) * GATE_STEP + g * R
        gate = tl.load(head_gate + gate_at + (m // R_ROWS * GATE_STEP + m % R_ROWS), mask=real, other=0.0)
        scale = tl.rsqrt(tl.sum(linear_tile * linear_tile, 1) / E + EPS) / (1.0 + tl.exp(-gate.to(tl.float32)))
        # Rounded first, as the reference does: moving the rows to the threads that store them takes half the registers
        tile = tile.to(out.dtype.element_ty).to(tl.float32)
        tile += linear_tile * scale[:, None] * tl.load(norm + e).to(tl.float32)[None, :]
    else:
        tl.store(lse + row + row_at, row_lse, mask=real)
    tl.store(out + row * E + q_at, tile.to(out.dtype.element_ty), mask=real[:, None])


@kernel("T", "K", "P", "GATE_STEP")
def sqsk_attention_kernel(
    q, k, v, k_map, v_map, log_gate, index, first, cached, count, end, gate, out, lse, T, K, P, GATE_STEP,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, R_ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of the heads of one key head over one of SPLITS parts of their keys. Row m of the tile is query
    m // R_ROWS, head m % R_ROWS. end: of `sqsk_attention`; None: queries are slots. index: the tokens that are rows of
    q; None: query i is row i. P, GATE_STEP: slots from one row of k and v, and of log_gate, to the next. k_map, v_map:
    tensor descriptors of k and v for the blocks that need no mask, or None. ADD: out[token] += gate (None: 1) *
    result; else out[query] = result, zeros in unused slots."""
    R: tl.constexpr = H // G
    tiles = tl.cdiv(K, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    # The longest tiles first, so that the last programs to start are the shortest
    i_begin = (tiles - 1 - program % tiles).to(tl.int32) * BLOCK_Q
    g, split, b = program // tiles % G, program // (tiles * G) % SPLITS, program // (tiles * G * SPLITS)
    kept = tl.load(count + b).to(tl.int32)
    used = tl.minimum(kept, K) if end is None else K
    m, n, e = tl.arange(0, BLOCK_Q * R_ROWS), tl.arange(0, BLOCK_N), tl.arange(0, E)
    slot = i_begin + m // R_ROWS
    head = g * R + m % R_ROWS
    held = (slot < K) & (m % R_ROWS < R)
    real = (slot < used) & (m % R_ROWS < R)
    slot_row = ((b * SPLITS + split) * K + slot) * H + head
    if i_begin >= used:
        if not ADD:
            empty = tl.zeros([BLOCK_Q * R_ROWS, E], out.dtype.element_ty)
            tl.store(out + slot_row[:, None] * E + e[None, :], empty, mask=held[:, None])
            if lse is not None:
                tl.store(lse + slot_row, tl.full([BLOCK_Q * R_ROWS], float("-inf"), tl.float32), mask=held)
        return
    if index is not None:
        token = tl.load(index + b * K + slot, mask=real, other=0).to(tl.int64)
        token_row = (b * T + token) * H + head
    else:
        token_row = (b * K + slot) * H + head
    q_tile = tl.load(q + token_row[:, None] * E + e[None, :], mask=real[:, None], other=0.0)
    low, past = 0, 0 if cached is None else tl.load(cached + b).to(tl.int32)
    # Every row sees the keys from `lead`, where the last of their documents has begun, to `clear`, where the first of
    # them ends
    if end is None:
        row_end = past + slot + 1
        high, clear = past + tl.minimum(i_begin + BLOCK_Q, used), past + i_begin + 1
    else:
        row_end = past + tl.minimum(tl.load(end + b * K + slot, mask=real, other=0), kept)
        high = past + tl.minimum(tl.load(end + b * K + tl.minimum(i_begin + BLOCK_Q, K) - 1), kept)
        clear = past + tl.minimum(tl.load(end + b * K + i_begin), kept)
    clear = clear // BLOCK_N * BLOCK_N
    row_first = tl.zeros([BLOCK_Q * R_ROWS], tl.int32)
    if first is not None:
        row_first = tl.load(first + b * K + slot, mask=real, other=0).to(tl.int32)
        low = tl.maximum(tl.load(first + b * K + i_begin).to(tl.int32), 0) // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(high - low, SPLITS), BLOCK_N) * BLOCK_N
        low += split.to(tl.int32) * share
        high = tl.minimum(high, low + share)
    row_end = tl.minimum(row_end, high)
    clear = tl.maximum(tl.minimum(clear, high // BLOCK_N * BLOCK_N), low)
    lead = low
    if first is not None:
        lead = tl.minimum(tl.maximum(tl.cdiv(tl.max(row_first, 0), BLOCK_N) * BLOCK_N, low), clear)
    kv_at = n[:, None] * (G * E) + e[None, :]
    acc = tl.zeros([BLOCK_Q * R_ROWS, E], tl.float32)
    peak, total = tl.full([BLOCK_Q * R_ROWS], FLOOR, tl.float32), tl.zeros([BLOCK_Q * R_ROWS], tl.float32)
    for s in range(lead, clear, BLOCK_N):
        if k_map is not None:
            k_tile = k_map.load([b.to(tl.int32), s, g.to(tl.int32), 0]).reshape(BLOCK_N, E)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
            v_tile = v_map.load([b.to(tl.int32), s, g.to(tl.int32), 0]).reshape(BLOCK_N, E)
        else:
            at = ((b * P + s) * G + g) * E + kv_at
            scores = tl.dot(q_tile, tl.trans(tl.load(k + at)), input_precision="tf32x3")
            v_tile = tl.load(v + at)
        if log_gate is not None:
            scores += tl.load(log_gate + b * GATE_STEP + s + n)[None, :] * (LOG2E / SCALE)
        acc, peak, total = fold_block(scores, v_tile, None, acc, peak, total, SCALE)
    # Those before `lead`, then those from `clear` on; one at a time with log gates, or up to 416 bytes are spilled
    for block in tl.range(low, high - clear + lead, BLOCK_N, num_stages=None if log_gate is None else 1):
        s = block + (clear - lead)
        if first is not None:
            s = tl.where(block < lead, block, s)
        key = s + n
        at = ((b * P + s) * G + g) * E + kv_at
        # Slots past the count may hold anything, NaN too: a zero weight alone would not hide them
        k_tile = tl.load(k + at, mask=(key < high)[:, None], other=0.0)
        v_tile = tl.load(v + at, mask=(key < high)[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
        if log_gate is not None:
            gates = tl.load(log_gate + b * GATE_STEP + key, mask=key < high, other=0.0)
            scores += gates[None, :] * (LOG2E / SCALE)
        visible = key[None, :] < row_end[:, None]
        if first is not None:
            visible = visible & (key[None, :] >= row_first[:, None])
        acc, peak, total = fold_block(scores, v_tile, visible, acc, peak, total, SCALE)
    tile, row_lse = finish(acc, peak, total)
    if ADD:
        at = token_row[:, None] * E + e[None, :]
        if gate is not None:
            tile *= tl.load(gate + b * T + token, mask=real, other=0.0).to(tl.float32)[:, None]
        tile += tl.load(out + at, mask=real[:, None], other=0.0).to(tl.float32)
        tl.store(out + at, tile.to(out.dtype.element_ty), mask=real[:, None])
    else:
        tile = tl.where(real[:, None], tile, 0.0)
        tl.store(out + slot_row[:, None] * E + e[None, :], tile.to(out.dtype.element_ty), mask=held[:, None])
    if lse is not None:
        tl.store(lse + slot_row, tl.where(real, row_lse, float("-inf")), mask=held)


@kernel("T", "K")
def combine_splits_kernel(
    part, part_lse, index, count, gate, out, lse, T, K, H: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """One query and head: the SPLITS partial softmaxes as one, stored or merged as `sqsk_attention_kernel` does."""
    program = tl.program_id(0).to(tl.int64)
    h, slot, b = program % H, program // H % K, program // (H * K)
    e, p = tl.arange(0, E), tl.arange(0, SPLITS)
    row = ((b * SPLITS + p) * K + slot) * H + h
    logs = tl.load(part_lse + row) * LOG2E
    peak = tl.maximum(tl.max(logs, 0), FLOOR)
    weights = tl.exp2(logs - peak)
    total = tl.sum(weights, 0)
    parts = tl.load(part + row[:, None] * E + e[None, :])
    tile = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    at, real = ((b * K + slot) * H + h) * E + e, e < E
    if gate is not None:
        used = slot < tl.load(count + b)
        token, real = tl.load(index + b * K + slot, mask=used, other=0), real & used
        at = ((b * T + token) * H + h) * E + e
        tile *= tl.load(gate + b * T + token).to(tl.float32)
    if ADD:
        tile += tl.load(out + at).to(tl.float32)
    tl.store(out + at, tile.to(out.dtype.element_ty), mask=real)
    if lse is not None:
        value = tl.where(total > 0, (peak + tl.log2(total)) * LN2, float("-inf"))
        tl.store(lse + (b * K + slot) * H + h, value)


@triton.jit
def move_rows(x, out, source, target, taken, written, weight, X: tl.constexpr, BLOCK_X: tl.constexpr):
    """Rows `source` of x, zeros where not `taken`, times a `weight` unless it is None, into the rows `target`."""
    for begin in range(0, X, BLOCK_X):
        c = begin + tl.arange(0, BLOCK_X)
        in_x = (c < X)[None, :]
        rows = tl.load(x + source[:, None] * X + c[None, :], mask=taken[:, None] & in_x, other=0.0)
        if weight is not None:
            rows = (rows.to(tl.float32) * weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + target[:, None] * X + c[None, :], rows, mask=written[:, None] & in_x)


@kernel("T", "K")
def take_rows_kernel(
    x, y, z, index, count, gate, out, out_y, out_z, T, K, X: tl.constexpr, Y: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    """out[b, k] = x[b, index[b, k]] (times gate[b, k], if there is one) for rows of X elements; index -1 gives zeros,
    slots past the count stay as is. The grid's second and third layer take the rows of y and z, of Y elements."""
    b = tl.program_id(1).to(tl.int64)
    stop = K
    if count is not None:
        stop = tl.minimum(tl.load(count + b).to(tl.int32), K)
        if tl.program_id(0) * BLOCK_K >= stop:
            return
    slot = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.load(index + b * K + slot, mask=slot < stop, other=-1).to(tl.int64)
    source, target, taken, weight = b * T + token, b * K + slot, token >= 0, None
    if gate is not None:
        weight = tl.load(gate + target, mask=taken, other=0.0).to(tl.float32)
    if tl.program_id(2) == 0:
        move_rows(x, out, source, target, taken, slot < stop, weight, X, BLOCK_X)
    elif y is not None:
        if z is not None:
            if tl.program_id(2) == 2:
                y, out_y = z, out_z
        move_rows(y, out_y, source, target, taken, slot < stop, None, Y, BLOCK_X)


@kernel("T", "K")
def gate_gradient_kernel(
    grad, gate, rows, slot, grad_rows, grad_gate, T, K, X: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_X: tl.constexpr
):  # fmt: skip
    """From the gradient of each token's gated row of X elements to those of its row, in its slot, and of its gate."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = tl.load(slot + b * T + t, mask=t < T, other=-1).to(tl.int64)
    weight = tl.load(gate + b * T + t, mask=at >= 0, other=0.0).to(tl.float32)
    product = tl.zeros([BLOCK_T], tl.float32)
    for begin in range(0, X, BLOCK_X):
        c = begin + tl.arange(0, BLOCK_X)
        routed = (at >= 0)[:, None] & (c < X)[None, :]
        row_at = (b * K + at)[:, None] * X + c[None, :]
        slope = tl.load(grad + (b * T + t)[:, None] * X + c[None, :], mask=routed, other=0.0).to(tl.float32)
        product += tl.sum(slope * tl.load(rows + row_at, mask=routed, other=0.0).to(tl.float32), 1)
        tl.store(grad_rows + row_at, (slope * weight[:, None]).to(grad_rows.dtype.element_ty), mask=routed)
    tl.store(grad_gate + b * T + t, product.to(grad_gate.dtype.element_ty), mask=t < T)


@triton.jit
def quantize(rows, HALF: tl.constexpr):
    """Numbers from -HALF to HALF - 1 of rows [N, E], in float32, and their scales [N], as `quantize` has them."""
    rows = rows.to(tl.float32)
    peak = tl.max(tl.abs(rows), 1)
    bits = tl.where(peak > LEAST, peak * (0.5 / HALF), 0.0).to(tl.int32, bitcast=True) + 0xFFFF
    scale = (bits & -0x10000).to(tl.float32, bitcast=True)
    factor = tl.where(scale > 0, tl.div_rn(0.5, tl.where(scale > 0, scale, 1.0)), 0.0)
    return tl.minimum(tl.maximum(tl.floor(rows * factor[:, None]), -HALF), HALF - 1), scale


@triton.jit
def store_rows(rows, row_scales, kept, scales, target, stored, G: tl.constexpr, HALF: tl.constexpr):
    """Rows [N, E] into the rows `target` of a store or ring, of one head, where `stored`; with HALF they are numbers
    of `quantize` and have scales."""
    N: tl.constexpr = rows.shape[0]
    if HALF == 8:
        n = tl.arange(0, 8)
        shift = n % 2 * 16 + n // 2 * 4  # of `NIBBLES`
        rows = tl.sum(tl.reshape((rows + HALF).to(tl.int32), (N, rows.shape[1] // 8, 8)) << shift[None, None, :], 2)
    WIDTH: tl.constexpr = rows.shape[1]
    at = target[:, None] * (G * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(kept + at, rows.to(kept.dtype.element_ty), mask=stored[:, None])
    if HALF > 0:
        tl.store(scales + target * G, row_scales.to(scales.dtype.element_ty), mask=stored)


@triton.jit
def copy_rows(
    x, kept, scales, source, target, moved, G: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Rows `source` of x into the rows `target` of a store or ring, of one head, where `moved`. HALF: of
    `kept_form`."""
    rows = tl.load(x + source[:, None] * (G * E) + tl.arange(0, E)[None, :], mask=moved[:, None], other=0.0)
    row_scales = None
    if HALF > 0:
        rows, row_scales = quantize(rows, HALF)
    store_rows(rows, row_scales, kept, scales, target, moved, G, HALF)


@triton.jit
def tokens_before(index, token, used, BITS):
    """How many of the first `used` entries of the ascending `index` are below each `token`, by bisection."""
    low, high = 0 * token, 0 * token + used
    for _ in range(BITS):
        middle = (low + high) // 2
        inside = low < high
        below = inside & (tl.load(index + middle, mask=inside, other=0) < token)
        high = tl.where(inside & (below == 0), middle, high)
        low = tl.where(below, middle + 1, low)
    return low


@kernel("B", "T", "K", "P", "POSITION_STEP", "BITS")
def extend_kernel(
    k, v, position, start, length, seen, score, index, count, ring_k, ring_v, keys, values, positions, held,
    document_slot, key_scales, value_scales, log_gates, first, numbers, after, document, B, T, K, P, POSITION_STEP,
    BITS, G: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr,
    EVERY: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """BLOCK slots of one row and head: of the window's ring in the first programs, else of the sparse store.
    P: slots per row, the spare one not counted. BITS: of K, the steps of a bisection. EVERY: each token reads,
    and has a first slot. log_gates: None if they are not held. WIDTH, HALF: of `kept_form`."""
    RINGS: tl.constexpr = (WINDOW + BLOCK - 1) // BLOCK
    b = tl.program_id(1).to(tl.int64)
    g, unit = tl.program_id(0) % G, tl.program_id(0) // G
    if RINGS > 0:
        if unit < RINGS:  # slot w takes the latest token of this call that lies there
            slot = unit * BLOCK + tl.arange(0, BLOCK)
            before = tl.load(seen + b)
            last = before + (T if length is None else tl.load(length + b)) - 1
            token = last - (last - slot + WINDOW) % WINDOW - before  # negative: of an earlier call
            moved, source, target = (slot < WINDOW) & (token >= 0), b * T + token, b * WINDOW + slot
            copy_rows(k + g * E, ring_k + g * E, None, source, target, moved, G, E, 0)
            copy_rows(v + g * E, ring_v + g * E, None, source, target, moved, G, E, 0)
    if index is not None:
        block = unit - RINGS
        readers = T if EVERY else tl.load(count + b).to(tl.int32)
        if (block == 0) | ((block > 0) & (block * BLOCK < readers)):
            slot = block * BLOCK + tl.arange(0, BLOCK)
            used = tl.load(count + b).to(tl.int32)
            total, opened = tl.load(held + b).to(tl.int32), tl.load(document_slot + b).to(tl.int32)
            before = tl.minimum(total, P)
            kept = tl.minimum(total + used, P) - before
            token = tl.load(index + b * K + slot, mask=slot < used, other=0)
            moved, source, target = slot < kept, b * T + token, b * (P + 1) + before + slot
            copy_rows(k + g * E, keys + g * WIDTH, key_scales + g, source, target, moved, G, E, HALF)
            copy_rows(v + g * E, values + g * WIDTH, value_scales + g, source, target, moved, G, E, HALF)
            if g == 0:
                places = tl.load(position + b * POSITION_STEP + token, mask=moved, other=0)
                tl.store(positions + target, places.to(tl.int32), mask=moved)
                if log_gates is not None:
                    moved_score = tl.load(score + source, mask=moved, other=0.0).to(tl.float32)
                    tl.store(log_gates + target, -softplus(-moved_score), mask=moved)
                N = K
                if EVERY:
                    token, N = slot.to(tl.int64), T
                if START == TOKEN_START:
                    begun = tl.load(start + b * T + token, mask=token < T, other=0)
                    latest = tl.load(start + b * T + T - 1)
                    number = tokens_before(index + b * K, begun, used, BITS)
                    before_latest = tl.max(tokens_before(index + b * K, latest + 0 * begun, used, BITS), 0)
                else:
                    latest = tl.load(start + b)
                    begun = latest + 0 * token
                    number, before_latest = 0 * slot, 0
                first_at = first + b * N + slot
                tl.store(first_at, tl.where(begun < 0, opened, total + number).to(tl.int32), mask=slot < N)
                if block == 0:
                    tl.store(numbers + b, before)
                    tl.store(numbers + B + b, kept)
                    tl.store(after + b, total + used)
                    tl.store(document + b, tl.where(latest < 0, opened, total + before_latest))


@triton.jit
def load_tile(x, x_map, b, t, h, at, real, ROWS: tl.constexpr, E: tl.constexpr):
    """ROWS rows from token t and head h on, through a descriptor or from `at`; zeros where not `real`, None: all."""
    if x_map is not None:
        tile = x_map.load([b.to(tl.int32), t, h.to(tl.int32), 0]).reshape(ROWS, E)
    elif real is None:
        tile = tl.load(x + at)
    else:
        tile = tl.load(x + at, mask=real[:, None], other=0.0)
    return tile


@kernel("T", "P")
def query_gradient_kernel(
    q, k, v, k_map, v_map, log_gate, start, count, end, grad, grad_lse, out, lse, delta, grad_q, T, P, H: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr, START: tl.constexpr,
    R_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_Q queries of the heads of one key head (arXiv 2205.14135), and `delta`: what is taken off the
    products of each row's `grad` with the values, `grad_lse` apart in float32. WINDOW: 0 for none. start: of
    `from_start`. P: keys of a row. count: those that are used, None for all; the others' gradient is 0. log_gate,
    end: of `sqsk_attention`; end None: query i is that of key i, and sees no later one."""
    R: tl.constexpr = H // G
    FINE: tl.constexpr = q.dtype.element_ty == tl.float32
    MASKED_ONLY: tl.constexpr = 1 if WINDOW > 0 else 0  # a window is too short for a loop of its own over whole blocks
    tiles = tl.cdiv(T, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    # The longest tiles first, so that the last programs to start are the shortest
    t_begin = (tiles - 1 - program % tiles).to(tl.int32) * BLOCK_Q
    g, b = program // tiles % G, program // (tiles * G)
    kept = P if count is None else tl.minimum(tl.load(count + b).to(tl.int32), P)
    used = kept if end is None else T
    m, n, e = tl.arange(0, BLOCK_Q * R_ROWS), tl.arange(0, BLOCK_N), tl.arange(0, E)
    t = t_begin + m // R_ROWS
    held, real = (t < T) & (m % R_ROWS < R), (t < used) & (m % R_ROWS < R)
    row = (b * T + t_begin) * H + g * R
    row_at = m // R_ROWS * H + m % R_ROWS
    q_at = row_at[:, None] * E + e[None, :]
    q_tile = tl.load(q + row * E + q_at, mask=real[:, None], other=0.0)
    grad_tile = tl.load(grad + row * E + q_at, mask=real[:, None], other=0.0)
    out_tile = tl.load(out + row * E + q_at, mask=real[:, None], other=0.0)
    level = tl.load(lse + row + row_at, mask=real, other=float("-inf"))
    seen = level > FLOOR  # else the log-sum-exp has no slope
    rise = tl.load(grad_lse + row + row_at, mask=seen, other=0.0)
    level = tl.where(seen, level * LOG2E, -FLOOR)
    if FINE:
        # Added up as the products of a row that sees a single key are, so that nothing is left of their difference
        change = tl.dot(grad_tile, tl.trans(out_tile), input_precision="tf32x3")
        change = tl.sum(tl.where(m[:, None] == m[None, :], change, 0.0), 1)
    else:
        change = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1) - rise
    tl.store(delta + row + row_at, change, mask=real)

    if end is None:
        row_end, clear = t + 1, t_begin + 1
        high = tl.where(t_begin < used, tl.minimum(t_begin + BLOCK_Q, used), 0)
    else:
        row_end = tl.minimum(tl.load(end + b * T + t, mask=t < T, other=0), kept)
        clear = tl.load(end + b * T + t_begin)
        high = tl.minimum(tl.load(end + b * T + tl.minimum(t_begin + BLOCK_Q, T) - 1), kept)
    first, low = 0 * t, 0
    if WINDOW > 0:
        first, low = t - WINDOW + 1, tl.maximum(t_begin - WINDOW + 1, 0)
    first = from_start(first, start, b, b * T + t, t < used, 0, START)
    if START == TOKEN_START:
        low = tl.maximum(low, tl.load(start + b * T + t_begin).to(tl.int32))
    low = low // BLOCK_N * BLOCK_N
    # Every row sees the keys from `lead`, where the last of their documents has begun, to `clear`, where the first of
    # them ends
    lead = low
    if WINDOW > 0:
        clear = low
    else:
        clear = tl.maximum(tl.minimum(clear, high) // BLOCK_N * BLOCK_N, low)
        if START > 0:
            lead = tl.minimum(tl.maximum(tl.cdiv(tl.max(first, 0), BLOCK_N) * BLOCK_N, low), clear)
    kv_at = n[:, None] * (G * E) + e[None, :]
    acc = tl.zeros([BLOCK_Q * R_ROWS, E], tl.float32)
    for MASKED in tl.static_range(MASKED_ONLY, 2):  # those from `lead` to `clear`, then the others
        begin, stop = lead, clear
        if MASKED:
            begin, stop = low, high - clear + lead
        for block in range(begin, stop, BLOCK_N):
            s = block
            if MASKED:
                s = tl.where(block < lead, block, block + (clear - lead))
            key = s + n
            at = ((b * P + s) * G + g) * E + kv_at
            # Slots past the count may hold anything, NaN too: a zero weight alone would not hide them
            if MASKED:
                k_tile = load_tile(k, k_map if count is None else None, b, s, g, at, key < kept, BLOCK_N, E)
                v_tile = load_tile(v, v_map if count is None else None, b, s, g, at, key < kept, BLOCK_N, E)
            else:
                k_tile = load_tile(k, k_map, b, s, g, at, None, BLOCK_N, E)
                v_tile = load_tile(v, v_map, b, s, g, at, None, BLOCK_N, E)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
            if log_gate is not None:
                scores += tl.load(log_gate + b * P + key, mask=key < kept, other=0.0)[None, :] * (LOG2E / SCALE)
            if MASKED:
                visible = (key[None, :] < row_end[:, None]) & (key[None, :] >= first[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            weights = tl.exp2(scores * SCALE - level[:, None])
            slopes = tl.dot(grad_tile, tl.trans(v_tile), input_precision="tf32x3") - change[:, None]
            if FINE:
                slopes += rise[:, None]
            slopes *= weights
            acc = tl.dot(slopes.to(k_tile.dtype), k_tile, acc, input_precision="tf32x3")
    tl.store(grad_q + row * E + q_at, (acc * (SCALE * LN2)).to(grad_q.dtype.element_ty), mask=held[:, None])


@kernel("T", "P", "BITS")
def key_gradient_kernel(
    q, k, v, q_map, grad_map, log_gate, start, count, end, grad, grad_lse, lse, delta, grad_k, grad_v, grad_log_gate,
    T, P, BITS, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    START: tl.constexpr, R_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one key head, over the queries that see them, and the head's part of
    those of their log gates; the rest is that of `query_gradient_kernel`. BITS: of T, the steps of a bisection."""
    R: tl.constexpr = H // G
    FINE: tl.constexpr = q.dtype.element_ty == tl.float32
    MASKED_ONLY: tl.constexpr = 1 if WINDOW > 0 else 0
    tiles = tl.cdiv(P, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    s_begin = (program % tiles).to(tl.int32) * BLOCK_N
    g, b = program // tiles % G, program // (tiles * G)
    kept = P if count is None else tl.minimum(tl.load(count + b).to(tl.int32), P)
    used = kept if end is None else T
    m, n, e = tl.arange(0, BLOCK_Q * R_ROWS), tl.arange(0, BLOCK_N), tl.arange(0, E)
    key = s_begin + n
    at = ((b * P + s_begin) * G + g) * E
    kv_at = n[:, None] * (G * E) + e[None, :]
    k_tile = tl.load(k + at + kv_at, mask=(key < kept)[:, None], other=0.0)
    v_tile = tl.load(v + at + kv_at, mask=(key < kept)[:, None], other=0.0)
    if log_gate is not None:
        gates = tl.load(log_gate + b * P + key, mask=key < kept, other=0.0) * (LOG2E / SCALE)
    row_at = m // R_ROWS * H + m % R_ROWS
    q_at = row_at[:, None] * E + e[None, :]

    # The first queries that see the first and the last key
    low, lead, high = s_begin, s_begin + BLOCK_N - 1, used
    if end is not None:
        begins = tokens_before(end + b * T, s_begin + 1 + (BLOCK_N - 1) * tl.arange(0, 2), used, BITS)
        low, lead = tl.min(begins, 0), tl.max(begins, 0)
    low = low // BLOCK_Q * BLOCK_Q
    # The queries from `lead` to `clear`, where the first key's document ends, see every key
    clear = low
    if WINDOW > 0:
        lead, high = low, tl.minimum(used, s_begin + BLOCK_N - 1 + WINDOW)
    else:
        clear = used
        if START == TOKEN_START:
            ends = tokens_before(start + b * T, s_begin + 1 + (BLOCK_N - 1) * tl.arange(0, 2), used, BITS)
            clear, high = tl.min(ends, 0), tl.max(ends, 0)
        lead = tl.cdiv(lead, BLOCK_Q) * BLOCK_Q
        clear = tl.maximum(clear // BLOCK_Q * BLOCK_Q, lead)
    acc_k, acc_v = tl.zeros([BLOCK_N, E], tl.float32), tl.zeros([BLOCK_N, E], tl.float32)
    acc_gate = tl.zeros([BLOCK_N], tl.float32)
    for MASKED in tl.static_range(MASKED_ONLY, 2):  # those from `lead` to `clear`, then the others
        begin, stop = lead, clear
        if MASKED:
            begin, stop = low, high - clear + lead
        for block in range(begin, stop, BLOCK_Q):
            t_begin = block
            if MASKED:
                t_begin = tl.where(block < lead, block, block + (clear - lead))
            t = t_begin + m // R_ROWS
            real = (t < used) & (m % R_ROWS < R)
            row = (b * T + t_begin) * H + g * R
            if MASKED:
                some_q, some_grad = (q_map, grad_map) if count is None else (None, None)
            else:
                some_q, some_grad = q_map, grad_map
            q_tile = load_tile(q, some_q, b, t_begin, g * R, row * E + q_at, real, BLOCK_Q * R_ROWS, E)
            grad_tile = load_tile(grad, some_grad, b, t_begin, g * R, row * E + q_at, real, BLOCK_Q * R_ROWS, E)
            level = tl.load(lse + row + row_at, mask=real, other=float("-inf"))
            seen = level > FLOOR
            level = tl.where(seen, level * LOG2E, -FLOOR)
            change = tl.load(delta + row + row_at, mask=real, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="tf32x3")
            if log_gate is not None:
                scores += gates[:, None]
            if MASKED:
                first = 0 * t
                if WINDOW > 0:
                    first = t - WINDOW + 1
                first = from_start(first, start, b, b * T + t, t < used, 0, START)
                row_end = t + 1
                if end is not None:
                    row_end = tl.minimum(tl.load(end + b * T + t, mask=t < T, other=0), kept)
                visible = (key[:, None] < row_end[None, :]) & (key[:, None] >= first[None, :])
                scores = tl.where(visible, scores, float("-inf"))
            weights = tl.exp2(scores * SCALE - level[None, :])
            acc_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, acc_v, input_precision="tf32x3")
            slopes = tl.dot(v_tile, tl.trans(grad_tile), input_precision="tf32x3") - change[None, :]
            if FINE:
                slopes += tl.load(grad_lse + row + row_at, mask=seen, other=0.0)[None, :]
            slopes *= weights
            if log_gate is not None:
                acc_gate += tl.sum(slopes, 1)
            acc_k = tl.dot(slopes.to(q_tile.dtype), q_tile, acc_k, input_precision="tf32x3")
    tl.store(grad_k + at + kv_at, (acc_k * (SCALE * LN2)).to(grad_k.dtype.element_ty), mask=(key < P)[:, None])
    tl.store(grad_v + at + kv_at, acc_v.to(grad_v.dtype.element_ty), mask=(key < P)[:, None])
    if log_gate is not None:
        tl.store(grad_log_gate + (b * P + key) * G + g, acc_gate, mask=key < P)


def _gather(index_BK, count_B, *tensors, gate_BK=None):
    """Rows named by `index_BK` of one to three tensors, the second and third alike; those of the first times gate_BK,
    if given; slots past `count_B` are left as they were allocated."""
    (B, K), T = index_BK.shape, tensors[0].shape[1]
    outs = [x.new_empty(B, K, *x.shape[2:]) for x in tensors]
    if outs[0].numel():
        X, rest = outs[0].stride(1), [None] * (3 - len(outs))
        take_rows_kernel[(cdiv(K, 8), B, len(outs))](
            *tensors, *rest, index_BK, count_B, gate_BK, *outs, *rest, T, K, X=X, Y=outs[-1].stride(1),
            BLOCK_K=8, BLOCK_X=min(512, power_of_2(X)), num_warps=4,
        )  # fmt: skip
    return outs


@take_rows.kernel
def _take_rows(x_BTX, index_BK, inverse_BT):
    return _gather(index_BK, None, x_BTX)[0]


@take_rows.gradient(wrt=("x_BTX",))
def _take_rows_back(grad_BKX, x_BTX, index_BK, inverse_BT):
    return _gather(inverse_BT, None, grad_BKX)


def _tile_sizes(q_shape, k_shape, rows, block_n, warps, stages, **more):
    """Constants of an attention whose tiles have `rows` rows, or one query and all heads of its key head."""
    (H, E), G = q_shape[2:], k_shape[2]
    r_rows = power_of_2(H // G)
    sizes = {"H": H, "G": G, "E": E, "SCALE": E**-0.5 * LOG2E.value, "R_ROWS": r_rows, "BLOCK_N": block_n, **more}
    return sizes | {"BLOCK_Q": max(1, rows // r_rows), "num_warps": warps, "num_stages": stages}


@lru_cache(maxsize=1024)
def _local_plan(q_shape, k_shape, v_shape, dtypes, device, element_size, window, ring_shape, merged):
    """Grid and constants of a local attention; `merged`: shapes of linear, head_gate and norm, or None."""
    check_heads(q_shape, k_shape, v_shape, *dtypes)
    (B, T, H, E), G = q_shape, k_shape[2]
    check((window >= 1, f"window must be at least 1, got {window}"))
    if ring_shape not in (None, (B, window, G, E)):
        raise ValueError(f"ring must hold the window, {(B, window, G, E)}, got {tuple(ring_shape)}")
    wanted = {"linear": (B, T, H, E), "head_gate": (B, T, H), "norm": (E,)}
    for (name, shape), got in zip(wanted.items(), merged or wanted.values(), strict=True):
        check((got == shape, f"{name} must be {shape}, to fit q, got {tuple(got)}"))
    # H200, B=64, T=4096, 16/4 heads, E=128, window 128, bf16: 64 rows and 32 keys 1.32 ms (1.41 without descriptors),
    # 128 and 32 1.42, 128 and 64 1.58. Float32: the largest tile that does not spill. `reflexive_merge` reads one more
    # tile after the keys, for which the compiler takes 152 registers in bf16 on sm_90: three programs per processor
    # instead of four, 2.02 ms. Held to 128 it spills 32 bytes (up to 96 on sm_100) and takes 1.74; three stages
    # without the bound 1.89
    held = merged is not None and element_size == 2 and capability(device) in (90, 100)
    rows, stages = (32, 1) if element_size == 4 else (64, 2)
    sizes = _tile_sizes(q_shape, k_shape, rows, 32, 4, stages, WINDOW=window, **({"maxnreg": 128} if held else {}))
    return (cdiv(T, sizes["BLOCK_Q"]) * G * B,), has_descriptors(device, element_size), sizes


@local_attention.kernel
def _local_attention(
    q_BTHE, k_BTGE, v_BTGE, start_BT, window, ring_k_BWGE, ring_v_BWGE, seen_B, linear_BTHE=None, head_gate_BTH=None,
    norm_E=None, eps=0.0,
):  # fmt: skip
    """The attention and its log-sum-exp or, with `linear_BTHE` and what follows, `reflexive_merge` and None."""
    (B, T, H, E), q, k, v = q_BTHE.shape, q_BTHE, k_BTGE, v_BTGE
    grid, tiled, sizes = _local_plan(
        q.shape, k.shape, v.shape, (q.dtype, k.dtype, v.dtype), q.device, q.element_size(), window,
        None if ring_k_BWGE is None else ring_k_BWGE.shape,
        None if linear_BTHE is None else (linear_BTHE.shape, head_gate_BTH.shape, norm_E.shape),
    )  # fmt: skip
    out, step, lse = torch.empty_like(q), 0, None
    if linear_BTHE is None:
        lse = q.new_empty(B, T, H, dtype=torch.float32)
    else:
        # Half of the columns of one projection, as the model has them, need no copy
        if head_gate_BTH.stride(2) != 1 or (B > 1 and head_gate_BTH.stride(0) != T * head_gate_BTH.stride(1)):
            head_gate_BTH = head_gate_BTH.contiguous()
        step = head_gate_BTH.stride(1)
    # Without a start every token sees only this call, so a ring changes nothing
    ring = (None, None, None) if start_BT is None else (ring_k_BWGE, ring_v_BWGE, seen_B)
    if out.numel():
        block = (1, sizes["BLOCK_N"], 1, E)
        maps = tile_maps((k, k.shape, k.stride(), block), (v, v.shape, v.stride(), block)) if tiled else (None, None)
        local_attention_kernel[grid](
            q, k, v, *maps, start_BT, *ring, linear_BTHE, head_gate_BTH, norm_E, out, lse, T,
            START=0 if start_BT is None else min(2, start_BT.shape[1]), GATE_STEP=step, EPS=eps, **sizes,
        )  # fmt: skip
    return out, lse


@reflexive_merge.kernel(strided=("head_gate_BTH",))
def _reflexive_merge(*inputs):
    """`local_attention` that adds the other part before its one write; all but the products is float32."""
    return _local_attention(*inputs)[0]


def _store_rows(k_BPGE, v_BPGE):
    """Keys and values whose rows are contiguous one by one: a store with spare slots at its end is not copied."""
    (G, E), step = k_BPGE.shape[2:], k_BPGE.stride(0)
    if k_BPGE.stride() == v_BPGE.stride() == (step, G * E, E, 1) and step % (G * E) == 0:
        return k_BPGE, v_BPGE
    return k_BPGE.contiguous(), v_BPGE.contiguous()


@lru_cache(maxsize=1024)
def _sqsk_plan(q_shape, k_shape, v_shape, dtypes, device, element_size, K):
    """Programs, parts of the keys worked on at once (1 to 64), whether tiles come through descriptors, constants."""
    check_heads(q_shape, k_shape, v_shape, *dtypes)
    (B, _, H, _), (P, G) = q_shape, k_shape[1:3]
    few, fill = K * power_of_2(H // G) <= 64, processors(device)
    # H200, 16/4 heads, E=128, bf16, TFLOP/s of 64 rows with 32 keys against 128 with 64: 339 and 298 at 64x820, 464
    # and 521 at 8x6554, 435 and 540 at 1x67175. Elsewhere 8 warps, so that 128 rows do not spill
    if element_size == 4:
        options = (16 if few else 32, 32, 4, 1)
    elif few:
        options = (16, 64, 4, 2)
    else:
        options = (64, 32, 4, 3) if K <= 2048 else (128, 64, 4 if capability(device) in (90, 100) else 8, 2)
    sizes = _tile_sizes(q_shape, k_shape, *options)
    programs, splits = cdiv(K, sizes["BLOCK_Q"]) * G * B, 1
    if few and 0 < programs < fill:  # else the queries fill the chip
        splits = 1 << (min(64, power_of_2(cdiv(2 * fill, programs)), max(1, P // 256)).bit_length() - 1)
    return programs, splits, not few and has_descriptors(device, element_size), sizes


def _launch_sqsk(q, k, v, log_gate, index, first, held, count, end, gate, out, lse, K, add=False):
    """Launch over [B, K] queries; `add`: to `out`, which has tokens as rows, times `gate`; `lse` may be None."""
    (B, T, H, E), G, step = q.shape, k.shape[2], 0
    if log_gate is not None:
        if log_gate.shape != k.shape[:2] or log_gate.dtype != torch.float32:
            got = f"{tuple(log_gate.shape)} in {log_gate.dtype}"
            raise ValueError(f"log_gate must be {tuple(k.shape[:2])} in float32, one per key, got {got}")
        log_gate = log_gate if log_gate.stride(1) == 1 else log_gate.contiguous()
        step = log_gate.stride(0)
    programs, splits, tiled, sizes = _sqsk_plan(
        q.shape, k.shape, v.shape, (q.dtype, k.dtype, v.dtype), q.device, q.element_size(), K
    )
    if not programs:
        return
    first = None if first is None else first.expand(B, K).contiguous()
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty(B, splits, K, H, E, dtype=torch.float32)
        part_lse = q.new_empty(B, splits, K, H, dtype=torch.float32)
    block = (1, sizes["BLOCK_N"], 1, E)
    maps = tile_maps((k, k.shape, k.stride(), block), (v, v.shape, v.stride(), block)) if tiled else (None, None)
    sqsk_attention_kernel[(programs * splits,)](
        q, k, v, *maps, log_gate, index, first, held, count, end, gate if splits == 1 else None, part, part_lse, T, K,
        k.stride(0) // (G * E), step, SPLITS=splits, ADD=add and splits == 1, **sizes,
    )  # fmt: skip
    if splits > 1:
        combine_splits_kernel[(B * K * H,)](
            part, part_lse, index, count, gate, out, lse, T, K, H=H, E=E, SPLITS=splits, ADD=add, num_warps=1
        )


@sqsk_attention.kernel(strided=("k_BPGE", "v_BPGE", "log_gate_BP"))
def _sqsk_attention(q_BKHE, k_BPGE, v_BPGE, log_gate_BP, first_BK, held_B, count_B, end_BK):
    """Slots past `count_B` are never read as keys and give zeros; work is done for the count alone."""
    (B, K, H, _), kv = q_BKHE.shape, _store_rows(k_BPGE, v_BPGE)
    out_BKHE, lse_BKH = torch.empty_like(q_BKHE), q_BKHE.new_empty(B, K, H, dtype=torch.float32)
    kv = *kv, log_gate_BP
    _launch_sqsk(q_BKHE, *kv, None, first_BK, held_B, count_B, end_BK, None, out_BKHE, lse_BKH, K)
    return out_BKHE, lse_BKH


def _has_gradient(q, k, v):
    """Whether the kernels have the gradient of such queries, keys and values, of one call alone."""
    return takes_heads(q, k, v) and k.shape == v.shape and q.shape[0] == k.shape[0]


@lru_cache(maxsize=1024)
def _gradient_plan(q_shape, k_shape, device, element_size, window):
    """Grid, whether tiles come through descriptors, and constants, of the gradient of the queries and of the keys."""
    (B, T, H, _), (P, G) = q_shape, k_shape[1:3]
    kind = "float32" if element_size == 4 else "window" if window else "rows" if T <= 2048 else "long"
    tables = GRADIENT_TILES[kind] if capability(device) in (90, 100) else OTHER_GRADIENT_TILES[kind]
    tiled, both = has_descriptors(device, element_size), []
    for rows, block, options in zip((T, P), ("BLOCK_Q", "BLOCK_N"), tables, strict=True):
        sizes = _tile_sizes(q_shape, k_shape, *options, WINDOW=window)
        both.append(((cdiv(rows, sizes[block]) * G * B,), tiled, sizes))
        tiled = tiled and sizes["R_ROWS"] * G == H  # the heads of a key head are then rows of one tile
    return both


def _attention_gradient(grad, grad_lse, q, k, v, log_gate, start, count, end, window, out, lse):
    """Of T queries, P keys of which `count` are used, values, and log gates if there are any; `window` 0 for none."""
    T, P, R, E = q.shape[1], k.shape[1], q.shape[2] // k.shape[2], q.shape[3]
    (q_grid, kv_tiled, q_sizes), (kv_grid, q_tiled, kv_sizes) = _gradient_plan(
        q.shape, k.shape, q.device, q.element_size(), window
    )
    grads, delta, parts_BPG = [torch.empty_like(x) for x in (q, k, v)], torch.empty_like(lse), None
    if log_gate is not None:
        parts_BPG = k.new_empty(k.shape[:3], dtype=torch.float32)
    if not q.numel():
        return [torch.zeros_like(x) for x in (q, k, v, log_gate) if x is not None]
    if start is not None and not window:
        start = start.expand(q.shape[:2]).contiguous()
    kind = 0 if start is None else min(2, start.shape[1])
    kv_block, q_block = (1, q_sizes["BLOCK_N"], 1, E), (1, kv_sizes["BLOCK_Q"], R, E)
    kv_maps = tile_maps(*((x, x.shape, x.stride(), kv_block) for x in (k, v))) if kv_tiled else (None, None)
    q_maps = tile_maps(*((x, x.shape, x.stride(), q_block) for x in (q, grad))) if q_tiled else (None, None)
    query_gradient_kernel[q_grid](
        q, k, v, *kv_maps, log_gate, start, count, end, grad, grad_lse, out, lse, delta, grads[0], T, P, START=kind,
        **q_sizes,
    )  # fmt: skip
    key_gradient_kernel[kv_grid](
        q, k, v, *q_maps, log_gate, start, count, end, grad, grad_lse, lse, delta, *grads[1:], parts_BPG, T, P,
        T.bit_length(), START=kind, **kv_sizes,
    )  # fmt: skip
    return grads if log_gate is None else [*grads, parts_BPG.sum(-1)]


@local_attention.gradient(
    wrt=("q_BTHE", "k_BTGE", "v_BTGE"), keeps=(0, 1),
    takes=lambda q, k, v, start, window, ring_k, *_: ring_k is None and _has_gradient(q, k, v),
)  # fmt: skip
def _local_attention_back(grad_BTHE, grad_lse_BTH, q, k, v, start_BT, window, ring_k, ring_v, seen_B, out, lse):
    return _attention_gradient(grad_BTHE, grad_lse_BTH, q, k, v, None, start_BT, None, None, window, out, lse)


@sqsk_attention.gradient(
    wrt=("q_BKHE", "k_BPGE", "v_BPGE", "log_gate_BP"), keeps=(0, 1),
    takes=lambda q, k, v, log_gate, first, held, count, end: held is None and _has_gradient(q, k, v),
)  # fmt: skip
def _sqsk_attention_back(grad_BKHE, grad_lse_BKH, q, k, v, log_gate, first_BK, held_B, count_B, end_BK, out, lse):
    return _attention_gradient(grad_BKHE, grad_lse_BKH, q, k, v, log_gate, first_BK, count_B, end_BK, 0, out, lse)


@contextual.kernel
def _contextual(q_BTHE, k_BTGE, v_BTGE, gate_BT, index_BK, slot_BT, first_BK, count_B):
    """Queries are read where their tokens stand; the sum with the reflexive stream is left to the caller, who fuses it
    with what makes that."""
    (B, K), (H, E), kv = index_BK.shape, q_BTHE.shape[2:], _gather(index_BK, count_B, k_BTGE, v_BTGE)
    out_BKHE, lse_BKH = q_BTHE.new_empty(B, K, H, E), q_BTHE.new_empty(B, K, H, dtype=torch.float32)
    _launch_sqsk(q_BTHE, *kv, None, index_BK, first_BK, None, count_B, None, None, out_BKHE, lse_BKH, K)
    return *_gather(slot_BT, None, out_BKHE, gate_BK=gate_BT), out_BKHE, lse_BKH


@contextual.gradient(
    wrt=("q_BTHE", "k_BTGE", "v_BTGE", "gate_BT"), keeps=(1, 2), outputs=1,
    takes=lambda q, k, v, *_: _has_gradient(q, k, v),
)  # fmt: skip
def _contextual_back(grad_BTHE, q_BTHE, k_BTGE, v_BTGE, gate_BT, index_BK, slot_BT, first_BK, count_B, out, lse):
    """Rows are gathered a second time: held since forward they would take 6 KB of each routed token in bf16 (16/4
    heads of 128)."""
    (B, T), grad_BKHE, grad_gate_BT = slot_BT.shape, torch.empty_like(out), torch.zeros_like(gate_BT)
    if out.numel():
        K, X = out.shape[1], out.stride(1)
        gate_gradient_kernel[(cdiv(T, 4), B)](
            grad_BTHE, gate_BT, out, slot_BT, grad_BKHE, grad_gate_BT, T, K, X=X, BLOCK_T=4,
            BLOCK_X=min(512, power_of_2(X)), num_warps=4,
        )  # fmt: skip
    rows = _gather(index_BK, count_B, q_BTHE, k_BTGE, v_BTGE)
    grads = _attention_gradient(grad_BKHE, torch.zeros_like(lse), *rows, None, first_BK, count_B, None, 0, out, lse)
    return *_gather(slot_BT, None, *grads), grad_gate_BT


@sqsk_merge.kernel(strided=("k_BPGE", "v_BPGE", "log_gate_BP"))
def _sqsk_merge(
    reflexive_BTHE, gate_BT, q_BTHE, k_BPGE, v_BPGE, log_gate_BP, index_BK, first_BN, held_B, count_B, end_BT
):  # fmt: skip
    """The sum is float32; where routed tokens alone read, the others are not passed over."""
    layout = f"reflexive must be contiguous {tuple(q_BTHE.shape)}, got {tuple(reflexive_BTHE.shape)}, contiguous="
    if reflexive_BTHE.shape != q_BTHE.shape or not reflexive_BTHE.is_contiguous():
        raise ValueError(f"{layout}{reflexive_BTHE.is_contiguous()}")
    if held_B is None:
        # Compacting first costs 0.07 ms at B=64, T=4096; gathering keys inside the kernel cost 30 % of its rate (H200,
        # timed with zeros in every unused slot; none is written now, as the attention reads no slot past the count)
        k, v = _gather(index_BK, count_B, k_BPGE.contiguous(), v_BPGE.contiguous())
        if log_gate_BP is not None:
            [log_gate_BP] = _gather(index_BK, count_B, log_gate_BP.contiguous())
    else:
        k, v = _store_rows(k_BPGE, v_BPGE)
    index, gate, N = (index_BK, gate_BT, index_BK.shape[1]) if end_BT is None else (None, None, q_BTHE.shape[1])
    kept = k, v, log_gate_BP
    _launch_sqsk(q_BTHE, *kept, index, first_BN, held_B, count_B, end_BT, gate, reflexive_BTHE, None, N, add=True)


@cache
def kept_form(dtype, E):
    """Constants of a store of `dtype`: elements of a head, and half of the levels of a whole number, or 0."""
    half = LEVELS.get(dtype, 0) // 2
    return {"WIDTH": E // 8 if dtype == torch.int32 else E, "HALF": half}


@extend.kernel
def _extend(
    k_BTGE, v_BTGE, position_BT, start_BT, length_B, seen_B, score_BT, index_BK, slot_BT, count_B, every, ring_k_BWGE,
    ring_v_BWGE, keys_BPGE, values_BPGE, positions_BP, held_B, document_slot_B, key_scales_BPG, value_scales_BPG,
    log_gates_BP,
):  # fmt: skip
    """One launch for ring and store; documents' first slots come from a bisection of the routed tokens."""
    (B, T, G, E), W, P = k_BTGE.shape, ring_k_BWGE.shape[1], keys_BPGE.shape[1] - 1
    written = {"ring_k": ring_k_BWGE, "ring_v": ring_v_BWGE, "keys": keys_BPGE, "values": values_BPGE}
    kept = kept_form(keys_BPGE.dtype, E)
    for (name, x), width in zip(written.items(), (E, E, kept["WIDTH"], kept["WIDTH"]), strict=True):
        if not x.is_contiguous() or x.shape[2:] != (G, width):
            raise ValueError(f"{name} must be contiguous [{B}, N, {G}, {width}] to be written, got {tuple(x.shape)}")
    routes, K = index_BK is not None, 0 if index_BK is None else index_BK.shape[1]
    N, log_gates = T if every else K, log_gates_BP if log_gates_BP.shape == positions_BP.shape else None
    blocks = cdiv(W, STORE_BLOCK) + (max(1, cdiv(N, STORE_BLOCK)) if routes else 0)
    shapes = ((B, N), (2, B), B, B) if routes else (0,) * 4
    outputs = tuple(map(held_B.new_empty, shapes))
    if not (B and T and blocks * G):
        return outputs
    extend_kernel[(blocks * G, B)](
        k_BTGE, v_BTGE, position_BT, start_BT, length_B, seen_B, score_BT, index_BK, count_B, *written.values(),
        positions_BP, held_B, document_slot_B, key_scales_BPG, value_scales_BPG, log_gates, *outputs, B, T, K, P,
        T if position_BT.shape[0] > 1 else 0, K.bit_length(), G=G, E=E, WINDOW=W, BLOCK=STORE_BLOCK,
        START=0 if start_BT is None else min(2, start_BT.shape[1]), EVERY=every, **kept, num_warps=4,
    )  # fmt: skip
    return outputs
