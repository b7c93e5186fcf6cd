"""One decoded token: all its attentions in two launches, which also extend the cache.

Meaning and shapes: `attend_decode_ref` in `reference_hspmn`; legend in `kernels_common_hspmn`. A step is bound by
launches and by the bytes of states and cached keys, so it advances the cache in place, and one launch has programs of
two roles: parts of the softmax attentions, and columns of the linear states.
"""

import torch

from .kernels_attention_hspmn import finish, fold_block
from .kernels_common_hspmn import (
    FLOOR,
    LOG2E,
    check_heads,
    check_in_place,
    dependent,
    operation,
    processors,
    rows_of,
)
from .reference_hspmn import LEAST_PEAK

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error

LEAST = tl.constexpr(LEAST_PEAK)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact to float32 also where exp(x) is small."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def advance_state(
    q_linear, k_linear, v, head, log_rate, rate_bias, least_decay, start, length, state, linear, b, h, column,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr, HAS_LENGTH: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns from `column` of the state of row b and head h, and of what the linear attention gives."""
    g = h // (H // G)
    e = tl.arange(0, E)
    f = column + tl.arange(0, COLUMNS)
    at = (b * H + h) * E * E + e[:, None] * E + f[None, :]
    held = tl.load(state + at)
    opens = tl.load(start + b) >= 0  # a document
    decay = softplus(tl.load(head + b * 2 * H + h).to(tl.float32) + tl.load(rate_bias + h).to(tl.float32))
    decay = tl.exp(-tl.exp(tl.load(log_rate + h).to(tl.float32)) * decay - least_decay)
    k_feature = tl.load(k_linear + (b * G + g) * E + e).to(tl.float32)
    v_part = tl.load(v + (b * G + g) * E + f).to(tl.float32)
    q_feature = tl.load(q_linear + (b * H + h) * E + e).to(tl.float32)
    advanced = held * tl.where(opens, 0.0, decay) + k_feature[:, None] * v_part[None, :]
    if HAS_LENGTH:
        advanced = tl.where(tl.load(length + b) > 0, advanced, held)
    tl.store(state + at, advanced)
    tl.store(linear + (b * H + h) * E + f, tl.sum(advanced * q_feature[:, None], 0))


@triton.jit
def quantize(row):
    """A row as whole numbers of at most 127, in float32, and their scale, as `quantize_ref` has them."""
    row = row.to(tl.float32)
    peak = tl.max(tl.abs(row), 0)
    held = peak > LEAST
    factor = tl.where(held, tl.div_rn(1.0, tl.where(held, peak, 1.0)) * 127.0, 0.0)
    return tl.floor(row * factor + 0.5), tl.where(held, peak * (1 / 127), 0.0)


@triton.jit
def load_slots(slots, scales, at, slot, shown, G: tl.constexpr, QUANTIZED: tl.constexpr):
    """The rows `at` of a store or ring, zeros where not shown; of int8 what they stand for, float32."""
    tile = tl.load(slots + at, mask=shown[:, None], other=0)
    if QUANTIZED:
        tile = tile.to(tl.float32) * tl.load(scales + slot * G, mask=shown, other=0.0)[:, None]
    return tile


@triton.jit
def attend_range(
    q, k, v, k_slots, v_slots, k_scales, v_scales, part, part_lse, b, g, split, low, high, own, pushed, place, past,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, RING: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Attention of row b and key head g over its slots low .. high - 1, as part `split`.

    k_slots, v_slots: slot 0 of row and head, in the sparse store or, with RING slots, in the window, of which the last
    `past` tokens before slot `place` are shown. own: over the token's own key and value too. pushed: these go to slot
    `place`. QUANTIZED: the slots are int8, the scales from k_scales and v_scales on.
    """
    R: tl.constexpr = H // G
    n = tl.arange(0, BLOCK_N)
    e = tl.arange(0, E)
    m = tl.arange(0, ROWS)
    query = g * R + m
    q_tile = tl.load(q + (b * H + query)[:, None] * E + e[None, :], mask=(m < R)[:, None], other=0.0)
    k_row = tl.load(k + (b * G + g) * E + e)
    v_row = tl.load(v + (b * G + g) * E + e)
    if QUANTIZED:
        k_whole, k_scale = quantize(k_row)
        v_whole, v_scale = quantize(v_row)
        k_row = (k_whole * k_scale).to(k_row.dtype)  # also the token's own are read as they are stored
        v_row = (v_whole * v_scale).to(v_row.dtype)
    own_score = tl.sum(q_tile.to(tl.float32) * k_row.to(tl.float32)[None, :], 1) * SCALE
    peak = tl.where(own, own_score, FLOOR)
    total = tl.zeros([ROWS], tl.float32) + tl.where(own, 1.0, 0.0)
    acc = tl.zeros([ROWS, E], tl.float32) + tl.where(own, v_row.to(tl.float32), 0.0)[None, :]
    kv_at = n[:, None] * (G * E) + e[None, :]
    for s in range(low, high, BLOCK_N):
        shown = s + n < high
        if RING > 0:
            age = (place - s - n + RING) % RING
            shown = shown & (age > 0) & (age <= past)
        first = b * 0 + s  # 64 bits
        at, slot = first * (G * E) + kv_at, first + n
        k_tile = load_slots(k_slots, k_scales, at, slot, shown, G, QUANTIZED).to(q_tile.dtype)
        v_tile = load_slots(v_slots, v_scales, at, slot, shown, G, QUANTIZED).to(q_tile.dtype)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
        scores = tl.where(shown[None, :], scores, float("-inf"))
        acc, peak, total = fold_block(scores, v_tile, acc, peak, total, SCALE)
    at = place.to(tl.int64) * (G * E) + e
    if QUANTIZED:
        tl.store(k_scales + place.to(tl.int64) * G, k_scale, mask=pushed)
        tl.store(v_scales + place.to(tl.int64) * G, v_scale, mask=pushed)
        k_row, v_row = k_whole, v_whole
    tl.store(k_slots + at, k_row.to(k_slots.dtype.element_ty), mask=pushed & (e < E))
    tl.store(v_slots + at, v_row.to(v_slots.dtype.element_ty), mask=pushed & (e < E))
    tile, row_lse = finish(acc, peak, total)
    at = (b * (SPLITS + 1) + split) * H + query
    tl.store(part + at[:, None] * E + e[None, :], tile, mask=((m < R) & (total > 0))[:, None])
    tl.store(part_lse + at, row_lse, mask=m < R)


@triton.jit
def attend_store(
    q, k, v, position, start, length, score, bias, keys, values, positions, count, document_slot, key_scales,
    value_scales, part, part_lse, plan, B, P, g, split,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, INITIAL: tl.constexpr,
    HAS_LENGTH: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Part `split` of the sparse attentions of key head g, see `attend_decode_kernel`."""
    r = tl.arange(0, BATCH)
    inside = r < B
    wanted = inside
    if HAS_LENGTH:
        wanted = wanted & (tl.load(length + r, mask=inside, other=0) > 0)
    begun = tl.load(start + r, mask=inside, other=0)
    score_B = tl.load(score + r, mask=inside, other=0.0).to(tl.float32)
    wanted = wanted & ((score_B + tl.load(bias).to(tl.float32) > 0) | (begun > -INITIAL))
    used = tl.load(count + r, mask=inside, other=0)
    opened = tl.load(document_slot + r, mask=inside, other=0)
    first = tl.where(begun < 0, opened, used)
    last = tl.minimum(used, P)
    works = wanted & (last < P)
    if (split == 0) & (g == 0):
        tl.store(plan + r * 3, works.to(tl.int32), mask=inside)
        tl.store(plan + r * 3 + 1, used + wanted.to(tl.int32), mask=inside)
        tl.store(plan + r * 3 + 2, first, mask=inside)
        at = positions + r.to(tl.int64) * (P + 1) + last
        tl.store(at, tl.load(position + r, mask=inside, other=0).to(tl.int32), mask=works)
    # The token itself counts as a block where there is none before it: it needs a part too
    blocks = tl.where(works, tl.maximum(tl.cdiv(last - first, BLOCK_N), 1), 0)
    ends = tl.cumsum(blocks, 0)
    share = tl.cdiv(tl.sum(blocks, 0), SPLITS)
    for row in range(B):
        chosen = r == row
        own_blocks = tl.sum(tl.where(chosen, blocks, 0), 0)
        before = tl.sum(tl.where(chosen, ends, 0), 0) - own_blocks
        begin = tl.maximum(split * share - before, 0)
        end = tl.minimum((split + 1) * share - before, own_blocks)
        b = (g * 0 + row).to(tl.int64)
        if begin < end:
            low = tl.sum(tl.where(chosen, first, 0), 0)
            place = tl.sum(tl.where(chosen, last, 0), 0)
            base = b * (P + 1) * G + g
            attend_range(
                q, k, v, keys + base * E, values + base * E, key_scales + base, value_scales + base, part, part_lse,
                b, g, split, low + begin * BLOCK_N, tl.minimum(low + end * BLOCK_N, place), begin == 0, begin == 0,
                place, 0, H, G, E, 0, SCALE, ROWS, BLOCK_N, SPLITS, QUANTIZED,
            )  # fmt: skip
        elif own_blocks > 0:
            m = tl.arange(0, ROWS)
            at = (b * (SPLITS + 1) + split) * H + g * (H // G) + m
            tl.store(part_lse + at, tl.full([ROWS], float("-inf"), tl.float32), mask=m < H // G)


@triton.jit(do_not_specialize=["B", "P"])
def attend_decode_kernel(
    q_linear, k_linear, q, k, v, head, log_rate, rate_bias, least_decay, position, start, length, seen, score, bias,
    state, ring_k, ring_v, keys, values, positions, count, document_slot, key_scales, value_scales, linear, part,
    part_lse, plan, B, P,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    INITIAL: tl.constexpr, HAS_LENGTH: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, COLUMNS: tl.constexpr, QUANTIZED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the softmax attentions of the heads of one key head, or COLUMNS columns of one head's linear state.

    The slots of all routed rows, laid end to end in blocks, are cut into the parts 0 .. SPLITS - 1, so that whichever
    rows a step routes each program has its share in one run; part SPLITS is the window, one program per row. The
    token's own key and value go to the store (the part with its row's first block) and to the ring (the window) here
    and are read from `k` and `v`; the slot of the ring that is written is not read. INITIAL: tokens of a document that
    are routed whatever their score. plan: per row, for the kernel after this one, whether the token has a slot, the
    count and the document's first slot after it. P: slots per row, the spare one not counted. BATCH: a power of two,
    at least B.
    """
    program = tl.program_id(0)
    windows = program - G * SPLITS
    states = windows - B * G
    row = tl.maximum(windows // G, 0).to(tl.int64)
    g = program % G
    column = states % (E // COLUMNS) * COLUMNS
    h = states // (E // COLUMNS) % H
    state_row = (states // (E // COLUMNS * H)).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if states >= 0:
        advance_state(
            q_linear, k_linear, v, head, log_rate, rate_bias, least_decay, start, length, state, linear, state_row, h,
            column, H, G, E, COLUMNS, HAS_LENGTH,
        )  # fmt: skip
    elif windows >= 0:
        real = row >= 0
        if HAS_LENGTH:
            real = tl.load(length + row) > 0
        past = tl.minimum(-tl.load(start + row), WINDOW).to(tl.int32)
        slot = (tl.load(seen + row) % WINDOW).to(tl.int32)
        base = (row * WINDOW * G + g) * E
        attend_range(
            q, k, v, ring_k + base, ring_v + base, key_scales, value_scales, part, part_lse, row, g, SPLITS, 0, WINDOW,
            True, real, slot, past, H, G, E, WINDOW, SCALE, ROWS, BLOCK_N, SPLITS, False,
        )  # fmt: skip
    elif SPLITS > 0:
        attend_store(
            q, k, v, position, start, length, score, bias, keys, values, positions, count, document_slot, key_scales,
            value_scales, part, part_lse, plan, B, P, g, program // G, H, G, E, SCALE, INITIAL, HAS_LENGTH, BATCH,
            ROWS, BLOCK_N, SPLITS, QUANTIZED,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def merge_decode_kernel(
    linear, head, norm, part, part_lse, plan, score, count, document_slot, out,
    H: tl.constexpr, E: tl.constexpr, EPS: tl.constexpr, NOISE_FLOOR: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row and head: the normed and gated linear attention, the window, and of a routed token the parts as one.

    The counts of the sparse store move on here, because programs of the kernel before read them.
    """
    b = tl.program_id(0).to(tl.int64) // H
    h = tl.program_id(0).to(tl.int64) % H
    if PDL:
        tl.extra.cuda.gdc_wait()
    e = tl.arange(0, E)
    if SPLITS > 0:  # loaded first: more loads wait for it
        kept = tl.load(plan + b * 3)
    row = tl.load(linear + (b * H + h) * E + e)
    gate = 1.0 / (1.0 + tl.exp(-tl.load(head + (2 * b + 1) * H + h).to(tl.float32)))
    scale = tl.rsqrt(tl.sum(row * row, 0) / E + EPS) * gate
    parts = b * (SPLITS + 1) * H + h
    merged = row * scale * tl.load(norm + e).to(tl.float32) + tl.load(part + (parts + SPLITS * H) * E + e)
    if SPLITS > 0:
        if h == 0:
            tl.store(count + b, tl.load(plan + b * 3 + 1))
            tl.store(document_slot + b, tl.load(plan + b * 3 + 2))
        if kept > 0:
            gate = 1.0 / (1.0 + tl.exp(-tl.load(score + b).to(tl.float32)))
            at = parts + tl.arange(0, SPLITS) * H
            logs = tl.load(part_lse + at) * LOG2E
            weights = tl.exp2(logs - tl.max(logs, 0))
            tiles = tl.load(part + at[:, None] * E + e[None, :], mask=(logs > float("-inf"))[:, None], other=0.0)
            tile = tl.sum(tiles * weights[:, None], 0) / tl.sum(weights, 0)
            merged += tl.where(gate >= NOISE_FLOOR, gate, 0.0) * tile
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + (b * H + h) * E + e, merged.to(out.dtype.element_ty))


def attend_decode_config(element_size, E, r_rows, G, P, multiprocessors):
    """Block sizes and launch options of `attend_decode_kernel`; P None: no token is routed.

    The parts of the store fill the chip with two programs per processor, each of which has 32 KiB or more in flight.
    H200, bf16, 128k tokens of context, 16/4 heads, one row and eight, with `merge_decode_kernel`: 10.0 and 33.6 us;
    32 parts 9.9 and 36.0, two stages 10.9 and 35.3, four 10.6 and 34.4, 32 slots at once and five stages 11.2 and
    35.6, 128 slots and 8 warps 12.0 and 44.8; 16 or 64 columns differ by less than 4 %.
    """
    splits = 0
    if P is not None:
        wanted = triton.next_power_of_2(triton.cdiv(2 * multiprocessors, G))
        splits = 1 << (max(1, min(64, wanted, P // 64)).bit_length() - 1)
    tiles = {"BLOCK_N": 32, "num_stages": 1} if element_size == 4 else {"BLOCK_N": 64, "num_stages": 3}
    return {"SPLITS": splits, "ROWS": max(16, r_rows), "COLUMNS": min(E, 32), "num_warps": 4, **tiles}


@operation(
    "attend_decode",
    mutates_args=(
        *("state_BHEE", "ring_k_BWGE", "ring_v_BWGE", "keys_BPGE", "values_BPGE", "positions_BP", "count_B"),
        *("document_slot_B", "key_scales_BPG", "value_scales_BPG"),
    ),
)
def _attend_decode(
    q_linear_BTHE: torch.Tensor,
    k_linear_BTGE: torch.Tensor,
    q_BTHE: torch.Tensor,
    k_BTGE: torch.Tensor,
    v_BTGE: torch.Tensor,
    head_BTX: torch.Tensor,
    decay_log_rate_H: torch.Tensor,
    decay_bias_H: torch.Tensor,
    least_decay: float,
    norm_E: torch.Tensor,
    eps: float,
    position_BT: torch.Tensor,
    start_BT: torch.Tensor,
    length_B: torch.Tensor | None,
    seen_B: torch.Tensor,
    score_BT: torch.Tensor | None,
    bias: torch.Tensor | None,
    noise_floor: float,
    initial: int,
    state_BHEE: torch.Tensor,
    ring_k_BWGE: torch.Tensor,
    ring_v_BWGE: torch.Tensor,
    keys_BPGE: torch.Tensor,
    values_BPGE: torch.Tensor,
    positions_BP: torch.Tensor,
    count_B: torch.Tensor,
    document_slot_B: torch.Tensor,
    key_scales_BPG: torch.Tensor,
    value_scales_BPG: torch.Tensor,
) -> torch.Tensor:
    (B, _, H, E), (W, G), P = q_BTHE.shape, ring_k_BWGE.shape[1:3], keys_BPGE.shape[1] - 1
    out_BTHE = q_BTHE.new_empty(q_BTHE.shape)
    if B == 0:
        return out_BTHE
    heads = [x.contiguous() for x in (q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, head_BTX)]
    rates = (x.contiguous() for x in (decay_log_rate_H, decay_bias_H))
    place = (rows_of(x, B) for x in (position_BT, start_BT, length_B, seen_B))
    score_BT = None if score_BT is None else score_BT.contiguous()
    store = (keys_BPGE, values_BPGE, positions_BP, count_B, document_slot_B, key_scales_BPG, value_scales_BPG)
    r_rows, slots = triton.next_power_of_2(H // G), None if score_BT is None else P
    device, options = q_BTHE.device, dependent(q_BTHE.device)
    config = attend_decode_config(ring_k_BWGE.element_size(), E, r_rows, G, slots, processors(device))
    splits = config["SPLITS"]
    linear_BHE = q_BTHE.new_empty(B, H, E, dtype=torch.float32)
    part = q_BTHE.new_empty(B, splits + 1, H, E, dtype=torch.float32)
    part_lse = q_BTHE.new_empty(B, splits + 1, H, dtype=torch.float32)
    plan = count_B.new_empty(B, 3)
    programs = G * splits + B * G + B * H * (E // config["COLUMNS"])
    attend_decode_kernel[(programs,)](
        *heads, *rates, least_decay, *place, score_BT, bias, state_BHEE, ring_k_BWGE, ring_v_BWGE, *store,
        linear_BHE, part, part_lse, plan, B, P, H=H, G=G, E=E, WINDOW=W, SCALE=E**-0.5 * LOG2E.value, INITIAL=initial,
        HAS_LENGTH=length_B is not None, BATCH=triton.next_power_of_2(B),
        QUANTIZED=keys_BPGE.dtype == torch.int8, **config, **options,
    )  # fmt: skip
    merge_decode_kernel[(B * H,)](
        linear_BHE, heads[-1], norm_E.contiguous(), part, part_lse, plan, score_BT, count_B, document_slot_B, out_BTHE,
        H=H, E=E, EPS=eps, NOISE_FLOOR=noise_floor, SPLITS=splits, num_warps=max(1, min(4, splits * E // 1024)),
        **options,
    )  # fmt: skip
    return out_BTHE


@_attend_decode.register_fake
def _(
    q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, head_BTX, decay_log_rate_H, decay_bias_H, least_decay,
    norm_E, eps, position_BT, start_BT, length_B, seen_B, score_BT, bias, noise_floor, initial, state_BHEE,
    ring_k_BWGE, ring_v_BWGE, keys_BPGE, values_BPGE, positions_BP, count_B, document_slot_B, key_scales_BPG,
    value_scales_BPG,
):  # fmt: skip
    return q_BTHE.new_empty(q_BTHE.shape)


def attend_decode(
    q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, head_BTX, decay_log_rate_H, decay_bias_H, least_decay,
    norm_E, eps, position_BT, start_BT, length_B, seen_B, score_BT, bias, noise_floor, initial, state_BHEE,
    ring_k_BWGE, ring_v_BWGE, keys_BPGE, values_BPGE, positions_BP, count_B, document_slot_B, key_scales_BPG,
    value_scales_BPG,
):  # fmt: skip
    """`attend_decode_ref` that advances state, ring, sparse store and counts, all IN PLACE.

    q_*, k_*, v: one dtype of float32, bfloat16, float16; T = 1; E of 16, 32, 64, 128. head_BTX [B, 1, 2 H], the
    parameters, score_BT [B, 1] and bias (one element): any float dtype; score and bias None where no token is routed.
    state: contiguous float32 [B, H, E, E]. ring_* [B, W, G, E], keys and values [B, P + 1, G, E]: contiguous, one
    float dtype; or keys and values int8, with contiguous float32 scales [B, P + 1, G], else of any shape. positions
    [B, P + 1], count and document_slot [B]: contiguous int32. Cached keys are read for routed rows alone; all
    arithmetic is float32.
    Returns both streams' sum [B, 1, H, E] in q's dtype. Raises ValueError on shapes, dtypes or layouts the kernel does
    not take.
    """
    check_heads(q_BTHE, k_BTGE, v_BTGE)
    check_heads(q_linear_BTHE, k_linear_BTGE, v_BTGE)
    (B, T, H, E), G, slots = q_BTHE.shape, k_BTGE.shape[2], keys_BPGE.shape[1]
    if T != 1:
        raise ValueError(f"attend_decode takes one token, got T={T}; use reflexive_merge and sqsk_merge")
    if head_BTX.shape != (B, 1, 2 * H):
        raise ValueError(f"head must be {(B, 1, 2 * H)}, decays first, to fit q, got {tuple(head_BTX.shape)}")
    if score_BT is not None and (score_BT.shape != (B, 1) or bias is None):
        raise ValueError(f"score must be {(B, 1)}, with a bias, got {tuple(score_BT.shape)} and bias {bias}")
    check_in_place("state", state_BHEE, (B, H, E, E), (torch.float32,))
    ring, kept = (B, max(1, ring_k_BWGE.shape[1]), G, E), (B, slots, G, E)
    quantized = keys_BPGE.dtype == torch.int8
    for name, x in (("ring_k", ring_k_BWGE), ("ring_v", ring_v_BWGE)):
        check_in_place(name, x, ring, (ring_k_BWGE.dtype,))
    for name, x in (("keys", keys_BPGE), ("values", values_BPGE)):
        check_in_place(name, x, kept, (torch.int8 if quantized else ring_k_BWGE.dtype,))
    for name, x in (("key_scales", key_scales_BPG), ("value_scales", value_scales_BPG)) * quantized:
        check_in_place(name, x, kept[:3], (torch.float32,))
    for name, x, shape in (("positions", positions_BP, (B, slots)), ("count", count_B, (B,)),
                           ("document_slot", document_slot_B, (B,))):  # fmt: skip
        check_in_place(name, x, shape, (torch.int32,))
    return _attend_decode(
        q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, head_BTX, decay_log_rate_H, decay_bias_H, least_decay,
        norm_E, eps, position_BT, start_BT, length_B, seen_B, score_BT, bias, noise_floor, initial, state_BHEE,
        ring_k_BWGE, ring_v_BWGE, keys_BPGE, values_BPGE, positions_BP, count_B, document_slot_B, key_scales_BPG,
        value_scales_BPG,
    )  # fmt: skip


@triton.jit
def place_decode_kernel(
    cos, sin, start, position, length, tables, place, B, COS_STEP, COS_LANE, SIN_STEP, SIN_LANE,
    E: tl.constexpr, BLOCK_E: tl.constexpr, HAS_LENGTH: tl.constexpr,
):  # fmt: skip
    """One row of the tables and of the three numbers of each row."""
    b = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    to = tables + b * E + e
    tl.store(to, tl.load(cos + b * COS_STEP + e * COS_LANE, mask=e < E), mask=e < E)
    tl.store(to + B * E, tl.load(sin + b * SIN_STEP + e * SIN_LANE, mask=e < E), mask=e < E)
    tl.store(place + b, tl.load(start + b).to(tl.int64))
    tl.store(place + B + b, tl.load(position + b).to(tl.int64))
    if HAS_LENGTH:
        tl.store(place + 2 * B + b, tl.load(length + b).to(tl.int64))


@operation("place_decode")
def _place_decode(
    cos_BTE: torch.Tensor,
    sin_BTE: torch.Tensor,
    start_BT: torch.Tensor,
    position_BT: torch.Tensor,
    length_B: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, E = start_BT.shape[0], cos_BTE.shape[-1]
    outputs = _placed(cos_BTE, start_BT)
    if B:
        steps = [x for table in (cos_BTE, sin_BTE) for x in (table.expand(B, 1, E).stride(0), table.stride(2))]
        place_decode_kernel[(B,)](
            cos_BTE, sin_BTE, start_BT.contiguous(), rows_of(position_BT, B), rows_of(length_B, B), *outputs, B,
            *steps, E=E, BLOCK_E=triton.next_power_of_2(E), HAS_LENGTH=length_B is not None, num_warps=1,
        )  # fmt: skip
    return outputs


def _placed(cos_BTE, start_BT):
    B, E = start_BT.shape[0], cos_BTE.shape[-1]
    return cos_BTE.new_empty(2, B, 1, E), start_BT.new_empty(3, B, 1, dtype=torch.int64)


@_place_decode.register_fake
def _(cos_BTE, sin_BTE, start_BT, position_BT, length_B):
    return _placed(cos_BTE, start_BT)


def place_decode(cos_BTE, sin_BTE, start_BT, position_BT, length_B):
    """cos, sin, start, position and length (or None) of one token, as dense tensors that one opaque operation made.

    Compiled code computes its inputs to an operation anew for every one that reads them: each layer would convert and
    copy these. cos, sin: [B or 1, 1, E], one dtype. start [B, 1], position [B or 1, 1], length [B]: integers.
    Returns cos and sin [B, 1, E], start and position [B, 1] and length [B] or None, the last three int64.
    """
    tables, place = _place_decode(cos_BTE, sin_BTE, start_BT, position_BT, length_B)
    return tables[0], tables[1], place[0], place[1], None if length_B is None else place[2, :, 0]


__all__ = ["attend_decode", "place_decode"]
