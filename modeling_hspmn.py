"""HSPMN: a causal language model whose blocks do not spend the same work on every token.

Every token passes the reflexive stream (gated linear attention, a local window and SwiGLU: linear time, constant
state). A router, balanced by a bias and not by a loss (ALF-LB, arXiv 2408.15664), sends about a fifth of the tokens
through the contextual stream as well: SQSK attention, full causal attention among routed tokens alone. Both streams
share one Q/K/V projection, and only routed tokens enter the key/value cache.

Shape suffixes as in `operations_hspmn`; D hidden size, L layers.
"""

import inspect
import os
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import ModelOutput, TransformersKwargs, logging

from .block_hspmn import (
    OPERATIONS,
    ContextualStream,
    HSPMNBlock,
    HSPMNRouter,
    ReflexiveStream,
    RMSNorm,
    Route,
    SharedProjection,
    make_stream,
    pick_backend,
    restore_rows,
    router_statistics,
)
from .cache_hspmn import EVICTED, SLOT_BLOCK, HSPMNCache, HSPMNCacheLayer, HSPMNStaticCache, Piece
from .configuration_hspmn import HSPMNConfig
from .float8_hspmn import Float8Linear
from .operations_hspmn import IGNORED, LINEAR_CHUNK, QUERY_SPAN, compact, take_rows

logger = logging.get_logger(__name__)

READ_AGAIN = 256  # tokens after a rewound state that a GPU reads in about the time of one
LEAST_PIECE = 1024  # tokens per row that are read at once however little memory is free
MEMORY_SHARE = 0.5  # of the free memory that reading a prompt may take
BAR_DELAY = 5.0  # seconds after which reading a prompt shows a progress bar
STOP_EVERY = 16  # decoded tokens between two looks for the end of text
# What chooses tokens on the device alone; anything else goes through the loop of transformers
WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper")
STOPS = ("MaxLengthCriteria", "EosTokenCriteria")
# What trainers, collators and `generate` pass to any decoder beside what `forward` names; most of it says nothing here
COMMON_ARGUMENTS = {
    *TransformersKwargs.__optional_keys__, "seq_idx", "shift_labels", "token_type_ids", "cache_position", "tokenizer",
    "assistant_tokenizer", "skip_logits",
}  # fmt: skip


@dataclass
class HSPMNOutput(ModelOutput):
    """Fields common to the outputs of all HSPMN models.

    past_key_values: the cache or None. hidden_states: L + 1 tensors [B, T, D] if asked for. aux_loss: scalar, the
    weighted entropy losses of all layers. router_scores: float32 [L, B, T], scores before the bias. router_mask: bool
    [L, B, T], whether a token entered the contextual stream. router_load, router_overflow, router_entropy: float32
    [L], see `router_statistics`; None for a single token on kernels.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None
    router_scores: torch.FloatTensor | None = None
    router_mask: torch.BoolTensor | None = None
    router_load: torch.FloatTensor | None = None
    router_overflow: torch.FloatTensor | None = None
    router_entropy: torch.FloatTensor | None = None


class HSPMNPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and declarations shared by all HSPMN models."""

    config_class = HSPMNConfig
    float8_layer = Float8Linear  # that of this file's copy, whichever copy's quantizer was registered
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HSPMNBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["router"]
    _is_stateful = False  # in transformers' sense: a cache with a rollback length can be cropped
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config, *args, **kwargs):
        config.validate()
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HSPMNRouter | SharedProjection | ReflexiveStream | HSPMNBlock):
            module.reset_parameters()

    @property
    def _ddp_params_and_buffers_to_ignore(self):
        """What each rank counts for itself: DistributedDataParallel would put rank 0's in its place."""
        return [name for name, _ in self.named_buffers() if name.endswith(".counts")]

    def _asked(self, switch, given):
        """An output switch of the call, or the configuration's where the call leaves it open."""
        return getattr(self.config, switch) if given is None else given

    def save_pretrained(self, *args, **kwargs):
        """As in transformers. FSDP2 gives a model a class made in a file of torch: the code saved is that of ours."""
        kind = type(self)
        if kind.__module__.startswith("torch."):
            self.__class__ = kind.__bases__[-1]
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = kind

    def set_sparsity_progress(self, progress):
        """Move every layer's target share, and the bound on its linear states, along their annealing.

        progress: 0.0 routes every token, 1.0 routes `config.sparsity_k`, linear between, while states are bounded by
        `config.linear_attention_horizon` over progress cubed; ValueError outside [0, 1]. Call it, or `anneal`, before
        each training step where `config.sparsity_anneal_fraction` is above 0. Nothing outside training depends on it.
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        for module in self.modules():
            if isinstance(module, HSPMNRouter | ReflexiveStream):
                module.set_progress(progress)

    def anneal(self, step, steps):
        """`set_sparsity_progress` at `step` of `steps`; the first `config.sparsity_anneal_fraction` of them anneal."""
        annealed = self.config.sparsity_anneal_fraction * steps
        self.set_sparsity_progress(min(1.0, step / annealed) if annealed else 1.0)

    @property
    def router_targets(self):
        """Current target share of each layer that has a router, float32, shape [number of routers]."""
        targets = [layer.router.target for layer in self.base_model.layers if layer.router is not None]
        return torch.stack(targets) if targets else torch.zeros(0)

    def kv_bytes_per_token(self, dtype=None):
        """Bytes by which the cache grows per token, on average at the configured `sparsity_k`: keys, values, scales
        of whole numbers, and the position id of each slot. The states do not grow.

        dtype: that of the keys and values, the model's own by default, if `kv_cache_dtype` is "auto".
        """
        layer = HSPMNCacheLayer(self.config)
        layer.allocate(1, 0, dtype or self.dtype, "meta")  # of the spare slot alone
        return sum(getattr(layer, name).nbytes for name in layer.slot_tensors) * sum(self.config.layer_sparsity)

    def estimate_flops(self, sequence_length, batch_size=1):
        """Multiply-adds, counted as two operations each, of one forward pass over `batch_size` full rows."""
        config, T = self.config, sequence_length
        H, G, E, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        per_token = 2 * D * ((H + 2 * G) * E + H * E) + 6 * D * config.intermediate_size  # projections, SwiGLU
        per_token += 4 * D * H if config.linear_attention == "gated" else 0
        per_token += H * E * (4 * LINEAR_CHUNK / 2 + 4 * E)  # linear attention: within chunks, through the state
        per_token += 4 * H * E * min(config.sliding_window, T)  # local attention
        total = per_token * T * config.num_hidden_layers
        for share in config.layer_sparsity:
            readers = T if config.contextual_readers == "all" else share * T
            total += 2 * H * E * share * T * readers + 6 * D * config.routed_intermediate_size * share * T
            total += 2 * D * T if share else 0
        total += 2 * D * config.vocab_size * T if hasattr(self, "lm_head") else 0
        return int(batch_size * total)


class HSPMNModel(HSPMNPreTrainedModel):
    """The stack of blocks, without a head."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(HSPMNBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_hidden_states=None, output_attentions=None, return_dict=None, row_weights=None,
        **kwargs,
    ):  # fmt: skip
        """Hidden states of every token.

        input_ids: int64 [B, T], or inputs_embeds: [B, T, D]; exactly one of them. attention_mask: [B, T] or [B, cached
        columns + T], 1 for real tokens, padding anywhere; compiled with a static cache it must have width T.
        position_ids: int64 [B, T]; where they go up neither by one nor by the columns that a hole in the mask spans, a
        new document begins (packing). past_key_values: `HSPMNCache` or `HSPMNStaticCache` to continue; the former is
        created if `use_cache` and None. Output switches that are None are the config's. row_weights: float [B], shares
        of the rows in `aux_loss`, None for their shares of the real tokens.

        kwargs: what any decoder of transformers is given, `COMMON_ARGUMENTS`. Of these seq_idx, int [B, T] (number of
        each token's document), and cu_seq_lens_q, int [documents + 1] (0, and the end of each document in all B T
        tokens), say where documents begin: they stand for absent position_ids, and must agree with present ones.

        Returns `HSPMNOutput`; hidden states of padding are zero. Raises ValueError for inputs that do not fit, and
        TypeError for a name that is unknown.
        """
        if kwargs:
            refuse_unknown(kwargs)
        use_cache = self._wants_cache(use_cache, past_key_values)
        output_hidden_states = self._asked("output_hidden_states", output_hidden_states)
        x_BTD = self._embed(input_ids, inputs_embeds, output_attentions)
        (B, T), position_BT = x_BTD.shape[:2], position_ids
        if position_BT is not None and tuple(position_BT.shape) not in ((1, T), (B, T)):
            raise ValueError(f"position_ids must have shape [{B}, {T}], got {tuple(position_BT.shape)}")
        # by name: a model loaded through the Auto classes has its own copy of the class
        kind = type(past_key_values).__name__
        if past_key_values is not None and kind not in ("HSPMNCache", "HSPMNStaticCache"):
            raise ValueError(
                f"past_key_values must be an HSPMNCache or an HSPMNStaticCache, got {kind}; pass None and "
                "continue with the cache that the output returns"
            )
        documents = document_numbers((B, T), kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q")) if kwargs else {}
        if documents and position_BT is None and past_key_values is not None:
            raise ValueError(f"{', '.join(documents)} without position_ids cannot continue a cache; pass position_ids")
        if use_cache and past_key_values is None:
            past_key_values = HSPMNCache(self.config)
        if past_key_values is not None:
            past_key_values.check_model(self)
            past_key_values.check_rows(B)

        real_BT = self._real_tokens(attention_mask, B, T, past_key_values)
        piece = Piece(x_BTD, real_BT, position_BT)
        read = self._read_again if past_key_values is not None and past_key_values.rewinds else self._read
        x_BTD, states, routes, rows, length_B = read(piece, past_key_values, output_hidden_states, documents)
        outputs = HSPMNOutput(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=(*states, x_BTD) if output_hidden_states else None,
            **self._router_outputs(routes, length_B, rows, x_BTD, row_weights),
        )
        return outputs if self._asked("return_dict", return_dict) else outputs.to_tuple()

    def _read(self, piece, cache, output_hidden_states, documents=None):
        """One pass of all blocks: the last hidden states and, if asked for, those before each block; their routes, the
        rows in which these are, see `restore_rows`, and the real tokens of each row, None for all. documents: what
        `document_numbers` returned."""
        (x_BTD, real_BT, position_BT), (B, T), documents = piece, piece.x_BTD.shape[:2], documents or {}
        rows = length_B = index_BT = None
        if real_BT is not None and T == 1:  # nothing to move
            length_B, rows = real_BT[:, 0].long(), (real_BT.long() - 1,) * 2
        elif real_BT is not None:
            index_BT, slot_BT, length_B = compact(real_BT, T)
            rows, length_B = (slot_BT, index_BT), length_B.long()
            x_BTD = take_rows(x_BTD, index_BT, slot_BT)
            moved_BT = index_BT.clamp(min=0)
            documents = {name: number_BT.gather(1, moved_BT) for name, number_BT in documents.items()}
            if position_BT is not None:
                position_BT = position_BT.expand(B, T).gather(1, moved_BT)
        for name, number_BT in documents.items():
            other = "seq_idx" if piece.position_BT is None else "position_ids"
            position_BT = document_positions(name, number_BT, position_BT, length_B, index_BT, other)
        backend = pick_backend(self.config.backend, x_BTD.device, self.config.head_dim)
        stream = make_stream(x_BTD, cache, self.rotary_emb, position_BT, length_B, backend, index_BT)

        states, routes = [], []
        for layer in self.layers:
            if output_hidden_states:  # each lies on the way of the gradient, padded rows too
                states.append(restore_rows(x_BTD, rows))
                x_BTD = restore_rows(states[-1], rows and rows[::-1])
            x_BTD, *route = layer(x_BTD, stream, past_key_values=cache, output_router=True)
            routes.append(Route(*route) if route else None)
        x_BTD = self.norm(x_BTD)
        if rows is not None:
            x_BTD = restore_rows(x_BTD, rows)
        if cache is not None:
            cache.advance(T, stream)
        return x_BTD, states, routes, rows, length_B

    def _read_again(self, piece, cache, output_hidden_states, documents=None):
        """`_read` for a cache that can be rewound. What `crop` left to be read again goes first, in the same pass
        where that is short; a long call takes two passes, so that a checkpoint stands before its last tokens. Position
        ids, which a call with a cache needs beside `documents`, say what these do."""
        (B, T), unread, again = piece.x_BTD.shape[:2], cache.unread_pieces(), cache.unread
        if torch.compiler.is_compiling() or (piece.x_BTD.is_cuda and torch.cuda.is_current_stream_capturing()):
            raise ValueError(
                f"past_key_values has rollback={cache.rollback}, which compiled and captured code cannot keep; call "
                "the model eagerly, or use a cache without"
            )
        if piece.position_BT is not None:
            piece = piece._replace(position_BT=piece.position_BT.expand(B, T))
        cache.begun = cache.get_seq_length()
        if cache.record_past:
            cache.rollback = max(cache.rollback, T)
        limit = max(cache.rollback, READ_AGAIN if piece.x_BTD.is_cuda else 1)
        alike = len({each.position_BT is None for each in (*unread, piece)}) == 1
        passes = [(piece, 0, piece)]  # what is read, its columns that were read before, and what is new
        if unread and alike and again + T <= 2 * limit:
            passes = [(Piece.join([*unread, piece]), again, piece)]
        else:
            for each in unread:
                self._read(each, cache, False)
            if T > 2 * limit and cache.rollback:
                cut = T - cache.rollback
                new = [piece.map(lambda x: x[:, :cut]), piece.map(lambda x: x[:, cut:])]
                passes = [(each, 0, each) for each in new]
        results = []
        for whole, again, new in passes:
            cache.checkpoint(limit)
            x_BTD, states, routes, rows, length_B = self._read(whole, cache, output_hidden_states)
            if length_B is None:
                length_B = torch.full(x_BTD.shape[:1], x_BTD.shape[1], device=x_BTD.device)
            cache.record(new)
            parts = [None if route is None else (
                restore_rows(route.score_BT, rows)[:, again:], (restore_rows(route.slot_BT + 1, rows) - 1)[:, again:],
                route.sums_B4,
            ) for route in routes]  # fmt: skip
            results.append((x_BTD[:, again:], [state[:, again:] for state in states], parts, length_B))
        xs, states, parts, lengths = zip(*results, strict=True)
        routes = []
        for each in zip(*parts, strict=True):
            if each[0] is None:
                routes.append(None)
                continue
            scores, slots, sums = zip(*each, strict=True)
            summed = None if any(x is None for x in sums) else sum(sums)
            routes.append(Route(torch.cat(scores, 1), None, None, torch.cat(slots, 1), None, summed))
        states = [torch.cat(each, 1) for each in zip(*states, strict=True)]
        return torch.cat(xs, 1), states, routes, None, sum(lengths)

    def _wants_cache(self, use_cache, past_key_values):
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if self.config.router_mode == "topk":
            if past_key_values is not None:
                raise ValueError("router_mode='topk' looks at later tokens and cannot continue a cache; pass none")
            return False
        checkpoints = self.training and self.layers[0].gradient_checkpointing
        if checkpoints and past_key_values is not None:
            raise ValueError(
                "past_key_values cannot be read while gradient checkpointing trains, which runs every layer twice; "
                "pass None, or call model.eval() or model.gradient_checkpointing_disable() first"
            )
        if use_cache and checkpoints:
            logger.warning_once("use_cache=True is incompatible with gradient checkpointing; setting use_cache=False")
            return False
        return use_cache

    def _embed(self, input_ids, inputs_embeds, output_attentions):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if self._asked("output_attentions", output_attentions):
            raise ValueError("output_attentions=True is not supported: no attention matrix is ever formed")
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape [batch, tokens], got {tuple(input_ids.shape)}")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if 0 in given.shape[:2]:
            raise ValueError(f"input_ids of shape {tuple(given.shape[:2])} holds no token; pass at least one")
        check_ids("input_ids", input_ids, self.embed_tokens.num_embeddings)
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return x_BTD

    @staticmethod
    def _real_tokens(attention_mask, B, T, cache):
        if attention_mask is None:
            return None
        if tuple(attention_mask.shape) != (B, T):
            columns = T if cache is None else T + cache.get_seq_length()
            if tuple(attention_mask.shape) != (B, columns):
                raise ValueError(
                    f"attention_mask must have shape [{B}, {columns}] with 1 for real tokens, "
                    f"got {tuple(attention_mask.shape)}; causal, window and document masks are built by the model"
                )
            attention_mask = attention_mask[:, -T:]
        return attention_mask.bool()

    def _router_outputs(self, routes, length_B, rows, x_BTD, row_weights):
        """Router fields of `HSPMNOutput`, zeros for layers that route nothing; counts loads in training."""
        device, shape, scores, slots, routed, routing, routers = x_BTD.device, x_BTD.shape[:2], [], [], [], [], []
        found_L3, summed = None, True
        if None in routes:
            no_score, no_slot = torch.zeros(shape, device=device), torch.full(shape, -1, device=device)
        for layer, route in zip(self.layers, routes, strict=True):
            scores.append(no_score if route is None else route.score_BT.to(device))
            slots.append(no_slot if route is None else route.slot_BT.to(device))
            if route is not None:
                routed.append(route)
                routing.append(layer)
                routers.append(layer.router)
                summed = summed and route.sums_B4 is not None  # kernels make no sums of a single token
        if routed and summed:
            length = shape[1] if length_B is None else length_B
            totals_L3, loss = router_statistics(routed, routers, length, self.config, row_weights)
            real = shape[0] * shape[1] if length_B is None else length_B.sum().to(totals_L3)
            found_L3 = totals_L3 / (real if length_B is None else real.clamp(min=1))
            if self.training and self.config.router_mode != "topk":
                self._count_routed(routing, totals_L3, real)
        scores_BTL, mask_BTL = torch.stack(scores, -1), torch.stack(slots, -1) >= 0
        if rows is not None:
            scores_BTL, mask_BTL = restore_rows(scores_BTL, rows), restore_rows(mask_BTL, rows)
        outputs = {"router_scores": scores_BTL.permute(2, 0, 1), "router_mask": mask_BTL.permute(2, 0, 1)}
        outputs["aux_loss"] = scores_BTL.new_zeros(()) if found_L3 is None else loss.to(device)
        if found_L3 is not None or not routed:
            found, nothing, columns = iter(found_L3.to(device) if routed else []), torch.zeros(3, device=device), []
            for route in routes:
                columns.append(nothing if route is None else next(found))
            found_3L = torch.stack(columns, 1)
            outputs["router_load"], outputs["router_overflow"], outputs["router_entropy"] = found_3L
        return outputs

    @staticmethod
    def _count_routed(routing, totals_L3, real):
        """Count what training passes with gradients route, for `step_biases`; a CPU looks at what was dropped."""
        looks = totals_L3.device.type == "cpu" and not torch.compiler.is_compiling()
        real = real if isinstance(real, torch.Tensor) else totals_L3.new_full((), real)
        for layer, (routed, dropped, _) in zip(routing, totals_L3, strict=True):
            router = layer.router
            if torch.is_grad_enabled() and router.weight.requires_grad:
                router.counts.add_(torch.stack([routed, real]).to(router.counts.device))
                router.counted = True
            if looks and dropped > 0:
                logger.warning_once(
                    f"layer {layer.layer_idx}: more tokens were routed than capacity_factor="
                    f"{layer.config.capacity_factor} holds; the latest were dropped (see router_overflow)"
                )


class HSPMNForCausalLM(HSPMNPreTrainedModel, GenerationMixin):
    """HSPMN with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = HSPMNModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_hidden_states=None, output_attentions=None, logits_to_keep=0,
        num_items_in_batch=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        """Next-token logits [B, T, vocab_size] in an `HSPMNOutput`, and the loss if `labels` are given.

        labels: int64 [B, T], shifted inside; -100 is ignored. logits_to_keep: last tokens to compute logits for, 0 for
        all, or a 1-D tensor of indices. num_items_in_batch: target tokens of the whole (accumulated, distributed)
        batch, as Trainer passes it. kwargs may hold shift_labels, the target of each token, in the place of labels.
        The others are those of `HSPMNModel.forward`. The loss is the mean cross entropy in nats plus, in training, the
        auxiliary losses, in which rows weigh what their targets do in the mean. A trainer that calls the stack of
        blocks and the head itself leaves those out (TRL's SFTTrainer does).
        """
        shifted = kwargs.get("shift_labels")
        for name, given in (("labels", labels), ("shift_labels", shifted)):
            check_ids(name, given, self.lm_head.out_features, ignored=IGNORED)
        targets, items = shifted, num_items_in_batch
        if shifted is None and labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if targets is not None:
            targets_B = (targets != IGNORED).sum(1)
            items = items.to(targets.device) if isinstance(items, torch.Tensor) else items
            kwargs["row_weights"] = targets_B / (targets_B.sum().clamp(min=1) if items is None else items)
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            output_attentions, True, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(outputs.last_hidden_state[:, kept]), None
        if targets is not None and "_loss_function" in vars(self):  # one that a user set
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch, shift_labels=shifted
            )
        elif targets is not None:
            if targets.numel() != logits[..., 0].numel():
                raise ValueError(
                    f"labels of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}; leave "
                    "logits_to_keep out, or give shift_labels of the tokens that it keeps"
                )
            losses = OPERATIONS[pick_backend(self.config.backend, logits.device, self.config.head_dim)].token_losses
            total = losses(logits.flatten(0, 1), targets.flatten().to(logits.device)).sum()
            items = targets_B.sum() if items is None else items
            loss = total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)
        return with_head(outputs, logits, loss, self.training, self._asked("return_dict", return_dict))

    def piece_size(self, rows):
        """Tokens per row of `rows` rows that one forward may read in half of the memory that is free now, counting a
        block's widest moment, what every router and cache keep per token and, where the reference runs, its scores."""
        config, device = self.config, self.device
        H, G, E, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        heads = (6 * H + 5 * G) * E
        widest, size = max(heads, config.intermediate_size + config.routed_intermediate_size), self.dtype.itemsize
        per_token = (4 * D + widest) * size + sum(map(bool, config.layer_sparsity)) * (2 * G * E * size + 64)
        if device.type == "cuda":
            held = torch.cuda.memory_stats(device)  # asked once: it takes 0.15 ms
            cached = held["reserved_bytes.all.current"] - held["allocated_bytes.all.current"]
            free = torch.cuda.mem_get_info(device)[0] + cached
        else:
            pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 2**20
            free = pages * os.sysconf("SC_PAGE_SIZE")
        if pick_backend(config.backend, device, E) != "triton":
            per_token += 4 * H * (4 * LINEAR_CHUNK + 8 * config.sliding_window + 4 * QUERY_SPAN)
        return max(LEAST_PIECE, int(MEMORY_SHARE * free / (rows * per_token)) // LEAST_PIECE * LEAST_PIECE)

    @torch.no_grad()
    def prefill(
        self, input_ids, attention_mask=None, past_key_values=None, chunk_size=None, logits_to_keep=1,
        position_ids=None, progress=None, **forward_kwargs,
    ):  # fmt: skip
        """Read a prompt in pieces, so that memory does not grow with its length but for the sparse keys and values.

        input_ids: int64 [B, N]. attention_mask: [B, N] or [B, cached columns + N]. position_ids: [B or 1, N].
        past_key_values: cache to continue, an `HSPMNCache` is created if None. chunk_size: tokens per row read at
        once, at least 1, the first piece being the shorter one; None: as many as `piece_size` allows and, into a
        bounded store, as leave it at a time (`EVICTED`). logits_to_keep:
        last tokens to compute logits for, 1 to `chunk_size`. progress: whether to show a progress bar; None: once
        reading has taken five seconds; transformers' `logging.disable_progress_bar()` turns it off everywhere.
        forward_kwargs: other arguments of `forward`, for the last piece.

        Returns the `HSPMNOutput` of the last piece; its `past_key_values` holds the whole prompt. Raises ValueError
        for arguments out of range, and for a static cache that is too small, which then holds the pieces before.
        """
        self._check_causal("prefill()")
        N = input_ids.shape[1]
        cache = HSPMNCache(self.config) if past_key_values is None else past_key_values
        if chunk_size is None:
            chunk_size, bound = self.piece_size(len(input_ids)), getattr(cache, "max_slots", None)
            chunk_size = chunk_size if bound is None else min(chunk_size, -(-bound // EVICTED))
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if not 1 <= logits_to_keep <= min(chunk_size, N):
            raise ValueError(
                f"logits_to_keep must lie in [1, {min(chunk_size, N)}], got {logits_to_keep}: prefill() computes "
                "logits of the last piece alone; raise chunk_size, or call the model for all of them"
            )
        ends = list(range(N, 0, -chunk_size))[::-1]
        options = {"disable": progress is False, "delay": 0.0 if progress else BAR_DELAY}
        with logging.tqdm(total=N, desc="prefill", unit="tok", unit_scale=True, **options) as bar:
            for begin, end in zip([0, *ends], ends, strict=False):
                mask = None if attention_mask is None else attention_mask[:, -N:][:, begin:end]
                positions = None if position_ids is None else position_ids[:, begin:end]
                inputs = (input_ids[:, begin:end], mask, positions, cache)
                if end < N:
                    self.model(*inputs, use_cache=True, output_hidden_states=False)
                else:
                    options = {"use_cache": True, "logits_to_keep": logits_to_keep, "return_dict": True}
                    outputs = self(*inputs, **options | forward_kwargs)
                bar.update(end - begin)
        return outputs

    def generate(self, *args, **kwargs):
        """`GenerationMixin.generate`; a prompt is read at once, or in as few pieces as the free memory allows.

        `prefill_chunk_size` sets another size of the pieces. ValueError for a router that cannot decide for one token.
        On CUDA a decoding step is captured and replayed as a CUDA graph for greedy decoding and for sampling with a
        temperature, top-k, top-p or min-p; other options go through transformers' loop. `disable_compile=True` turns
        that off. cache_implementation="static" allocates an `HSPMNStaticCache` that nothing can overflow; pass a
        smaller one as `past_key_values`.
        """
        self._check_causal("generate()")
        return super().generate(*args, **kwargs)

    def _check_causal(self, caller):
        if self.config.router_mode == "topk":
            raise ValueError(
                f"{caller} needs router_mode='threshold': 'topk' ranks a token against later ones, which do not "
                "exist yet while decoding. Set model.config.router_mode = 'threshold' and fine-tune, so that the "
                "bias settles"
            )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, max_length):
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation must be None, 'dynamic' or 'static' for HSPMN, got {implementation!r}"
            )
        if generation_config.use_cache is False:
            return
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = self._new_cache(generation_config, batch_size, max_length)
            cache.outlives_call = generation_config.return_dict_in_generate
            model_kwargs["past_key_values"] = cache
        if generation_config.is_assistant and hasattr(cache, "rollback"):
            # all of the draft may be refused and, where tokenizers differ, some tokens before it be split otherwise
            drafted = (generation_config.max_new_tokens or 0) + (generation_config.assistant_lookbehind or 0)
            cache.rollback = max(cache.rollback, drafted)

    def _new_cache(self, generation_config, batch_size, max_length):
        if generation_config.cache_implementation != "static":
            return HSPMNCache(self.config)
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        max_length = max(max_length, getattr(generation_config, "max_cache_len", None) or 1)
        # lengths that differ little share one size, and so one compilation
        length = -(-max_length // SLOT_BLOCK) * SLOT_BLOCK
        return HSPMNStaticCache(self.config, rows, length, device=self.device, dtype=self.dtype)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """None: the model counts positions itself, from the cache and without padding."""

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """The prompt of `generate`, in pieces if it is long; never compiled, because kernels serve long calls."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if cache is None or model_kwargs.get("inputs_embeds") is not None or not input_ids.shape[1]:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        # transformers' rule: ids as wide as the mask (or the mask of ones that it dropped) hold the cached ones too
        columns = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        new = input_ids.shape[1] - (cache.get_seq_length() if columns == input_ids.shape[1] else 0)
        inputs = self.prepare_inputs_for_generation(
            input_ids, next_sequence_length=new, is_first_iteration=is_first_iteration, **model_kwargs
        )
        inputs.pop("use_cache", None)
        return self.prefill(chunk_size=generation_config.prefill_chunk_size or None, **inputs)

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        """transformers' loop, on a cache whose last call can be taken back. The prompt but for its last token is read
        before, in pieces if it is long, so that no draft that is refused lets the model read it again."""
        cache, end = kwargs.get("past_key_values"), input_ids.shape[1] - 1
        begin = 0 if cache is None else cache.get_seq_length()
        if cache is not None and kwargs.get("inputs_embeds") is None and len(input_ids) == 1 and end > begin:
            mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
            mask = None if mask is None else mask[:, :end]
            position_ids = None if position_ids is None else position_ids[:, begin:end]
            size = kwargs["generation_config"].prefill_chunk_size
            self.prefill(input_ids[:, begin:end], mask, cache, size, position_ids=position_ids)
        rollback = getattr(cache, "rollback", 0)
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            if cache is not None:
                cache.rollback, cache.record_past = rollback, False

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        """transformers' loop, or its tokens from a captured step where they can be chosen on the device alone."""
        cache, asked = kwargs.get("past_key_values"), generation_config
        plain = (
            type(cache).__name__ in ("HSPMNCache", "HSPMNStaticCache")
            and input_ids.is_cuda
            and not (cache.rollback or cache.record_past)
            and not (args or kwargs.get("synced_gpus") or kwargs.get("streamer") or asked.return_dict_in_generate)
            and not (asked.disable_compile or asked.compile_config)
            and kwargs.get("inputs_embeds") is None
            and kwargs.get("position_ids") is None
            and all(type(processor).__name__ in WARPERS for processor in logits_processor)
            and all(type(criterion).__name__ in STOPS for criterion in stopping_criteria)
        )
        if not plain:
            return super()._sample(input_ids, logits_processor, stopping_criteria, asked, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("synced_gpus", "streamer")}
        return self._decode_captured(input_ids, logits_processor, stopping_criteria, asked, kwargs)

    def _decode_captured(self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs):
        """The tokens of transformers' `_sample`: the host looks for the end of text every `STOP_EVERY` tokens.

        The first step runs eagerly, which builds its kernels, the next is captured, and all others replay it until a
        cache that grows has moved. Tokens decoded past the end are dropped, and with them their draws of the random
        generator.
        """
        cache, (B, N) = model_kwargs["past_key_values"], input_ids.shape
        most = stopping_criteria.max_length
        eos = [x.eos_token_id for x in stopping_criteria if hasattr(x, "eos_token_id")]
        look = STOP_EVERY if eos and not cache.outlives_call else 1  # a cache that is used on must not read on
        ids, step_ids = input_ids.new_empty(B, most), input_ids.new_empty(B, 1)
        ids[:, :N] = input_ids
        unfinished_B = torch.ones(B, dtype=torch.bool, device=ids.device)
        running = torch.ones(most, dtype=torch.bool, device=ids.device)
        draws, graph, layers, places = {}, None, cache.layers, None

        def step():
            options = {"use_cache": True, "logits_to_keep": 1, "return_dict": True}
            return self(input_ids=step_ids, past_key_values=cache, **options).logits

        logits = self._prefill(input_ids, generation_config, model_kwargs).logits
        for n in range(N, most):
            scores = logits_processor(ids[:, :n], logits[:, -1].to(copy=True, dtype=torch.float32))
            if generation_config.do_sample:
                chosen_B = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
                draws[n] = torch.cuda.get_rng_state(ids.device) if eos else None
            else:
                chosen_B = scores.argmax(-1)
            if eos:
                chosen_B = torch.where(unfinished_B, chosen_B, generation_config._pad_token_tensor.to(ids.device))
                unfinished_B = unfinished_B & ~torch.isin(chosen_B, eos[0].to(ids.device))
                running[n] = unfinished_B.any()
            ids[:, n] = chosen_B
            if eos and ((n - N + 1) % look == 0 or n == most - 1):
                ended = (~running[max(N, n - look + 1) : n + 1]).nonzero().flatten().tolist()
                if ended:
                    n = max(N, n - look + 1) + ended[0]
                    if draws:
                        torch.cuda.set_rng_state(draws[n], ids.device)
                    return ids[:, : n + 1]
            if n < most - 1:
                step_ids.copy_(chosen_B[:, None])
                cache.reserve(1, for_next_call=True)
                if n > N and places != (places := [layer.keys.data_ptr() for layer in layers]):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        logits = step()
                    graph.replay()
                elif graph is None:
                    logits = step()
                else:
                    graph.replay()
                    cache.replayed()
        return ids

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, *, inputs_embeds=None, **kwargs):
        """As in `GenerationMixin`; what a compiled decoding step cannot check is checked here."""
        cache = kwargs.get("past_key_values")
        if next_sequence_length is None and getattr(cache, "record_past", False) and inputs_embeds is None:
            # the first draft of assisted decoding stands behind the whole prompt
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        if hasattr(cache, "reserve") and ids is not None and ids.shape[1] == 1:  # forward names a foreign cache
            cache.reserve(1, for_next_call=True)
        return inputs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """The mask of the present tokens alone, which has the same width in every decoding step."""
        if attention_mask is None:
            return None
        # a copy, because a slice keeps the strides of a mask that grows with every step
        return attention_mask[:, -inputs_embeds.shape[1] :].clone(memory_format=torch.contiguous_format)


class HSPMNClassifier(HSPMNPreTrainedModel):
    """What the classification models share: a linear layer, `score`, on the stack of blocks, per token or per row."""

    per_token = True

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HSPMNModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=self.per_token)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
        output_hidden_states=None, output_attentions=None, num_items_in_batch=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        """Logits and, with labels, the loss, see the class; the other arguments are those of `HSPMNModel.forward`.

        num_items_in_batch: labels of the whole (accumulated, distributed) batch, as Trainer passes it.
        """
        if self.config.problem_type in (None, "single_label_classification") and self.num_labels > 1:
            check_ids("labels", labels, self.num_labels, ignored=IGNORED)
        if not self.per_token and attention_mask is None and input_ids is not None:
            attention_mask = self._text_between_padding(input_ids)
        if labels is not None:
            kwargs["row_weights"] = target_shares(labels, num_items_in_batch)
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, return_dict=True,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
            **{"use_cache": False} | kwargs,
        )  # fmt: skip
        x_BTD, loss = outputs.last_hidden_state, None
        if not self.per_token:
            (B, T), token_T = x_BTD.shape[:2], torch.arange(x_BTD.shape[1], device=x_BTD.device)
            last_B = token_T[-1].expand(B) if attention_mask is None else (token_T * attention_mask[:, -T:]).argmax(1)
            x_BTD = x_BTD[torch.arange(B, device=last_B.device), last_B]
        logits = self.score(x_BTD)
        if labels is not None and self.per_token:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        elif labels is not None:
            options = {"pooled_logits": logits, "config": self.config, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(labels=labels, **options)
            if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
                loss = loss * (labels.numel() / num_items_in_batch)  # transformers leaves a mean over this call
        return with_head(outputs, logits, loss, self.training, self._asked("return_dict", return_dict))

    def _text_between_padding(self, input_ids):
        """Mask of the ids between a row's leading and trailing padding, whose id may also stand within the text."""
        if (pad := self.config.pad_token_id) is not None:
            seen_BT = (input_ids != pad).long().cumsum(1)
            return ((seen_BT > 0) & ((seen_BT < seen_BT[:, -1:]) | (input_ids != pad))).long()
        if input_ids.shape[0] > 1:
            raise ValueError("batches need an attention_mask or config.pad_token_id to find each row's last token")


class HSPMNForSequenceClassification(HSPMNClassifier):
    """HSPMN with a label per sequence, read from the last real token: logits [B, num_labels]; labels int64 [B], or
    float for regression and multi-label problems. Raises ValueError for a batch whose last tokens cannot be told from
    padding.
    """

    per_token = False


class HSPMNForTokenClassification(HSPMNClassifier):
    """HSPMN with a label per token: logits [B, T, num_labels]; labels int64 [B, T], -100 is ignored."""


def refuse_unknown(kwargs):
    """TypeError for a keyword argument that no decoder is given, with the name that was probably meant."""
    for name in kwargs:
        if name not in COMMON_ARGUMENTS:
            named = inspect.signature(HSPMNForCausalLM.forward).parameters.keys() | COMMON_ARGUMENTS
            near = get_close_matches(name, sorted(named - {name, "self", "kwargs"}), 1, 0.0)[0]
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}; did you mean {near!r}?")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal=False is not supported: every stream is causal; leave it out")


def document_numbers(shape, seq_idx, cu_seq_lens_q):
    """By the name of the argument, the number of the document of each token, [B, T], as each argument says it."""
    (B, T), numbers = shape, {}
    if seq_idx is not None:
        if tuple(seq_idx.shape) not in ((1, T), (B, T)):
            raise ValueError(f"seq_idx must have shape [{B}, {T}], got {tuple(seq_idx.shape)}")
        numbers["seq_idx"] = seq_idx.expand(B, T)
    if cu_seq_lens_q is not None:
        ends, shape = cu_seq_lens_q, tuple(cu_seq_lens_q.shape)
        if ends.dim() != 1 or not len(ends):
            raise ValueError(f"cu_seq_lens_q must have shape [documents + 1], got {shape}")
        token = torch.arange(B * T, device=ends.device, dtype=ends.dtype)
        numbers["cu_seq_lens_q"] = torch.searchsorted(ends, token, right=True).view(B, T)
        holds = (ends[0] == 0) & (ends[-1] == B * T)
        demand(holds, f"cu_seq_lens_q must begin with 0 and end with the {B * T} tokens of this call")
    return numbers


def document_positions(name, number_BT, position_BT, length_B, column_BT, other):
    """Position ids of tokens whose documents the argument `name` numbers; real tokens come first in each row.

    position_BT: those that `other` gives, which must agree, or None. column_BT: the column of each token, None for its
    place in the row. Raises ValueError where the two contradict each other.
    """
    token_T = torch.arange(number_BT.shape[1], device=number_BT.device)
    begins_BT = F.pad(number_BT[:, 1:] != number_BT[:, :-1], (1, 0), value=True)
    if position_BT is None:
        return token_T - torch.where(begins_BT, token_T, 0).cummax(1).values
    offset_BT = position_BT - (token_T if column_BT is None else column_BT)
    jumps_BT = (position_BT.diff() != 1) & (offset_BT.diff() != 0)
    agrees_BT = begins_BT[:, 1:] == jumps_BT
    if length_B is not None:
        agrees_BT = agrees_BT | (token_T[1:] >= length_B[:, None])
    demand(agrees_BT.all(), f"{name} and {other} contradict each other about where documents begin; pass one of them")
    return position_BT


def demand(holds, message):
    """ValueError with `message` unless the scalar tensor `holds`; on CUDA, and compiled, an assertion of the device
    instead, which nobody waits for."""
    if holds.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def target_shares(targets, items):
    """Share of each row in the targets of a step, float32 [B], -100 being none; items: their number, None for all."""
    targets_B = (targets != IGNORED).flatten(1).sum(1) if targets.dim() > 1 else (targets != IGNORED)
    items = targets_B.sum().clamp(min=1) if items is None else items
    return targets_B / (items.to(targets.device) if isinstance(items, torch.Tensor) else items)


def check_ids(name, ids, size, ignored=None):
    """ValueError unless whole numbers `ids` lie in [0, size) or are `ignored`; on a CPU, where looking is free."""
    plain = type(ids) is torch.Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if not plain or ids.is_floating_point():
        return
    wrong = (ids < 0) | (ids >= size)
    if ignored is not None:
        wrong = wrong & (ids != ignored)
    if wrong.any():
        other = "" if ignored is None else f" or be {ignored}"
        raise ValueError(f"{name} must lie in [0, {size}){other}, got {ids[wrong][0]}")


def with_head(outputs, logits, loss, training, return_dict):
    """`outputs` with logits and loss as an object or, for `return_dict=False`, as a tuple.

    In training the loss holds the auxiliary losses too; in evaluation it does not, so that perplexity can be read off.
    """
    if loss is not None and training:
        loss = loss + outputs.aux_loss.to(loss.device, loss.dtype)
    # built anew, because a field set later would come last in the tuple
    outputs = HSPMNOutput(**dict(outputs) | {"loss": loss, "logits": logits})
    return outputs if return_dict else outputs.to_tuple()


HSPMNModel.register_for_auto_class("AutoModel")
HSPMNForCausalLM.register_for_auto_class("AutoModelForCausalLM")
HSPMNForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
HSPMNForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "ContextualStream", "HSPMNBlock", "HSPMNCache", "HSPMNForCausalLM", "HSPMNForSequenceClassification",
    "HSPMNForTokenClassification", "HSPMNModel", "HSPMNOutput", "HSPMNPreTrainedModel", "HSPMNRouter",
    "HSPMNStaticCache", "ReflexiveStream",
]  # fmt: skip
