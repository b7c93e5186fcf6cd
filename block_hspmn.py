"""The block of HSPMN: router, shared projection, reflexive and contextual stream, SwiGLU.

Shape suffixes: B batch, T tokens, K routed slots, P key slots, H query heads, G key/value heads, E head width, F value
width, D hidden size.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .operations_hspmn import (
    attend_decode,
    compact,
    linear_add,
    linear_add_decode,
    linear_attention,
    local_attention,
    norm_heads,
    pick_backend,
    place_decode,
    project_decode,
    reflexive_merge,
    route,
    split_heads,
    split_heads_decode,
    sqsk_merge,
    swiglu,
    swiglu_decode,
    take_rows,
    takes_rows,
)
from .reference_hspmn import (
    SCORE_GAIN,
    add_sinks_ref,
    decide_ref,
    gated_norm_ref,
    gated_product_ref,
    log_decay_ref,
    push_window_ref,
    window_decode_ref,
)

EVERY_TOKEN = 2**31 - 1
QUERY_KEY_MATCH = 0.8  # correlation of the fresh weights of a query head and its key head
QUERY_KEY_GAIN = 2.0  # fresh weight of both norms: a match stands out of thousands of keys


class Stream(NamedTuple):
    """Where the tokens of one call stand, shared by all blocks. Rows are right-padded: real tokens come first.

    start_BT and length_B are those of `reference_hspmn`, or None for one full document per row; seen_B counts the
    real tokens of earlier calls, None without a cache; cos and sin are RoPE's, [B, T, E].
    """

    position_BT: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    start_BT: torch.Tensor | None = None
    length_B: torch.Tensor | None = None
    seen_B: torch.Tensor | None = None


class Route(NamedTuple):
    """What the router decided for one layer. index_BK, slot_BT and count_B are those of `compact_ref`.

    stats is None for a single token outside training.
    """

    score_BT: torch.Tensor
    gate_BT: torch.Tensor
    index_BK: torch.Tensor
    slot_BT: torch.Tensor
    count_B: torch.Tensor
    stats: "RouterStats | None"


class RouterStats(NamedTuple):
    """Per-layer scalars, float32: share of real tokens routed, share without a slot, mean gate entropy in nats."""

    load: torch.Tensor
    overflow: torch.Tensor
    entropy: torch.Tensor
    aux_loss: torch.Tensor


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, so that float32 weights under autocast keep the fused bf16 path."""

    def forward(self, x):
        """[..., width] to the same."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class HSPMNRouter(nn.Module):
    """ALF-LB router: a float32 score per token, a bias that keeps the load at its target, no noise.

    Buffers: `bias`, added to the score for the decision only; `target`, the share of tokens to route at this point
    of training. Parameters and buffers stay float32 whatever dtype the model is cast to.
    """

    def __init__(self, config, layer_idx=0):
        super().__init__()
        self.config = config
        self.sparsity_k = config.layer_sparsity[layer_idx]
        self.annealing = False
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=torch.float32))
        self.register_buffer("bias", torch.empty((), dtype=torch.float32))
        self.register_buffer("target", torch.empty((), dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Scores of unit-variance inputs get a deviation of 0.5, and the bias the load `sparsity_k` on them."""
        init.normal_(self.weight, std=0.5 / SCORE_GAIN)
        init.constant_(self.bias, 0.5 * NormalDist().inv_cdf(min(max(self.sparsity_k, 0.02), 0.98)))
        init.constant_(self.target, self.sparsity_k)

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @torch.no_grad()
    def set_progress(self, progress):
        """Move the target along its annealing: 1.0 at progress 0, `sparsity_k` at progress 1."""
        self.annealing = progress < 1.0
        self.target.fill_(1.0 + (self.sparsity_k - 1.0) * progress)

    @torch.no_grad()
    def update_bias(self, load):
        """One step of b += rate * clip(gain * (target - load), -1, 1); `load` is a scalar tensor."""
        error = self.config.router_bias_gain * (self.target - load)
        self.bias += self.config.router_bias_rate * error.clamp(-1.0, 1.0)

    def capacity(self, tokens):
        """Slots held per row in training: `capacity_factor` times the target share, all of them while annealing."""
        if self.annealing:
            return tokens
        # rounded first: 1.5 * 0.2 * 50 is a hair above 15 in binary
        return min(tokens, math.ceil(round(self.config.capacity_factor * self.sparsity_k * tokens, 6)))

    def forward(self, h_BTD, length_B=None, bias=None, backend="reference", start_BT=None):
        """Route normalised hidden states; `length_B` real tokens per row, None for all. Returns a `Route`.

        bias: the value to decide with, None for the present one. backend: see `pick_backend`. start_BT: where each
        token's document starts, as in `Stream`.
        """
        bias = self.bias if bias is None else bias
        decisions = route(h_BTD, self.weight, bias, self.config.router_noise_floor, backend)
        return self._assign(*decisions, length_B, backend, start_BT)

    def decided(self, score_BT, length_B=None, bias=None, backend="reference", start_BT=None):
        """The `Route` of scores made elsewhere; compiled code drops what nobody reads of it."""
        bias = self.bias if bias is None else bias
        decisions = decide_ref(score_BT, bias, self.config.router_noise_floor)
        return self._assign(score_BT, *decisions, length_B, backend, start_BT)

    def single(self, score_BT, bias=None):
        """What `attend_decode` needs of the router: score, bias, noise floor, and how many first tokens are sent."""
        every = self.sparsity_k == 1.0 or self.config.router_mode == "topk"
        initial = EVERY_TOKEN if every else self.config.router_initial_tokens
        return score_BT, self.bias if bias is None else bias, self.config.router_noise_floor, initial

    def _assign(self, score_BT, gate_BT, wanted_BT, length_B, backend, start_BT):
        T = score_BT.shape[1]
        if length_B is None:
            real_BT = torch.ones_like(wanted_BT)
        else:
            real_BT = torch.arange(T, device=score_BT.device) < length_B[:, None]
        if self.config.router_mode == "topk":
            wanted_BT = self._top_k(score_BT, real_BT)
        elif self.sparsity_k == 1.0:
            wanted_BT = real_BT
        elif self.config.router_initial_tokens:
            place_BT = torch.arange(T, device=score_BT.device) - (0 if start_BT is None else start_BT)
            wanted_BT = wanted_BT | (place_BT < self.config.router_initial_tokens)
        if length_B is not None:
            wanted_BT = wanted_BT & real_BT

        if self.training and self.config.router_mode == "threshold":
            capacity = self.capacity(T)
        elif T == 1 or torch.compiler.is_compiling() or score_BT.is_cuda:
            capacity = T  # no reading of the device: memory is held for all, work is done for those routed
        else:
            capacity = max(1, int(wanted_BT.sum(1).max()))
        index_BK, slot_BT, count_B = compact(wanted_BT, capacity, backend)
        # a decoded token has no load to speak of, and the statistics would take longer than its routing
        stats = self._stats(score_BT, wanted_BT, real_BT, count_B) if T > 1 or self.training else None
        return Route(score_BT, gate_BT, index_BK, slot_BT, count_B, stats)

    def _top_k(self, score_BT, real_BT):
        k = max(1, round(self.sparsity_k * score_BT.shape[1]))
        best_BK = score_BT.masked_fill(~real_BT, float("-inf")).topk(k, 1).indices
        return torch.zeros_like(real_BT).scatter(1, best_BK, True)

    def _stats(self, score_BT, wanted_BT, real_BT, count_B):
        real = real_BT.sum().clamp(min=1)
        load = wanted_BT.sum() / real
        overflow = load - count_B.sum() / real
        probability_BT = score_BT.sigmoid()
        entropy_BT = F.softplus(score_BT) - probability_BT * score_BT
        entropy = torch.where(real_BT, entropy_BT, 0).sum() / real
        mean = (torch.where(real_BT, probability_BT, 0).sum() / real).clamp(1e-6, 1 - 1e-6)
        # Towards the final share while the target still falls: a price on gates sorts the tokens before any is
        # dropped, where a term towards the target would push all scores up first
        share = self.sparsity_k
        divergence = share * (share / mean).log()
        if share < 1:
            divergence = divergence + (1 - share) * ((1 - share) / (1 - mean)).log()
        aux_loss = self.config.router_token_entropy_coef * entropy + self.config.router_load_entropy_coef * divergence
        return RouterStats(load.detach(), overflow.detach(), entropy.detach(), aux_loss)


class Heads(NamedTuple):
    """What the streams read of the shared projection, see `split_heads_ref`: q and k for the linear attention, then
    q, k and v for the softmax attentions, normalised and with RoPE.
    """

    q_linear_BTHE: torch.Tensor
    k_linear_BTGE: torch.Tensor
    q_BTHE: torch.Tensor
    k_BTGE: torch.Tensor
    v_BTGE: torch.Tensor


class SharedProjection(nn.Module):
    """The one Q/K/V projection of both streams, with a short causal convolution over the projected tokens.

    The convolution lets a key hold its predecessor too, which makes recall of a repeated pair a matter of one layer.
    """

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

        Queries share a part of their weights with their key head, a mimetic initialisation (arXiv 2305.09828; of
        recurrent states arXiv 2410.11135), their norms start above 1, and the convolution starts close to the identity
        or, on the keys of the first, third, ... head, to a shift by one token. So the recall of a repeated pair has a
        gradient from the first step; from independent weights it was learned after hundreds of steps or not at all.
        """
        H, G, E = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        weight = self.qkv_proj.weight.detach().clone()
        q_GXED, k_GXED = weight[: H * E].view(G, H // G, E, -1), weight[H * E : (H + G) * E].view(G, 1, E, -1)
        matched = QUERY_KEY_MATCH * k_GXED + math.sqrt(1 - QUERY_KEY_MATCH**2) * q_GXED
        weight[: H * E] = matched.flatten(0, 2)
        init.copy_(self.qkv_proj.weight, weight)
        for norm in (self.q_norm, self.k_norm):
            init.constant_(norm.weight, QUERY_KEY_GAIN)
        taps = torch.randn(self.conv_weight.shape) * 0.1
        taps[:, -1] += 1.0
        if self.config.conv_kernel_size > 1:
            keys_GEL = taps[H * E : (H + G) * E].view(G, E, -1)
            keys_GEL[::2, :, -2:] = keys_GEL[::2, :, -2:].flip(-1)
        init.copy_(self.conv_weight, taps)

    def forward(self, h_BTD, stream, layer_cache, backend):
        """`Heads` of every token; updates the convolution's history."""
        return self.split(self.qkv_proj(h_BTD), stream, layer_cache, backend)

    def split(self, x_BTC, stream, layer_cache, backend):
        """`Heads` of what `qkv_proj` gave."""
        if layer_cache is not None and not layer_cache.is_initialized:
            layer_cache.lazy_initialization(x_BTC)
        history = None
        if self.conv_weight.shape[1] > 1 and layer_cache is not None:
            history = layer_cache.conv_state
        inputs = (x_BTC, self.conv_weight, history, stream.start_BT)
        norms = (stream.cos, stream.sin, self.q_norm.weight, self.k_norm.weight)
        options = {
            "kv_heads": self.config.num_key_value_heads, "eps": self.config.rms_norm_eps,
            "mode": self.config.linear_attention, "backend": backend,
        }  # fmt: skip
        if history is not None and x_BTC.shape[1] == 1:
            *heads, history = split_heads_decode(*inputs, stream.length_B, *norms, **options)
            layer_cache.keep("conv_state", history)
            return Heads(*heads)
        heads = split_heads(*inputs, *norms, **options)
        if history is not None:
            layer_cache.write_conv(x_BTC, stream.length_B)
        return Heads(*heads)


class ReflexiveStream(nn.Module):
    """Every token, O(N) time, O(1) state: causal linear attention plus local softmax attention.

    "gated": scalar data-dependent decay per head, L2-normalised q/k, RMSNorm and a gate per head on the output (the
    form of Mamba-2, arXiv 2405.21060, and Gated Linear Attention, arXiv 2312.06635). "elu": feature map elu(x) + 1
    with a running normaliser (arXiv 2006.16236).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        H = config.num_attention_heads
        if config.linear_attention == "gated":
            self.head_proj = nn.Linear(config.hidden_size, 2 * H, bias=False)
            self.decay_log_rate = nn.Parameter(torch.empty(H))
            self.decay_bias = nn.Parameter(torch.empty(H))
            self.norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.register_buffer("bound", torch.empty((), dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Heads remember over time scales from about 1 to 1000 tokens, evenly spread in the logarithm."""
        if self.config.linear_attention == "gated":
            init.constant_(self.bound, 1.0)
            H = self.config.num_attention_heads
            rate = torch.exp(torch.linspace(math.log(1e-3), math.log(0.7), H))  # log-decay per token at zero input
            init.zeros_(self.decay_log_rate)
            init.copy_(self.decay_bias, rate.expm1().log())  # softplus gives back `rate`

    @torch.no_grad()
    def set_progress(self, progress):
        """Tighten the bound of a state in training: none at progress 0, `linear_attention_horizon` at progress 1.

        It follows the cube: recall is learned through the states first, and taken over by the contextual stream.
        """
        if self.config.linear_attention == "gated":
            self.bound.fill_(progress**3)

    def decay_parameters(self):
        """What `log_decay_ref` needs beside its input; outside training always with the whole bound."""
        horizon = self.config.linear_attention_horizon
        least = 1.0 / horizon if horizon else 0.0
        if horizon and self.training:
            least = self.bound.float() * least
        return self.decay_log_rate, self.decay_bias, least

    def forward(self, h_BTD, heads, stream, layer_cache, backend, sinks=None, head_BTX=None):
        """Sum of both attentions, [B, T, H, E]; `head_BTX` is what `head_proj` gives, if that is there."""
        single = layer_cache is not None and h_BTD.shape[1] == 1
        fused = self.config.sliding_window and self.config.linear_attention == "gated" and sinks is None
        linear_BTHE, gate_BTH = self._linear(h_BTD, head_BTX, heads, stream, layer_cache, backend)
        if fused:
            with_linear = (linear_BTHE, gate_BTH, self.norm.weight, self.norm.eps)
            return self._window(heads, stream, layer_cache, backend, with_linear)
        if gate_BTH is not None:
            linear_BTHE = gated_norm_ref(linear_BTHE, gate_BTH, self.norm.weight, self.norm.eps)
        if not self.config.sliding_window:
            return linear_BTHE.to(heads.v_BTGE.dtype)
        if single:
            ring = (layer_cache.window_keys, layer_cache.window_values)
            slot_B = push_window_ref(heads.k_BTGE, heads.v_BTGE, *ring, stream.seen_B, stream.length_B)
            local_BTHE, lse_BTH = window_decode_ref(heads.q_BTHE, *ring, slot_B, stream.start_BT)
        else:
            local_BTHE, lse_BTH = self._window(heads, stream, layer_cache, backend)
        if sinks is not None:
            local_BTHE = add_sinks_ref(local_BTHE, lse_BTH, heads.q_BTHE, *sinks)
        return (linear_BTHE + local_BTHE).to(heads.v_BTGE.dtype)

    def _window(self, heads, stream, layer_cache, backend, with_linear=None):
        """Local attention and its log-sum-exp, or the whole stream if `with_linear` has the other part of it."""
        inputs = (heads.q_BTHE, heads.k_BTGE, heads.v_BTGE, stream.start_BT, self.config.sliding_window)
        history = None if layer_cache is None else layer_cache.window_history(stream.seen_B)
        if with_linear is None:
            result = local_attention(*inputs, history, backend)
        else:
            result = reflexive_merge(*inputs, *with_linear, history, backend)
        if layer_cache is not None:
            layer_cache.write_window(heads.k_BTGE, heads.v_BTGE, stream.seen_B, stream.length_B)
        return result

    def _linear(self, h_BTD, head_BTX, heads, stream, layer_cache, backend):
        """Output of the linear attention, and its gate before the sigmoid: None for "elu", which is normalised."""
        state, v_BTGF = None if layer_cache is None else layer_cache.linear_state, heads.v_BTGE
        gated = self.config.linear_attention == "gated"
        if gated:
            head_BTX = self.head_proj(h_BTD) if head_BTX is None else head_BTX
            decay_BTH, gate_BTH = head_BTX.chunk(2, -1)
            log_decay_BTH = log_decay_ref(decay_BTH, *self.decay_parameters())
        else:
            v_BTGF = F.pad(v_BTGF, (0, 1), value=1.0)  # the last column sums the keys: the normaliser
            log_decay_BTH = torch.zeros_like(heads.q_BTHE[..., 0], dtype=torch.float32)
        out_BTHF, state = linear_attention(
            heads.q_linear_BTHE, heads.k_linear_BTGE, v_BTGF, log_decay_BTH, stream.start_BT, stream.length_B, state,
            backend,
        )  # fmt: skip
        if layer_cache is not None:
            layer_cache.keep("linear_state", state)
        if gated:
            return out_BTHF, gate_BTH
        return out_BTHF[..., :-1] / out_BTHF[..., -1:].clamp(min=1e-6), None


class ContextualStream(nn.Module):
    """Routed tokens only: SQSK attention, full causal attention among them at their original positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, reflexive_BTHE, heads, route, stream, layer_cache, backend, sinks=None):
        """`reflexive_BTHE` plus gate * attention output at every routed token; it may be overwritten."""
        index_BK, slot_BT, count_B = route.index_BK, route.slot_BT, route.count_B
        kv, cached_B, first_BK = (heads.k_BTGE, heads.v_BTGE), None, None
        if stream.start_BT is not None:
            first_BT = self._first_slot(route, stream, layer_cache)
            first_BK = first_BT.gather(1, index_BK.clamp(min=0))
        if layer_cache is not None:
            position_BK = stream.position_BT.expand_as(slot_BT)
            if slot_BT.shape[1] > 1:  # a single token is its own only slot
                position_BK = position_BK.gather(1, index_BK.clamp(min=0))
                kv = [take_rows(x, index_BK, slot_BT, backend) for x in kv]
            *kv, cached_B, count_B = layer_cache.update(*kv, position_BK, count_B)
            route = route._replace(count_B=count_B)
            layer_cache.keep("document_slot", first_BT[:, -1].to(torch.int32))
        return sqsk_merge(reflexive_BTHE, heads.q_BTHE, kv, route, first_BK, cached_B, sinks, backend)

    def _first_slot(self, route, stream, layer_cache):
        """First slot of each token's document, counted with the cached slots, [B, T]."""
        start_BT, first_BT = stream.start_BT.expand_as(route.slot_BT), 0
        if start_BT.shape[1] > 1 or layer_cache is None:
            routed_BT = route.slot_BT >= 0
            before_BT = routed_BT.cumsum(1) - routed_BT.long()  # routed tokens of this call before each token
            first_BT = before_BT.gather(1, start_BT.clamp(min=0))
        if layer_cache is None:
            return first_BT
        first_BT = first_BT + layer_cache.count[:, None]
        return torch.where(start_BT < 0, layer_cache.document_slot[:, None], first_BT)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTD, residual_BTD=None, backend="reference"):
        """[B, T, D] to [B, T, D]; added to `residual_BTD` if there is one, which may be overwritten."""
        products = (self.gate_proj, self.up_proj, self.down_proj)
        if backend == "triton" and residual_BTD is not None and weights_usable(x_BTD, *products):
            gate, up, down = (module.weight for module in products)
            return linear_add(residual_BTD, swiglu(x_BTD, gate, up, backend), down, backend)
        y_BTD = self.down_proj(gated_product_ref(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
        return y_BTD if residual_BTD is None else residual_BTD + y_BTD


class HSPMNBlock(GradientCheckpointingLayer):
    """One block: shared projection, router, both streams, merge and SwiGLU. Works alone on [B, S, hidden_size]."""

    def __init__(self, config, layer_idx=0):
        super().__init__()
        config.validate()
        self.config = config
        self.layer_idx = layer_idx
        D, E = config.hidden_size, config.head_dim
        self.input_layernorm = RMSNorm(D, eps=config.rms_norm_eps)
        self.projection = SharedProjection(config)
        self.reflexive = ReflexiveStream(config)
        self.router = HSPMNRouter(config, layer_idx) if config.layer_sparsity[layer_idx] else None
        self.contextual = ContextualStream(config) if self.router is not None else None
        if config.num_sink_tokens:
            self.sink_keys = nn.Parameter(torch.empty(config.num_sink_tokens, config.num_key_value_heads, E))
            self.sink_values = nn.Parameter(torch.empty(config.num_sink_tokens, config.num_key_value_heads, E))
        self.o_proj = nn.Linear(config.num_attention_heads * E, D, bias=False)
        self.post_attention_layernorm = RMSNorm(D, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(D, config.intermediate_size)
        heavier = config.routed_intermediate_size and self.router is not None
        self.routed_mlp = SwiGLU(D, config.routed_intermediate_size) if heavier else None
        self.reset_parameters()

    def reset_parameters(self):
        """Sinks start small, so that they take little of any softmax's value."""
        if self.config.num_sink_tokens:
            init.normal_(self.sink_keys, std=self.config.initializer_range)
            init.normal_(self.sink_values, std=self.config.initializer_range)

    def forward(self, hidden_states, stream=None, past_key_values=None, output_router=False, router_bias=None):
        """Run the block.

        Args:
            hidden_states: [B, S, hidden_size].
            stream: where the tokens stand; None: one document per row, continued if `past_key_values` is given.
            past_key_values: `HSPMNCache` to read and extend, or None.
            output_router: return the `Route` (None for a purely reflexive layer) as a fourth value.
            router_bias: the routing bias of this call, None for the router's own. A caller that moves the bias before
                backward passes a copy, so that recomputation under gradient checkpointing routes the same tokens.

        Returns:
            output [B, S, hidden_size], aux_loss (scalar), and the cache.
        """
        alone = stream is None
        if alone:
            rotary = LlamaRotaryEmbedding(self.config).to(hidden_states.device)
            backend = pick_backend(self.config.backend, hidden_states.device, self.config.head_dim)
            stream = make_stream(hidden_states, past_key_values, rotary, backend=backend)
        output, route = self._run(hidden_states, stream, past_key_values, router_bias)
        if alone and past_key_values is not None:
            advance_cache(past_key_values, hidden_states.shape[1], stream)
        stats = None if route is None else route.stats
        aux_loss = output.new_zeros((), dtype=torch.float32) if stats is None else stats.aux_loss
        if output_router:
            return output, aux_loss, past_key_values, route
        return output, aux_loss, past_key_values

    def _run(self, x_BTD, stream, past_key_values, router_bias):
        backend = pick_backend(self.config.backend, x_BTD.device, self.config.head_dim)
        layer_cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        sinks = (self.sink_keys, self.sink_values) if self.config.num_sink_tokens else None
        single = layer_cache is not None and x_BTD.shape[1] == 1 and sinks is None and self._streams_are_plain()
        if single and takes_rows(x_BTD, backend) and self._is_plain(x_BTD):
            return self._decode(x_BTD, stream, layer_cache, router_bias, backend)
        (h_BTD, head_BTX, score_BT), route = self._normed(x_BTD, single, backend), None
        heads = self.projection(h_BTD, stream, layer_cache, backend)
        if not single:
            merged_BTHE = self.reflexive(h_BTD, heads, stream, layer_cache, backend, sinks, head_BTX)
        if score_BT is not None:
            route = self.router.decided(score_BT, stream.length_B, router_bias, backend, stream.start_BT)
        elif self.router is not None:
            route = self.router(h_BTD, stream.length_B, router_bias, backend, stream.start_BT)
        if single:
            head_BTX, score_BT = self.reflexive.head_proj(h_BTD), None if route is None else route.score_BT
            merged_BTHE = self._attend(heads, head_BTX, score_BT, stream, layer_cache, router_bias, backend)
        elif route is not None:
            merged_BTHE = self.contextual(merged_BTHE, heads, route, stream, layer_cache, backend, sinks)
        x_BTD = x_BTD + self.o_proj(merged_BTHE.flatten(2))
        return self._feed_forward(x_BTD, route, backend), route

    def _normed(self, x_BTD, single, backend):
        """The normed input, and what `head_proj` and the router make of it where one operation does all three."""
        usable = (
            not (single or self.training)
            and (self.router is None or is_plain(self.router, HSPMNRouter))
            and self._streams_are_plain()
            and weights_usable(x_BTD, self.input_layernorm, self.reflexive.head_proj)
        )
        if not usable:
            return self.input_layernorm(x_BTD), None, None
        norm, weights = self.input_layernorm, (self.reflexive.head_proj.weight, self._score_weight())
        return norm_heads(x_BTD, norm.weight, norm.eps, *weights, backend)

    def _score_weight(self):
        return None if self.router is None else self.router.weight

    def _streams_are_plain(self):
        """Whether both streams of a single token may be one operation, which does not call their modules."""
        if not self.config.sliding_window or self.config.linear_attention != "gated":
            return False
        return is_plain(self.reflexive, ReflexiveStream) and (
            self.contextual is None or is_plain(self.contextual, ContextualStream)
        )

    def _is_plain(self, x_BTD):
        """Whether the weights of all other modules may be used without calling these, in the dtype of `x_BTD`."""
        parts = [(self.projection, SharedProjection), (self.mlp, SwiGLU)]
        if self.router is not None:
            parts.append((self.router, HSPMNRouter))
        return (
            not self.training
            and all(is_plain(module, kind) for module, kind in parts)
            and weights_usable(x_BTD, self.projection.qkv_proj, self.reflexive.head_proj, self.o_proj)
            and weights_usable(x_BTD, self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj)
            and weights_usable(x_BTD, self.input_layernorm, self.post_attention_layernorm)
        )

    def _attend(self, heads, head_BTX, score_BT, stream, layer_cache, router_bias, backend):
        """Both streams of a single token, [B, 1, H, E]; extends the cache."""
        reflexive = self.reflexive
        parameters = (*reflexive.decay_parameters(), reflexive.norm.weight)
        router = (None, None, 0.0, 0) if score_BT is None else self.router.single(score_BT, router_bias)
        store = layer_cache.store(0 if score_BT is None else 1)
        state, ring = layer_cache.linear_state, (layer_cache.window_keys, layer_cache.window_values)
        merged_BTHE, state = attend_decode(
            heads, head_BTX, parameters, reflexive.norm.eps, stream, router, state, ring, store, backend
        )
        layer_cache.keep("linear_state", state)
        return merged_BTHE

    def _decode(self, x_BTD, stream, layer_cache, router_bias, backend):
        """`_run` of a single token of few rows: every product in one launch with what stands before or after it."""
        norm, projection = self.input_layernorm, self.projection
        weights = (projection.qkv_proj.weight, self.reflexive.head_proj.weight, self._score_weight())
        x_BTC, head_BTX, score_BT = project_decode(x_BTD, norm.weight, norm.eps, *weights, backend)
        heads = projection.split(x_BTC, stream, layer_cache, backend)
        merged_BTHE = self._attend(heads, head_BTX, score_BT, stream, layer_cache, router_bias, backend)
        x_BTD = linear_add_decode(x_BTD, merged_BTHE.flatten(2), self.o_proj.weight, backend)
        route = None
        if self.router is not None:
            route = self.router.decided(score_BT, stream.length_B, router_bias, start_BT=stream.start_BT)
        if self.routed_mlp is not None:
            return self._feed_forward(x_BTD, route, backend), route
        norm, mlp = self.post_attention_layernorm, self.mlp
        hidden_BTX = swiglu_decode(x_BTD, norm.weight, norm.eps, mlp.gate_proj.weight, mlp.up_proj.weight, backend)
        return linear_add_decode(x_BTD, hidden_BTX, mlp.down_proj.weight, backend), route

    def _feed_forward(self, x_BTD, route, backend):
        h_BTD = self.post_attention_layernorm(x_BTD)
        x_BTD = self.mlp(h_BTD, x_BTD, backend)
        if self.routed_mlp is None:
            return x_BTD
        routed_BKD = self.routed_mlp(take_rows(h_BTD, route.index_BK, route.slot_BT, backend))
        routed_BTD = take_rows(routed_BKD, route.slot_BT, route.index_BK, backend)
        return x_BTD + routed_BTD * route.gate_BT[..., None].to(x_BTD.dtype)


def is_plain(module, kind):
    """Whether a call of `module` is `kind.forward`: no subclass, hook or replaced method (adapters, offload)."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in module.__dict__


def weights_usable(x, *modules):
    """Whether the weights of linear layers or norms may be used without calling these, in the dtype of `x`."""
    return not torch.is_autocast_enabled(x.device.type) and all(
        is_plain(module, RMSNorm if isinstance(module, RMSNorm) else nn.Linear)
        and type(module.weight) is nn.Parameter
        and module.weight.dtype == x.dtype
        and getattr(module, "bias", None) is None
        for module in modules
    )


def make_stream(x_BTD, cache, rotary, position_BT=None, length_B=None, backend="reference"):
    """The `Stream` of one call.

    Args:
        x_BTD: embeddings, real tokens first in each row.
        cache: `HSPMNCache` or None; a first call starts its rows.
        rotary: module giving cos and sin for (x, position ids).
        position_BT: position ids, or None to count on from the cache; a jump (other than +1) starts a document.
        length_B: real tokens per row, or None if all are.
        backend: see `pick_backend`.
    """
    B, T = x_BTD.shape[:2]
    token_T = torch.arange(T, device=x_BTD.device)
    seen_B = start_BT = None
    if cache is not None:
        cache.start_call(B, T, x_BTD.device)
        seen_B = cache.seen
    document_seen = 0 if cache is None else cache.document_seen[:, None]
    if position_BT is None:
        position_BT = (token_T + document_seen).expand(B if cache is not None else 1, T)
        start_BT = None if cache is None else (-document_seen).expand(B, T)
    else:
        position_BT = position_BT if cache is None else position_BT.expand(B, T)
        last = position_BT[:, :1] - 1 if cache is None else cache.last_position[:, None]
        jumps_BT = position_BT != torch.cat([last, position_BT[:, :-1]], 1) + 1
        if length_B is not None:  # padding starts no document
            jumps_BT = jumps_BT & (token_T < length_B[:, None])
        start_BT = torch.where(jumps_BT, token_T, -1).cummax(1).values
        start_BT = torch.where(start_BT < 0, -document_seen, start_BT).expand(B, T)
    cos, sin = rotary(x_BTD, position_BT)
    if cache is not None and T == 1:
        cos, sin, start_BT, position_BT, length_B = place_decode(cos, sin, start_BT, position_BT, length_B, backend)
    return Stream(position_BT, cos, sin, start_BT, length_B, seen_B)


def restore_rows(y_BTX, rows):
    """Rows in the caller's order, zeros at padding; `rows` is (slot of each token, token of each slot) or None."""
    return y_BTX if rows is None else take_rows(y_BTX, *rows)


def advance_cache(cache, columns, stream):
    """Account for a finished call in the cache's counts."""
    cache.advance(columns, stream.length_B, stream.start_BT, stream.position_BT)
