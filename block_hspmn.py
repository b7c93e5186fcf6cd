"""The block of HSPMN: router, shared projection, reflexive and contextual stream, SwiGLU.

Shape suffixes as in `operations_hspmn`; D hidden size.
"""

import math
import weakref
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.import_utils import is_triton_available

from .float8_hspmn import Float8Linear, KeepsDtypes
from .operations_hspmn import (
    E4M3,
    EVERY_TOKEN,
    SCORE_GAIN,
    STORES,
    add_sinks,
    as_stored,
    assign,
    causal_conv,
    end_slot,
    feature_map,
    first_slot,
    gated_product,
    log_decay,
    operations,
    rotate,
    router_score,
)

HAS_TRITON = is_triton_available()
if HAS_TRITON:
    from .kernels_hspmn import HEAD_WIDTHS, interpreted, swiglu_fits

# Kernels go through the dispatcher, "triton", only where a compiler looks on
OPERATIONS = {backend: operations(backend) for backend in ("reference", "flex", "train", "triton", "launch")}
SHARE_UNIT = 10**6  # shares are whole multiples of 1 / SHARE_UNIT where tokens are counted, also of a symbolic length
# Those attributes of a module of which one is true where it is hooked, or has another forward than its class
CHANGES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward")
QUERY_KEY_MATCH = 0.8  # correlation of the fresh weights of a query head and its key head
QUERY_KEY_GAIN = 2.0  # fresh weight of both norms: a match stands out of thousands of keys


def pick_backend(requested, device, head_dim):
    """What runs the operations on `device` now: "reference", "flex" (FlexAttention), "train" (kernels with gradients)
    or "triton" (those without).

    "auto" takes the reference on CPU; on CUDA the kernels or, where these cannot run, FlexAttention.
    Raises ValueError if the requested one cannot run there; a forced choice is never replaced silently.
    """
    kernels = "train" if torch.is_grad_enabled() else "triton"
    if requested == "auto":
        if device.type != "cuda":
            return "reference"
        return kernels if HAS_TRITON and head_dim in HEAD_WIDTHS else "flex"
    if requested == "flex" and device.type != "cuda":
        raise ValueError(f"backend='flex' needs a CUDA device, got {device.type}; set backend='auto' or 'reference'")
    if requested != "triton":
        return requested
    if not HAS_TRITON:
        raise ValueError("backend='triton' needs the triton package; install it or set backend='auto'")
    if device.type != "cuda" and not interpreted():
        raise ValueError(f"backend='triton' needs a CUDA device, got {device.type}; set backend='auto'")
    return kernels


class Stream(NamedTuple):
    """Where the tokens of one call stand, shared by all blocks; real tokens come first in each row.

    start_BT, length_B: of `operations_hspmn`. seen_B: real tokens of earlier calls, None without a cache. cos, sin:
    RoPE's, [B, T, E]. backend: what `pick_backend` returned. column_BT: the input's column of each token, None if that
    is token t.
    """

    position_BT: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    start_BT: torch.Tensor | None = None
    length_B: torch.Tensor | None = None
    seen_B: torch.Tensor | None = None
    backend: str = "reference"
    column_BT: torch.Tensor | None = None


class Route(NamedTuple):
    """What the router decided for one layer, see `route`; of a single token on kernels only scores and slots."""

    score_BT: torch.Tensor
    gate_BT: torch.Tensor | None
    index_BK: torch.Tensor | None
    slot_BT: torch.Tensor
    count_B: torch.Tensor | None
    sums_B4: torch.Tensor | None


def router_statistics(routes, routers, length, config, weight_B=None):
    """Statistics of the `routes` of L layers with `routers`; length: real tokens of each row [B], or of every row.

    Returns sums over all real tokens, float32 [L, 3]: routed, routed but without a slot, entropy of the gates in nats;
    and the weighted entropy losses of all layers, a scalar. These draw gates to 0 or 1 (token entropy), and the mean
    gate of each layer and row to the layer's final share while the target still falls: a price on gates sorts the
    tokens before any is dropped, where a term towards the target would push all scores up first. Rows are weighted by
    `weight_B`, None being their shares of the real tokens: a loss by rows is the same however a step is cut.
    """
    sums, shares, own = [], [], 0.0
    for route, router in zip(routes, routers, strict=True):
        sums.append(route.sums_B4.to(routes[0].sums_B4.device))  # of a model spread over several devices, the first
        shares.append(router.share.to(sums[0]))
        for share in (router.sparsity_k, 1 - router.sparsity_k):
            own += share * math.log(share) if share else 0.0
    sums_LB4, share_L1, even = torch.stack(sums), torch.stack(shares)[:, None], 1.0
    if isinstance(length, torch.Tensor):
        length = length.to(sums[0])
        weight_B = length / length.sum().clamp(min=1) if weight_B is None else weight_B
        length = length.clamp(min=1)[:, None]
    elif weight_B is None:
        even = 1 / len(sums[0])  # the weight of each row, for no launch more
    entropy_LB, gate_LB = (sums_LB4[..., 2:] / length).unbind(-1)
    gate_LB = gate_LB.clamp(1e-6, 1 - 1e-6)
    # divergence of the mean gates from the shares: their cross entropy, less the entropy of the shares
    cross_LB = torch.lerp(torch.log1p(-gate_LB), gate_LB.log(), share_L1)
    token, load = even * config.router_token_entropy_coef, even * config.router_load_entropy_coef
    loss_LB = torch.sub(token * entropy_LB, cross_LB, alpha=load)
    if weight_B is None:
        loss = loss_LB.sum() + load * own * len(sums[0])
    else:
        loss = ((loss_LB.sum(0) + load * own) * weight_B.to(sums[0])).sum()
    return sums_LB4[..., :3].detach().sum(1), loss


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, so that float32 weights under autocast keep the fused bf16 path."""

    def forward(self, x):
        """[..., width] to the same."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class HSPMNRouter(KeepsDtypes):
    """ALF-LB router: a float32 score per token, a bias that keeps the load at its target, no noise.

    Buffers: `bias`, added to the score for the decision only; `target`, the share of tokens to route at this point
    of training; `share`, that at its end; `counts`, routed and real tokens of training passes since the optimizer's
    last step, after which `step_biases` moves the bias. Parameters and buffers stay float32 whatever dtype the model
    is cast to.
    """

    def __init__(self, config, layer_idx=0):
        super().__init__()
        self.config, self.sparsity_k, self.annealing = config, config.layer_sparsity[layer_idx], False
        # so many first tokens of every document are routed whatever their score
        self.initial = EVERY_TOKEN if self.sparsity_k == 1.0 else config.router_initial_tokens
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=torch.float32))
        for name, shape in (("bias", ()), ("target", ()), ("share", ()), ("counts", 2)):
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=name == "bias")
        self.counted = False  # whether `counts` may hold anything, which the host knows without looking
        self.reset_parameters()
        ROUTERS[self] = None

    def __setstate__(self, state):
        super().__setstate__(state)
        ROUTERS[self] = None  # copies and unpickled routers too

    def reset_parameters(self):
        """Scores of unit-variance inputs get a deviation of 0.5, and the bias the load `sparsity_k` on them."""
        init.normal_(self.weight, std=0.5 / SCORE_GAIN)
        init.constant_(self.bias, 0.5 * NormalDist().inv_cdf(min(max(self.sparsity_k, 0.02), 0.98)))
        init.constant_(self.target, self.sparsity_k)
        init.constant_(self.share, self.sparsity_k)
        init.zeros_(self.counts)

    @torch.no_grad()
    def set_progress(self, progress):
        """Move the target along its annealing: 1.0 at progress 0, `sparsity_k` at progress 1."""
        self.annealing = progress < 1.0
        self.target.fill_(1.0 + (self.sparsity_k - 1.0) * progress)

    @torch.no_grad()
    def update_bias(self, counts):
        """One step of b += rate * clip(gain * (target - load), -1, 1) with load = routed / real tokens, the two
        `counts`, none without tokens; the router's own counts start anew."""
        routed, real = counts.to(self.bias)
        error = self.config.router_bias_gain * (self.target - routed / real.clamp(min=1))
        self.bias += self.config.router_bias_rate * error.clamp(-1.0, 1.0) * (real > 0)
        self.counts.zero_()
        self.counted = False

    def forward(self, h_BTD, start_BT=None, length_B=None, backend="reference"):
        """The `Route` of normalised hidden states [B, T, D]; start_BT, length_B, backend: of `Stream`."""
        capacity = h_BTD.shape[1]  # slots per row: memory is held for all tokens, and work is done for those routed
        if self.training and not self.annealing:  # `capacity_factor` times the target share
            # whole: 1.5 * 0.2 * 50 is a hair above 15 in binary, and a symbolic length has no ceiling of a float
            share = min(SHARE_UNIT, round(self.config.capacity_factor * self.sparsity_k * SHARE_UNIT))
            capacity = -(-capacity * share // SHARE_UNIT)
        score_BT = router_score(h_BTD, self.weight)
        if self.config.router_mode == "topk":
            return self._rank(score_BT, length_B)
        gate_BT, index_BK, *rest = OPERATIONS[backend].route(
            score_BT, self.bias, start_BT, length_B, self.config.router_noise_floor, self.initial, capacity
        )
        if not (self.training or h_BTD.is_cuda or backend == "triton" or torch.compiler.is_compiling()):
            # a CPU may as well look how many those are; one slot is for one token, which float8 multiplies otherwise
            index_BK = index_BK[:, : max(2, int(rest[1].max()))]
        return Route(score_BT, gate_BT, index_BK, *rest)

    def _rank(self, score_BT, length_B):
        """Exactly k tokens per row by rank, which looks at later tokens (Mixture-of-Depths, arXiv 2404.02258)."""
        T, real_BT = score_BT.shape[1], torch.ones_like(score_BT, dtype=torch.bool)
        if length_B is not None:
            real_BT = torch.arange(T, device=score_BT.device) < length_B[:, None]
        k = max(1, (2 * T * round(self.sparsity_k * SHARE_UNIT) + SHARE_UNIT) // (2 * SHARE_UNIT))  # rounded
        best_BK = score_BT.masked_fill(~real_BT, float("-inf")).topk(k, 1).indices
        wanted_BT = torch.zeros_like(real_BT).scatter(1, best_BK, True) & real_BT
        return Route(score_BT, *assign(score_BT, wanted_BT, real_BT, self.config.router_noise_floor, best_BK.shape[1]))


ROUTERS = weakref.WeakKeyDictionary()  # every router in the order of making: the optimizer that was seen to hold it


@torch.no_grad()
def step_biases(routers, optimizer, args, kwargs):
    """After each step of an optimizer, move the biases of the routers it trains by the load of the whole step.

    These are the ones whose weights it holds or, where it holds none (flat partitions of DeepSpeed and FSDP), all that
    counted a pass and are held by no other optimizer. The load is that of all training passes since the last step, on
    all ranks.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [(router, owner) for router, owner in routers.items() if router.weight.requires_grad]
    moving = [router for router, _ in trained if id(router.weight) in held]
    if moving:
        routers.update(dict.fromkeys(moving, weakref.ref(optimizer)))
    else:
        moving = [router for router, owner in trained if router.counted and (owner is None or owner() is None)]
    if not moving:
        return
    counts_R2 = torch.stack([router.counts.to(moving[0].counts.device) for router in moving])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts_R2)
    for router, counts in zip(moving, counts_R2, strict=True):
        router.update_bias(counts)


register_optimizer_step_post_hook(partial(step_biases, ROUTERS))


class Heads(NamedTuple):
    """What `split_heads` makes: q and k of the linear attention; q, k (normalised, with RoPE) and v of the softmax;
    and q without RoPE, which scores sinks, as these stand nowhere; None where there are none."""

    q_linear_BTHE: torch.Tensor
    k_linear_BTGE: torch.Tensor
    q_BTHE: torch.Tensor
    k_BTGE: torch.Tensor
    v_BTGE: torch.Tensor
    q_plain_BTHE: torch.Tensor | None = None


class SharedProjection(nn.Module):
    """The one Q/K/V projection of both streams, with a short causal convolution over the projected tokens: a key holds
    its predecessor too, which makes recall of a repeated pair a matter of one layer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_kernel_size))
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.reset_parameters()

    def reset_parameters(self):
        """A fresh query already matches the keys of tokens like its own, in every second key head their successors'.

        Queries share a part of their weights with their key head (mimetic initialisation, arXiv 2305.09828; of
        recurrent states arXiv 2410.11135), norms start above 1, and the convolution close to the identity or, on the
        keys of the first, third, ... head, to a shift by one token. So the recall of a repeated pair has a gradient
        from the first step; from independent weights it was learned after hundreds of steps or not at all.
        """
        H, G, E = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        weight = self.qkv_proj.weight.detach().clone()
        q_GXED, k_GXED = weight[: H * E].view(G, H // G, E, -1), weight[H * E : (H + G) * E].view(G, 1, E, -1)
        q_GXED.mul_(math.sqrt(1 - QUERY_KEY_MATCH**2)).add_(QUERY_KEY_MATCH * k_GXED)
        init.copy_(self.qkv_proj.weight, weight)
        init.constant_(self.q_norm.weight, QUERY_KEY_GAIN)
        init.constant_(self.k_norm.weight, QUERY_KEY_GAIN)
        taps = torch.randn(self.conv_weight.shape) * 0.1
        taps[:, -1] += 1.0
        if self.config.conv_kernel_size > 1:
            keys_GEL = taps[H * E : (H + G) * E].view(G, E, -1)
            keys_GEL[::2, :, -2:] = keys_GEL[::2, :, -2:].flip(-1)
        init.copy_(self.conv_weight, taps)

    def forward(self, h_BTD, stream, layer_cache=None):
        """`Heads` of every token [B, T, D]; moves the convolution's history on."""
        x_BTC, config, history_BLC = self.qkv_proj(h_BTD), self.config, None
        if layer_cache is not None:
            if (layer_cache.dtype, layer_cache.device) != (x_BTC.dtype, x_BTC.device):
                layer_cache.lazy_initialization(x_BTC)
            history_BLC = layer_cache.conv_state
        place, kind = (history_BLC, stream.start_BT, stream.length_B), config.linear_attention
        plain = not config.num_sink_tokens
        for norm in (self.q_norm, self.k_norm):
            plain = plain and type(norm) is RMSNorm and not any(map(norm.__dict__.get, CHANGES))
        if plain:
            return Heads(*OPERATIONS[stream.backend].split_heads(
                x_BTC, self.conv_weight, *place, stream.cos, stream.sin, self.q_norm.weight, self.k_norm.weight,
                config.num_key_value_heads, config.rms_norm_eps, kind,
            ))  # fmt: skip
        x_BTC = causal_conv(x_BTC, self.conv_weight, *place)
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        q_BTHE, k_BTGE, v_BTGE = x_BTC.unflatten(-1, (-1, config.head_dim)).split(sizes, 2)
        q_linear, k_linear = feature_map(q_BTHE, kind), feature_map(k_BTGE, kind)
        (q_BTHE, k_BTGE), angles = (self.q_norm(q_BTHE), self.k_norm(k_BTGE)), (stream.cos, stream.sin)
        q_plain = q_BTHE if config.num_sink_tokens else None  # else it would only hold memory
        return Heads(q_linear, k_linear, rotate(q_BTHE, *angles), rotate(k_BTGE, *angles), v_BTGE, q_plain)


class ReflexiveStream(nn.Module):
    """Every token, O(N) time, O(1) state: causal linear attention plus local softmax attention.

    "gated": scalar data-dependent decay per head, L2-normalised q/k, RMSNorm and a gate per head on the output (as
    Mamba-2, arXiv 2405.21060, and GLA, arXiv 2312.06635). "elu": elu(x) + 1 with a normaliser (arXiv 2006.16236).
    """

    def __init__(self, config):
        super().__init__()
        self.config, H = config, config.num_attention_heads
        if config.linear_attention == "gated":
            self.head_proj = nn.Linear(config.hidden_size, 2 * H, bias=False)
            self.decay_log_rate, self.decay_bias = nn.Parameter(torch.empty(H)), nn.Parameter(torch.empty(H))
            self.norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.register_buffer("bound", torch.empty((), dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Heads remember over time scales from about 1 to 1000 tokens, evenly spread in the logarithm."""
        if self.config.linear_attention == "gated":
            init.constant_(self.bound, 1.0)
            init.zeros_(self.decay_log_rate)
            # log-decay per token at zero input
            rate = torch.exp(torch.linspace(math.log(1e-3), math.log(0.7), self.config.num_attention_heads))
            init.copy_(self.decay_bias, rate.expm1().log())  # softplus gives back `rate`

    @torch.no_grad()
    def set_progress(self, progress):
        """Tighten the bound of states in training: none at progress 0, `linear_attention_horizon` at 1, by the cube:
        recall is learned through the states first, and taken over by the contextual stream."""
        if self.config.linear_attention == "gated":
            self.bound.fill_(progress**3)

    @property
    def least_decay(self):
        """Nats per token that every state forgets at least: outside training always the whole bound."""
        horizon = self.config.linear_attention_horizon
        least = 1.0 / horizon if horizon else 0.0
        return self.bound.float() * least if horizon and self.training else least

    def written(self, h_BTD, heads, decay_BTH, stream):
        """Keys [B, T, G, E] and values [B, T, G, F] whose products the linear state sums."""
        if self.config.linear_attention == "gated":
            return heads.k_linear_BTGE, heads.v_BTGE
        return heads.k_linear_BTGE, F.pad(heads.v_BTGE, (0, 1), value=1.0)  # the last column: the normaliser

    def forward(self, h_BTD, heads, stream, layer_cache=None, sinks=None):
        """Sum of both attentions, [B, T, H, E]; advances the linear state and only reads the window."""
        operations, cached = OPERATIONS[stream.backend], layer_cache is not None
        gated = self.config.linear_attention == "gated"
        if gated:
            decay_BTH, gate_BTH = self.head_proj(h_BTD).chunk(2, -1)
            decay_BTH = log_decay(decay_BTH, self.decay_log_rate, self.decay_bias, self.least_decay)
        else:
            decay_BTH = torch.zeros_like(heads.q_BTHE[..., 0], dtype=torch.float32)
        k_BTGE, v_BTGF = self.written(h_BTD, heads, decay_BTH, stream)
        state = layer_cache.linear_state if cached else None
        if state is None and stream.backend == "triton" and torch.compiler.is_compiling():
            state = dropped_state(decay_BTH, heads.q_BTHE.shape[-1], v_BTGF.shape[-1])
        linear_BTHF = operations.linear_attention(
            heads.q_linear_BTHE, k_BTGE, v_BTGF, decay_BTH, stream.start_BT, stream.length_B, state
        )
        if gated:
            kind = torch.promote_types(linear_BTHF.dtype, torch.float32)
            linear_BTHE = self.norm(linear_BTHF.to(kind)) * gate_BTH.to(kind).sigmoid()[..., None]
        else:
            linear_BTHE = linear_BTHF[..., :-1] / linear_BTHF[..., -1:].clamp(min=1e-6)
        if self.config.sliding_window:
            ring = (layer_cache.window_keys, layer_cache.window_values) if cached else (None, None)
            local_BTHE, lse_BTH = operations.local_attention(
                *heads[2:5], stream.start_BT, self.config.sliding_window, *ring, stream.seen_B
            )
            if sinks is not None:
                local_BTHE = add_sinks(local_BTHE, lse_BTH, heads.q_plain_BTHE, *sinks)
            linear_BTHE = linear_BTHE + local_BTHE
        return linear_BTHE.to(heads.v_BTGE.dtype)


class ContextualStream(nn.Module):
    """Attention to the routed tokens at their original positions, by these alone (SQSK) or by every token."""

    def __init__(self, config):
        super().__init__()
        self.every = config.contextual_readers == "all"

    def forward(self, reflexive_BTHE, heads, route, stream, stored=None, sinks=None):
        """`reflexive_BTHE` plus gate * attention output at every routed token or, where every token reads, attention
        with the keys' log gates in its scores at all; stored: of the cache's `update`."""
        operations, index_BK, slot_BT = OPERATIONS[stream.backend], route.index_BK, route.slot_BT
        q_BKHE, q_plain_BKHE, log_gate_BK = heads.q_BTHE, heads.q_plain_BTHE, None
        if stored is None:
            read = None if self.every else index_BK
            first_BK = None if stream.start_BT is None else first_slot(read, slot_BT, stream.start_BT)
            if sinks is None and not self.every:
                slots = index_BK, slot_BT, first_BK, route.count_B
                return reflexive_BTHE + operations.contextual(*heads[2:5], route.gate_BT, *slots)[0]
            k_BKGE, v_BKGE = (operations.take_rows(x, index_BK, slot_BT) for x in (heads.k_BTGE, heads.v_BTGE))
            if self.every:
                log_gate_BK = F.logsigmoid(operations.take_rows(route.score_BT, index_BK, slot_BT))
            stored = k_BKGE, v_BKGE, log_gate_BK, first_BK, None, route.count_B
        if not self.every:
            q_BKHE = operations.take_rows(q_BKHE, index_BK, slot_BT)
        out_BKHE, lse_BKH = operations.sqsk_attention(q_BKHE, *stored, end_slot(slot_BT) if self.every else None)
        if sinks is not None:
            if not self.every:
                q_plain_BKHE = operations.take_rows(q_plain_BKHE, index_BK, slot_BT)
            out_BKHE = add_sinks(out_BKHE, lse_BKH, q_plain_BKHE, *sinks)
        if self.every:
            return reflexive_BTHE + out_BKHE
        contextual_BTHE = operations.take_rows(out_BKHE, slot_BT, index_BK)
        return reflexive_BTHE + contextual_BTHE * route.gate_BT[..., None, None].to(contextual_BTHE.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTD, backend="reference"):
        """[B, T, D] to [B, T, D]; backend: of `Stream`. Training on kernels takes the weights of plain layers."""
        layers, plain = (self.gate_proj, self.up_proj, self.down_proj), backend == "train"
        for layer in layers:
            plain = plain and type(layer) is nn.Linear and layer.bias is None and type(layer.weight) is nn.Parameter
            # a frozen one needs no gradient
            plain = plain and layer.weight.requires_grad and not any(map(layer.__dict__.get, CHANGES))
        if plain:
            kind, dtype = x_BTD.device.type, x_BTD.dtype
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
            return OPERATIONS[backend].gated_mlp(x_BTD.to(dtype), *(layer.weight.to(dtype) for layer in layers))[0]
        gate, up, down = layers
        fused = type(down) is Float8Linear and down.rounds(x_BTD)
        for layer in layers if fused else ():
            fused = fused and type(layer) is Float8Linear and layer.scaling == down.scaling
            fused = fused and not any(map(layer.__dict__.get, CHANGES))
        if fused:
            return self.float8(x_BTD, OPERATIONS["triton" if x_BTD.is_cuda else "reference"])
        return down(gated_product(gate(x_BTD), up(x_BTD)))

    def float8(self, x_BTD, operations):
        """`forward` of float8 layers: gate and up read the same rows, and their product is made as rows of down."""
        rows = operations.quantize_rows(x_BTD, self.gate_proj.scaling)
        gate, up = (layer.product(operations, rows, x_BTD.dtype) for layer in (self.gate_proj, self.up_proj))
        rows = operations.quantize_product(gate, up, self.down_proj.scaling)
        return self.down_proj.product(operations, rows, x_BTD.dtype)


def multiply_float8(operations, layer, x_BTX):
    """What a float8 layer makes of x [B, T, X]."""
    return layer.product(operations, operations.quantize_rows(x_BTX, layer.scaling), x_BTX.dtype)


def scale_of(layer):
    """Scales of a weight in float8, or None."""
    return layer._parameters.get("weight_scale")


class HSPMNBlock(GradientCheckpointingLayer):
    """One block: shared projection, router, both streams, merge and SwiGLU. Works alone on [B, S, hidden_size]."""

    def __init__(self, config, layer_idx=0):
        super().__init__()
        config.validate()
        self.config, self.layer_idx = config, layer_idx
        D, E = config.hidden_size, config.head_dim
        self.input_layernorm = RMSNorm(D, eps=config.rms_norm_eps)
        self.projection = SharedProjection(config)
        self.reflexive = ReflexiveStream(config)
        self.router = HSPMNRouter(config, layer_idx) if config.layer_sparsity[layer_idx] else None
        self.contextual = ContextualStream(config) if self.router is not None else None
        if config.num_sink_tokens:
            sinks = (config.num_sink_tokens, config.num_key_value_heads, E)
            self.sink_keys, self.sink_values = nn.Parameter(torch.empty(sinks)), nn.Parameter(torch.empty(sinks))
        self.o_proj = nn.Linear(config.num_attention_heads * E, D, bias=False)
        self.post_attention_layernorm = RMSNorm(D, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(D, config.intermediate_size)
        heavier = config.routed_intermediate_size and self.router is not None
        self.routed_mlp = SwiGLU(D, config.routed_intermediate_size) if heavier else None
        unfused = {
            "linear_attention='elu'": config.linear_attention == "elu", "sliding_window=0": not config.sliding_window,
            "num_sink_tokens": config.num_sink_tokens, "routed_intermediate_size": heavier,
        }  # fmt: skip
        self.unfused = [field for field, holds in unfused.items() if holds]  # what only `_run_modules` computes
        self.reset_parameters()

    def reset_parameters(self):
        """Sinks start small, so that they take little of any softmax's value."""
        if self.config.num_sink_tokens:
            init.normal_(self.sink_keys, std=self.config.initializer_range)
            init.normal_(self.sink_values, std=self.config.initializer_range)

    def forward(self, hidden_states, stream=None, past_key_values=None, output_router=False):
        """Output [B, S, hidden_size] of hidden_states [B, S, hidden_size], aux_loss (scalar), and the cache.

        stream: where the tokens stand; None: one document per row, continued if `past_key_values`, the `HSPMNCache` to
        read and extend, is given. output_router: return the output and the fields of the `Route`, none for a purely
        reflexive layer: flat, as reentrant gradient checkpointing follows no nested tensors.
        """
        tokens, alone = hidden_states.shape[1], stream is None
        if alone:
            rotary = LlamaRotaryEmbedding(self.config).to(hidden_states.device)
            backend = pick_backend(self.config.backend, hidden_states.device, self.config.head_dim)
            stream = make_stream(hidden_states, past_key_values, rotary, backend=backend)
        layer_cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        body, _ = self.path(hidden_states, stream.backend, layer_cache is not None)
        output, route = getattr(self, f"_run_{body}")(hidden_states, stream, layer_cache)
        if alone and past_key_values is not None:
            past_key_values.advance(tokens, stream)
        if output_router:
            return output, *(route or ())
        aux_loss = output.new_zeros((), dtype=torch.float32)
        if route is not None and route.sums_B4 is not None:
            length = tokens if stream.length_B is None else stream.length_B
            aux_loss = router_statistics([route], [self.router], length, self.config)[1]
        return output, aux_loss, past_key_values

    def path(self, x_BTD, backend, cached=False):
        """Which body runs a call, "modules" (each is called), "fused" or "token" (kernels), and the first reason."""
        for holds, reason in (
            (backend != "triton", "gradients are recorded, or there is no CUDA device"),
            (self.training, "training calls every module"),
            (torch.is_autocast_enabled(x_BTD.device.type), "autocast casts what modules are given"),
            (self.unfused, f"there is no fused form of {', '.join(self.unfused)}"),
            (self.config.router_mode == "topk", "there is no fused form of router_mode='topk'"),
        ):
            if holds:
                return "modules", reason
        projection, reflexive, mlp = self.projection, self.reflexive, self.mlp
        product = Float8Linear if type(self.o_proj) is Float8Linear else nn.Linear
        for module, kind, weighs in (
            (self.input_layernorm, RMSNorm, True), (projection, SharedProjection, False),
            (projection.q_norm, RMSNorm, False), (projection.k_norm, RMSNorm, False),
            (reflexive, ReflexiveStream, False),
            (reflexive.head_proj, nn.Linear, True), (reflexive.norm, RMSNorm, False),
            (self.router, HSPMNRouter, False), (self.contextual, ContextualStream, False),
            (self.post_attention_layernorm, RMSNorm, True), (mlp, SwiGLU, False),
            (projection.qkv_proj, product, True), (self.o_proj, product, True), (mlp.gate_proj, product, True),
            (mlp.up_proj, product, True), (mlp.down_proj, product, True),
        ):  # fmt: skip
            if module is None:
                continue
            hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
            if type(module) is not kind or hooked:
                return "modules", f"a {type(module).__name__} is adapted, replaced or hooked (offloading does too)"
            held = module._parameters  # the modules' own lookup takes longer than all other checks
            weight = held.get("weight") if weighs else None
            dtype = E4M3 if kind is Float8Linear else x_BTD.dtype
            if weighs and (type(weight) is not nn.Parameter or weight.dtype != dtype):
                return "modules", f"a {kind.__name__} is quantised or not in the dtype of the hidden states"
            if weighs and not weight.is_contiguous():
                return "modules", f"the weight of a {kind.__name__} is not contiguous"
            if kind is Float8Linear and module.scaling != self.o_proj.scaling:
                return "modules", "its products in float8 are of several scalings"
            if kind is nn.Linear and held.get("bias") is not None:
                return "modules", "a linear layer has a bias"
        if x_BTD.shape[1] == 1 and getattr(self.o_proj, "scaling", "rowwise") == "rowwise":
            if cached:
                return "token", "one token of a cached row"
            if product is Float8Linear:
                return "modules", "one token without a cache, of whose rows float8 rounds the weights alone"
        return "fused", "several tokens, no cache, or scaling='mx'"

    def _run_modules(self, x_BTD, stream, layer_cache):
        """Every module is called, norms included: training, adapters, hooks, offloading, and CPUs."""
        h_BTD, route, stored = self.input_layernorm(x_BTD), None, None
        heads = self.projection(h_BTD, stream, layer_cache)
        sinks = (self.sink_keys, self.sink_values) if self.config.num_sink_tokens else None
        merged_BTHE = self.reflexive(h_BTD, heads, stream, layer_cache, sinks)
        if self.router is not None:
            route = self.router(h_BTD, stream.start_BT, stream.length_B, stream.backend)
        if layer_cache is not None:
            operations = OPERATIONS[stream.backend]
            stored = layer_cache.update(heads.k_BTGE, heads.v_BTGE, stream, route, operations)
            if layer_cache.quantized and torch.is_grad_enabled():
                stored = None  # whole numbers have no gradient; `start_call` saw that nothing was held before
        if route is not None:
            whole = STORES.get(self.config.kv_cache_dtype) if self.training else None
            if whole and stored is None:
                k_BTGE, v_BTGE = (as_stored(x, whole) for x in (heads.k_BTGE, heads.v_BTGE))
                heads = heads._replace(k_BTGE=k_BTGE, v_BTGE=v_BTGE)
            merged_BTHE = self.contextual(merged_BTHE, heads, route, stream, stored, sinks)
        x_BTD = x_BTD + self.o_proj(merged_BTHE.flatten(2))
        h_BTD = self.post_attention_layernorm(x_BTD)
        x_BTD = x_BTD + self.mlp(h_BTD, stream.backend)
        if self.routed_mlp is None:
            return x_BTD, route
        take_rows = OPERATIONS[stream.backend].take_rows
        routed_BKD = self.routed_mlp(take_rows(h_BTD, route.index_BK, route.slot_BT), stream.backend)
        routed_BTD = take_rows(routed_BKD, route.slot_BT, route.index_BK)
        return x_BTD + routed_BTD * route.gate_BT[..., None].to(x_BTD.dtype), route

    def _run_fused(self, x_BTD, stream, layer_cache):
        """`_run_modules` for prompts on kernels: norms, gates, decisions and sums are made where their inputs are."""
        operations, config = OPERATIONS["triton" if torch.compiler.is_compiling() else "launch"], self.config
        projection, reflexive, router, mlp = self.projection, self.reflexive, self.router, self.mlp
        norm, start_BT, length_B = self.input_layernorm, stream.start_BT, stream.length_B
        x_BTD, plain = x_BTD.contiguous(), type(self.o_proj) is nn.Linear
        history = state = ring_k = ring_v = route = stored = None
        if layer_cache is not None:
            if (layer_cache.dtype, layer_cache.device) != (x_BTD.dtype, x_BTD.device):
                layer_cache.lazy_initialization(x_BTD)
            history, state = layer_cache.conv_state, layer_cache.linear_state
            ring_k, ring_v = layer_cache.window_keys, layer_cache.window_values
        h_BTD, decay_BTH, gate_BTH, score_BT = operations.norm_heads(
            x_BTD, norm.weight, norm.eps, reflexive.head_proj.weight, reflexive.decay_log_rate, reflexive.decay_bias,
            reflexive.least_decay, None if router is None else router.weight,
        )  # fmt: skip
        linear = projection.qkv_proj
        x_BTC = F.linear(h_BTD, linear.weight) if plain else multiply_float8(operations, linear, h_BTD)
        q_linear, k_linear, q_BTHE, k_BTGE, v_BTGE = operations.split_heads(
            x_BTC, projection.conv_weight, history, start_BT, length_B, stream.cos, stream.sin,
            projection.q_norm.weight, projection.k_norm.weight, config.num_key_value_heads, config.rms_norm_eps,
            "gated",
        )  # fmt: skip
        if state is None and torch.compiler.is_compiling():
            state = dropped_state(decay_BTH, config.head_dim, config.head_dim)
        linear_BTHE = operations.linear_attention(q_linear, k_linear, v_BTGE, decay_BTH, start_BT, length_B, state)
        merged_BTHE = operations.reflexive_merge(
            q_BTHE, k_BTGE, v_BTGE, start_BT, config.sliding_window, ring_k, ring_v, stream.seen_B, linear_BTHE,
            gate_BTH, reflexive.norm.weight, reflexive.norm.eps,
        )  # fmt: skip
        if router is not None:
            floor, capacity = config.router_noise_floor, x_BTD.shape[1]
            route = Route(score_BT, *operations.route(
                score_BT, router.bias, start_BT, length_B, floor, router.initial, capacity
            ))  # fmt: skip
        if layer_cache is not None:
            stored = layer_cache.update(k_BTGE, v_BTGE, stream, route, operations)
        elif route is not None:
            read, log_gate_BT = (None, F.logsigmoid(score_BT)) if self.contextual.every else (route.index_BK, None)
            first_BN = None if start_BT is None else first_slot(read, route.slot_BT, start_BT)
            stored = k_BTGE, v_BTGE, log_gate_BT, first_BN, None, route.count_B
        if route is not None:
            end_BT = end_slot(route.slot_BT) if self.contextual.every else None
            operations.sqsk_merge(merged_BTHE, route.gate_BT, q_BTHE, *stored[:3], route.index_BK, *stored[3:], end_BT)
        norm, linear, merged_BTX = self.post_attention_layernorm, self.o_proj, merged_BTHE.flatten(2)
        y_BTD = F.linear(merged_BTX, linear.weight) if plain else multiply_float8(operations, linear, merged_BTX)
        x_BTD, h_BTD = operations.add_norm(x_BTD, y_BTD, norm.weight, norm.eps)
        if not plain:
            return x_BTD.add_(mlp.float8(h_BTD, operations)), route
        product = operations.swiglu if swiglu_fits(h_BTD, mlp.gate_proj.weight) else OPERATIONS["reference"].swiglu
        operations.linear_add(x_BTD, product(h_BTD, mlp.gate_proj.weight, mlp.up_proj.weight), mlp.down_proj.weight)
        return x_BTD, route

    def _run_token(self, x_BTD, stream, layer_cache):
        """`_run_modules` of a single token on kernels: products share a launch with what stands before or after."""
        operations, config = OPERATIONS["triton" if torch.compiler.is_compiling() else "launch"], self.config
        projection, reflexive, router, mlp = self.projection, self.reflexive, self.router, self.mlp
        norm, start_BT, length_B = self.input_layernorm, stream.start_BT, stream.length_B
        x_BTD = x_BTD.contiguous()
        if (layer_cache.dtype, layer_cache.device) != (x_BTD.dtype, x_BTD.device):
            layer_cache.lazy_initialization(x_BTD)
        score_weight = decision = None
        if router is not None:
            score_weight, decision = router.weight, router.bias
        x_BTC, head_BTX, score_BT = operations.project_token(
            x_BTD, norm.weight, norm.eps, projection.qkv_proj.weight, reflexive.head_proj.weight, score_weight,
            scale_of(projection.qkv_proj),
        )  # fmt: skip
        heads = operations.split_heads(
            x_BTC, projection.conv_weight, layer_cache.conv_state, start_BT, length_B, stream.cos, stream.sin,
            projection.q_norm.weight, projection.k_norm.weight, config.num_key_value_heads, config.rms_norm_eps,
            "gated",
        )  # fmt: skip
        merged_BTHE, slot_BT = operations.attend_token(
            *heads, head_BTX, reflexive.decay_log_rate, reflexive.decay_bias, reflexive.least_decay,
            reflexive.norm.weight, reflexive.norm.eps, stream.position_BT, start_BT, length_B, stream.seen_B,
            None if router is None else score_BT, decision, config.router_noise_floor,
            0 if router is None else router.initial, layer_cache.every,
            layer_cache.linear_state, layer_cache.window_keys, layer_cache.window_values, layer_cache.keys,
            layer_cache.values, layer_cache.positions, layer_cache.count, layer_cache.document_slot,
            layer_cache.key_scales, layer_cache.value_scales, layer_cache.log_gates,
        )  # fmt: skip
        norm, o_proj, (gate, up, down) = self.post_attention_layernorm, self.o_proj, mlp.children()
        x_BTD = operations.linear_add_token(x_BTD, merged_BTHE.flatten(2), o_proj.weight, scale_of(o_proj))
        hidden_BTX = operations.swiglu_token(
            x_BTD, norm.weight, norm.eps, gate.weight, up.weight, scale_of(gate), scale_of(up)
        )
        x_BTD = operations.linear_add_token(x_BTD, hidden_BTX, down.weight, scale_of(down))
        return x_BTD, None if router is None else Route(score_BT, None, None, slot_BT, None, None)


def make_stream(x_BTD, cache, rotary, position_BT=None, length_B=None, backend="reference", column_BT=None):
    """The `Stream` of one call on embeddings `x_BTD`, real tokens first in each row.

    cache: `HSPMNCache` or None; a first call starts its rows. rotary: module giving cos and sin for (x, position ids).
    position_BT: position ids, or None to count on from the cache; a jump starts a document: neither one more than the
    token before, nor as many more as columns, padding's included. length_B: real tokens per row, or None if all are.
    backend: see `pick_backend`. column_BT: of `Stream`.
    """
    (B, T), position_BT = x_BTD.shape[:2], None if position_BT is None else position_BT.contiguous()
    seen_B = start_BT = None
    if cache is not None:
        kind = x_BTD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTD.dtype
        cache.start_call(B, T, x_BTD.device, dtype)
        seen_B = cache.seen
        # `place` knows no padding, which starts no document whatever position it is given
        placed = position_BT is None or (T == 1 and length_B is None)
        if placed and not any(map(rotary.__dict__.get, CHANGES)):
            cos, sin, start_BT, position_BT = OPERATIONS[backend].place(
                T, position_BT, cache.document_seen, cache.last_position, rotary.inv_freq,
                float(rotary.attention_scaling), x_BTD.dtype,
            )  # fmt: skip
            return Stream(position_BT, cos, sin, start_BT, length_B, seen_B, backend, column_BT)
    token_T = torch.arange(T, device=x_BTD.device)
    document_seen = 0 if cache is None else cache.document_seen[:, None]
    if position_BT is None:
        position_BT = (token_T + document_seen).expand(B if cache is not None else 1, T)
        start_BT = None if cache is None else -document_seen
    else:
        position_BT = position_BT if cache is None else position_BT.expand(B, T).contiguous()
        last_B2 = position_BT[:, :1] - 1 if cache is None else cache.last_position
        jumps_BT = position_BT != torch.cat([last_B2[:, :1], position_BT[:, :-1]], 1) + 1
        offset_BT = position_BT - (token_T if column_BT is None else column_BT)  # one where positions count columns
        last = offset_BT[:, :1] if cache is None else last_B2[:, 1:] + 1
        jumps_BT = jumps_BT & (offset_BT != torch.cat([last, offset_BT[:, :-1]], 1))
        if length_B is not None:  # padding starts no document
            jumps_BT = jumps_BT & (token_T < length_B[:, None])
        start_BT = torch.where(jumps_BT, token_T, -1).cummax(1).values
        start_BT = torch.where(start_BT < 0, -document_seen, start_BT).expand(B, T).contiguous()
    return Stream(position_BT, *rotary(x_BTD, position_BT), start_BT, length_B, seen_B, backend, column_BT)


def dropped_state(decay_BTH, E, F):
    """A linear state [B, H, E, F] that nobody reads on: torch 2.11's inductor lowers no operation of a single output
    beside an absent argument that is written in place."""
    return decay_BTH.new_zeros(len(decay_BTH), decay_BTH.shape[-1], E, F)


def restore_rows(y_BTX, rows):
    """Rows in the caller's order, zeros at padding; `rows` is (slot of each token, token of each slot) or None."""
    return y_BTX if rows is None else OPERATIONS["reference"].take_rows(y_BTX, *rows)
