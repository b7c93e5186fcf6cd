"""The two softmax attentions on the GPU: the local window and SQSK, which gathers routed tokens and merges its result.

Meaning and shapes: `local_attention_ref`, `reflexive_merge_ref`, `sqsk_attention_ref` and `merge_ref` in
`reference_hspmn`; legend in `kernels_common_hspmn`. The R query heads that share a key head are rows of one tile, so
keys and values are read once for all of them and a tile spans few slots, which keeps the wasted part of the diagonal
small.
"""

import torch

from .kernels_common_hspmn import (
    FLOOR,
    LN2,
    LOG2E,
    capability,
    check_heads,
    has_descriptors,
    operation,
    processors,
    rows_of,
)

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error


@triton.jit
def fold_block(scores, v_tile, acc, peak, total, SCALE: tl.constexpr):
    """Take one block of keys into the running softmax; SCALE turns raw scores into log2 units, -inf masks."""
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


@triton.jit(do_not_specialize=["T"])
def local_attention_kernel(
    q, k, v, k_map, v_map, start, history_k, history_v, linear, head_gate, norm, out, lse, T,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    GATE_STEP: tl.constexpr, EPS: tl.constexpr, R_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr, HAS_HISTORY: tl.constexpr, MERGE: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of the heads of one key head; row m of the tile is query m // R_ROWS, head m % R_ROWS.

    MERGE: out = attention + RMSNorm(linear) * sigmoid(head_gate); GATE_STEP: from one token's gates to the next.
    """
    R: tl.constexpr = H // G
    BEHIND: tl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(T, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    t_begin = (program % tiles).to(tl.int32) * BLOCK_Q
    g = program // tiles % G
    b = program // (tiles * G)
    m = tl.arange(0, BLOCK_Q * R_ROWS)
    n = tl.arange(0, BLOCK_N)
    e = tl.arange(0, E)
    t = t_begin + m // R_ROWS
    real = (t < T) & (m % R_ROWS < R)
    # Offsets inside a tile fit 32 bits, which halves the registers that addresses take
    row = (b * T + t_begin) * H + g * R
    row_at = m // R_ROWS * H + m % R_ROWS
    q_at = row_at[:, None] * E + e[None, :]
    kv_at = n[:, None] * (G * E) + e[None, :]
    q_tile = tl.load(q + row * E + q_at, mask=real[:, None], other=0.0)
    first = t - WINDOW + 1
    if HAS_START:
        begin = tl.load(start + b * T + t, mask=t < T, other=0)
        first = tl.maximum(first, tl.maximum(begin, -WINDOW).to(tl.int32))
    # Blocks start at multiples of BLOCK_N, so each lies wholly in the history or wholly in this call
    low = (t_begin - WINDOW + 1 + BEHIND) // BLOCK_N * BLOCK_N - BEHIND
    acc = tl.zeros([BLOCK_Q * R_ROWS, E], tl.float32)
    peak = tl.full([BLOCK_Q * R_ROWS], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_Q * R_ROWS], tl.float32)
    if HAS_HISTORY:
        for s in range(low, 0, BLOCK_N):
            key = s + n
            held = (key >= -WINDOW) & (key < 0)
            at = ((b * WINDOW + WINDOW + s) * G + g) * E
            k_tile = tl.load(history_k + at + kv_at, mask=held[:, None], other=0.0)
            v_tile = tl.load(history_v + at + kv_at, mask=held[:, None], other=0.0)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
            visible = (key[None, :] >= first[:, None]) & held[None, :]
            scores = tl.where(visible, scores, float("-inf"))
            acc, peak, total = fold_block(scores, v_tile, acc, peak, total, SCALE)
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
        scores = tl.where(visible, scores, float("-inf"))
        acc, peak, total = fold_block(scores, v_tile, acc, peak, total, SCALE)
    tile, row_lse = finish(acc, peak, total)
    if MERGE:
        linear_tile = tl.load(linear + row * E + q_at, mask=real[:, None], other=0.0).to(tl.float32)
        gate_at = (b * T + t_begin) * GATE_STEP + g * R
        gate = tl.load(head_gate + gate_at + (m // R_ROWS * GATE_STEP + m % R_ROWS), mask=real, other=0.0)
        scale = tl.rsqrt(tl.sum(linear_tile * linear_tile, 1) / E + EPS) / (1.0 + tl.exp(-gate.to(tl.float32)))
        # Rounded first, as the reference does: moving the rows to the threads that store them takes half the registers
        tile = tile.to(out.dtype.element_ty).to(tl.float32)
        tile += linear_tile * scale[:, None] * tl.load(norm + e).to(tl.float32)[None, :]
    tl.store(out + row * E + q_at, tile.to(out.dtype.element_ty), mask=real[:, None])
    if WITH_LSE:
        tl.store(lse + row + row_at, row_lse, mask=real)


@triton.jit(do_not_specialize=["T", "K", "P"])
def sqsk_attention_kernel(
    q, k, v, k_map, v_map, index, first, cached, count, gate, out, lse, T, K, P,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr,
    R_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    GATHER: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_CACHED: tl.constexpr,
    MERGE: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q slots of the heads of one key head over one of SPLITS parts of their keys.

    Row m of the tile is slot m // R_ROWS, head m % R_ROWS. GATHER: rows of q are tokens named by `index`, else slots.
    P: slots from one row of k and v to the next. k_map, v_map: tensor descriptors of k and v for the blocks that need
    no mask, or None. MERGE: out[token] += gate * result, else out[slot] = result, with zeros in unused slots.
    """
    R: tl.constexpr = H // G
    tiles = tl.cdiv(K, BLOCK_Q)
    program = tl.program_id(0).to(tl.int64)
    # The longest tiles first, so that the last programs to start are the shortest
    i_begin = (tiles - 1 - program % tiles).to(tl.int32) * BLOCK_Q
    g = program // tiles % G
    split = program // (tiles * G) % SPLITS
    b = program // (tiles * G * SPLITS)
    used = tl.minimum(tl.load(count + b).to(tl.int32), K)
    m = tl.arange(0, BLOCK_Q * R_ROWS)
    n = tl.arange(0, BLOCK_N)
    e = tl.arange(0, E)
    slot = i_begin + m // R_ROWS
    head = g * R + m % R_ROWS
    held = (slot < K) & (m % R_ROWS < R)
    real = (slot < used) & (m % R_ROWS < R)
    slot_row = ((b * SPLITS + split) * K + slot) * H + head
    if i_begin >= used:
        if not MERGE:
            empty = tl.zeros([BLOCK_Q * R_ROWS, E], out.dtype.element_ty)
            tl.store(out + slot_row[:, None] * E + e[None, :], empty, mask=held[:, None])
            if WITH_LSE:
                tl.store(lse + slot_row, tl.full([BLOCK_Q * R_ROWS], float("-inf"), tl.float32), mask=held)
        return
    if GATHER:
        token = tl.load(index + b * K + slot, mask=real, other=0).to(tl.int64)
        token_row = (b * T + token) * H + head
    else:
        token_row = (b * K + slot) * H + head
    q_tile = tl.load(q + token_row[:, None] * E + e[None, :], mask=real[:, None], other=0.0)
    past = 0
    if HAS_CACHED:
        past = tl.load(cached + b).to(tl.int32)
    low = 0
    high = past + tl.minimum(i_begin + BLOCK_Q, used)
    clear = (past + i_begin + 1) // BLOCK_N * BLOCK_N  # keys before this are visible to every row
    row_first = tl.zeros([BLOCK_Q * R_ROWS], tl.int32)
    if HAS_FIRST:
        row_first = tl.load(first + b * K + slot, mask=real, other=0).to(tl.int32)
        low = tl.maximum(tl.load(first + b * K + i_begin).to(tl.int32), 0) // BLOCK_N * BLOCK_N
        clear = low
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(high - low, SPLITS), BLOCK_N) * BLOCK_N
        low += split.to(tl.int32) * share
        high = tl.minimum(high, low + share)
        clear = tl.maximum(tl.minimum(clear, high // BLOCK_N * BLOCK_N), low)
    kv_at = n[:, None] * (G * E) + e[None, :]
    acc = tl.zeros([BLOCK_Q * R_ROWS, E], tl.float32)
    peak = tl.full([BLOCK_Q * R_ROWS], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_Q * R_ROWS], tl.float32)
    for s in range(low, clear, BLOCK_N):
        if k_map is not None:
            k_tile = k_map.load([b.to(tl.int32), s, g.to(tl.int32), 0]).reshape(BLOCK_N, E)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
            v_tile = v_map.load([b.to(tl.int32), s, g.to(tl.int32), 0]).reshape(BLOCK_N, E)
        else:
            at = ((b * P + s) * G + g) * E + kv_at
            scores = tl.dot(q_tile, tl.trans(tl.load(k + at)), input_precision="tf32x3")
            v_tile = tl.load(v + at)
        acc, peak, total = fold_block(scores, v_tile, acc, peak, total, SCALE)
    for s in range(clear, high, BLOCK_N):
        key = s + n
        at = ((b * P + s) * G + g) * E + kv_at
        # Slots past the count may hold anything, NaN too: a zero weight alone would not hide them
        k_tile = tl.load(k + at, mask=(key < high)[:, None], other=0.0)
        v_tile = tl.load(v + at, mask=(key < high)[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
        visible = (key[None, :] <= (past + slot)[:, None]) & (key < high)[None, :]
        if HAS_FIRST:
            visible = visible & (key[None, :] >= row_first[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        acc, peak, total = fold_block(scores, v_tile, acc, peak, total, SCALE)
    tile, row_lse = finish(acc, peak, total)
    if MERGE:
        at = token_row[:, None] * E + e[None, :]
        weight = tl.load(gate + b * T + token, mask=real, other=0.0).to(tl.float32)
        tile = tl.load(out + at, mask=real[:, None], other=0.0).to(tl.float32) + weight[:, None] * tile
        tl.store(out + at, tile.to(out.dtype.element_ty), mask=real[:, None])
    else:
        tile = tl.where(real[:, None], tile, 0.0)
        tl.store(out + slot_row[:, None] * E + e[None, :], tile.to(out.dtype.element_ty), mask=held[:, None])
    if WITH_LSE:
        tl.store(lse + slot_row, tl.where(real, row_lse, float("-inf")), mask=held)


@triton.jit(do_not_specialize=["T", "K"])
def combine_splits_kernel(
    part, part_lse, index, count, gate, out, lse, T, K,
    H: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, MERGE: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """One slot and head: the SPLITS partial softmaxes as one, stored or merged as `sqsk_attention_kernel` does."""
    program = tl.program_id(0).to(tl.int64)
    h = program % H
    slot = program // H % K
    b = program // (H * K)
    e = tl.arange(0, E)
    p = tl.arange(0, SPLITS)
    real = slot < tl.load(count + b)
    row = ((b * SPLITS + p) * K + slot) * H + h
    logs = tl.load(part_lse + row) * LOG2E
    peak = tl.maximum(tl.max(logs, 0), FLOOR)
    weights = tl.exp2(logs - peak)
    total = tl.sum(weights, 0)
    parts = tl.load(part + row[:, None] * E + e[None, :])
    tile = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    if MERGE:
        token = tl.load(index + b * K + slot, mask=real, other=0)
        at = ((b * T + token) * H + h) * E + e
        merged = tl.load(out + at).to(tl.float32) + tl.load(gate + b * T + token).to(tl.float32) * tile
        tl.store(out + at, merged.to(out.dtype.element_ty), mask=(e < E) & real)
    else:
        tl.store(out + ((b * K + slot) * H + h) * E + e, tile.to(out.dtype.element_ty))
    if WITH_LSE:
        value = tl.where(total > 0, (peak + tl.log2(total)) * LN2, float("-inf"))
        tl.store(lse + (b * K + slot) * H + h, value)


@triton.jit(do_not_specialize=["T", "K"])
def take_rows_kernel(
    x, index, count, out, T, K, X: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr, HAS_COUNT: tl.constexpr
):  # fmt: skip
    """out[b, k] = x[b, index[b, k]] for rows of X elements; index -1 gives zeros, slots past the count stay as is."""
    b = tl.program_id(1).to(tl.int64)
    stop = K
    if HAS_COUNT:
        stop = tl.minimum(tl.load(count + b).to(tl.int32), K)
        if tl.program_id(0) * BLOCK_K >= stop:
            return
    slot = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.load(index + b * K + slot, mask=slot < stop, other=-1).to(tl.int64)
    for begin in range(0, X, BLOCK_X):
        c = begin + tl.arange(0, BLOCK_X)
        in_x = (c < X)[None, :]
        rows = tl.load(x + (b * T + token)[:, None] * X + c[None, :], mask=(token >= 0)[:, None] & in_x, other=0.0)
        tl.store(out + (b * K + slot)[:, None] * X + c[None, :], rows, mask=(slot < stop)[:, None] & in_x)


def _row_block(R_ROWS, rows):
    """Slots per tile so that a tile has `rows` rows, at least one slot."""
    return max(1, rows // R_ROWS)


def local_attention_config(element_size, r_rows, merge, compute_capability):
    """Block sizes and launch options of `local_attention_kernel`.

    H200, B=64, T=4096, 16/4 heads, E=128, window 128, bf16: 64 rows and 32 keys 1.32 ms (1.41 without
    descriptors), 128 rows and 32 keys 1.42, 128 rows and 64 keys 1.58. Float32: the largest tile that does not spill.
    `merge` (`reflexive_merge`) reads one more tile after the keys, for which the compiler takes 152 registers in bf16
    on sm_90: three programs per processor instead of four, 2.02 ms. Held to 128 it spills 32 bytes (up to 96 on
    sm_100) and takes 1.74; three stages without the bound 1.89.
    """
    if element_size == 4:
        return {"BLOCK_Q": _row_block(r_rows, 32), "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    registers = {"maxnreg": 128} if merge and compute_capability in (90, 100) else {}
    return {"BLOCK_Q": _row_block(r_rows, 64), "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, **registers}


def sqsk_attention_config(element_size, r_rows, K, compute_capability):
    """Block sizes and launch options of `sqsk_attention_kernel` for K query slots.

    H200, 16/4 heads, E=128, bf16, TFLOP/s of 64 rows with 32 keys against 128 with 64: 339 and 298 at 64x820, 464 and
    521 at 8x6554, 435 and 540 at 1x67175. Elsewhere 8 warps, so that 128 rows do not spill.
    """
    few_queries = K * r_rows <= 64
    if element_size == 4:
        rows = 16 if few_queries else 32
        return {"BLOCK_Q": _row_block(r_rows, rows), "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if few_queries:
        return {"BLOCK_Q": _row_block(r_rows, 16), "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    if K <= 2048:
        return {"BLOCK_Q": _row_block(r_rows, 64), "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
    warps = 4 if compute_capability in (90, 100) else 8
    return {"BLOCK_Q": _row_block(r_rows, 128), "BLOCK_N": 64, "num_warps": warps, "num_stages": 2}


def _launch_take_rows(x_BTX, index_BK, count_B):
    """Rows named by `index_BK`; with `count_B`, slots past it are left as they were allocated."""
    (B, T), K, x = x_BTX.shape[:2], index_BK.shape[1], x_BTX.contiguous()
    out = x.new_empty(B, K, *x.shape[2:])
    if out.numel():
        X = x[0, 0].numel()
        take_rows_kernel[(triton.cdiv(K, 8), B)](
            x, index_BK.contiguous(), count_B, out, T, K,
            X=X, BLOCK_K=8, BLOCK_X=min(512, triton.next_power_of_2(X)), HAS_COUNT=count_B is not None, num_warps=4,
        )  # fmt: skip
    return out


@operation("take_rows")
def _take_rows(x_BTX: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
    return _launch_take_rows(x_BTX, index_BK, None)


@_take_rows.register_fake
def _(x_BTX, index_BK):
    return x_BTX.new_empty(x_BTX.shape[0], index_BK.shape[1], *x_BTX.shape[2:])


def take_rows(x_BTX, index_BK):
    """`take_rows_ref`: rows of `x_BTX` [B, T, ...] named by `index_BK` as [B, K, ...]; index -1 gives zeros."""
    return _take_rows(x_BTX, index_BK)


def _launch_local(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history, merged, eps, with_lse):
    """Launch of the local attention; `merged`: linear_BTHE, head_gate_BTH and norm_E to merge, or three None."""
    (B, T, H, E), G = q_BTHE.shape, k_BTGE.shape[2]
    q, k, v = (x.contiguous() for x in (q_BTHE, k_BTGE, v_BTGE))
    out_BTHE = torch.empty_like(q)
    lse_BTH = q.new_empty((B, T, H) if with_lse else 0, dtype=torch.float32)
    r_rows = triton.next_power_of_2(H // G)
    config = local_attention_config(q.element_size(), r_rows, merged[0] is not None, capability(q.device))
    # Without a start every token sees only this call, so a history changes nothing
    has_history = history[0] is not None and start_BT is not None
    history = [x.to(q.dtype).contiguous() if has_history else None for x in history]
    maps = [_descriptor(x, config["BLOCK_N"]) for x in (k, v)]
    linear, head_gate, norm = merged
    if linear is not None:
        linear, norm = linear.contiguous(), norm.contiguous()
        # Half of the columns of one projection, as the model has them, need no copy
        if head_gate.stride(2) != 1 or (B > 1 and head_gate.stride(0) != T * head_gate.stride(1)):
            head_gate = head_gate.contiguous()
    local_attention_kernel[(triton.cdiv(T, config["BLOCK_Q"]) * G * B,)](
        q, k, v, *maps, rows_of(start_BT, B), *history, linear, head_gate, norm, out_BTHE, lse_BTH, T,
        H=H, G=G, E=E, WINDOW=window, SCALE=E**-0.5 * LOG2E.value, R_ROWS=r_rows,
        GATE_STEP=0 if linear is None else head_gate.stride(1), EPS=eps, MERGE=linear is not None,
        HAS_START=start_BT is not None, HAS_HISTORY=has_history, WITH_LSE=with_lse, **config,
    )  # fmt: skip
    return out_BTHE, lse_BTH


@operation("local_attention")
def _local_attention(
    q_BTHE: torch.Tensor,
    k_BTGE: torch.Tensor,
    v_BTGE: torch.Tensor,
    start_BT: torch.Tensor | None,
    window: int,
    history_k_BWGE: torch.Tensor | None,
    history_v_BWGE: torch.Tensor | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    history = history_k_BWGE, history_v_BWGE
    return _launch_local(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history, (None,) * 3, None, with_lse)


@_local_attention.register_fake
def _(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history_k_BWGE, history_v_BWGE, with_lse):
    q = q_BTHE.contiguous()
    return torch.empty_like(q), q.new_empty(q.shape[:3] if with_lse else 0, dtype=torch.float32)


def _check_local(q_BTHE, k_BTGE, v_BTGE, window, history_k_BWGE):
    check_heads(q_BTHE, k_BTGE, v_BTGE)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if history_k_BWGE is not None and history_k_BWGE.shape[1] != window:
        raise ValueError(f"history must hold the window ({window} tokens), got {history_k_BWGE.shape[1]}")


def local_attention(
    q_BTHE, k_BTGE, v_BTGE, start_BT, window, history_k_BWGE=None, history_v_BWGE=None, *, with_lse=False
):
    """`local_attention_ref`: out_BTHE in q's dtype, and with `with_lse` also lse_BTH in float32.

    q, k, v: one dtype of float32, bfloat16, float16; E of 16, 32, 64, 128. start_BT: integers or None. history_*: the
    `window` tokens before this call. Time and memory are O(T * window).
    Raises ValueError on shapes or dtypes the kernel does not take, or window below 1.
    """
    _check_local(q_BTHE, k_BTGE, v_BTGE, window, history_k_BWGE)
    out, lse = _local_attention(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history_k_BWGE, history_v_BWGE, with_lse)
    return (out, lse) if with_lse else out


@operation("reflexive_merge")
def _reflexive_merge(
    q_BTHE: torch.Tensor,
    k_BTGE: torch.Tensor,
    v_BTGE: torch.Tensor,
    start_BT: torch.Tensor | None,
    window: int,
    linear_BTHE: torch.Tensor,
    head_gate_BTH: torch.Tensor,
    norm_E: torch.Tensor,
    eps: float,
    history_k_BWGE: torch.Tensor | None,
    history_v_BWGE: torch.Tensor | None,
) -> torch.Tensor:
    history, merged = (history_k_BWGE, history_v_BWGE), (linear_BTHE, head_gate_BTH, norm_E)
    return _launch_local(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history, merged, eps, False)[0]


@_reflexive_merge.register_fake
def _(q_BTHE, k_BTGE, v_BTGE, start_BT, window, linear_BTHE, head_gate_BTH, norm_E, eps, history_k, history_v):
    return torch.empty_like(q_BTHE.contiguous())


def reflexive_merge(
    q_BTHE, k_BTGE, v_BTGE, start_BT, window, linear_BTHE, head_gate_BTH, norm_E, eps,
    history_k_BWGE=None, history_v_BWGE=None,
):  # fmt: skip
    """`reflexive_merge_ref`: `local_attention` that adds RMSNorm(linear) * sigmoid(head_gate) before its one write.

    q, k, v, start_BT, window, history_*: as in `local_attention`. linear_BTHE: any float dtype. head_gate_BTH: any
    float dtype, before the sigmoid; a slice of the last dimension is read in place. norm_E: any float dtype.
    Returns the reflexive stream [B, T, H, E] in q's dtype; all but the products of the attention is float32.
    Raises ValueError on shapes or dtypes the kernel does not take, or window below 1.
    """
    _check_local(q_BTHE, k_BTGE, v_BTGE, window, history_k_BWGE)
    wanted = {"linear": q_BTHE.shape, "head_gate": q_BTHE.shape[:3], "norm": q_BTHE.shape[3:]}
    for (name, shape), x in zip(wanted.items(), (linear_BTHE, head_gate_BTH, norm_E), strict=True):
        if x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, to fit q, got {tuple(x.shape)}")
    return _reflexive_merge(
        q_BTHE, k_BTGE, v_BTGE, start_BT, window, linear_BTHE, head_gate_BTH, norm_E, eps,
        history_k_BWGE, history_v_BWGE,
    )  # fmt: skip


def _splits(programs, P, few_queries, device):
    """Parts of the keys worked on at once: one where the queries fill the chip, else a power of two up to 64."""
    if not few_queries or programs >= processors(device):
        return 1
    wanted = min(64, triton.next_power_of_2(triton.cdiv(2 * processors(device), programs)), max(1, P // 256))
    return 1 << (wanted.bit_length() - 1)


def _descriptor(x_BPGE, block_n):
    """Tensor descriptor of one head's rows, or None where the hardware or the layout has none."""
    if not has_descriptors(x_BPGE) or x_BPGE.data_ptr() % 16:
        return None
    return TensorDescriptor(x_BPGE, list(x_BPGE.shape), list(x_BPGE.stride()), [1, block_n, 1, x_BPGE.shape[-1]])


def _store_rows(k_BPGE, v_BPGE):
    """Keys and values whose rows are contiguous one by one: a store with spare slots at its end is not copied."""
    P, G, E = k_BPGE.shape[1:]
    inner = (G * E, E, 1)
    if all(x.stride()[1:] == inner and x.stride(0) % inner[0] == 0 for x in (k_BPGE, v_BPGE)):
        if k_BPGE.stride(0) == v_BPGE.stride(0):
            return k_BPGE, v_BPGE
    return k_BPGE.contiguous(), v_BPGE.contiguous()


def _launch_sqsk(q, k, v, index, first, cached, count, gate, out, lse, K):
    """Launch over [B, K] slots; `gate` given: merge into `out`, which has tokens as rows; `lse` may be None."""
    (B, T, H, E), (P, G) = q.shape, k.shape[1:3]
    r_rows = triton.next_power_of_2(H // G)
    few = K * r_rows <= 64
    config = sqsk_attention_config(q.element_size(), r_rows, K, capability(q.device))
    programs = triton.cdiv(K, config["BLOCK_Q"]) * G * B
    splits = _splits(programs, P, few, q.device)
    k_map, v_map = (None if few else _descriptor(x, config["BLOCK_N"]) for x in (k, v))
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty(B, splits, K, H, E, dtype=torch.float32)
        part_lse = q.new_empty(B, splits, K, H, dtype=torch.float32)
    sqsk_attention_kernel[(programs * splits,)](
        q, k, v, k_map, v_map, index, first, cached, count, gate, part, part_lse, T, K, k.stride(0) // (G * E),
        H=H, G=G, E=E, SCALE=E**-0.5 * LOG2E.value, R_ROWS=r_rows, SPLITS=splits, GATHER=index is not None,
        HAS_FIRST=first is not None, HAS_CACHED=cached is not None,
        MERGE=gate is not None and splits == 1, WITH_LSE=part_lse is not None, **config,
    )  # fmt: skip
    if splits > 1:
        combine_splits_kernel[(B * K * H,)](
            part, part_lse, index, count, gate, out, lse, T, K,
            H=H, E=E, SPLITS=splits, MERGE=gate is not None, WITH_LSE=lse is not None, num_warps=1,
        )  # fmt: skip


@operation("sqsk_attention")
def _sqsk_attention(
    q_BKHE: torch.Tensor,
    k_BPGE: torch.Tensor,
    v_BPGE: torch.Tensor,
    first_BK: torch.Tensor | None,
    cached_B: torch.Tensor | None,
    count_B: torch.Tensor,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, K, H, _ = q_BKHE.shape
    q, (k, v) = q_BKHE.contiguous(), _store_rows(k_BPGE, v_BPGE)
    out_BKHE = torch.empty_like(q)
    lse_BKH = q.new_empty((B, K, H) if with_lse else 0, dtype=torch.float32)
    if q.numel():
        first, lse = rows_of(first_BK, B), lse_BKH if with_lse else None
        _launch_sqsk(q, k, v, None, first, cached_B, count_B, None, out_BKHE, lse, K)
    return out_BKHE, lse_BKH


@_sqsk_attention.register_fake
def _(q_BKHE, k_BPGE, v_BPGE, first_BK, cached_B, count_B, with_lse):
    q = q_BKHE.contiguous()
    return torch.empty_like(q), q.new_empty(q.shape[:3] if with_lse else 0, dtype=torch.float32)


def sqsk_attention(q_BKHE, k_BPGE, v_BPGE, first_BK, cached_B, count_B, *, with_lse=False):
    """`sqsk_attention_ref` in slot order: out_BKHE in q's dtype, and with `with_lse` also lse_BKH in float32.

    q, k, v: one dtype of float32, bfloat16, float16; E of 16, 32, 64, 128. first_BK and cached_B may be None: slot 0,
    nothing cached. Slots past `count_B` are never read as keys and give zeros. Work is done for the count alone.
    Raises ValueError on shapes or dtypes the kernel does not take.
    """
    check_heads(q_BKHE, k_BPGE, v_BPGE)
    out, lse = _sqsk_attention(q_BKHE, k_BPGE, v_BPGE, first_BK, cached_B, count_B, with_lse)
    return (out, lse) if with_lse else out


@operation("sqsk_merge", mutates_args=("reflexive_BTHE",))
def _sqsk_merge(
    reflexive_BTHE: torch.Tensor,
    gate_BT: torch.Tensor,
    q_BTHE: torch.Tensor,
    k_BPGE: torch.Tensor,
    v_BPGE: torch.Tensor,
    index_BK: torch.Tensor,
    first_BK: torch.Tensor | None,
    cached_B: torch.Tensor | None,
    count_B: torch.Tensor,
) -> None:
    B, K = index_BK.shape
    if K == 0 or B == 0:
        return
    q, gate, index = (x.contiguous() for x in (q_BTHE, gate_BT, index_BK))
    if cached_B is None:
        # Compacting first costs 0.07 ms at B=64, T=4096; gathering keys inside the kernel cost 30 % of its rate (H200,
        # timed with zeros in every unused slot; none is written now, as the attention reads no slot past the count)
        k, v = (_launch_take_rows(x, index, count_B) for x in (k_BPGE, v_BPGE))
    else:
        k, v = _store_rows(k_BPGE, v_BPGE)
    _launch_sqsk(q, k, v, index, rows_of(first_BK, B), cached_B, count_B, gate, reflexive_BTHE, None, K)


def sqsk_merge(reflexive_BTHE, gate_BT, q_BTHE, k_BPGE, v_BPGE, index_BK, first_BK, cached_B, count_B):
    """Add gate * SQSK attention to the routed tokens of `reflexive_BTHE`, IN PLACE; the other tokens are not touched.

    As `merge_ref(reflexive, sqsk_attention_ref(take_rows_ref(q, index), ...), gate, slot)` with the sum in float32 and
    without a pass over the tokens that were not routed. index_BK, count_B: from `compact`. cached_B given: k_BPGE and
    v_BPGE are the sparse store, `cached_B` earlier slots followed by those of this call. cached_B None: they are this
    call's keys and values in token order (P = T), gathered here.
    Raises ValueError on shapes or dtypes the kernel does not take or a reflexive tensor that is not contiguous.
    """
    check_heads(q_BTHE, k_BPGE, v_BPGE)
    if reflexive_BTHE.shape != q_BTHE.shape or not reflexive_BTHE.is_contiguous():
        raise ValueError(
            f"reflexive must be contiguous {tuple(q_BTHE.shape)}, got {tuple(reflexive_BTHE.shape)}, "
            f"contiguous={reflexive_BTHE.is_contiguous()}"
        )
    _sqsk_merge(reflexive_BTHE, gate_BT, q_BTHE, k_BPGE, v_BPGE, index_BK, first_BK, cached_B, count_B)


__all__ = ["local_attention", "reflexive_merge", "sqsk_attention", "sqsk_merge", "take_rows"]
