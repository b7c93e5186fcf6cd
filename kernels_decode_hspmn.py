"""One decoded token: the reflexive stream, and the contextual one with its sparse store, each in one operation.

Meaning and shapes: `reflexive_decode_ref` in `reference_hspmn`; legend in `kernels_common_hspmn`. A step is bound by
launches and by the bytes of states and cached keys, so every operation advances its part of the cache in place.
"""

import torch

from .kernels_attention_hspmn import finish, fold_block
from .kernels_common_hspmn import FLOOR, LOG2E, check_heads, check_in_place, operation, processors, rows_of

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact to float32 also where exp(x) is small."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def reflexive_decode_kernel(
    q_linear, k_linear, q, k, v, hidden, head_weight, log_rate, rate_bias, norm, start, length, seen,
    state, ring_k, ring_v, out,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, HAS_LENGTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The token of one row and head; the first head of each key head writes the ring.

    The slot that is written is not read, because another program may have written it or not: its score and value are
    those of `k` and `v`.
    """
    R: tl.constexpr = H // G
    b = tl.program_id(0).to(tl.int64) // H
    h = tl.program_id(0).to(tl.int64) % H
    g = h // R
    e = tl.arange(0, E)
    state += (b * H + h) * E * E + e[:, None] * E + e[None, :]
    held = tl.load(state)
    decays, gates = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for begin in tl.static_range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x = tl.load(hidden + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        decays += x * tl.load(head_weight + h * D + d, mask=d < D, other=0.0).to(tl.float32)
        gates += x * tl.load(head_weight + (H + h) * D + d, mask=d < D, other=0.0).to(tl.float32)
    slot = (tl.load(seen + b) % WINDOW).to(tl.int32)
    past = tl.maximum(tl.load(start + b), -WINDOW).to(tl.int32)  # minus how many earlier tokens are visible
    real = True
    if HAS_LENGTH:
        real = tl.load(length + b) > 0
    q_row = tl.load(q + (b * H + h) * E + e).to(tl.float32)
    k_row = tl.load(k + (b * G + g) * E + e)
    v_row = tl.load(v + (b * G + g) * E + e)
    ring = b * WINDOW * G * E + g * E
    w = tl.arange(0, BLOCK_W)
    own = tl.sum(q_row * k_row.to(tl.float32), 0) * SCALE
    peak, total, local = own, 1.0, v_row.to(tl.float32)
    for begin in tl.static_range(0, WINDOW, BLOCK_W):
        age = (slot - begin - w + WINDOW) % WINDOW
        visible = (begin + w < WINDOW) & (age > 0) & (age <= -past)
        at = ring + (begin + w)[:, None] * (G * E) + e[None, :]
        k_tile = tl.load(ring_k + at, mask=visible[:, None], other=0.0).to(tl.float32)
        v_tile = tl.load(ring_v + at, mask=visible[:, None], other=0.0).to(tl.float32)
        scores = tl.where(visible, tl.sum(k_tile * q_row[None, :], 1) * SCALE, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - new_peak), tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 0)
        local = local * shrink + tl.sum(v_tile * weights[:, None], 0)
        peak = new_peak

    decay = softplus(tl.sum(decays, 0) + tl.load(rate_bias + h).to(tl.float32))
    decay = tl.exp(-tl.exp(tl.load(log_rate + h).to(tl.float32)) * decay)
    decay = tl.where(past < 0, decay, 0.0)
    q_feature = tl.load(q_linear + (b * H + h) * E + e).to(tl.float32)
    k_feature = tl.load(k_linear + (b * G + g) * E + e).to(tl.float32)
    advanced = held * decay + k_feature[:, None] * v_row.to(tl.float32)[None, :]
    if HAS_LENGTH:
        advanced = tl.where(real, advanced, held)
    tl.store(state, advanced)
    linear = tl.sum(advanced * q_feature[:, None], 0)
    gate = 1.0 / (1.0 + tl.exp(-tl.sum(gates, 0)))
    linear *= tl.rsqrt(tl.sum(linear * linear, 0) / E + EPS) * gate
    merged = local / total + linear * tl.load(norm + e).to(tl.float32)
    tl.store(out + (b * H + h) * E + e, merged.to(out.dtype.element_ty))
    at = ring + slot * (G * E) + e
    first = (h % R == 0) & real
    tl.store(ring_k + at, k_row.to(ring_k.dtype.element_ty), mask=first & (e < E))
    tl.store(ring_v + at, v_row.to(ring_v.dtype.element_ty), mask=first & (e < E))


def reflexive_decode_config(element_size, E, window):
    """Block size and launch options of `reflexive_decode_kernel`.

    Reasoned, not yet measured. A program of 8 warps holds a state of 128 by 128 in 64 registers per thread and the
    window beside it, all of it loaded before the first use; 16 programs (batch 1) then take about 3 us, most of it one
    latency of the memory and the 64 bytes per clock that one processor reads.
    """
    rows = min(triton.next_power_of_2(window), max(1, 2**15 // (E * element_size)))
    return {"BLOCK_W": rows, "num_warps": min(8, max(1, E * E // 1024))}


@operation("reflexive_decode", mutates_args=("state_BHEE", "ring_k_BWGE", "ring_v_BWGE"))
def _reflexive_decode(
    q_linear_BTHE: torch.Tensor,
    k_linear_BTGE: torch.Tensor,
    q_BTHE: torch.Tensor,
    k_BTGE: torch.Tensor,
    v_BTGE: torch.Tensor,
    hidden_BTD: torch.Tensor,
    head_weight_XD: torch.Tensor,
    decay_log_rate_H: torch.Tensor,
    decay_bias_H: torch.Tensor,
    norm_E: torch.Tensor,
    eps: float,
    start_BT: torch.Tensor,
    length_B: torch.Tensor | None,
    seen_B: torch.Tensor,
    state_BHEE: torch.Tensor,
    ring_k_BWGE: torch.Tensor,
    ring_v_BWGE: torch.Tensor,
) -> torch.Tensor:
    (B, _, H, E), (W, G), D = q_BTHE.shape, ring_k_BWGE.shape[1:3], hidden_BTD.shape[-1]
    heads = (x.contiguous() for x in (q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, hidden_BTD))
    parameters = (x.contiguous() for x in (head_weight_XD, decay_log_rate_H, decay_bias_H, norm_E))
    out_BTHE = q_BTHE.new_empty(q_BTHE.shape)
    if B:
        reflexive_decode_kernel[(B * H,)](
            *heads, *parameters, rows_of(start_BT, B), rows_of(length_B, B), seen_B.contiguous(), state_BHEE,
            ring_k_BWGE, ring_v_BWGE, out_BTHE, H=H, G=G, E=E, D=D, WINDOW=W, SCALE=E**-0.5 * LOG2E.value, EPS=eps,
            HAS_LENGTH=length_B is not None, BLOCK_D=min(2048, triton.next_power_of_2(D)),
            **reflexive_decode_config(ring_k_BWGE.element_size(), E, W),
        )  # fmt: skip
    return out_BTHE


@_reflexive_decode.register_fake
def _(
    q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, hidden_BTD, head_weight_XD, decay_log_rate_H, decay_bias_H,
    norm_E, eps, start_BT, length_B, seen_B, state_BHEE, ring_k_BWGE, ring_v_BWGE,
):  # fmt: skip
    return q_BTHE.new_empty(q_BTHE.shape)


def reflexive_decode(
    q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, hidden_BTD, head_weight_XD, decay_log_rate_H, decay_bias_H,
    norm_E, eps, start_BT, length_B, seen_B, state_BHEE, ring_k_BWGE, ring_v_BWGE,
):  # fmt: skip
    """`reflexive_decode_ref` that advances `state_BHEE`, `ring_k_BWGE` and `ring_v_BWGE` IN PLACE.

    q_*, k_*, v: one dtype of float32, bfloat16, float16; T = 1; E of 16, 32, 64, 128. hidden_BTD and the
    parameters: any float dtype. state: contiguous float32 [B, H, E, E]. ring_*: contiguous [B, W, G, E], of any float
    dtype.
    Returns the reflexive stream [B, 1, H, E] in q's dtype; all arithmetic is float32.
    Raises ValueError on shapes, dtypes or layouts the kernel does not take.
    """
    check_heads(q_BTHE, k_BTGE, v_BTGE)
    check_heads(q_linear_BTHE, k_linear_BTGE, v_BTGE)
    B, T, H, E = q_BTHE.shape
    if T != 1:
        raise ValueError(f"reflexive_decode takes one token, got T={T}; use linear_attention and reflexive_merge")
    D = hidden_BTD.shape[-1]
    if hidden_BTD.shape[:2] != (B, 1) or head_weight_XD.shape != (2 * H, D):
        raise ValueError(
            f"hidden and head_weight must be {(B, 1, D)} and {(2 * H, D)}, decays first, to fit q, got "
            f"{tuple(hidden_BTD.shape)} and {tuple(head_weight_XD.shape)}"
        )
    check_in_place("state", state_BHEE, (B, H, E, E), (torch.float32,))
    shape = (B, max(1, ring_k_BWGE.shape[1]), *k_BTGE.shape[2:])
    for name, ring in (("ring_k", ring_k_BWGE), ("ring_v", ring_v_BWGE)):
        check_in_place(name, ring, shape, (ring_k_BWGE.dtype,))
    return _reflexive_decode(
        q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, hidden_BTD, head_weight_XD, decay_log_rate_H,
        decay_bias_H, norm_E, eps, start_BT, length_B, seen_B, state_BHEE, ring_k_BWGE, ring_v_BWGE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["P"])
def sqsk_decode_kernel(
    q, k, v, routed, position, start, keys, values, positions, count, document_slot, part, part_lse, plan, P,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The heads of one key head over one of SPLITS parts of the cached keys; the first part holds the token itself.

    Its key and value go to the store here and are read from `k` and `v`. plan: per row, for the kernel after this one,
    whether the token has a slot, the count and the document's first slot after it. P: slots per row, the spare one not
    counted.
    """
    R: tl.constexpr = H // G
    program = tl.program_id(0).to(tl.int64)
    g = program % G
    split = (program // G % SPLITS).to(tl.int32)
    b = program // (G * SPLITS)
    wanted = tl.load(routed + b).to(tl.int32)
    used = tl.load(count + b)
    low = tl.where(tl.load(start + b) < 0, tl.load(document_slot + b), used)
    high = tl.minimum(used, P)
    kept = (wanted > 0) & (high < P)
    if (split == 0) & (g == 0):
        tl.store(plan + b * 3, kept.to(tl.int32))
        tl.store(plan + b * 3 + 1, used + wanted)
        tl.store(plan + b * 3 + 2, low)
    if kept:
        m = tl.arange(0, ROWS)
        n = tl.arange(0, BLOCK_N)
        e = tl.arange(0, E)
        real = m < R
        head = g * R + m
        q_tile = tl.load(q + (b * H + head)[:, None] * E + e[None, :], mask=real[:, None], other=0.0)
        acc = tl.zeros([ROWS, E], tl.float32)
        peak = tl.full([ROWS], FLOOR, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        row = b * (P + 1)
        if split == 0:
            k_row = tl.load(k + (b * G + g) * E + e)
            v_row = tl.load(v + (b * G + g) * E + e)
            own = ((row + high) * G + g) * E + e
            tl.store(keys + own, k_row.to(keys.dtype.element_ty))
            tl.store(values + own, v_row.to(values.dtype.element_ty))
            if g == 0:
                tl.store(positions + row + high, tl.load(position + b).to(tl.int32))
            peak = tl.sum(q_tile.to(tl.float32) * k_row.to(tl.float32)[None, :], 1) * SCALE
            total += 1.0
            acc += v_row.to(tl.float32)[None, :]
        share = tl.cdiv(tl.cdiv(high - low, SPLITS), BLOCK_N) * BLOCK_N
        begin = low + split * share
        end = tl.minimum(high, begin + share)
        kv_at = n[:, None] * (G * E) + e[None, :]
        for s in range(begin, end, BLOCK_N):
            held = s + n < end
            at = ((row + s) * G + g) * E + kv_at
            k_tile = tl.load(keys + at, mask=held[:, None], other=0.0).to(q_tile.dtype)
            v_tile = tl.load(values + at, mask=held[:, None], other=0.0).to(q_tile.dtype)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
            scores = tl.where(held[None, :], scores, float("-inf"))
            acc, peak, total = fold_block(scores, v_tile, acc, peak, total, SCALE)
        tile, row_lse = finish(acc, peak, total)
        at = (b * SPLITS + split) * H + head
        tl.store(part + at[:, None] * E + e[None, :], tile, mask=real[:, None] & (total > 0)[:, None])
        tl.store(part_lse + at, row_lse, mask=real)


@triton.jit
def merge_decode_kernel(
    part, part_lse, plan, gate, count, document_slot, out, H: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr
):
    """One row and head: out += gate * the partial softmaxes as one, if the token has a slot; the counts move on."""
    b = tl.program_id(0).to(tl.int64) // H
    h = tl.program_id(0).to(tl.int64) % H
    kept = tl.load(plan + b * 3)
    if h == 0:
        tl.store(count + b, tl.load(plan + b * 3 + 1))
        tl.store(document_slot + b, tl.load(plan + b * 3 + 2))
    if kept > 0:
        e = tl.arange(0, E)
        row = (b * SPLITS + tl.arange(0, SPLITS)) * H + h
        logs = tl.load(part_lse + row) * LOG2E
        weights = tl.exp2(logs - tl.max(logs, 0))
        parts = tl.load(part + row[:, None] * E + e[None, :], mask=(logs > float("-inf"))[:, None], other=0.0)
        tile = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
        at = out + (b * H + h) * E + e
        merged = tl.load(at).to(tl.float32) + tl.load(gate + b).to(tl.float32) * tile
        tl.store(at, merged.to(out.dtype.element_ty))


def sqsk_decode_config(element_size, r_rows, B, G, P, multiprocessors):
    """Block sizes and launch options of `sqsk_decode_kernel`.

    Reasoned, not yet measured. The rows that a step routes, often one alone, must fill the chip with two programs per
    processor, each of which has 32 KiB or more in flight; the programs of other rows exit at once.
    """
    wanted = triton.next_power_of_2(triton.cdiv(2 * multiprocessors, G * max(1, B // 8)))
    splits = max(1, min(64, wanted, P // 64))
    tiles = {"BLOCK_N": 32, "num_stages": 1} if element_size == 4 else {"BLOCK_N": 64, "num_stages": 3}
    return {"SPLITS": 1 << (splits.bit_length() - 1), "ROWS": max(16, r_rows), "num_warps": 4, **tiles}


@operation(
    "sqsk_decode",
    mutates_args=("reflexive_BTHE", "keys_BPGE", "values_BPGE", "positions_BP", "count_B", "document_slot_B"),
)
def _sqsk_decode(
    reflexive_BTHE: torch.Tensor,
    gate_BT: torch.Tensor,
    q_BTHE: torch.Tensor,
    k_BTGE: torch.Tensor,
    v_BTGE: torch.Tensor,
    routed_B: torch.Tensor,
    position_BT: torch.Tensor,
    start_BT: torch.Tensor,
    keys_BPGE: torch.Tensor,
    values_BPGE: torch.Tensor,
    positions_BP: torch.Tensor,
    count_B: torch.Tensor,
    document_slot_B: torch.Tensor,
) -> None:
    (B, _, H, E), (P, G) = q_BTHE.shape, keys_BPGE.shape[1:3]
    if B == 0:
        return
    inputs = (x.contiguous() for x in (q_BTHE, k_BTGE, v_BTGE, routed_B))
    r_rows = triton.next_power_of_2(H // G)
    config = sqsk_decode_config(keys_BPGE.element_size(), r_rows, B, G, P - 1, processors(q_BTHE.device))
    splits = config["SPLITS"]
    part = q_BTHE.new_empty(B, splits, H, E, dtype=torch.float32)
    part_lse = q_BTHE.new_empty(B, splits, H, dtype=torch.float32)
    plan = count_B.new_empty(B, 3)
    sqsk_decode_kernel[(B * splits * G,)](
        *inputs, rows_of(position_BT, B), rows_of(start_BT, B), keys_BPGE, values_BPGE, positions_BP, count_B,
        document_slot_B, part, part_lse, plan, P - 1, H=H, G=G, E=E, SCALE=E**-0.5 * LOG2E.value, **config,
    )  # fmt: skip
    merge_decode_kernel[(B * H,)](
        part, part_lse, plan, gate_BT.contiguous(), count_B, document_slot_B, reflexive_BTHE, H=H, E=E, SPLITS=splits,
        num_warps=max(1, min(4, splits * E // 1024)),
    )  # fmt: skip


def sqsk_decode(
    reflexive_BTHE, gate_BT, q_BTHE, k_BTGE, v_BTGE, routed_B, position_BT, start_BT,
    keys_BPGE, values_BPGE, positions_BP, count_B, document_slot_B,
):  # fmt: skip
    """`sqsk_decode_ref` that adds to `reflexive_BTHE` and extends the sparse store and its counts, all IN PLACE.

    reflexive, q, k, v: one dtype of float32, bfloat16, float16; T = 1; E of 16, 32, 64, 128. gate_BT: any float dtype.
    routed_B, position_BT, start_BT: integers. keys, values: contiguous [B, P + 1, G, E], any float dtype; positions
    [B, P + 1], count and document_slot [B]: contiguous int32. Keys are read for routed rows alone; sums in float32.
    Raises ValueError on shapes, dtypes or layouts the kernel does not take.
    """
    check_heads(q_BTHE, k_BTGE, v_BTGE)
    (B, T, _, E), G, slots = q_BTHE.shape, k_BTGE.shape[2], keys_BPGE.shape[1]
    if T != 1:
        raise ValueError(f"sqsk_decode takes one token, got T={T}; use sqsk_merge")
    check_in_place("reflexive", reflexive_BTHE, q_BTHE.shape, (q_BTHE.dtype,))
    for name, x in (("keys", keys_BPGE), ("values", values_BPGE)):
        check_in_place(name, x, (B, slots, G, E), (keys_BPGE.dtype,))
    for name, x, shape in (("positions", positions_BP, (B, slots)), ("count", count_B, (B,)),
                           ("document_slot", document_slot_B, (B,))):  # fmt: skip
        check_in_place(name, x, shape, (torch.int32,))
    _sqsk_decode(
        reflexive_BTHE, gate_BT, q_BTHE, k_BTGE, v_BTGE, routed_B, position_BT, start_BT, keys_BPGE, values_BPGE,
        positions_BP, count_B, document_slot_B,
    )  # fmt: skip


__all__ = ["reflexive_decode", "sqsk_decode"]
