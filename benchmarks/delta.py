"""The gated delta rule in the reflexive stream (arXiv 2412.06464), for training alone: no cache holds its state.

Shape suffixes as in `operations_hspmn`; N chunks of L tokens, R query heads per key head.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..operations_hspmn import LINEAR_CHUNK, wide

LEAST_PRODUCT = 16  # rows of the smallest matrices whose product is worth a call of its own


def _unit_inverse(x):
    """Inverse of unit lower triangular matrices [..., L, L], L a power of 2, from those of their halves: its entries
    are bounded where the rule's are, unlike powers of the matrix."""
    half = x.shape[-1] // 2
    if not half:
        return torch.ones_like(x)
    first, last = _unit_inverse(torch.stack([x[..., :half, :half], x[..., half:, half:]], -3)).unbind(-3)
    below = -x[..., half:, :half]
    if half < LEAST_PRODUCT:  # a compiler makes sums of its own
        below = ((last[..., None] * below[..., None, :, :]).sum(-2)[..., None] * first[..., None, :, :]).sum(-2)
    else:
        below = last @ below @ first
    return torch.cat([F.pad(first, (0, half)), torch.cat([below, last], -1)], -2)


def written_values(k_BTGE, v_BTGF, log_decay_BTH, beta_BTH, start_BT=None, chunk=LINEAR_CHUNK):
    """What the gated delta rule writes into its state, u_t = b_t (v_t - exp(a_t) S_(t-1)^T k_t), in v's dtype.

    With S_t = exp(a_t) S_(t-1) + k_t u_t^T this is S_t = exp(a_t) (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T (Gated
    DeltaNet, arXiv 2412.06464), so that `linear_attention` of q, k and u reads it. k: of length at most 1. log_decay:
    a, at most 0. beta: b in [0, 1]. start_BT: of `operations_hspmn`. chunk: tokens solved at once, a power of 2.
    Returns u_BTHF. WY representation: u = U - W S with the state S before the chunk, (I + A) [U, W] = b [v, exp(c) k],
    sums c of a, and A_ts = b_t exp(c_t - c_s) k_t . k_s for s < t. It is solved, and states carried, in float32.
    """
    (B, T, G, E), (V, H, L) = k_BTGE.shape, (v_BTGF.shape[3], beta_BTH.shape[2], chunk)
    N, R, dtype = -(-T // L), H // G, v_BTGF.dtype
    padding = N * L - T
    k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).reshape(B, N, L, G, -1).transpose(2, 3) for x in (k_BTGE, v_BTGF))
    a, b = (F.pad(wide(x), (0, 0, 0, padding)).reshape(B, N, L, G, R) for x in (log_decay_BTH, beta_BTH))
    c, b = a.permute(0, 1, 3, 4, 2).cumsum(-1), b.permute(0, 1, 3, 4, 2)  # [B, N, G, R, L]
    token_L = torch.arange(L, device=k.device)
    earlier, reached, last, kept = token_L[:, None] > token_L, 1.0, 1.0, 1.0
    if start_BT is not None:  # within its chunk: documents see neither tokens nor states from before they begin
        start = F.pad(start_BT.expand(B, T), (0, padding), value=T).reshape(B, N, 1, 1, L)
        start = start - torch.arange(0, N * L, L, device=k.device)[:, None, None, None]
        earlier = earlier & (token_L >= start[..., None])
        reached, last, kept = start < 0, token_L >= start[..., -1:], start[..., -1:] < 0
    with torch.autocast(k.device.type, enabled=False):
        weight = (c[..., :, None] - c[..., None, :]).masked_fill(~earlier, float("-inf")).exp()
        products = (wide(k) @ wide(k).mT)[:, :, :, None]
        eye = torch.eye(L, dtype=c.dtype, device=k.device)
        system = eye + b[..., None] * weight * products
        inverse = _unit_inverse(system.detach())
        inverse = inverse @ (2 * eye - system @ inverse)  # one step of Newton, which has the inverse's gradient
        solve = inverse * b[..., None, :]
        entering = solve * (c.exp() * reached)[..., None, :]
        # Rows of query heads that share a key head make one product
        U = (solve.to(dtype).flatten(3, 4) @ v).unflatten(3, (R, L))
        W = (entering.to(dtype).flatten(3, 4) @ k).unflatten(3, (R, L))
        leaving = (k[:, :, :, None] * ((c[..., -1:] - c).exp() * last)[..., None]).to(dtype).mT
        # From chunk to chunk: S = (exp(c_L) - leaving W) S + leaving U
        eye = torch.eye(E, dtype=c.dtype, device=k.device)
        moves = eye * (c[..., -1:].exp() * kept)[..., None] - wide(leaving @ W)
        moves, adds = (x.transpose(0, 1).reshape(N, B * H, E, -1) for x in (moves, wide(leaving @ U)))
        states = [torch.zeros_like(adds[0])]
        for move, add in zip(moves.unbind()[:-1], adds.unbind()[:-1], strict=True):
            states.append(torch.baddbmm(add, move, states[-1]))
        states = torch.stack(states).to(dtype).reshape(N, B, G, R, E, V).transpose(0, 1)
        u = U - W @ states
    return u.permute(0, 1, 4, 2, 3, 5).reshape(B, N * L, H, V)[:, :T]


class DeltaRule:
    """Mixed into a model's own `ReflexiveStream`: the state is written by the gated delta rule."""

    def written(self, h_BTD, heads, decay_BTH, stream):
        """The key of every query head, [B, T, H, E], and what `written_values` gives; ValueError with a cache."""
        if stream.seen_B is not None:
            raise ValueError("hspmn_delta has no cache, got one to continue; set use_cache=False")
        k_BTGE, beta_BTH = heads.k_linear_BTGE, wide(self.beta_proj(h_BTD)).sigmoid()
        u_BTHF = written_values(k_BTGE, heads.v_BTGE, decay_BTH, beta_BTH, stream.start_BT)
        return k_BTGE.repeat_interleave(beta_BTH.shape[2] // k_BTGE.shape[2], 2), u_BTHF


def use_delta_rule(model):
    """Let every reflexive stream of an HSPMN model write by the delta rule, with a fresh projection to its strengths;
    from then on the model runs without a cache."""
    config, layers = model.config, model.base_model.layers
    kind = type("DeltaStream", (DeltaRule, type(layers[0].reflexive)), {})  # one: a compiler looks at classes
    for layer in layers:
        layer.reflexive.__class__ = kind
        linear = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)
        nn.init.normal_(linear.weight, std=config.initializer_range)
        layer.reflexive.beta_proj = linear
