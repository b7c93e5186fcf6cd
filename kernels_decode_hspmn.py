"""One decoded token: its products, and all its attentions in two launches, which also extend the cache.

Meaning and shapes in `operations_hspmn`; legend in `kernels_common_hspmn`. A step is bound by launches and by the
bytes of weights, states and cached keys. So it advances the cache in place, one launch has programs of two roles,
parts of the softmax attentions and columns of the linear states, and a norm in front of a product is computed in every
program from the rows themselves: they are few, and a launch costs more. A product is weights times rows, so that the
rows, few as they are, fill its narrow side; M rows, K features before a product.
"""

from functools import lru_cache

import torch

from .kernels_common_hspmn import (  # isort: skip
    DTYPES, FLOOR, GAIN, LOG2E, capability, cdiv, check, check_heads, dependent, kernel, power_of_2, processors,
    refuse_in_place, softplus, tl, triton,
)  # fmt: skip
from .kernels_attention_hspmn import finish, fold_block, kept_form, quantize, store_rows
from .kernels_mlp_hspmn import gated
from .operations_hspmn import E4M3, attend_token, check_float8, linear_add_token, project_token, swiglu_token

MOST_ROWS = 16  # of the products: two narrow tiles of the tensor cores


@triton.jit
def halves(words, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Twice the number from bit SHIFT on of both halves of int32 words, under the bits of a float."""
    pair = (((words >> SHIFT) & 0x000F000F) << 1) | BITS
    return pair.to(tl.uint16), (pair >> 16).to(tl.uint16)


@triton.jit
def unpack(words, KIND: tl.constexpr):
    """The eight numbers of each int32 as the odd ones of `dequantize`, in KIND: those of 16 bits are put under a power
    of two, large enough for neighbours to be one apart, without a conversion of each."""
    BITS: tl.constexpr = 0x43004300 if KIND == tl.bfloat16 else 0x64006400 if KIND == tl.float16 else 0
    POWER: tl.constexpr = 128.0 if KIND == tl.bfloat16 else 1024.0 if KIND == tl.float16 else 0.0
    n0, n1 = halves(words, 0, BITS)
    n2, n3 = halves(words, 4, BITS)
    n4, n5 = halves(words, 8, BITS)
    n6, n7 = halves(words, 12, BITS)
    even = tl.interleave(tl.interleave(n0, n4), tl.interleave(n2, n6))
    odd = tl.interleave(tl.interleave(n1, n5), tl.interleave(n3, n7))
    return tl.interleave(even, odd).to(KIND, bitcast=POWER > 0) - (POWER + 15.0)


@triton.jit
def load_slots(
    slots, scales, row, first, shown, KIND: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr
):
    """The slots from `first` on of a store or ring in KIND, zeros where not shown; of numbers what they stand for,
    with the scale of slot 0 at `row`."""
    n = tl.arange(0, shown.shape[0])
    at = n[:, None] * (G * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tile = tl.load(slots + first * (G * WIDTH) + at, mask=shown[:, None], other=0)
    if HALF == 8:
        tile = unpack(tile, KIND)
    elif HALF > 0:
        tile = 2.0 * tile.to(tl.float32) + 1.0
    tile = tile.to(KIND)
    if HALF > 0:  # scales are loaded as halves of words, the least that is copied while the slots before are read
        scale_at = row + first * G + n * G
        words = tl.load(scales.to(tl.pointer_type(tl.int32)) + scale_at // 2, mask=shown, other=0)
        scale = tl.where(scale_at % 2 == 0, words << 16, words & -0x10000).to(tl.float32, bitcast=True)
        tile *= scale.to(KIND)[:, None]
    return tile


@triton.jit
def attend_range(
    q, k, v, own_gate, k_slots, v_slots, k_scales, v_scales, log_gates, row, part, part_lse, b, g, split, low, high,
    own, pushed, place, past, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, RING: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Attention of row b and key head g over its slots low .. high - 1, as part `split`. k_slots, v_slots: slot 0 of
    row and head, in the sparse store or, with RING slots, in the window, of which the last `past` tokens before slot
    `place` are shown. log_gates: the row's, which are added to the scores, own_gate to that of the own key, or None.
    own: over the token's own key and value too. pushed: these go to slot `place`. WIDTH, HALF: of `kept_form`; with
    HALF slots have scales, that of slot 0 at `row` of k_scales and v_scales."""
    R: tl.constexpr = H // G
    n, e, m = tl.arange(0, BLOCK_N), tl.arange(0, E), tl.arange(0, ROWS)
    query = g * R + m
    q_tile = tl.load(q + (b * H + query)[:, None] * E + e[None, :], mask=(m < R)[:, None], other=0.0)
    k_row, v_row = tl.load(k + (b * G + g) * E + e)[None, :], tl.load(v + (b * G + g) * E + e)[None, :]
    k_kept, v_kept, k_scale, v_scale = k_row, v_row, None, None
    if HALF > 0:
        k_kept, k_scale = quantize(k_row, HALF)
        v_kept, v_scale = quantize(v_row, HALF)
        # Also the token's own are read as they are stored
        k_row = ((2.0 * k_kept + 1.0) * k_scale[:, None]).to(k_row.dtype)
        v_row = ((2.0 * v_kept + 1.0) * v_scale[:, None]).to(v_row.dtype)
    own_score = tl.sum(q_tile.to(tl.float32) * k_row.to(tl.float32), 1) * SCALE
    if own_gate is not None:
        own_score += own_gate * LOG2E
    peak = tl.where(own, own_score, FLOOR)
    total = tl.zeros([ROWS], tl.float32) + tl.where(own, 1.0, 0.0)
    acc = tl.zeros([ROWS, E], tl.float32) + tl.where(own, v_row.to(tl.float32), 0.0)
    for s in range(low, high, BLOCK_N):
        shown = s + n < high
        if RING > 0:
            age = (place - s - n + RING) % RING
            shown = shown & (age > 0) & (age <= past)
        first = b * 0 + s  # 64 bits
        k_tile = load_slots(k_slots, k_scales, row, first, shown, q_tile.dtype, G, WIDTH, HALF)
        v_tile = load_slots(v_slots, v_scales, row, first, shown, q_tile.dtype, G, WIDTH, HALF)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
        if log_gates is not None:
            scores += tl.load(log_gates + s + n, mask=shown, other=0.0)[None, :] * (LOG2E / SCALE)
        acc, peak, total = fold_block(scores, v_tile, shown[None, :], acc, peak, total, SCALE)
    slot = place.to(tl.int64) + tl.arange(0, 1)
    store_rows(k_kept, k_scale, k_slots, k_scales + row, slot, pushed & (slot >= 0), G, HALF)
    store_rows(v_kept, v_scale, v_slots, v_scales + row, slot, pushed & (slot >= 0), G, HALF)
    tile, row_lse = finish(acc, peak, total)
    at = (b * (SPLITS + 1) + split) * H + query
    tl.store(part + at[:, None] * E + e[None, :], tile, mask=((m < R) & (total > 0))[:, None])
    tl.store(part_lse + at, row_lse, mask=m < R)


@kernel("B", "P")
def attend_token_kernel(
    q_linear, k_linear, q, k, v, head, log_rate, rate_bias, least_decay, position, start, length, seen, score, bias,
    state, ring_k, ring_v, keys, values, positions, held, document_slot, key_scales, value_scales, log_gates, linear,
    part, part_lse, plan, token_slot, B, P, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, INITIAL: tl.constexpr, EVERY: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One part of the softmax attentions of the heads of one key head, or COLUMNS columns of one head's linear state.
    The slots of all routed rows, laid end to end in blocks, are cut into the parts 0 .. SPLITS - 1, so that whichever
    rows a step routes each program has its share in one run; part SPLITS is the window, one program per row. The
    token's own key and value go to the store (the part with its row's first block) and to the ring (the window) here
    and are read from `k` and `v`; the slot of the ring that is written is not read. INITIAL: tokens of a document that
    are routed whatever their score. EVERY: all rows read, and log gates, which are None where they are not held, are
    in the scores. token_slot: per row, 0 if the token has a slot, else -1. plan: per row, for the kernel after this
    one, tokens held and the document's first slot after it. P: slots per row, the spare one not counted. BATCH: a
    power of two, at least B."""
    program = tl.program_id(0)
    windows = program - G * SPLITS
    states = windows - B * G
    split, g = program // G, program % G
    if PDL:
        tl.extra.cuda.gdc_wait()
    if states >= 0:
        f = states % (E // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
        h = states // (E // COLUMNS) % H
        row = (states // (E // COLUMNS * H)).to(tl.int64)
        e = tl.arange(0, E)
        state_at = (row * H + h) * E * E + e[:, None] * E + f[None, :]
        held_state = tl.load(state + state_at)
        opens = tl.load(start + row) >= 0  # a document
        decay = softplus(tl.load(head + row * 2 * H + h).to(tl.float32) + tl.load(rate_bias + h).to(tl.float32))
        decay = tl.exp(-tl.exp(tl.load(log_rate + h).to(tl.float32)) * decay - least_decay)
        k_feature = tl.load(k_linear + (row * G + h // (H // G)) * E + e).to(tl.float32)
        v_part = tl.load(v + (row * G + h // (H // G)) * E + f).to(tl.float32)
        q_feature = tl.load(q_linear + (row * H + h) * E + e).to(tl.float32)
        advanced = held_state * tl.where(opens, 0.0, decay) + k_feature[:, None] * v_part[None, :]
        if length is not None:
            advanced = tl.where(tl.load(length + row) > 0, advanced, held_state)
        tl.store(state + state_at, advanced)
        tl.store(linear + (row * H + h) * E + f, tl.sum(advanced * q_feature[:, None], 0))
    elif windows >= 0:
        row = (windows // G).to(tl.int64)
        real = row >= 0 if length is None else tl.load(length + row) > 0
        past = tl.minimum(-tl.load(start + row), WINDOW).to(tl.int32)
        slot = (tl.load(seen + row) % WINDOW).to(tl.int32)
        base = (row * WINDOW * G + g) * E
        attend_range(
            q, k, v, None, ring_k + base, ring_v + base, key_scales, value_scales, None, 0, part, part_lse, row, g,
            SPLITS, 0, WINDOW, True, real, slot, past, H, G, E, WINDOW, SCALE, ROWS, BLOCK_N, SPLITS, E, 0,
        )  # fmt: skip
        if SPLITS == 0:
            tl.store(token_slot + row, -1, mask=g == 0)
    elif SPLITS > 0:
        r = tl.arange(0, BATCH)
        inside = r < B
        present = inside
        if length is not None:
            present = present & (tl.load(length + r, mask=inside, other=0) > 0)
        begun = tl.load(start + r, mask=inside, other=0)
        score_B = tl.load(score + r, mask=inside, other=0.0).to(tl.float32)
        wanted = present & ((score_B + tl.load(bias).to(tl.float32) > 0) | (begun > -INITIAL))
        used = tl.load(held + r, mask=inside, other=0)
        opened = tl.load(document_slot + r, mask=inside, other=0)
        first = tl.where(begun < 0, opened, used)
        last = tl.minimum(used, P)
        works = wanted & (last < P)
        reads = present if EVERY else works
        if log_gates is not None:
            log_gate_B = -softplus(-score_B)
        if (split == 0) & (g == 0):
            tl.store(token_slot + r, works.to(tl.int64) - 1, mask=inside)
            tl.store(plan + r * 2, used + wanted.to(tl.int32), mask=inside)
            tl.store(plan + r * 2 + 1, first, mask=inside)
            slot_at = r.to(tl.int64) * (P + 1) + last
            tl.store(positions + slot_at, tl.load(position + r, mask=inside, other=0).to(tl.int32), mask=works)
            if log_gates is not None:
                tl.store(log_gates + slot_at, log_gate_B, mask=works)
        # The token itself counts as a block where there is none before it: it needs a part too
        blocks = tl.where(reads, tl.maximum(tl.cdiv(last - first, BLOCK_N), works.to(tl.int32)), 0)
        ends = tl.cumsum(blocks, 0)
        share = tl.cdiv(tl.sum(blocks, 0), SPLITS)
        for i in range(B):
            chosen = r == i
            own_blocks = tl.sum(tl.where(chosen, blocks, 0), 0)
            before = tl.sum(tl.where(chosen, ends, 0), 0) - own_blocks
            begin = tl.maximum(split * share - before, 0)
            end = tl.minimum((split + 1) * share - before, own_blocks)
            b = (g * 0 + i).to(tl.int64)
            if begin < end:
                low = tl.sum(tl.where(chosen, first, 0), 0)
                place = tl.sum(tl.where(chosen, last, 0), 0)
                store = b * (P + 1) * G + g
                own, own_gate, row_gates = begin == 0, None, None
                if EVERY:
                    own = own & (tl.sum((chosen & works).to(tl.int32), 0) > 0)
                    own_gate = tl.sum(tl.where(chosen, log_gate_B, 0.0), 0)
                    row_gates = log_gates + b * (P + 1)
                attend_range(
                    q, k, v, own_gate, keys + store * WIDTH, values + store * WIDTH, key_scales, value_scales,
                    row_gates, store, part, part_lse, b, g, split, low + begin * BLOCK_N,
                    tl.minimum(low + end * BLOCK_N, place), own, own, place, 0, H, G, E, 0, SCALE, ROWS, BLOCK_N,
                    SPLITS, WIDTH, HALF,
                )  # fmt: skip
            elif (own_blocks > 0) | EVERY:
                m = tl.arange(0, ROWS)
                lse_at = (b * (SPLITS + 1) + split) * H + g * (H // G) + m
                tl.store(part_lse + lse_at, tl.full([ROWS], float("-inf"), tl.float32), mask=m < H // G)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@kernel()
def merge_token_kernel(
    linear, head, norm, part, part_lse, plan, token_slot, score, held, document_slot, out, H: tl.constexpr,
    E: tl.constexpr, EPS: tl.constexpr, NOISE_FLOOR: tl.constexpr, EVERY: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row and head: the normed and gated linear attention, the window, and of a token that reads the parts as one.
    The counts of the sparse store move on here, because programs of the kernel before read them."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    if PDL:
        tl.extra.cuda.gdc_wait()
    e = tl.arange(0, E)
    if SPLITS > 0:  # loaded first: more loads wait for it
        kept = tl.load(token_slot + b)
    row = tl.load(linear + (b * H + h) * E + e)
    gate = 1.0 / (1.0 + tl.exp(-tl.load(head + (2 * b + 1) * H + h).to(tl.float32)))
    scale = tl.rsqrt(tl.sum(row * row, 0) / E + EPS) * gate
    parts = b * (SPLITS + 1) * H + h
    merged = row * scale * tl.load(norm + e).to(tl.float32) + tl.load(part + (parts + SPLITS * H) * E + e)
    if SPLITS > 0:
        if h == 0:
            tl.store(held + b, tl.load(plan + b * 2))
            tl.store(document_slot + b, tl.load(plan + b * 2 + 1))
        if (kept >= 0) | EVERY:
            at = parts + tl.arange(0, SPLITS) * H
            logs = tl.load(part_lse + at) * LOG2E
            weights = tl.exp2(logs - tl.maximum(tl.max(logs, 0), FLOOR))
            total = tl.sum(weights, 0)
            tiles = tl.load(part + at[:, None] * E + e[None, :], mask=(logs > float("-inf"))[:, None], other=0.0)
            tile = tl.sum(tiles * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
            if not EVERY:
                gate = 1.0 / (1.0 + tl.exp(-tl.load(score + b).to(tl.float32)))
                tile *= tl.where(gate >= NOISE_FLOOR, gate, 0.0)
            merged += tile
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + (b * H + h) * E + e, merged.to(out.dtype.element_ty))


def attend_token_config(element_size, E, r_rows, G, P, multiprocessors):
    """Block sizes and launch options of `attend_token_kernel`; P None: no token is routed. The parts of the store fill
    the chip with two programs per processor, each of which has 32 KiB or more in flight. H200, bf16, 128k tokens of
    context, 16/4 heads, one row and eight, with `merge_token_kernel`: 10.0 and 33.6 us; 32 parts 9.9 and 36.0, two
    stages 10.9 and 35.3, four 10.6 and 34.4, 32 slots at once and five stages 11.2 and 35.6, 128 slots and 8 warps
    12.0 and 44.8; 16 or 64 columns differ by less than 4 %."""
    splits = 0
    if P is not None:
        wanted = power_of_2(cdiv(2 * multiprocessors, G))
        splits = 1 << (max(1, min(64, wanted, P // 64)).bit_length() - 1)
    tiles = {"BLOCK_N": 32, "num_stages": 1} if element_size == 4 else {"BLOCK_N": 64, "num_stages": 3}
    return {"SPLITS": splits, "ROWS": max(16, r_rows), "COLUMNS": min(E, 32), "num_warps": 4, **tiles}


@lru_cache(maxsize=1024)
def _attend_plan(shapes, dtypes, device, ring_size, slots, routes):
    """Splits, size of the scratch, grids and constants; ValueError for what the kernel does not take."""
    q, k, v, q_linear, k_linear, head, score = (None if x is None else tuple(x) for x in shapes)
    check_heads(q, k, v, *dtypes[:3])
    check_heads(q_linear, k_linear, v, *dtypes[3:], dtypes[2])
    (B, T, H, E), G = q, k[2]
    check(
        (T == 1, f"attend_token takes one token, got T={T}; use reflexive_merge and sqsk_merge"),
        (head == (B, 1, 2 * H), f"head must be {(B, 1, 2 * H)}, decays first, to fit q, got {head}"),
        (score is None or score == (B, 1), f"score must be {(B, 1)}, with a bias, got {score}"),
    )
    r_rows = power_of_2(H // G)
    config = attend_token_config(ring_size, E, r_rows, G, slots if routes else None, processors(device))
    programs = G * config["SPLITS"] + B * G + B * H * (E // config["COLUMNS"])
    sizes = {"H": H, "G": G, "E": E, "SCALE": E**-0.5 * LOG2E.value, "BATCH": power_of_2(max(1, B))}
    merge = {"H": H, "E": E, "SPLITS": config["SPLITS"], "num_warps": max(1, min(4, config["SPLITS"] * E // 1024))}
    return config["SPLITS"] + 1, (programs,), sizes | config | dependent(device), (B * H,), merge | dependent(device)


@attend_token.kernel
def _attend_token(
    q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, head_BTX, log_rate_H, rate_bias_H, least, norm_E, eps,
    position_BT, start_BT, length_B, seen_B, score_BT, bias, noise_floor, initial, every, state_BHEE, ring_k_BWGE,
    ring_v_BWGE, keys_BPGE, values_BPGE, positions_BP, held_B, document_slot_B, key_scales_BPG, value_scales_BPG,
    log_gates_BP,
):  # fmt: skip
    """Cached keys are read for rows that read alone; all arithmetic is float32."""
    (B, _, H, E), (W, G), P = q_BTHE.shape, ring_k_BWGE.shape[1:3], keys_BPGE.shape[1] - 1
    parts, grid, constants, merge_grid, merge = _attend_plan(
        (q_BTHE.shape, k_BTGE.shape, v_BTGE.shape, q_linear_BTHE.shape, k_linear_BTGE.shape, head_BTX.shape,
         None if score_BT is None else score_BT.shape),
        (q_BTHE.dtype, k_BTGE.dtype, v_BTGE.dtype, q_linear_BTHE.dtype, k_linear_BTGE.dtype), q_BTHE.device,
        ring_k_BWGE.element_size(), P, score_BT is not None,
    )  # fmt: skip
    form, kind, ring, counts = kept_form(keys_BPGE.dtype, E), ring_k_BWGE.dtype, (B, max(1, W), G, E), (B,)
    kept, held = (B, P + 1, G, form["WIDTH"]), keys_BPGE.dtype if form["HALF"] else kind
    scales, log_gates = (B, P + 1, G) if form["HALF"] else None, log_gates_BP
    if not every and log_gates_BP.shape != positions_BP.shape:
        log_gates = None
    gates = None if log_gates is None else kept[:2]
    for name, x, shape, dtype in (
        ("state", state_BHEE, (B, H, E, E), torch.float32), ("ring_k", ring_k_BWGE, ring, kind), ("ring_v",
        ring_v_BWGE, ring, kind), ("keys", keys_BPGE, kept, held), ("values", values_BPGE,
        kept, held), ("positions", positions_BP, kept[:2], torch.int32), ("held", held_B, counts,
        torch.int32), ("document_slot", document_slot_B, counts, torch.int32), ("key_scales", key_scales_BPG, scales,
        torch.bfloat16), ("value_scales", value_scales_BPG, scales, torch.bfloat16), ("log_gates", log_gates_BP, gates,
        torch.float32),
    ):  # fmt: skip
        if shape is not None and (x.shape != shape or x.dtype != dtype or not x.is_contiguous()):
            refuse_in_place(name, x, shape, dtype)
    out_BTHE, slot_BT = torch.empty_like(q_BTHE), start_BT.new_empty(B, 1)
    if B == 0:
        return out_BTHE, slot_BT
    linear_BHE = q_BTHE.new_empty(B, H, E, dtype=torch.float32)
    part = q_BTHE.new_empty(B, parts, H, E, dtype=torch.float32)
    part_lse = q_BTHE.new_empty(B, parts, H, dtype=torch.float32)
    plan_B2 = held_B.new_empty(B, 2)
    attend_token_kernel[grid](
        q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, head_BTX, log_rate_H, rate_bias_H, least,
        position_BT.expand(B, 1).contiguous(), start_BT, length_B, seen_B, score_BT, bias, state_BHEE, ring_k_BWGE,
        ring_v_BWGE, keys_BPGE, values_BPGE, positions_BP, held_B, document_slot_B, key_scales_BPG, value_scales_BPG,
        log_gates, linear_BHE, part, part_lse, plan_B2, slot_BT, B, P, WINDOW=W, INITIAL=initial, EVERY=every, **form,
        **constants,
    )  # fmt: skip
    merge_token_kernel[merge_grid](
        linear_BHE, head_BTX, norm_E, part, part_lse, plan_B2, slot_BT, score_BT, held_B, document_slot_B, out_BTHE,
        EPS=eps, NOISE_FLOOR=noise_floor, EVERY=every, **merge,
    )  # fmt: skip
    return out_BTHE, slot_BT


@triton.jit
def load_rows(x, row, M, begin, end, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K columns from `begin` of ROWS rows, of which x is the one numbered `row` of M; zeros from `end` and M."""
    m = tl.arange(0, ROWS)
    k = begin + tl.arange(0, BLOCK_K)
    return tl.load(x + m[:, None] * K + k[None, :], mask=(row + m < M)[:, None] & (k < end)[None, :], other=0.0)


@triton.jit
def load_factor(norm, begin, end, BLOCK_K: tl.constexpr):
    """BLOCK_K values from `begin` of a norm's weight, zeros from `end`."""
    k = begin + tl.arange(0, BLOCK_K)
    return tl.load(norm + k, mask=k < end, other=0.0)


@triton.jit
def as_tile(rows, TILE: tl.constexpr):
    """Rows as the TILE rows of a product, repeated; what they sum to is not stored."""
    ROWS: tl.constexpr = rows.shape[0]
    if ROWS == TILE:
        return rows
    return tl.reshape(tl.broadcast_to(rows[None, :, :], (TILE // ROWS, ROWS, rows.shape[1])), (TILE, rows.shape[1]))


@triton.jit
def load_normed(x, norm, squares, begin, end, M, K: tl.constexpr, TILE: tl.constexpr):
    """Columns of the M rows as a TILE, and their squares: as they are, or under RMSNorm except for the division by
    their lengths, which can follow the product; that waits for no sum over the rows then. Float16 might not hold such
    rows: they are float32 there."""
    rows = load_rows(x, 0, M, begin, end, K, squares.shape[0], squares.shape[1])
    if norm is not None:
        wide = rows.to(tl.float32)
        squares += wide * wide
        if rows.dtype == tl.float16:
            rows = wide
        rows = (rows * load_factor(norm, begin, end, squares.shape[1])[None, :]).to(rows.dtype)
    return as_tile(rows, TILE), squares


@triton.jit
def fold_product(total, weight, column, N, begin, end, rows, K: tl.constexpr):
    """total [BLOCK_N, TILE] + weight tile, of `load_rows`, @ rows [TILE, BLOCK_K]^T; TF32 holds float16 as it is, and
    every dtype e4m3."""
    weight_tile = load_rows(weight, column, N, begin, end, K, total.shape[0], rows.shape[1])
    if weight_tile.dtype == tl.float8e4nv:
        weight_tile = weight_tile.to(rows.dtype)
    if rows.dtype == weight_tile.dtype:
        total = tl.dot(weight_tile, tl.trans(rows), total, input_precision="tf32x3")
    else:
        total = tl.dot(weight_tile.to(tl.float32), tl.trans(rows), total, input_precision="tf32")
    return total


@triton.jit
def two_sums(
    low, x, norm, weight, other, column, N, M, K: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products [BLOCK_N, TILE] of the channels from `column` of weight [N, K] with rows of x, in two sums, and the
    scale [1, TILE] that RMSNorm still multiplies them by. Of the first HALF features, added to `low`, and of the
    others, because a sum of products is a chain, and two of them overlap; with a weight `other` of all HALF = K
    features with each of both weights, which share the rows."""
    TILE: tl.constexpr = low.shape[1]
    at = column.to(tl.int64) * K
    high, squares = tl.zeros(low.shape, tl.float32), tl.zeros([ROWS, BLOCK_K], tl.float32)
    for k in range(0, HALF, BLOCK_K):
        rows, squares = load_normed(x, norm, squares, k, HALF, M, K, TILE)
        low = fold_product(low, weight + at, column, N, k, HALF, rows, K)
        if other is None:
            rows, squares = load_normed(x, norm, squares, HALF + k, K, M, K, TILE)
            high = fold_product(high, weight + at, column, N, HALF + k, K, rows, K)
        else:
            high = fold_product(high, other + at, column, N, k, K, rows, K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    scale = tl.rsqrt(tl.sum(squares, 1) / K + EPS)
    return low, high, tl.trans(as_tile(tl.reshape(scale, (ROWS, 1)), TILE))


@triton.jit
def store_columns(out, tile, column, M, N):
    """A tile [BLOCK_N, TILE] as BLOCK_N columns from `column` of out [M, N], in the dtype of `out`."""
    m, n = tl.arange(0, tile.shape[1]), column + tl.arange(0, tile.shape[0])
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out + m[None, :] * N + n[:, None], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_scores(
    x, norm, weight, score, M, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Scores of the M rows. The decision must be that of `router_score`: rows rounded by the norm, no tensor cores."""
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in tl.range(0, K, BLOCK_D, num_stages=1):
        rows = load_rows(x, 0, M, begin, K, K, ROWS, BLOCK_D).to(tl.float32)
        squares += rows * rows
    scale = tl.rsqrt(tl.sum(squares, 1) / K + EPS)
    products = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in tl.range(0, K, BLOCK_D, num_stages=1):
        rows = load_rows(x, 0, M, begin, K, K, ROWS, BLOCK_D)
        factor = load_factor(norm, begin, K, BLOCK_D).to(tl.float32)
        normed = (rows.to(tl.float32) * scale[:, None] * factor[None, :]).to(rows.dtype).to(tl.float32)
        products += normed * load_factor(weight, begin, K, BLOCK_D).to(tl.float32)[None, :]
    m = tl.arange(0, ROWS)
    tl.store(score + m, tl.sum(products, 1) * (GAIN * K**-0.5), mask=m < M)


@kernel("M")
def product_kernel(
    x, norm, weight, other, second, score_weight, weight_scale, other_scale, residual, out, second_out, score, M,
    N: tl.constexpr, X: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of out [M, N], the product of `weight` with the rows, added to `residual` or, given `other`, of
    their SwiGLU; or of second_out [M, X], that of `second`; a last program, if launched, makes the scores [M].
    weight_scale, other_scale: [N], of weights in e4m3."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = TILES_N + (X + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    column, columns, works = tile * BLOCK_N, N, True
    if second is not None:
        columns, works = tl.where(tile < TILES_N, N, X), tile < TILES
        if tile >= TILES_N:
            column = (tile - TILES_N) * BLOCK_N
            if weight_scale is None:
                weight = second
    if PDL:
        tl.extra.cuda.gdc_wait()
    if works:
        low = tl.zeros([BLOCK_N, TILE], tl.float32)
        before = low
        if residual is not None:
            m, n = tl.arange(0, TILE), column + tl.arange(0, BLOCK_N)
            inside = (n < N)[:, None] & (m < M)[None, :]
            before = tl.load(residual + m[None, :] * N + n[:, None], mask=inside, other=0.0).to(tl.float32)
            if weight_scale is None:
                low = before
        if second is None or weight_scale is None:
            low, high, scale = two_sums(
                low, x, norm, weight, other, column, columns, M, K, HALF, EPS, ROWS, BLOCK_K, PDL
            )
        elif tile < TILES_N:
            low, high, scale = two_sums(low, x, norm, weight, None, column, N, M, K, HALF, EPS, ROWS, BLOCK_K, PDL)
        else:  # pointers to two dtypes are no alternatives
            low, high, scale = two_sums(low, x, norm, second, None, column, X, M, K, HALF, EPS, ROWS, BLOCK_K, PDL)
        if weight_scale is not None and tile < TILES_N:
            factor = load_factor(weight_scale, column, N, BLOCK_N)[:, None]
            low = low * factor
            high = high * (factor if other is None else load_factor(other_scale, column, N, BLOCK_N)[:, None])
        if other is not None:
            store_columns(out, gated(low * scale, high * scale), column, M, N)
        elif second is None:
            total = low + high
            store_columns(out, total if weight_scale is None else total + before, column, M, N)
        else:
            total = (low + high) * scale
            if tile < TILES_N:
                store_columns(out, total, column, M, N)
            else:
                store_columns(second_out, total, column, M, X)
    elif score_weight is not None:
        store_scores(x, norm, score_weight, score, M, K, EPS, ROWS, BLOCK_D)


# Block sizes and launch options of the products; in float32 BLOCK_K is a quarter, as products on tensor cores take
# three times the registers. H200, bf16, K=2048, one row and eight, beside launches of its kind
PRODUCTS = {
    # 3104 channels 5.8 and 7.6 us; 16 channels and one warp 5.5 and 16; four warps 9.3 and 12. Before rows took the
    # narrow side of the product 5.8 and 10
    "project_token": {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 2, "num_stages": 4},
    # N=6912: 15.4 and 16.7 us, 3.7 and 3.4 TB/s; one warp of 16 columns 15.7 and 19; four warps of 64 columns 26, 23
    "swiglu_token": {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 2, "num_stages": 5},
    # N=2048, K=6912 9.6 us, K=2048 4.7; 32 columns and two warps 12.0 and 4.9; 512 values of K at once 11.5. One sum
    # over all of K instead of two, on the wide side of the product: 11.9 and 5.1
    "linear_add_token": {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 1, "num_stages": 4},
}


@lru_cache(maxsize=1024)
def _product_plan(operation, names, x_shape, dtype, device, *others):
    """Grid and constants of a product of few rows, given names, shapes and dtypes of its weights and of the vectors as
    wide as x; ValueError for what its kernel does not take."""
    (B, T, K), options = x_shape, PRODUCTS[operation]
    others = [(name, tuple(x[0]), x[1]) for name, x in zip(names, others, strict=True) if x is not None]
    check(
        (T == 1, f"x of {operation} must be one token, [B, 1, D], got {tuple(x_shape)}; call the layers one by one"),
        (dtype in DTYPES, f"x of {operation} must be float32, bfloat16 or float16, got {dtype}; cast it"),
    )
    vectors = [(name, shape) for name, shape, _ in others if name in ("norm", "score_weight")]
    scales = {name: (shape, kind) for name, shape, kind in others if name.endswith("scale")}
    weights = [other for other in others if other[:2] not in vectors and other[0] not in scales]
    if scales:
        check_float8(capability(device))
    for name, shape, kind in weights:
        scale = scales.get(name.replace("weight", "scale"))
        right, of = (dtype, f"as x of {operation} has it") if scale is None else (E4M3, "of scales")
        wanted = f"{name} must be [N, {K}] in {right}, {of}, got {shape} in {kind}; cast it"
        check((len(shape) == 2 and shape[1] == K and 0 not in shape and kind == right, wanted))
        wanted = f"the scale of {name} must be [{shape[0]}, 1] in float32, got {scale}"
        check((scale in (None, ((shape[0], 1), torch.float32)), wanted))
    for name, shape in vectors:
        check((shape == (K,), f"{name} must be [{K}], the width of x, got {shape}"))
    gates, half = operation == "swiglu_token", dtype.itemsize == 2  # gates: two weights that share tiles
    N, X = weights[0][1][0], 0 if gates or len(weights) == 1 else weights[1][1][0]
    programs = cdiv(N, options["BLOCK_N"]) + cdiv(X, options["BLOCK_N"]) + (len(vectors) == 2)
    # Rows as powers of two: those of a product, whose tiles have 8 columns or more, and those that are loaded
    tile = max(8, power_of_2(max(1, B)))
    rows = power_of_2(max(1, B)) if vectors else tile
    sizes = {
        "N": N, "X": X, "K": K, "HALF": K if gates else cdiv(cdiv(K, 2), 16) * 16, "ROWS": rows, "TILE": tile,
        "BLOCK_D": min(4096 // rows, power_of_2(K)), "BLOCK_K": options["BLOCK_K"] // (1 if half else 4),
    }  # fmt: skip
    return (programs,), options | sizes | dependent(device)


def _product(operation, names, x_BTD, *others):
    """`_product_plan` of tensors."""
    described = [None if x is None else (x.shape, x.dtype) for x in others]
    return _product_plan(operation, names, x_BTD.shape, x_BTD.dtype, x_BTD.device, *described)


@project_token.kernel
def _project_token(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D, qkv_scale_C1):
    """One launch for at most 16 rows; sums are float32."""
    B = x_BTD.shape[0]
    if B > MOST_ROWS:
        return project_token.reference(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D, qkv_scale_C1)
    names = ("norm", "qkv_weight", "head_weight", "score_weight", "qkv_scale")
    others = norm_D, qkv_weight_CD, head_weight_XD, score_weight_D, qkv_scale_C1
    grid, constants = _product("project_token", names, x_BTD, *others)
    qkv_BTC = x_BTD.new_empty(B, 1, constants["N"])
    head_BTX = x_BTD.new_empty(B, 1, constants["X"], dtype=torch.float32)
    score_BT = x_BTD.new_empty(B, 0 if score_weight_D is None else 1, dtype=torch.float32)
    if B:
        product_kernel[grid](
            x_BTD, norm_D, qkv_weight_CD, None, head_weight_XD, score_weight_D, qkv_scale_C1, None, None, qkv_BTC,
            head_BTX, score_BT, B, EPS=eps, **constants,
        )  # fmt: skip
    return qkv_BTC, head_BTX, score_BT


@swiglu_token.kernel
def _swiglu_token(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND, gate_scale_N1, up_scale_N1):
    """One launch for at most 16 rows; gate and up are not rounded before SiLU and product."""
    B, N = x_BTD.shape[0], gate_weight_ND.shape[0]
    if B > MOST_ROWS:
        return swiglu_token.reference(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND, gate_scale_N1, up_scale_N1)
    if (gate_scale_N1 is None) != (up_scale_N1 is None):
        raise ValueError("swiglu_token takes both weights with scales or none; quantise the other one too")
    names = ("norm", "gate_weight", "up_weight", "gate_scale", "up_scale")
    others = norm_D, gate_weight_ND, up_weight_ND, gate_scale_N1, up_scale_N1
    grid, constants = _product("swiglu_token", names, x_BTD, *others)
    if up_weight_ND.shape[0] != N:
        raise ValueError(f"up_weight must have the {N} rows of gate_weight, got {tuple(up_weight_ND.shape)}")
    out_BTN = x_BTD.new_empty(B, 1, N)
    if B:
        product_kernel[grid](
            x_BTD, norm_D, gate_weight_ND, up_weight_ND, None, None, gate_scale_N1, up_scale_N1, None, out_BTN, None,
            None, B, EPS=eps, **constants,
        )  # fmt: skip
    return out_BTN


@linear_add_token.kernel
def _linear_add_token(residual_BTN, x_BTD, weight_ND, scale_N1):
    """One launch for at most 16 rows, summed in float32 and rounded once."""
    B, N = x_BTD.shape[0], weight_ND.shape[0]
    if B > MOST_ROWS:
        return linear_add_token.reference(residual_BTN, x_BTD, weight_ND, scale_N1)
    grid, constants = _product("linear_add_token", ("weight", "scale"), x_BTD, weight_ND, scale_N1)
    if residual_BTN.shape != (B, 1, N) or residual_BTN.dtype != x_BTD.dtype:
        got = f"{tuple(residual_BTN.shape)} in {residual_BTN.dtype}"
        raise ValueError(f"residual must be {(B, 1, N)} in {x_BTD.dtype}, got {got}")
    out_BTN = x_BTD.new_empty(B, 1, N)
    if B:
        product_kernel[grid](  # nothing is normed
            x_BTD, None, weight_ND, None, None, None, scale_N1, None, residual_BTN, out_BTN, None, None, B, EPS=1.0,
            **constants,
        )  # fmt: skip
    return out_BTN
