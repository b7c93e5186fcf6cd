"""The models that HSPMN is compared with where they are trained, and how: the same optimiser and steps for all."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from ..block_hspmn import SharedProjection, Stream
from ..results import config_with, low_precision, refuse, refusing
from .delta import use_delta_rule

LLAMAS = ("dense", "dense_conv")  # models of transformers, which have no field of `HSPMNConfig`
CACHELESS = (*LLAMAS, "hspmn_delta")  # models without a cache of HSPMN's
PATCHED = ("dense_conv", "hspmn_delta")  # whose saved code would lack what was put in
MODELS = (
    *LLAMAS, "linear_full4", "linear_full8", "hspmn", "hspmn_random", "hspmn_annealed", "hspmn_delta", "reflexive"
)  # fmt: skip


class MatchedAttention(nn.Module):
    """A Llama's attention behind HSPMN's projection: short convolution, norms of queries and keys, and fresh weights
    by which a query already matches the keys of tokens like its own, in every second key head their successors'."""

    def __init__(self, config):
        super().__init__()
        self.projection = SharedProjection(config)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        for linear in (self.projection.qkv_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=config.initializer_range)
        self.projection.reset_parameters()

    def forward(self, hidden_states, position_embeddings, **_):
        """As `LlamaAttention` without a cache or padding: [B, T, D] to the same, and no weights."""
        heads = self.projection(hidden_states, Stream(None, *position_embeddings))
        q, k, v = (x.transpose(1, 2) for x in heads[2:5])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def settle(args):
    """Refuse a vocabulary that a fresh tokenizer cannot have, and fill in how models are compiled by default."""
    if args.vocab_size < 257:
        refuse(f"--vocab_size must be at least 257 (bytes and end of text), got {args.vocab_size}")
    args.compile = args.compile or ("layers" if args.device == "cuda" else "none")


def comparison_config(case, sizes, overrides=None):
    """Configuration of a case; `sizes` are fields that every decoder has, `overrides` fields of `HSPMNConfig`.
    linear_full4 is the usual hybrid built from the same blocks: gated linear attention in every layer, full causal
    attention beside it in every fourth (the last one of a shorter stack), no local window; linear_full8 in every
    eighth. They and the reflexive model keep their distant past in linear states, so no bound is put on what these
    remember."""
    sizes = sizes | {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"], "tie_word_embeddings": True}
    if case in LLAMAS:
        config_with(sizes)  # refuses what neither can have
        with refusing(TypeError):
            return LlamaConfig(**sizes, rms_norm_eps=1e-6, max_position_embeddings=1048576)
    layers = sizes["num_hidden_layers"]

    def hybrid(every):
        full = [float(i % every == every - 1 or (layers < every and i == layers - 1)) for i in range(layers)]
        return {"sparsity_k": full, "sliding_window": 0, "linear_attention_horizon": 0}

    own = {
        "linear_full4": hybrid(4),
        "linear_full8": hybrid(8),
        "hspmn_annealed": {"sparsity_anneal_fraction": 0.6},
        "reflexive": {"sparsity_k": 0.0, "linear_attention_horizon": 0}}  # fmt: skip
    return config_with(sizes | (overrides or {}) | own.get(case, {}))


def build_model(case, config, seed):
    """Freshly initialised model of a case, float32; hspmn_random keeps its random router. There the hidden states
    learn nothing from the scores either: they would bend to where the frozen weights point."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    if case == "dense_conv":
        fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "initializer_range")
        own = config_with({field: getattr(config, field) for field in fields})
        for layer in model.base_model.layers:
            layer.self_attn = MatchedAttention(own)
    if case == "hspmn_delta":
        use_delta_rule(model)
    if case == "hspmn_random":
        for router in filter(None, (layer.router for layer in model.base_model.layers)):
            router.weight.register_hook(torch.zeros_like)  # one that needs no gradient leaves the bias at rest as well
            router.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
    return model


def train_steps(model, batches, loss_function, steps, lr, anneal=None):
    """Train on `batches`, gradients clipped to norm 1; yields the loss and the outputs of every step. `loss_function`
    takes the model and a batch, under bfloat16 autocast on CUDA, and returns loss and outputs. An HSPMN model's
    sparsity target follows the steps: by its own `anneal`, or by the one given, a function of step and steps. AdamW
    decays the weights of linear layers and embeddings only; its rate warms up linearly over 7 % of the steps, then
    falls along a cosine to a tenth of `lr`."""
    matrices = {part.weight for part in model.modules() if isinstance(part, torch.nn.Linear | torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = ([p for p in trained if (p in matrices) == decays] for decays in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=trained[0].is_cuda)
    anneal = anneal or getattr(model, "anneal", lambda step, steps: None)
    warmup = max(1, round(0.07 * steps))
    model.train()
    for step, batch in enumerate(batches):
        anneal(step, steps)
        with low_precision(model.device):
            loss, outputs = loss_function(model, batch)
        aux_loss = getattr(outputs, "aux_loss", None)
        (loss if aux_loss is None else loss + aux_loss).backward()
        fall = max(0, step - warmup) / max(1, steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * fall)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.detach(), outputs
    anneal(steps, steps)
