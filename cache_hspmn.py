"""What an HSPMN model remembers between calls: O(1) states of the reflexive stream, sparse keys of the contextual one.

`HSPMNCache` grows as routed tokens come; `HSPMNStaticCache` holds every tensor at a fixed address from the start, for
`torch.compile` and CUDA graphs. Shape suffixes as in `operations_hspmn`; P sparse slots held. Rows advance by their
own number of real tokens, so every count is a tensor per row.
"""

import math

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .operations_hspmn import read_slots

SLOT_BLOCK = 256  # sparse slots are allocated in multiples of this
ALIGNMENT = 256  # bytes from which every tensor of an allocation begins
GROWTH = 1.25  # and at least by this factor, so that appending costs O(1) copies per token


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

    def reorder_cache(self, beam_idx):
        """Row i becomes old row beam_idx[i], as beam search needs."""
        self.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        """Each row becomes `repeats` equal rows."""
        self.map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        """Keep the rows named by `indices`."""
        self.map_rows(lambda x: x[indices.to(x.device)] if isinstance(indices, torch.Tensor) else x[indices])


def mark_static(tensor):
    """`tensor`, marked as one whose address stays: CUDA graphs then read and write it without a copy."""
    # unguarded: another cache of the same shapes re-records the CUDA graph and does not recompile
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


class HSPMNCacheLayer(Rows, CacheLayerMixin):
    """State of one block: linear state, convolution history, window ring and the sparse keys and values.

    static: allocated once and updated in place. Attributes (None until the first call; F is E, or E + 1 with the
    normaliser of linear_attention="elu"):
        linear_state: [B, H, E, F] float32.
        conv_state: [B, conv_kernel_size - 1, C], the last real tokens, latest last.
        window_keys, window_values: [B, W, G, E], a ring; real token i lies at i mod W.
        keys, values: [B, P + 1, G, E], routed tokens alone, in order; the last slot takes discarded writes.
        key_scales, value_scales: [B, P + 1, G] float32, those of keys and values if these are int8
            (`kv_cache_dtype`), see `quantize`; [B, 1, G], not used, if not.
        positions: [B, P + 1] int32, the position id of each routed token.
        count: [B] int32, routed tokens so far. document_slot: [B] int32, first slot of the row's current document.
    """

    is_sliding, max_length = False, -1  # -1: grows without bound
    _batched = (
        *("linear_state", "conv_state", "window_keys", "window_values"),
        *("keys", "values", "key_scales", "value_scales", "positions", "count", "document_slot"),
    )

    def __init__(self, config, layer_idx=0, static=False):
        super().__init__()
        self.static = self.is_compileable = static
        self.window, self.routes = config.sliding_window, config.layer_sparsity[layer_idx] > 0
        H, G, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._state_shape = (H, E, E + (config.linear_attention == "elu"))
        self._conv_shape = (config.conv_kernel_size - 1, (H + 2 * G) * E)
        self._head_shape, self.quantized = (G, E), config.kv_cache_dtype == "int8"
        self.slot_tensors = ("keys", "values", "positions") + self.quantized * ("key_scales", "value_scales")
        self.columns = self.most_used = 0
        for name in self._batched:
            setattr(self, name, None)

    def lazy_initialization(self, key_states, value_states=None):
        """Allocate for the rows, dtype and device of `key_states` [B, T, ...], with slots for all of its tokens."""
        tokens = key_states.shape[1] if self.routes else 0
        self.allocate(key_states.shape[0], -(-tokens // SLOT_BLOCK) * SLOT_BLOCK, key_states.dtype, key_states.device)
        self.most_used = tokens

    def allocate(self, batch_size, slots, dtype, device):
        """Begin anew with `slots` empty sparse slots per row; keys, values and convolution inputs in `dtype`."""
        self.dtype, self.device = dtype, torch.device(device)
        wide, kept = torch.promote_types(dtype, torch.float32), torch.int8 if self.quantized else dtype
        scales = (wide, slots + 1 if self.quantized else 1, self._head_shape[0])
        window, store = (dtype, self.window, *self._head_shape), (kept, slots + 1, *self._head_shape)
        shapes = {
            "linear_state": (wide, *self._state_shape), "conv_state": (dtype, *self._conv_shape),
            "window_keys": window, "window_values": window, "keys": store, "values": store, "key_scales": scales,
            "value_scales": scales, "positions": (torch.int32, slots + 1), "count": (torch.int32,),
            "document_slot": (torch.int32,),
        }  # fmt: skip
        # What stays in one launch, and in another what is replaced as the store grows
        replaced = self.slot_tensors if self.routes else ()
        for group in ([name for name in shapes if name not in replaced], replaced):
            begin, places = 0, {}
            for name in group:
                kind, *shape = shapes[name]
                places[name] = begin, math.prod((batch_size, *shape)) * kind.itemsize
                begin += -(-places[name][1] // ALIGNMENT) * ALIGNMENT
            whole = torch.zeros(begin, dtype=torch.uint8, device=device) if group else None
            for name, (place, size) in places.items():
                kind, *shape = shapes[name]
                tensor = whole[place : place + size].view(kind).view(batch_size, *shape)
                setattr(self, name, mark_static(tensor) if self.static else tensor)
        self.most_used = 0  # upper bound of `count` over the rows, known without reading the device
        self.is_initialized = True

    @property
    def slots(self):
        """Sparse slots P held per row."""
        return self.keys.shape[1] - 1

    def grow(self):
        """Hold at least `most_used` slots, which are more than now."""
        extra = -(-max(self.most_used, int(self.slots * GROWTH)) // SLOT_BLOCK) * SLOT_BLOCK - self.slots
        for name in self.slot_tensors:
            held = getattr(self, name)
            setattr(self, name, torch.cat([held, held.new_zeros(held.shape[0], extra, *held.shape[2:])], 1))

    def update(self, key_states, value_states, stream, route, operations):
        """Take in this call's keys and values [B, T, G, E]: the last of them in the window, routed ones in the store.

        stream: the call's `Stream`. route: the layer's `Route` or None. operations: the forms that run. Returns what
        `sqsk_attention` needs beside the queries, None without a route: all keys and values [B, P, G, E] (those of
        int8 in the dtype of the new ones), where slots past a row's count hold nothing meaningful; the first visible
        slot of each routed token; the slots used before, and how many of this call's tokens have one (all of them,
        unless a static store is full: the latest are left out).
        """
        chosen = (None, None, None) if route is None else (route.index_BK, route.slot_BT, route.count_B)
        first_BK, numbers_4B = operations.extend(
            key_states, value_states, stream.position_BT, stream.start_BT, stream.length_B, stream.seen_B, *chosen,
            self.window_keys, self.window_values, self.keys, self.values, self.positions, self.count,
            self.document_slot, self.key_scales, self.value_scales,
        )  # fmt: skip
        if route is None:
            return None
        before_B, kept_B, count_B, document_slot_B = numbers_4B.unbind()
        self.keep("count", count_B)
        self.keep("document_slot", document_slot_B)
        keys, values = self.keys[:, :-1], self.values[:, :-1]
        if self.quantized:
            keys = read_slots(self.keys, self.key_scales, key_states.dtype)
            values = read_slots(self.values, self.value_scales, key_states.dtype)
        return keys, values, first_BK, before_B, kept_B

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
            self.columns, self.is_initialized = 0, False
        for name in self._batched:
            if self.static:
                getattr(self, name).zero_()
            else:
                setattr(self, name, None)


class HSPMNCache(Rows, Cache):
    """The cache of an HSPMN model, created by `forward(use_cache=True)` and by `generate()`.

    Attributes: `layers`, one `HSPMNCacheLayer` per block; `seen`, real tokens seen per row [B]; `document_seen`,
    those of the row's current document [B]; `last_position`, the position id of the last real token per row, and what
    it were in the row's last column, which padding may fill [B, 2].
    """

    outlives_call = True  # the call of `generate` that decodes with it
    _batched = ("seen", "document_seen", "last_position")

    def __init__(self, config):
        super().__init__(layers=[HSPMNCacheLayer(config, i, self.static) for i in range(config.num_hidden_layers)])
        self.columns = self.reserved = 0  # reserved: tokens for which there is room already, for the next call
        self.seen = self.document_seen = self.last_position = None

    def reserve(self, tokens, for_next_call=False):
        """Make room, before a call, for `tokens` more per row, whatever is routed of them. A static cache has it or
        raises ValueError and stays as it was; it can be used on, with fewer tokens, or be reset.

        for_next_call: they are those of the model's next call, which, if it is eager, does not reserve them again.
        The host keeps an upper bound of the used slots, and waits for the device only where it no longer suffices.
        """
        layers = [layer for layer in self.layers if layer.routes and layer.is_initialized]
        if any(layer.most_used + tokens > layer.slots for layer in layers):
            used = torch.stack([layer.count.max().to(self.seen.device) for layer in layers]) if self.batch_size else []
            for layer, most in zip(layers, used.tolist() if len(used) else [0] * len(layers), strict=True):
                layer.most_used = most
            full = [layer for layer in layers if layer.most_used + tokens > layer.slots]
            if full and self.static:
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

    def start_call(self, batch_size, tokens, device):
        """Before a call of `tokens` columns changes anything: begin the rows, make room, or refuse the call with a
        ValueError, if the batch size changed or a static cache is too small."""
        if self.seen is None:
            self._start_rows(batch_size, device)
        elif self.seen.shape[0] != batch_size:
            raise ValueError(
                f"past_key_values holds {self.seen.shape[0]} rows but the input has batch size {batch_size}; "
                "use batch_repeat_interleave or batch_select_indices, or a fresh cache"
            )
        if tokens != self.reserved:
            self.reserve(tokens)
        self.reserved = 0

    def _start_rows(self, batch_size, device):
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.keep("seen", zeros)
        self.keep("document_seen", zeros.clone())
        self.keep("last_position", zeros[:, None].repeat(1, 2) - 1)

    def advance(self, tokens, stream):
        """Account for one call of `tokens` columns, where `stream` says, after all layers have run."""
        start_BT, position_BT, length_B = stream.start_BT, stream.position_BT, stream.length_B
        self._count_columns(tokens)
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

    def replayed(self):
        """Account on the host for one token that a captured step has read; a static cache counts on the device."""
        if not self.static:
            self._count_columns(1)

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

    def crop(self, *args, **kwargs):
        """Refused: a linear state cannot be rewound."""
        raise ValueError(
            f"an {type(self).__name__} cannot be cropped: the linear state cannot be rewound; "
            "copy the cache (copy.deepcopy) before the tokens you may want to take back"
        )

    def reset(self):
        """Forget everything; the next call may have any batch size, on a static cache the same."""
        super().reset()
        self.reserved = 0
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


class HSPMNStaticCache(HSPMNCache):
    """An `HSPMNCache` of fixed size: every tensor is allocated here, stays at its address and is updated in place.

    So a decoding step compiles once (`torch.compile(fullgraph=True)`) and can be captured in a CUDA graph. It records
    no gradients.

    batch_size, max_length: rows, and tokens per row that are sure to fit, at least 1 each. capacity: sparse slots per
    row of every layer that routes, or a list with one number per layer. None holds `max_length`, so that nothing can
    overflow; a long context needs about `sparsity_k * max_length`, and room for one whole call more, because how many
    of its tokens are routed is known only layer by layer. device, dtype: of all tensors; of keys, values (unless
    `kv_cache_dtype` makes those of the store int8) and convolution inputs, which is that of the model's projections.
    None for torch's defaults.

    A call of T tokens is refused before it changes anything unless T slots are free in every layer, see `reserve`.
    Compiled and captured code has no host to refuse: call `reserve` before each step of it, as `generate()` does.
    Without that, tokens past the capacity get no slot (zero contextual stream), nothing else is touched, a layer's
    `count` exceeds its `slots`, and `reserve` raises once it looks. A batch of another size
    (`batch_repeat_interleave`, `batch_select_indices`) takes new tensors.
    """

    static = True

    def __init__(self, config, batch_size, max_length, capacity=None, device=None, dtype=None):
        super().__init__(config)
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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

    def start_call(self, batch_size, tokens, device):
        """As in `HSPMNCache`, and ValueError where gradients are recorded."""
        if torch.is_grad_enabled():
            raise ValueError(
                "an HSPMNStaticCache is updated in place and records no gradients; call the model under "
                "torch.no_grad(), or use an HSPMNCache"
            )
        # In this order: asking a stream breaks the graph of code that is being compiled
        if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.reserved = tokens  # reading what it was would compile that code anew for each value
        super().start_call(batch_size, tokens, device)
