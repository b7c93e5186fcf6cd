"""What an HSPMN model remembers between calls: O(1) states of the reflexive stream, sparse keys of the contextual one.

`HSPMNCache` grows as routed tokens come; `HSPMNStaticCache` holds every tensor at a fixed address from the start, for
`torch.compile` and CUDA graphs. Shape suffixes as in `operations_hspmn`; P sparse slots held. Rows advance by their
own number of real tokens, so every count is a tensor per row.
"""

import copy
import weakref
from operator import attrgetter
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .operations_hspmn import STORES, compact, read_slots

SLOT_BLOCK = 256  # sparse slots are allocated in multiples of this
GROWTH = 1.25  # and at least by this factor, so that appending costs O(1) copies per token
EVICTED = 8  # one part in so many of a full bounded store leaves at once, so that a decoded token seldom waits for it
# What the shapes of a cache follow from
FIELDS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
    *("conv_kernel_size", "linear_attention", "kv_cache_dtype", "sparsity_k", "contextual_readers"),
)


class Rows:
    """Holder of tensors whose first dimension is the batch, named by `_batched`; None before the first call.

    static: they stay where they are, and what is kept is copied into them.
    """

    _batched, static = (), False

    def keep(self, name, value):
        """Replace the tensor `name` by `value` or, if static and of as many rows, overwrite it."""
        held = getattr(self, name) if self.static else None
        if held is None or held.shape != value.shape:
            setattr(self, name, mark_static(value) if self.static else value)
        elif held is not value:  # it was not advanced in place
            held.copy_(value)

    def map_rows(self, function):
        """Apply `function` to every tensor that has a batch dimension."""
        for name in self._batched:
            if getattr(self, name) is not None:
                self.keep(name, function(getattr(self, name)))

    def thaw(self):
        """Take tensors made in inference mode for normal ones of the same memory, which other modes may write."""
        for name in self._batched:
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, mark_static(normal(held)) if self.static else normal(held))

    def __getstate__(self):
        return vars(self)

    def __deepcopy__(self, memo):
        """A copy that shares no memory, and no graph if this one was filled while gradients were recorded."""
        memo[id(self)] = twin = self.__class__.__new__(self.__class__)
        for name, value in self.__getstate__().items():
            value = value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    def reorder_cache(self, beam_idx):
        """Row i becomes old row beam_idx[i], as beam search needs."""
        self.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        """Each row becomes `repeats` equal rows."""
        self.map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        """Keep the rows named by `indices`."""
        self.map_rows(lambda x: x[indices.to(x.device)] if isinstance(indices, torch.Tensor) else x[indices])


def normal(tensor):
    """A normal tensor of the memory of `tensor`, which may have been made in inference mode."""
    place = tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)


def mark_static(tensor):
    """`tensor`, marked as one whose address stays: CUDA graphs then read and write it without a copy."""
    # unguarded: another cache of the same shapes re-records the CUDA graph and does not recompile
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


class Piece(NamedTuple):
    """Inputs of a call: embeddings [B, T, D], mask (bool) and position ids [B, T] or None."""

    x_BTD: torch.Tensor
    real_BT: torch.Tensor | None
    position_BT: torch.Tensor | None

    def map(self, function):
        """`function` of every tensor."""
        return Piece(*[None if x is None else function(x) for x in self])

    @staticmethod
    def join(pieces):
        """One piece of several, of which all have position ids or none has."""
        like, padded = pieces[-1].x_BTD, any(each.real_BT is not None for each in pieces)
        xs, reals, positions = [], [], []
        for x_BTD, real_BT, position_BT in pieces:
            xs.append(x_BTD.to(like))
            reals.append(torch.ones_like(x_BTD[..., 0], dtype=torch.bool) if real_BT is None else real_BT)
            positions.append(position_BT)
        placed = positions[0] is not None
        real_BT, position_BT = torch.cat(reals, 1) if padded else None, torch.cat(positions, 1) if placed else None
        return Piece(torch.cat(xs, 1), real_BT, position_BT)


class Checkpoint(NamedTuple):
    """What a cache held after so many columns, but for the sparse store, of which the counts say enough."""

    columns: int
    used: list  # upper bounds of the slots in use, one per layer
    tensors: list | None  # see `HSPMNCache._states`; None: nothing was held


class HSPMNCacheLayer(Rows, CacheLayerMixin):
    """State of one block: linear state, convolution history, window ring and the sparse keys and values.

    static: allocated once and updated in place. Attributes (None until the first call; F is E, or E + 1 with the
    normaliser of linear_attention="elu"):
        linear_state: [B, H, E, F] float32.
        conv_state: [B, conv_kernel_size - 1, C], the last real tokens, latest last.
        window_keys, window_values: [B, W, G, E], a ring; real token i lies at i mod W.
        keys, values: [B, P + 1, G, E], routed tokens alone, in order; the last slot takes discarded writes. As
            `kv_cache_dtype` says, these may be whole numbers: int8, or eight in each of E / 8 int32.
        key_scales, value_scales: [B, P + 1, G] bfloat16, those of whole numbers, see `quantize`; else [B, 1, G], not
            used.
        positions: [B, P + 1] int32, the position id of each routed token.
        log_gates: [B, P + 1] float32, the logarithm of its gate, if every token reads or `max_slots` bounds P;
            [B, 1], not used, if neither.
        count: [B] int32, routed tokens so far. document_slot: [B] int32, first slot of the row's current document.
    """

    is_sliding, max_length = False, -1  # -1: grows without bound
    states = ("linear_state", "conv_state", "window_keys", "window_values", "count", "document_slot")
    _batched = (
        *("linear_state", "conv_state", "window_keys", "window_values"),
        *("keys", "values", "key_scales", "value_scales", "positions", "log_gates", "count", "document_slot"),
    )

    def __init__(self, config, layer_idx=0, static=False, max_slots=None):
        super().__init__()
        self.static = self.is_compileable = static
        self.window, self.routes = config.sliding_window, config.layer_sparsity[layer_idx] > 0
        H, G, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._state_shape = (H, E, E + (config.linear_attention == "elu"))
        self._conv_shape = (config.conv_kernel_size - 1, (H + 2 * G) * E)
        self._head_shape, self.quantized = (G, E), STORES.get(config.kv_cache_dtype)  # to this dtype, or None
        self.every, self.max_slots = config.contextual_readers == "all", max_slots  # every: each token reads
        self.scored = self.every or max_slots is not None
        self.slot_tensors = ("keys", "values", "positions") + self.scored * ("log_gates",)
        self.slot_tensors += ("key_scales", "value_scales") if self.quantized else ()
        self.columns, self.most_used, self.dtype = 0, 0, None
        for name in self._batched:
            setattr(self, name, None)

    def lazy_initialization(self, key_states, value_states=None):
        """Allocate for the rows, dtype and device of `key_states` [B, T, ...], with slots for all of its tokens, or
        take on both: the dtype of a call is what all of it is read in, and a cache may see autocast come and go."""
        if self.is_initialized:
            return self._move(key_states.dtype, key_states.device)
        tokens = key_states.shape[1] * self.routes
        self.allocate(key_states.shape[0], self.blocks(tokens), key_states.dtype, key_states.device)
        self.most_used = tokens

    def _move(self, dtype, device):
        if torch.compiler.is_compiling():
            raise ValueError(
                f"past_key_values holds {self.dtype} but the call computes in {dtype}; compiled code cannot convert "
                "it: make the cache with that dtype, or make one eager call first"
            )
        wide, self.dtype, self.device = torch.promote_types(dtype, torch.float32), dtype, device
        kinds = {"linear_state": wide, "log_gates": wide, "key_scales": torch.bfloat16, "value_scales": torch.bfloat16}
        for name in self._batched:
            held = getattr(self, name)
            kind = kinds.get(name, dtype) if held.is_floating_point() else held.dtype
            held = held.to(device, kind)
            setattr(self, name, mark_static(held) if self.static else held)

    def allocate(self, batch_size, slots, dtype, device, fill=torch.zeros):
        """Begin anew with `slots` empty sparse slots per row; keys, values and convolution inputs in `dtype`.

        Every tensor has memory of its own: torch 2.11 compiles writes to a part of a larger one wrongly. fill: what
        makes a tensor; a caller that gives `torch.empty` fills them with zeros.
        """
        wide, kept, (G, E) = torch.promote_types(dtype, torch.float32), self.quantized or dtype, self._head_shape
        scales = (torch.bfloat16, slots + 1 if self.quantized else 1, G)
        window, store = (dtype, self.window, G, E), (kept, slots + 1, G, E // 8 if kept == torch.int32 else E)
        scored = slots + 1 if self.scored else 1
        shapes = {
            "linear_state": (wide, *self._state_shape), "conv_state": (dtype, *self._conv_shape),
            "window_keys": window, "window_values": window, "keys": store, "values": store, "key_scales": scales,
            "value_scales": scales, "positions": (torch.int32, slots + 1), "log_gates": (wide, scored),
            "count": (torch.int32,), "document_slot": (torch.int32,),
        }  # fmt: skip
        for name, (kind, *shape) in shapes.items():
            tensor = fill(batch_size, *shape, dtype=kind, device=device)
            setattr(self, name, mark_static(tensor) if self.static else tensor)
        self.dtype, self.device = dtype, tensor.device
        self.most_used = 0  # upper bound of `count` over the rows, known without reading the device
        self.is_initialized = True

    @property
    def slots(self):
        """Sparse slots P held per row."""
        return self.keys.shape[1] - 1

    def blocks(self, slots):
        """Slots to allocate where `slots` are needed: whole blocks, but no more than `max_slots`."""
        whole = -(-slots // SLOT_BLOCK) * SLOT_BLOCK
        return whole if self.max_slots is None else min(whole, self.max_slots)

    def grow(self):
        """Hold at least `most_used` slots, which are more than now."""
        extra = self.blocks(max(self.most_used, int(self.slots * GROWTH))) - self.slots
        for name in self.slot_tensors:
            held = getattr(self, name)
            setattr(self, name, torch.cat([held, held.new_zeros(held.shape[0], extra, *held.shape[2:])], 1))

    @torch.no_grad()
    def evict(self, tokens, others=()):
        """Make room for `tokens` in every row with fewer free slots: of `max_slots` slots one part in `EVICTED`, or
        `tokens` if these are more, are free then. The others keep the tokens of the highest scores and, of equal
        ones, the latest, in order, at the same addresses. others: more numbers of slots [B], which follow as `count`
        does, IN PLACE.
        """
        slot_P, room = torch.arange(self.slots, device=self.device), max(tokens, -(-self.max_slots // EVICTED))
        used_BP = slot_P < self.count[:, None]
        gate_BP = torch.where(used_BP, self.log_gates[:, :-1], float("-inf")).flip(1)  # a stable sort keeps the latest
        order_BP = self.slots - 1 - gate_BP.argsort(dim=1, descending=True, stable=True)
        kept_BP = torch.zeros_like(used_BP).scatter(1, order_BP[:, : self.max_slots - room], True)
        kept_BP = torch.where((self.count + tokens > self.max_slots)[:, None], kept_BP, used_BP)
        index_BP, _, count_B = compact(kept_BP, self.slots)
        at = torch.arange(len(index_BP), device=self.device)[:, None], index_BP.clamp(min=0)
        for name in self.slot_tensors:
            held = getattr(self, name)
            held[:, :-1] = held[at]
        for number_B in (self.document_slot, *others):
            number_B.copy_((kept_BP & (slot_P < number_B[:, None])).sum(1))
        self.count.copy_(count_B)

    def update(self, key_states, value_states, stream, route, operations):
        """Take in this call's keys and values [B, T, G, E]: the last of them in the window, routed ones in the store.

        stream: the call's `Stream`. route: the layer's `Route` or None. operations: the forms that run. Returns what
        `sqsk_attention` needs beside the queries, None without a route: all keys and values [B, P, G, E] (stored whole
        numbers in the dtype of the new ones) and, if every token reads, log gates [B, P], else None, where slots past
        a row's count hold nothing meaningful; the first visible slot of each token that reads; the slots used before,
        and how many of this call's tokens have one (all of them, unless a static store is full: the latest are left
        out).
        """
        chosen = (None,) * 4
        if route is not None:
            chosen = (route.score_BT, route.index_BK, route.slot_BT, route.count_B)
        first_BN, numbers_2B, count_B, document_slot_B = operations.extend(
            key_states, value_states, stream.position_BT, stream.start_BT, stream.length_B, stream.seen_B, *chosen,
            self.every, self.window_keys, self.window_values, self.keys, self.values, self.positions, self.count,
            self.document_slot, self.key_scales, self.value_scales, self.log_gates,
        )  # fmt: skip
        if route is None:
            return None
        self.keep("count", count_B)
        self.keep("document_slot", document_slot_B)
        keys, values = self.keys[:, :-1], self.values[:, :-1]
        if self.quantized:
            keys = read_slots(self.keys, self.key_scales, key_states.dtype)
            values = read_slots(self.values, self.value_scales, key_states.dtype)
        log_gates = self.log_gates[:, :-1] if self.every else None
        return keys, values, log_gates, first_BN, *numbers_2B.unbind()

    def get_mask_sizes(self, query_length):
        """Key length and offset of a dense mask over all columns, as transformers asks for it."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self):
        """Input columns seen, padding included."""
        return int(self.columns)

    def get_max_length(self):
        """Tokens per row that are sure to fit, -1 if it grows without bound."""
        return self.max_length

    def reset(self):
        """Forget everything, in place if static; else the next call allocates anew."""
        self.most_used = 0
        if not self.static:
            self.columns, self.dtype, self.is_initialized = 0, None, False
        for name in self._batched:
            if self.static:
                getattr(self, name).zero_()
            else:
                setattr(self, name, None)


class HSPMNCache(Rows, Cache):
    """The cache of an HSPMN model, created by `forward(use_cache=True)` and by `generate()`.

    rollback: how many of the last tokens `crop` can take back, at least 0. What they overwrite in the states of
    constant size cannot be computed back, so the cache keeps two or more `Checkpoint`s of these and the inputs read
    since the oldest; `crop` goes to the latest checkpoint before its aim, and the model reads the tokens between
    again, in one pass with those of the next call. That is exact whatever a layer does, changes no kernel, and fits
    drafts of a few tokens (arXiv 2211.17192), of which a GPU reads twice as many in the same time. Such a cache
    records no gradients, and its calls are neither compiled nor captured. What left a bounded store stays away.

    max_slots: slots per row of every layer that routes, at least 1, so that a stream of any length takes constant
    memory; None for no bound. A call of T tokens, at most `max_slots`, first makes room for all of them in each row
    where fewer than T slots are free: `HSPMNCacheLayer.evict`. Until then all is as without a bound, bit for bit where
    the stores have one size, by which sums are cut.

    Attributes: `layers`, one `HSPMNCacheLayer` per block; `seen`, real tokens seen per row [B]; `document_seen`,
    those of the row's current document [B]; `last_position`, the position id of the last real token per row, and what
    it were in the row's last column, which padding may fill [B, 2]: after `crop` and until the next call, as at the
    checkpoint.
    """

    outlives_call = True  # the call of `generate` that decodes with it
    _batched = ("seen", "document_seen", "last_position")

    def __init__(self, config, rollback=0, max_slots=None):
        if rollback < 0:
            raise ValueError(f"rollback must be at least 0 tokens, got {rollback}")
        if max_slots is not None and max_slots < 1:
            raise ValueError(f"max_slots must be at least 1, or None for no bound, got {max_slots}")
        self.fields = attrgetter(*FIELDS)(config)
        # each look at a field of a configuration takes transformers a microsecond
        sizes = SimpleNamespace(layer_sparsity=config.layer_sparsity, **dict(zip(FIELDS, self.fields, strict=True)))
        numbers = range(sizes.num_hidden_layers)
        super().__init__(layers=[HSPMNCacheLayer(sizes, i, self.static, max_slots) for i in numbers])
        self.max_slots = max_slots
        self.columns = self.reserved = 0  # reserved: tokens for which there is room already, for the next call
        self.seen = self.document_seen = self.last_position = None
        self.owner = None  # weak reference to the model that fills it
        self.running = self.recorded = False  # a call began; the last one recorded gradients
        self.rollback, self.record_past = rollback, False  # record_past: go back over the last call, whatever its size
        self.checkpoints, self.pieces = [], []
        self.unread = self.begun = 0  # columns to be read again before the next, and those held before the last call
        self.notes = []  # counts of the last two calls, on their way to the host

    def __getstate__(self):
        return super().__getstate__() | {"owner": None, "notes": []}  # which are of this process

    def reserve(self, tokens, for_next_call=False):
        """Make room, before a call, for `tokens` more per row, whatever is routed of them. A bounded store evicts for
        it. A cache too small for that many, and a static one that is full, raise ValueError and stay as they were;
        they can be used on, with fewer tokens, or be reset.

        for_next_call: they are those of the model's next call, which, if it is eager, does not reserve them again.
        The host keeps an upper bound of the used slots, and looks at the device's counts only where it no longer
        suffices: between the pieces of a long prompt on CUDA at those before the piece that still runs.
        """
        layers = [layer for layer in self.layers if layer.routes and layer.is_initialized]
        tokens += self.unread if for_next_call else 0
        bounded = self.max_slots is not None
        if bounded and tokens > self.max_slots and any(layer.routes for layer in self.layers):
            raise ValueError(
                f"max_slots={self.max_slots} is too small for a call of {tokens} tokens, which may all be routed; "
                "feed fewer at once (chunk_size, prefill_chunk_size), or make the cache with a larger max_slots"
            )
        if any(layer.most_used + tokens > layer.slots for layer in layers):
            for layer, most in zip(layers, self._used(layers), strict=True):
                layer.most_used = most
            full = [layer for layer in layers if layer.most_used + tokens > layer.slots]
            if full and bounded:
                self._evict([layer for layer in full if layer.most_used + tokens > self.max_slots], tokens)
            elif full and self.static:
                raise ValueError(
                    f"capacity ({full[0].slots} sparse slots per row) of layer {self.layers.index(full[0])} is too "
                    f"small: {full[0].most_used} are used and {tokens} tokens may need as many more; feed fewer "
                    "tokens at once (chunk_size, prefill_chunk_size) or begin with a larger capacity or an "
                    "HSPMNCache, which grows"
                )
        for layer in layers:
            layer.most_used += tokens
            if layer.most_used > layer.slots:
                layer.grow()
        self.reserved = tokens if for_next_call else 0

    def _evict(self, layers, tokens):
        """Make room for `tokens` in the bounded stores of `layers`; numbers of slots in checkpoints follow."""
        self._own()
        for layer in layers:
            first = len(self._batched) + self.layers.index(layer) * len(layer.states)
            places = [first + layer.states.index(name) for name in ("count", "document_slot")]
            layer.evict(tokens, [held.tensors[i] for held in self.checkpoints if held.tensors for i in places])
            layer.most_used = self.max_slots - tokens

    def _own(self, records=False):
        """Before something is written: make it that of a mode which may, and no part of a graph that needs it."""
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            self.thaw()
        if records or self.recorded:  # a graph may need what they hold now, and none takes writes to what views share
            self.map_rows(torch.clone)

    def _used(self, layers):
        """Upper bounds of the slots that `layers` use. Waits for the device, but for notes only if it is two calls
        behind, and then one call is left to it; until there are two the bound stands."""
        if not self.notes:
            used = [layer.count.max().to(self.seen.device) for layer in layers] if self.batch_size else []
            return torch.stack(used).tolist() if used else [0] * len(layers)
        done = [note for note in self.notes if note[2].query()]
        if not done and len(self.notes) < 2:
            return [layer.most_used for layer in layers]
        columns, used, event = done[-1] if done else self.notes[0]
        event.synchronize()
        return [most + self.columns - columns for most in used.amax(1).tolist()]

    def _note(self, tokens):
        """Begin to copy the counts after a piece of a prompt to the host."""
        layers = [layer for layer in self.layers if layer.routes]
        if tokens == 1 or self.static or not (layers and self.batch_size) or torch.cuda.is_current_stream_capturing():
            self.notes = []
            return
        count_LB = torch.stack([layer.count.to(self.seen.device, non_blocking=True) for layer in layers])
        used, event = torch.empty(count_LB.shape, dtype=count_LB.dtype, pin_memory=True), torch.cuda.Event()
        used.copy_(count_LB, non_blocking=True)
        event.record(torch.cuda.current_stream(self.seen.device))
        self.notes = [*self.notes[-1:], (self.columns, used, event)]

    def check_model(self, model):
        """Raise ValueError for a cache that another model has filled, or whose shapes are not those of `model`."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.owner is not None and self.owner() is model:
            return
        for field, has, wants in zip(FIELDS, self.fields, attrgetter(*FIELDS)(model.config), strict=True):
            if has != wants:
                raise ValueError(
                    f"past_key_values was made for {field}={has!r} but this model has {wants!r}; pass a cache made "
                    "with this model's config, or None"
                )
        if compiling:
            return
        if self.owner is not None and self.owner() is not None and self.get_seq_length():
            raise ValueError(
                "past_key_values holds the states of another model of the same shapes; pass the cache that this "
                "model returned, or None"
            )
        self.owner = weakref.ref(model)

    def check_rows(self, batch_size):
        """Raise ValueError for a call of another number of rows."""
        if self.seen is not None and self.seen.shape[0] != batch_size:
            raise ValueError(
                f"past_key_values holds {self.seen.shape[0]} rows but the input has batch size {batch_size}; "
                "use batch_repeat_interleave or batch_select_indices, or a fresh cache"
            )

    def start_call(self, batch_size, tokens, device, dtype=None):
        """Before a call of `tokens` columns in `dtype` (None: not known yet) changes anything: begin the rows, make
        room, or refuse the call with a ValueError: if the batch size changed, a static cache is too small, the call
        before was interrupted, or gradients are recorded where they cannot be right."""
        if self.running:
            raise ValueError(
                "a call on past_key_values was interrupted, so some layers hold its tokens and others do not; "
                "pass None or a fresh cache, reset() this one"
                + (", or crop(0) it, which takes that call back" if self.rewinds else "")
            )
        self.check_rows(batch_size)
        records = torch.is_grad_enabled()
        if records and self.rewinds:
            raise ValueError(
                f"an {type(self).__name__} with a rollback length records no gradients; call the model under "
                "torch.no_grad(), or use one without"
            )
        if records and self.layers[0].quantized and self.columns:
            raise ValueError(
                f"past_key_values holds kv_cache_dtype={self.fields[FIELDS.index('kv_cache_dtype')]!r}, through which "
                "no gradient passes; call the model under torch.no_grad(), or with all tokens at once"
            )
        if self.seen is None:
            self._start_rows(batch_size, device)
        self._own(records)
        if tokens != self.reserved:
            self.reserve(tokens)
        self.reserved, self.running, self.recorded = 0, True, records
        if dtype is not None and not self.layers[0].is_initialized:
            self._begin_layers(batch_size, tokens, dtype, device)

    def _begin_layers(self, batch_size, tokens, dtype, device):
        """All layers at once, so that a launch fills them all; one of another device or dtype moves on its own."""
        made = {}
        for layer in self.layers:
            if layer.is_initialized:
                continue
            layer.allocate(batch_size, layer.blocks(tokens * layer.routes), dtype, device, torch.empty)
            layer.most_used = tokens * layer.routes
            for name in layer._batched:
                made.setdefault(getattr(layer, name).dtype, []).append(getattr(layer, name))
        for tensors in made.values():
            torch._foreach_zero_(tensors)

    def _start_rows(self, batch_size, device):
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.keep("seen", zeros)
        self.keep("document_seen", zeros.clone())
        self.keep("last_position", zeros.new_full((batch_size, 2), -1))

    def advance(self, tokens, stream):
        """Account for one call of `tokens` columns, where `stream` says, after all layers have run."""
        start_BT, position_BT, length_B = stream.start_BT, stream.position_BT, stream.length_B
        self._count_columns(tokens - self.unread)
        self.unread, self.running = 0, False
        if length_B is None:
            document_seen, position = tokens - start_BT[:, -1], position_BT[:, -1:]
        else:
            last, some = (length_B - 1).clamp(min=0)[:, None], length_B[:, None] > 0
            start, position = (x.expand(len(last), tokens).gather(1, last) for x in (start_BT, position_BT))
            column, held = last if stream.column_BT is None else stream.column_BT.gather(1, last), self.last_position
            document_seen = torch.where(some[:, 0], length_B - start[:, 0], self.document_seen)
            position, held = torch.where(some, position, held[:, :1]), held[:, 1:] - held[:, :1]
            padding = tokens - torch.where(some, column + 1, -held)  # columns after the last real one
            position = torch.cat([position, position + padding], 1)
        self.document_seen.copy_(document_seen)
        self.last_position.copy_(position)
        self.seen.add_(tokens if length_B is None else length_B)
        if self.seen.is_cuda and not torch.compiler.is_compiling():
            self._note(tokens)

    def replayed(self):
        """Account on the host for one token that a captured step has read; a static cache counts on the device."""
        if not self.static:
            self._count_columns(1)
            self.notes = []

    def _count_columns(self, tokens):
        self.columns += tokens  # in place where it is a tensor, which the layers hold as well
        for layer in () if self.static else self.layers:
            layer.columns = self.columns

    def has_previous_state(self, layer_idx=None, state_idx=None):
        """Whether any token has been seen."""
        return self.get_seq_length() > 0

    @property
    def batch_size(self):
        """Rows held, -1 before the first call."""
        return -1 if self.seen is None else self.seen.shape[0]

    @property
    def rewinds(self):
        """Whether tokens can be taken back, or some were and are to be read again."""
        return self.rollback > 0 or self.record_past or self.unread > 0

    @property
    def is_croppable(self):
        """Whether `crop` can take tokens back."""
        return self.rollback > 0

    @property
    def is_compileable(self):
        """Whether a step on it may be compiled."""
        return self.static and not self.rewinds

    def activate_past_recording(self):
        """From now on any number of the last call's tokens can be taken back, as assisted decoding does."""
        self.record_past = True

    def crop(self, tokens_to_remove):
        """Take back the last columns, as if they had never been read: `tokens_to_remove` is minus their number, as in
        transformers. It also takes back a call that was interrupted, which is all that 0 does.

        Raises ValueError, and changes nothing, for more columns than `rollback` or than have been read since the cache
        began to keep what it takes, and for the final length (a positive number), which transformers once took.
        """
        if not self.rewinds:
            raise ValueError(
                f"an {type(self).__name__} cannot be cropped: the linear state cannot be rewound; make it with "
                "rollback=N to take back up to N tokens, or copy the cache (copy.deepcopy) before the tokens you may "
                "want to take back"
            )
        self._forget_others()
        columns, removed = self.begun if self.running else self.get_seq_length(), -int(tokens_to_remove)
        most = min(self.rollback, columns - self.checkpoints[0].columns) if self.checkpoints else 0
        if not 0 <= removed <= most:
            raise ValueError(
                f"crop({tokens_to_remove}) must be minus a number of tokens from 0 to {most}: of the {columns} that "
                f"it holds this cache can take back {most} (rollback={self.rollback}); make it with a larger rollback"
            )
        if removed or (self.running and self.checkpoints):
            self._rewind(columns - removed)

    @torch.no_grad()
    def _rewind(self, target):
        self.thaw()
        while self.checkpoints[-1].columns > target:
            self.checkpoints.pop()
        (begin, used, tensors), live = self.checkpoints[-1], self._states()
        for layer, most in zip(self.layers, used, strict=True):
            layer.most_used = most
        if tensors is None:
            torch._foreach_zero_(live)
            self.last_position.fill_(-1)
        else:
            torch._foreach_copy_(live, tensors)
        pieces, self.pieces, end = self.pieces, [], self.checkpoints[0].columns
        for piece in pieces:
            length = min(piece.x_BTD.shape[1], target - end)
            if length > 0:
                self.pieces.append(piece.map(lambda x, length=length: x[:, :length]))
            end += piece.x_BTD.shape[1]
        self._count_columns(target - self.get_seq_length())
        self.unread, self.running, self.reserved, self.notes = target - begin, False, 0, []

    def _states(self):
        """What a checkpoint holds, in order."""
        holders = [(self, self._batched), *((layer, layer.states) for layer in self.layers if layer.is_initialized)]
        return [getattr(holder, name) for holder, names in holders for name in names]

    def checkpoint(self, every):
        """Before a call: keep the states of constant size, if they are `every` columns or more past the last ones."""
        if self.running or self.unread:
            return
        self._forget_others()
        columns = self.get_seq_length()
        if not self.checkpoints or columns - self.checkpoints[-1].columns >= every:
            tensors = [x.clone() for x in self._states()] if columns else None
            self.checkpoints.append(Checkpoint(columns, [layer.most_used for layer in self.layers], tensors))

    def _forget_others(self):
        """Drop checkpoints from before a call that was not recorded."""
        read = sum(piece.x_BTD.shape[1] for piece in self.pieces)
        if self.checkpoints and self.checkpoints[0].columns + read != self.get_seq_length():
            self.checkpoints, self.pieces = [], []

    def record(self, piece):
        """After a call: keep what it read, and drop what lies further back than `crop` may ask for."""
        self.pieces.append(piece)
        if not (self.rollback or self.record_past):
            self.checkpoints, self.pieces = [], []
        while len(self.checkpoints) > 1 and self.checkpoints[1].columns <= self.get_seq_length() - self.rollback:
            dropped = self.checkpoints[1].columns - self.checkpoints.pop(0).columns
            while dropped:
                dropped -= self.pieces.pop(0).x_BTD.shape[1]

    def unread_pieces(self):
        """What was read since the checkpoint that `crop` went back to."""
        behind, pieces = self.checkpoints[-1].columns - self.checkpoints[0].columns if self.unread else 0, []
        for piece in self.pieces if self.unread else ():
            if behind <= 0:
                pieces.append(piece)
            behind -= piece.x_BTD.shape[1]
        return pieces

    def state_dict(self):
        """What a stream goes on from: tensors by name, those of layer i from "layers.i." on, not copied, and a `dict`
        of numbers and texts, which JSON holds. What `crop` could take back is not kept. Raises ValueError where a call
        was interrupted, or columns wait to be read again."""
        if self.running or self.unread:
            raise ValueError(
                "this cache stands within a call, which was interrupted, or behind a crop; its state is that after "
                "the model's next call, or after reset()"
            )
        tensors = {key: getattr(held, name) for held, name, key in self._named()}
        used = [layer.most_used for layer in self.layers]
        numbers = {"fields": self._identity(), "columns": self.get_seq_length(), "most_used": used}
        return {name: x.detach() for name, x in tensors.items() if x is not None}, numbers

    def _named(self):
        """Every holder of a tensor, the tensor's name there, and that in a state."""
        holders = {"": self} | {f"layers.{i}.": layer for i, layer in enumerate(self.layers)}
        return [(held, name, at + name) for at, held in holders.items() for name in held._batched]

    def _identity(self):
        return dict(zip(FIELDS, self.fields, strict=True)) | {"max_slots": self.max_slots}

    @torch.no_grad()
    def load_state_dict(self, tensors, numbers):
        """Take on what `state_dict` gave, in place of all that is held. The tensors are copied and stay on their
        device, which must be that of the model; a static cache copies them into its own, of the same shapes.

        Raises ValueError, and changes nothing, for the state of a cache with other fields of the configuration or
        another `max_slots`, and for tensors that are missing or do not fit.
        """
        identity, given = self._identity(), numbers.get("fields", {})
        for field, wants in identity.items():
            if field not in given or given[field] != wants:
                raise ValueError(f"the state was made for {field}={given.get(field)!r}, this cache for {wants!r}")
        names = self._named()
        for held, name, key in names if tensors else ():
            has, wants = tensors.get(key), getattr(held, name) if self.static else None
            if has is None or (wants is not None and (has.shape, has.dtype) != (wants.shape, wants.dtype)):
                found = "is missing" if has is None else f"has shape {tuple(has.shape)} in {has.dtype}"
                expected = "" if wants is None else f", this cache holds {tuple(wants.shape)} in {wants.dtype}"
                raise ValueError(f"{key} of the state {found}{expected}; load the state of a cache of this kind")
        if self.seen is not None:
            self._own()
        self.reset()
        if not tensors:
            return
        for held, name, key in names:
            held.keep(name, tensors[key].clone())
        for layer, most in zip(self.layers, numbers["most_used"], strict=True):
            layer.most_used, layer.is_initialized = most, True
            layer.dtype, layer.device = layer.window_keys.dtype, layer.window_keys.device
        self._count_columns(numbers["columns"])

    def reset(self):
        """Forget everything; the next call may have any batch size, on a static cache the same."""
        super().reset()
        self.reserved, self.unread, self.running, self.recorded, self.owner = 0, 0, False, False, None
        self.checkpoints, self.pieces, self.notes = [], [], []
        if self.static:
            self.columns.zero_()
            self._start_rows(self.batch_size, self.seen.device)
        else:
            self.columns = 0
            self.seen = self.document_seen = self.last_position = None

    def map_rows(self, function):
        """Apply `function` to every tensor that has a batch dimension, those of the layers too."""
        super().map_rows(function)
        for layer in self.layers:
            layer.map_rows(function)
        for i, held in enumerate(self.checkpoints):
            self.checkpoints[i] = held._replace(tensors=held.tensors and [function(x) for x in held.tensors])
        self.pieces = [piece.map(function) for piece in self.pieces]

    def thaw(self):
        """Take tensors made in inference mode for normal ones, those of the layers too."""
        frozen = self.seen.is_inference()
        for layer in self.layers:  # by one tensor of each way to make them
            frozen = (
                frozen
                or layer.is_initialized
                and (layer.linear_state.is_inference() or layer.count.is_inference() or layer.keys.is_inference())
            )
        if frozen:
            super().thaw()
            for layer in self.layers:
                layer.thaw()
            if self.static:
                self.columns = mark_static(normal(self.columns))
                for layer in self.layers:
                    layer.columns = self.columns


class HSPMNStaticCache(HSPMNCache):
    """An `HSPMNCache` of fixed size: every tensor is allocated here, stays at its address and is updated in place.

    So a decoding step compiles once (`torch.compile(fullgraph=True)`) and can be captured in a CUDA graph. It records
    no gradients.

    batch_size, max_length: rows, and tokens per row that are sure to fit, at least 1 each. capacity: sparse slots per
    row of every layer that routes, or a list with one number per layer. None holds `max_length`, so that nothing can
    overflow; a long context needs about `sparsity_k * max_length`, and room for one whole call more, because how many
    of its tokens are routed is known only layer by layer. device, dtype: of all tensors; of keys, values (those of
    the store unless `kv_cache_dtype` makes them whole numbers) and convolution inputs, which is that of the model's
    projections. None for torch's defaults. rollback, max_slots: of `HSPMNCache`; max_slots stands for `capacity` and
    for `max_length`, beyond which such a cache goes on.

    A call of T tokens is refused before it changes anything unless T slots are free in every layer, see `reserve`.
    Compiled and captured code has no host to refuse: call `reserve` before each step of it, as `generate()` does.
    Without that, tokens past the capacity get no slot (zero contextual stream), nothing else is touched, a layer's
    `count` exceeds its `slots`, and `reserve` raises once it looks. A batch of another size
    (`batch_repeat_interleave`, `batch_select_indices`) or an eager call in another dtype takes new tensors.
    """

    static = True

    def __init__(
        self, config, batch_size, max_length, capacity=None, device=None, dtype=None, rollback=0, max_slots=None
    ):
        super().__init__(config, rollback, max_slots)
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_slots is not None:
            if capacity is not None:
                raise ValueError(f"capacity={capacity} and max_slots={max_slots} both say how many slots; give one")
            capacity, max_length = max_slots, -1
        device, dtype = torch.device(device or torch.get_default_device()), dtype or torch.get_default_dtype()
        self.max_length = max_length
        # a tensor, because compiled code would be compiled anew for each value of a Python number
        self.columns = mark_static(torch.zeros((), dtype=torch.long, device=device))
        self._start_rows(batch_size, device)
        capacity = max_length if capacity is None else capacity
        capacities = capacity if isinstance(capacity, list) else [capacity] * len(self.layers)
        if len(capacities) != len(self.layers) or min(capacities) < 0:
            raise ValueError(
                f"capacity must be a number of slots, at least 0, or a list of {len(self.layers)}, one per layer; "
                f"got {capacity!r}"
            )
        for layer, slots in zip(self.layers, capacities, strict=True):
            layer.allocate(batch_size, slots if layer.routes else 0, dtype, device)
            layer.columns, layer.max_length = self.columns, max_length

    def start_call(self, batch_size, tokens, device, dtype=None):
        """As in `HSPMNCache`, and ValueError where gradients are recorded."""
        if torch.is_grad_enabled():
            raise ValueError(
                "an HSPMNStaticCache is updated in place and records no gradients; call the model under "
                "torch.no_grad(), or use an HSPMNCache"
            )
        # In this order: asking a stream breaks the graph of code that is being compiled
        if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.reserved = tokens  # reading what it was would compile that code anew for each value
        super().start_call(batch_size, tokens, device, dtype)
