"""What each HSPMN operation means, in plain PyTorch: the executable specification of the kernels.

Legend of shape suffixes:
    B batch, T tokens of this call, K routed slots of this call, P key slots (cached ones first), S key tokens,
    H query heads, G key/value heads (H = G * R), E head width, F value width, C channels, W window, D model width.

Two integer tensors carry packing, padding and cache continuation through every operation:
    start_BT  index of the first token that token t may see, counted in tokens of this call; negative values reach
              into the cached past (-3: the last three cached tokens are visible). It never decreases along a row.
    length_B  tokens of this call that are real; rows are right-padded, so they are tokens 0 .. length - 1.
"""

import torch
from torch.nn import functional as F

LINEAR_CHUNK = 64  # tokens per chunk of the linear attention
LINEAR_SPAN = 4096  # tokens whose chunk states are combined in one product; longer rows loop over spans
SILU_LIMIT = 30.0  # SiLU is linear or zero beyond it to float32 precision; keeps fp16 products finite
SCORE_GAIN = 2.0  # a step of Adam moves a router's score by this times lr * sqrt(D); without 1 / sqrt(D) by lr * D
LEAST_PEAK = 1e-30  # of a head that is stored as whole numbers; one of smaller elements is stored as zeros
HIDDEN_SCORE = -1e30  # finite, since a softmax over nothing but -inf has no value
QUERY_SPAN = 1024  # queries scored at once against all keys, which bounds the memory of long prompts


def wide(x):
    """`x` in float32, or in float64 if it is float64: what scores, softmaxes and states are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def score_ref(h_BTD, weight_D):
    """Router score of each token, 2 h.w / sqrt(D), in float32 whatever the autocast or TF32 setting.

    It is a sum of products, not a matmul, so no reduced-precision mode applies.
    """
    return (wide(h_BTD) * weight_D).sum(-1) * (SCORE_GAIN * h_BTD.shape[-1] ** -0.5)


def route_ref(h_BTD, weight_D, bias, noise_floor):
    """Router score (see `score_ref`), gate and decision of each token.

    `bias` (a scalar tensor) steers the decision and never enters the gate (arXiv 2408.15664).

    Returns score_BT and gate_BT in float32, routed_BT in bool.
    """
    score_BT = score_ref(h_BTD, weight_D)
    return score_BT, *decide_ref(score_BT, bias, noise_floor)


def decide_ref(score_BT, bias, noise_floor):
    """Gate (float) and decision (bool) of router scores, as in `route_ref`."""
    gate_BT = score_BT.sigmoid()
    return gate_BT * (gate_BT >= noise_floor), score_BT + bias > 0


def compact_ref(mask_BT, capacity):
    """Ordered compaction of the true entries of a mask into `capacity` slots per row.

    Returns index_BK (int64, the token of each slot, -1 for an empty slot), slot_BT (int64, the slot of each token,
    -1 for a token without one) and count_B (int32, used slots). Entries past the capacity, the latest, get none.
    """
    slot_BT = mask_BT.long().cumsum(1) - 1
    slot_BT = torch.where(mask_BT & (slot_BT < capacity), slot_BT, -1)
    token_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(slot_BT)
    index_BK = slot_BT.new_full((mask_BT.shape[0], capacity + 1), -1)
    index_BK = index_BK.scatter(1, torch.where(slot_BT < 0, capacity, slot_BT), token_BT)[:, :capacity]
    return index_BK, slot_BT, (slot_BT >= 0).sum(1, dtype=torch.int32)


def take_rows_ref(x_BTX, index_BK):
    """Rows of `x_BTX` [B, T, ...] named by `index_BK`, as [B, K, ...]; index -1 gives zeros."""
    index = index_BK.reshape(*index_BK.shape, *[1] * (x_BTX.dim() - 2))
    rows = x_BTX.gather(1, index.clamp(min=0).expand(-1, -1, *x_BTX.shape[2:]))
    return torch.where(index >= 0, rows, 0)


def causal_conv_ref(x_BTC, weight_CL, start_BT, history_BLC):
    """Depthwise causal convolution: y_t = sum_i weight_i x_(t - L + 1 + i) over visible tokens.

    weight_CL: the last of the L taps weighs the current token. history_BLC: the L - 1 tokens before this call.
    """
    T, L = x_BTC.shape[1], weight_CL.shape[1]
    padded = torch.cat([history_BLC.to(x_BTC.dtype), x_BTC], 1)
    token_T = torch.arange(T, device=x_BTC.device)
    y_BTC = x_BTC * weight_CL[:, -1]
    for lag in range(1, L):
        past_BTC = padded[:, L - 1 - lag : L - 1 - lag + T]
        if start_BT is not None:
            past_BTC = torch.where((token_T - lag >= start_BT)[..., None], past_BTC, 0)
        y_BTC = y_BTC + past_BTC * weight_CL[:, -1 - lag]
    return y_BTC


def linear_attention_recurrent_ref(q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, length_B, state_BHEF):
    """Decayed linear attention, one token at a time: S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T and o_t = S_t^T q_t.

    The state restarts at zero at a token with start_t = t; tokens past `length_B` leave it as it was.
    Returns o_BTHF in q's dtype and the last state in float32.
    Source: Linear Transformers (arXiv 2006.16236); scalar decay per head as in Mamba-2 (arXiv 2405.21060).
    """
    T, R = q_BTHE.shape[1], q_BTHE.shape[2] // k_BTGE.shape[2]
    state, outputs = state_BHEF.to(wide(q_BTHE).dtype), []
    for t in range(T):
        q, k, v = wide(q_BTHE[:, t]), wide(k_BTGE[:, t]), wide(v_BTGF[:, t])
        update = (k[..., :, None] * v[..., None, :]).repeat_interleave(R, 1)
        decay = log_decay_BTH[:, t].to(state.dtype).exp()[..., None, None]
        if start_BT is not None:
            decay = decay * (start_BT[:, t] < t)[:, None, None, None]
        advanced = decay * state + update
        if length_B is not None:
            advanced = torch.where((t < length_B)[:, None, None, None], advanced, state)
        state = advanced
        outputs.append((q[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1).to(q_BTHE.dtype), state


def linear_attention_ref(q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, length_B, state_BHEF):
    """`linear_attention_recurrent_ref` in chunks of `LINEAR_CHUNK` tokens: the same result from matrix products.

    Products run in q's dtype, decays and states in float32. start_BT, length_B and state_BHEF may be None: one
    document from token 0, all tokens real, zero state. Source: chunkwise form of Gated Linear Attention
    (arXiv 2312.06635) and the state-space dual (arXiv 2405.21060).
    """
    B, T, H, E = q_BTHE.shape
    if state_BHEF is None:
        state_BHEF = q_BTHE.new_zeros(B, H, E, v_BTGF.shape[-1])
    if length_B is not None:
        real_BT = torch.arange(T, device=q_BTHE.device) < length_B[:, None]
        log_decay_BTH = torch.where(real_BT[..., None], log_decay_BTH, 0)
        k_BTGE = torch.where(real_BT[..., None, None], k_BTGE, 0)
    outputs, state = [], state_BHEF.to(wide(q_BTHE).dtype)
    for begin in range(0, T, LINEAR_SPAN):
        span = slice(begin, min(begin + LINEAR_SPAN, T))
        start = None if start_BT is None else start_BT[:, span] - begin
        out, state = _linear_attention_span(
            q_BTHE[:, span], k_BTGE[:, span], v_BTGF[:, span], log_decay_BTH[:, span], start, state
        )
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state


def _linear_attention_span(q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, state_BHEF):
    B, T, H, E = q_BTHE.shape
    G, V = v_BTGF.shape[2:]
    R, L = H // G, min(LINEAR_CHUNK, T)
    N = -(-T // L)
    padding = N * L - T
    if padding:  # empty tokens: no key, no decay
        q_BTHE, k_BTGE, v_BTGF = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q_BTHE, k_BTGE, v_BTGF))
        log_decay_BTH = F.pad(log_decay_BTH, (0, 0, 0, padding))
    # [B, N, G, R, L, E] and [B, N, G, L, E]: query heads that share a key head are rows of one product
    q = q_BTHE.reshape(B, N, L, G, R, E).permute(0, 1, 3, 4, 2, 5)
    k = k_BTGE.reshape(B, N, L, G, E).transpose(2, 3)
    v = v_BTGF.reshape(B, N, L, G, V).transpose(2, 3)
    decay = log_decay_BTH.to(state_BHEF.dtype).reshape(B, N, L, G, R)
    decay = decay.permute(0, 1, 3, 4, 2).cumsum(-1)  # [B, N, G, R, L]

    token_L = torch.arange(L, device=q.device)
    visible = token_L[:, None] >= token_L  # [L, L] query by key
    if start_BT is not None:
        start = start_BT if not padding else torch.cat([start_BT, start_BT[:, -1:].expand(-1, padding)], 1)
        start = start.reshape(B, N, L) - torch.arange(0, N * L, L, device=q.device)[:, None]  # within its chunk
        visible = visible & (token_L >= start[..., None])
        visible = visible[:, :, None, None]
    weight = (decay[..., :, None] - decay[..., None, :]).masked_fill(~visible, float("-inf")).exp()
    scores = (q.reshape(B, N, G, R * L, E) @ k.transpose(-1, -2)).reshape(B, N, G, R, L, L)
    out = (scores * weight).to(v.dtype).reshape(B, N, G, R * L, L) @ v
    out = out.reshape(B, N, G, R, L, V)

    to_end = (decay[..., -1:] - decay).exp()  # [B, N, G, R, L]
    if start_BT is not None:
        to_end = to_end * (token_L >= start[:, :, -1:])[:, :, None, None]
    updates = (k[:, :, :, None] * to_end[..., None]).to(k.dtype).transpose(-1, -2) @ v[:, :, :, None]
    # States at the N + 1 chunk borders from the initial state and the N updates, in one triangular product
    total = F.pad(decay[..., -1].reshape(B, N, H).cumsum(1), (0, 0, 1, 0)).transpose(1, 2)  # [B, H, N + 1]
    border = torch.arange(N + 1, device=q.device)
    reached = border[:, None] >= border
    if start_BT is not None:
        resets = F.pad((start[:, :, -1] >= 0).long().cumsum(1), (1, 0))  # chunks that hold a document's start
        reached = (reached & (resets[:, :, None] == resets[:, None, :]))[:, None]
    carry = (total[..., :, None] - total[..., None, :]).masked_fill(~reached, float("-inf")).exp()
    sources = torch.cat([state_BHEF[:, None], wide(updates).reshape(B, N, H, E, V)], 1)
    with torch.autocast(q.device.type, enabled=False):  # it would round the states to bfloat16
        states = torch.einsum("bhnm,bmhx->bnhx", carry, sources.flatten(3)).reshape(B, N + 1, G, R, E, V)

    from_begin = decay.exp()
    if start_BT is not None:
        from_begin = from_begin * (start < 0)[:, :, None, None]
    out = out + (q @ states[:, :-1].to(q.dtype)) * from_begin[..., None]
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(B, N * L, H, V)[:, :T]
    return out.to(q_BTHE.dtype), states[:, -1].reshape(B, H, E, V)


def interval_attention_ref(q_BTHE, k_BSGE, v_BSGE, first_BT, last_BT):
    """Softmax attention of query t over the keys first_t .. last_t, both included; an empty interval gives zeros.

    Scores are scaled by 1/sqrt(E); scores and softmax are float32 or wider.
    Returns out_BTHE in q's dtype and the log-sum-exp of the scores lse_BTH in float32 (-inf where empty).
    """
    outputs = []
    for begin in range(0, max(q_BTHE.shape[1], 1), QUERY_SPAN):
        span = slice(begin, begin + QUERY_SPAN)
        key_S = torch.arange(k_BSGE.shape[1], device=q_BTHE.device)
        visible = (key_S >= first_BT[:, span, None]) & (key_S <= last_BT[:, span, None])
        outputs.append(_masked_attention(q_BTHE[:, span], k_BSGE[:, None], v_BSGE[:, None], visible[:, None]))
    out, lse = (torch.cat(parts, 1) for parts in zip(*outputs, strict=True))
    return out, lse


def _masked_attention(q_BTHE, k_BNSGE, v_BNSGE, visible_BNTS):
    """Attention of N blocks of queries, each over its own S keys; T = N * (queries per block)."""
    (B, T, H, E), (N, _, G) = q_BTHE.shape, k_BNSGE.shape[1:4]
    if not k_BNSGE.shape[2]:
        return torch.zeros_like(q_BTHE), wide(q_BTHE).new_full((B, T, H), float("-inf"))
    q = q_BTHE.reshape(B, N, T // N, G, H // G, E).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)  # [B, N, G, R * T/N, E]
    k, v = k_BNSGE.transpose(2, 3), v_BNSGE.transpose(2, 3)  # [B, N, G, S, E]
    visible = visible_BNTS[:, :, None, None]
    scores = wide(q @ k.transpose(-1, -2)).unflatten(3, (H // G, T // N)) * E**-0.5
    scores = scores.masked_fill(~visible, HIDDEN_SCORE)
    weights, empty = scores.softmax(-1), ~visible.any(-1)
    # the largest weight is exp(largest score - lse), so the sum of exponentials is not needed a second time
    lse = (scores.amax(-1) - weights.amax(-1).log()).masked_fill(empty, float("-inf"))
    out = (weights.to(v.dtype).flatten(3, 4) @ v).unflatten(3, (H // G, T // N)).masked_fill(empty[..., None], 0)
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(B, T, H, E)
    return out, lse.permute(0, 1, 4, 2, 3).reshape(B, T, H)


def local_attention_ref(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history_k_BWGE=None, history_v_BWGE=None):
    """Softmax attention of token t over the visible tokens among t - window + 1 .. t.

    history_*: the `window` tokens before this call in order (entries before `start` are never read as values).
    Blocks of queries see only their own stretch of keys, so time and memory are O(T * window).
    Returns out_BTHE in q's dtype and lse_BTH in float32.
    """
    B, T, G, E = k_BTGE.shape
    block = min(window, T)
    N = -(-T // block)
    padding = N * block - T
    if start_BT is None:
        start_BT = torch.zeros(1, T, dtype=torch.long, device=q_BTHE.device)
    if history_k_BWGE is None:
        history_k_BWGE = history_v_BWGE = k_BTGE.new_zeros(B, window, G, E)
    q = F.pad(q_BTHE, (0, 0, 0, 0, 0, padding))
    k, v = (
        _with_previous(F.pad(torch.cat([past.to(x.dtype), x], 1), (0, 0, 0, 0, 0, padding)), window, block)
        for past, x in ((history_k_BWGE, k_BTGE), (history_v_BWGE, v_BTGE))
    )
    token = torch.arange(N * block, device=q.device).reshape(N, block, 1)
    key = torch.arange(-window, block, device=q.device) + torch.arange(0, N * block, block, device=q.device)[:, None]
    key = key[:, None]  # [N, 1, window + block]
    start = F.pad(start_BT, (0, padding)).reshape(-1, N, block, 1)
    visible = ((key <= token) & (key > token - window) & (key >= start)).expand(B, -1, -1, -1)
    out, lse = _masked_attention(q, k, v, visible)
    return out[:, :T], lse[:, :T]


def _with_previous(x_BSGE, window, block):
    """Stretches of `window + block` keys, one per block of queries; blocks are `window` long unless there is one."""
    if x_BSGE.shape[1] == window + block:
        return x_BSGE[:, None]
    blocks = x_BSGE.unflatten(1, (-1, window))
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], 2)


def sqsk_attention_ref(q_BKHE, k_BPGE, v_BPGE, first_BK, cached_B, count_B):
    """SQSK attention: routed query i sees the routed keys first_i .. cached + i, in slots; empty slots give zeros.

    Slots are ordered by position, so this is dense causal attention on the compacted rows. k_BPGE holds `cached_B`
    earlier slots followed by those of this call; count_B of the K query slots are used; first_BK is the first
    visible slot (documents packed in one row), or None for slot 0. RoPE has been applied at original positions.
    Returns out_BKHE in q's dtype and lse_BKH in float32.
    """
    slot_K = torch.arange(q_BKHE.shape[1], device=q_BKHE.device)
    last_BK = torch.where(slot_K < count_B[:, None], slot_K + cached_B[:, None], -1)
    first_BK = torch.zeros_like(last_BK) if first_BK is None else first_BK
    return interval_attention_ref(q_BKHE, k_BPGE, v_BPGE, first_BK, last_BK)


def add_sinks_ref(out_BTHE, lse_BTH, q_BTHE, sink_k_NGE, sink_v_NGE):
    """Attention output as if N learned keys and values had taken part in the softmax (arXiv 2309.17453)."""
    N, G, E = sink_k_NGE.shape
    q = wide(q_BTHE).unflatten(2, (G, -1))
    scores = torch.einsum("btgre,nge->btgrn", q, wide(sink_k_NGE)).flatten(2, 3) * E**-0.5
    total = torch.logaddexp(lse_BTH, scores.logsumexp(-1))
    weights = (scores - total[..., None]).exp().unflatten(2, (G, -1))
    sinks = torch.einsum("btgrn,nge->btgre", weights, wide(sink_v_NGE)).flatten(2, 3)
    return (wide(out_BTHE) * (lse_BTH - total).exp()[..., None] + sinks).to(out_BTHE.dtype)


def merge_ref(reflexive_BTHE, contextual_BKHE, gate_BT, slot_BT):
    """reflexive + gate * scatter(contextual): each routed token receives its slot of the contextual stream."""
    contextual_BTHE = take_rows_ref(contextual_BKHE, slot_BT)
    return reflexive_BTHE + contextual_BTHE * gate_BT[..., None, None].to(contextual_BTHE.dtype)


def split_heads_ref(
    x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E, *, kv_heads, eps, mode="gated"
):
    """From the shared projection to what both streams read: convolution, heads, feature map, norms and RoPE.

    x_BTC: C = (H + 2 * kv_heads) * E channels, queries first, then keys, then values. weight_CL: L taps of
    `causal_conv_ref`; one tap means no convolution and is not read. history_BLC: the L - 1 tokens before this call,
    or None for zeros. start_BT: or None. cos_BTE, sin_BTE: first dimension 1 or B. q_norm_E, k_norm_E: weights of the
    RMSNorm per head, with `eps` inside its root.
    mode: what the linear attention reads of q and k, "gated": SiLU divided by its length (at least 1e-12), "elu":
    elu(x) + 1.

    Returns q_linear [B, T, H, E], k_linear [B, T, G, E], q_rotated [B, T, H, E], k_rotated and v [B, T, G, E], in x's
    dtype, in which the convolution and RoPE are computed too.
    """
    dtype, E, lags = x_BTC.dtype, q_norm_E.shape[0], weight_CL.shape[1] - 1
    if lags:
        if history_BLC is None:
            history_BLC = x_BTC.new_zeros(x_BTC.shape[0], lags, x_BTC.shape[2])
        x_BTC = causal_conv_ref(x_BTC, weight_CL.to(dtype), start_BT, history_BLC)
    q_heads = x_BTC.shape[2] // E - 2 * kv_heads
    q, k, v = x_BTC.unflatten(-1, (-1, E)).split((q_heads, kv_heads, kv_heads), 2)

    def feature(x):
        x = wide(F.silu(x)) if mode == "gated" else wide(x)
        return (F.normalize(x, dim=-1) if mode == "gated" else F.elu(x) + 1).to(dtype)

    def rotated(x, weight_E):
        x = F.rms_norm(x, (E,), weight_E.to(dtype), eps).to(dtype)
        low, high = x.chunk(2, -1)
        return x * cos_BTE[:, :, None].to(dtype) + torch.cat([-high, low], -1) * sin_BTE[:, :, None].to(dtype)

    return feature(q), feature(k), rotated(q, q_norm_E), rotated(k, k_norm_E), v


def split_heads_decode_ref(
    x_BTC, weight_CL, history_BLC, start_BT, length_B, cos_BTE, sin_BTE, q_norm_E, k_norm_E, *,
    kv_heads, eps, mode="gated",
):  # fmt: skip
    """`split_heads_ref` of a single token (T = 1), and the history with the token in place of its oldest.

    length_B: 1, or 0 where a row's token is padding, which leaves the history as it was; None for no padding.
    Returns the five tensors and the new history.
    """
    tensors = (x_BTC, weight_CL, history_BLC, start_BT, cos_BTE, sin_BTE, q_norm_E, k_norm_E)
    heads = split_heads_ref(*tensors, kv_heads=kv_heads, eps=eps, mode=mode)
    moved_BLC = torch.cat([history_BLC[:, 1:], x_BTC.to(history_BLC.dtype)], 1)
    if length_B is not None:
        moved_BLC = torch.where((length_B > 0)[:, None, None], moved_BLC, history_BLC)
    return (*heads, moved_BLC)


def gated_norm_ref(linear_BTHE, head_gate_BTH, norm_E, eps):
    """RMSNorm(linear) * sigmoid(head_gate), norm and gate per head, in float32 or wider."""
    normed_BTHE = F.rms_norm(wide(linear_BTHE), norm_E.shape, wide(norm_E), eps)
    return normed_BTHE * wide(head_gate_BTH).sigmoid()[..., None]


def reflexive_merge_ref(
    q_BTHE, k_BTGE, v_BTGE, start_BT, window, linear_BTHE, head_gate_BTH, norm_E, eps,
    history_k_BWGE=None, history_v_BWGE=None,
):  # fmt: skip
    """The reflexive stream: local attention + RMSNorm(linear) * sigmoid(head_gate), norm and gate per head.

    linear_BTHE: output of the linear attention. head_gate_BTH: before the sigmoid. norm_E: the norm's weight, `eps`
    inside its root. The rest is that of `local_attention_ref`. Returns [B, T, H, E] in q's dtype; norm, gate and sum
    are float32 or wider.
    """
    local_BTHE, _ = local_attention_ref(q_BTHE, k_BTGE, v_BTGE, start_BT, window, history_k_BWGE, history_v_BWGE)
    return (local_BTHE + gated_norm_ref(linear_BTHE, head_gate_BTH, norm_E, eps)).to(q_BTHE.dtype)


def window_decode_ref(q_BTHE, k_BWGE, v_BWGE, slot_B, start_BT):
    """`local_attention_ref` of a single token (T = 1) over a ring of its last W tokens, itself included.

    slot_B: where the token lies; its predecessor lies one slot before, modulo W. Softmax needs no order and keys carry
    their RoPE, so the ring is read as it lies; slots older than `start_BT` [B, 1], which is at most 0, are not seen.
    Returns out_BTHE in q's dtype and lse_BTH in float32.
    """
    W = k_BWGE.shape[1]
    age_BW = (slot_B[:, None] - torch.arange(W, device=q_BTHE.device)) % W
    visible_BW = age_BW <= -start_BT
    k_BWGE, v_BWGE = k_BWGE.to(q_BTHE.dtype), v_BWGE.to(q_BTHE.dtype)
    return _masked_attention(q_BTHE, k_BWGE[:, None], v_BWGE[:, None], visible_BW[:, None, None])


def push_window_ref(k_BTGE, v_BTGE, ring_k_BWGE, ring_v_BWGE, seen_B, length_B):
    """Write a single token (T = 1) into the ring, IN PLACE, and return its slot_B; padding writes nothing."""
    slot_B = seen_B % ring_k_BWGE.shape[1]
    at = (torch.arange(len(slot_B), device=slot_B.device), slot_B)
    for ring_BWGE, x_BTGE in ((ring_k_BWGE, k_BTGE), (ring_v_BWGE, v_BTGE)):
        x_BGE = x_BTGE[:, 0].to(ring_BWGE.dtype)
        if length_B is not None:
            x_BGE = torch.where((length_B > 0)[:, None, None], x_BGE, ring_BWGE[at])
        ring_BWGE.index_put_(at, x_BGE)
    return slot_B


def log_decay_ref(decay_BTH, log_rate_H, bias_H, least):
    """Log-decay per token and head, -least - exp(log_rate) * softplus(decay + bias), float32 or wider, at most 0.

    least: nats per token that every head forgets at least, so that no state remembers without end.
    """
    return -wide(log_rate_H).exp() * F.softplus(wide(decay_BTH) + wide(bias_H)) - least


def quantize_ref(x_BKGE):
    """int8 [B, K, G, E] and, of each head, the scale [B, K, G] that takes its largest element to 127; zeros have 0."""
    x_BKGE = wide(x_BKGE)
    peak_BKG = x_BKGE.abs().amax(-1)
    held_BKG = peak_BKG > LEAST_PEAK
    # Products with reciprocals, which is what CUDA makes of divisions by a number: the kernel has the same bits then
    factor_BKG = torch.where(held_BKG, peak_BKG.reciprocal() * 127, 0)
    scale_BKG = torch.where(held_BKG, peak_BKG * (1 / 127), 0)
    return (x_BKGE * factor_BKG[..., None] + 0.5).floor().to(torch.int8), scale_BKG


def write_slots_ref(kept_BPGE, scales_BPG, at, x_BKGE):
    """Put rows into the slots `at` of a sparse store, IN PLACE; their scales too if the store is int8."""
    if kept_BPGE.dtype == torch.int8:
        x_BKGE, scale_BKG = quantize_ref(x_BKGE)
        scales_BPG.index_put_(at, scale_BKG.to(scales_BPG.dtype))
    # index_put and not scatter: inductor does the one in place, and copies the whole store for the other
    kept_BPGE.index_put_(at, x_BKGE.to(kept_BPGE.dtype))


def read_slots_ref(kept_BPGE, scales_BPG, dtype):
    """A sparse store as it is or, if it is int8, what it stands for in `dtype`."""
    if kept_BPGE.dtype != torch.int8:
        return kept_BPGE
    return (kept_BPGE.to(scales_BPG.dtype) * scales_BPG[..., None]).to(dtype)


def attend_decode_ref(
    q_linear_BTHE, k_linear_BTGE, q_BTHE, k_BTGE, v_BTGE, head_BTX, decay_log_rate_H, decay_bias_H, least_decay,
    norm_E, eps, position_BT, start_BT, length_B, seen_B, score_BT, bias, noise_floor, initial, state_BHEE,
    ring_k_BWGE, ring_v_BWGE, keys_BPGE, values_BPGE, positions_BP, count_B, document_slot_B, key_scales_BPG,
    value_scales_BPG,
):  # fmt: skip
    """Both streams of a single token (T = 1): linear attention, window, and gate * SQSK attention where it is routed.

    q_linear, k_linear, q, k, v: what `split_heads_ref` returns. head_BTX: the H inputs of `log_decay_ref`, then the H
    gates of `gated_norm_ref`. least_decay: the `least` of the former. start_BT: at most 0. length_B: 1, or 0 where a
    row's token is padding, which is not routed and whose output means nothing; None for no padding. seen_B: real
    tokens before this one. score_BT, bias, noise_floor: the router's, see `route_ref`, with score None for a layer
    without one; initial: so many first tokens of a document are routed whatever their score. ring_*: the window as in
    `window_decode_ref`. keys, values [B, P + 1, G, E] and positions [B, P + 1]: the sparse store, whose last slot
    takes discarded writes; count_B: its used slots; document_slot_B: the first slot of the row's document;
    key_scales_BPG and value_scales_BPG: of `quantize_ref` if keys and values are int8, else unused. Ring, store and
    counts are updated IN PLACE. A routed token without a free slot is counted and otherwise treated as one that
    is not routed.
    Returns the sum [B, 1, H, E] in q's dtype and the advanced state.
    """
    decay_BTH, gate_BTH = head_BTX.chunk(2, -1)
    log_decay_BTH = log_decay_ref(decay_BTH, decay_log_rate_H, decay_bias_H, least_decay)
    linear_BTHE, state_BHEE = linear_attention_recurrent_ref(
        q_linear_BTHE, k_linear_BTGE, v_BTGE, log_decay_BTH, start_BT, length_B, state_BHEE
    )
    slot_B = push_window_ref(k_BTGE, v_BTGE, ring_k_BWGE, ring_v_BWGE, seen_B, length_B)
    local_BTHE, _ = window_decode_ref(q_BTHE, ring_k_BWGE, ring_v_BWGE, slot_B, start_BT)
    merged_BTHE = (local_BTHE + gated_norm_ref(linear_BTHE, gate_BTH, norm_E, eps)).to(q_BTHE.dtype)
    if score_BT is None:
        return merged_BTHE, state_BHEE
    gate_BT, wanted_BT = decide_ref(score_BT, bias, noise_floor)
    wanted_B = wanted_BT[:, 0] | (start_BT[:, 0] > -initial)
    if length_B is not None:
        wanted_B = wanted_B & (length_B > 0)
    slots = keys_BPGE.shape[1] - 1
    before_B, first_B = count_B.clamp(max=slots), torch.where(start_BT[:, 0] < 0, document_slot_B, count_B)
    kept_B = wanted_B & (before_B < slots)
    at = (torch.arange(len(kept_B), device=kept_B.device)[:, None], torch.where(kept_B, before_B, slots)[:, None])
    write_slots_ref(keys_BPGE, key_scales_BPG, at, k_BTGE)
    write_slots_ref(values_BPGE, value_scales_BPG, at, v_BTGE)
    positions_BP.index_put_(at, position_BT.to(positions_BP.dtype))
    count_B.add_(wanted_B)
    document_slot_B.copy_(first_B)
    stores = ((keys_BPGE, key_scales_BPG), (values_BPGE, value_scales_BPG))
    store = (read_slots_ref(kept[:, :slots], scales[:, :slots], q_BTHE.dtype) for kept, scales in stores)
    contextual_BTHE, _ = sqsk_attention_ref(q_BTHE, *store, first_B[:, None], before_B, kept_B.to(torch.int32))
    return merged_BTHE + contextual_BTHE * gate_BT[..., None, None].to(contextual_BTHE.dtype), state_BHEE


def norm_heads_ref(x_BTD, norm_D, eps, head_weight_XD, score_weight_D=None):
    """RMSNorm of a block's input, and its two narrow products.

    Returns h [B, T, D] and head [B, T, X] (see `attend_decode_ref`) in x's dtype, and score [B, T] in float32 (see
    `score_ref`), None without a weight.
    """
    h_BTD = F.rms_norm(x_BTD, norm_D.shape, norm_D.to(x_BTD.dtype), eps)
    score_BT = None if score_weight_D is None else score_ref(h_BTD, score_weight_D)
    return h_BTD, F.linear(h_BTD, head_weight_XD), score_BT


def project_decode_ref(x_BTD, norm_D, eps, qkv_weight_CD, head_weight_XD, score_weight_D=None):
    """RMSNorm of a single token (T = 1) and what a block's attentions and router make of it.

    Returns qkv [B, 1, C] in x's dtype, head [B, 1, X] (see `attend_decode_ref`) and score [B, 1] (see `score_ref`) in
    float32; the score is None without a weight.
    """
    h_BTD, head_BTX, score_BT = norm_heads_ref(x_BTD, norm_D, eps, head_weight_XD, score_weight_D)
    return F.linear(h_BTD, qkv_weight_CD), wide(head_BTX), score_BT


def swiglu_decode_ref(x_BTD, norm_D, eps, gate_weight_ND, up_weight_ND):
    """`swiglu_ref` of RMSNorm(x), of a single token (T = 1)."""
    return swiglu_ref(F.rms_norm(x_BTD, norm_D.shape, norm_D.to(x_BTD.dtype), eps), gate_weight_ND, up_weight_ND)


def gated_product_ref(gate, up):
    """silu(max(gate, -SILU_LIMIT)) * up, in their dtype."""
    return F.silu(gate.clamp(min=-SILU_LIMIT)) * up


def swiglu_ref(x, gate_weight_NK, up_weight_NK):
    """`gated_product_ref` of x's products with the weights, x [..., K].

    Returns [..., N] in x's dtype, in which gate and up are rounded too.
    """
    return gated_product_ref(F.linear(x, gate_weight_NK), F.linear(x, up_weight_NK))


def linear_add_ref(residual, x, weight_NK):
    """residual [..., N] + the product of x [..., K] with the weight, in x's dtype."""
    return residual + F.linear(x, weight_NK)
