"""What an HSPMN model remembers between calls: O(1) states of the reflexive stream, sparse keys of the contextual one.

Shape suffixes as in `reference_hspmn`; P sparse slots held. Rows advance by their own number of real tokens, so every
count is a tensor per row; only `get_seq_length` (input columns, padding included) is a Python number.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

SLOT_BLOCK = 256  # sparse slots are allocated in multiples of this
GROWTH = 1.25  # and at least by this factor, so that appending costs O(1) copies per token


class HSPMNCacheLayer(CacheLayerMixin):
    """State of one block: linear state, convolution history, window ring and the sparse keys and values.

    Attributes (None until the first call; those a layer has no use for stay None):
        linear_state: [B, H, E, F] float32.
        conv_state: [B, conv_kernel_size - 1, C], the last real tokens, latest last.
        window_keys, window_values: [B, W, G, E], a ring; real token i lies at i mod W.
        keys, values: [B, P + 1, G, E], routed tokens alone, in order; the last slot takes discarded writes.
        positions: [B, P + 1] int32, the position id of each routed token.
        count: [B] int32, used slots. document_slot: [B] int32, first slot of the row's current document.
    """

    is_sliding = False
    _batched = (
        *("linear_state", "conv_state", "window_keys", "window_values"),
        *("keys", "values", "positions", "count", "document_slot"),
    )

    def __init__(self, window):
        super().__init__()
        self.window = window
        self.columns = 0
        for name in self._batched:
            setattr(self, name, None)

    def lazy_initialization(self, key_states, value_states=None):
        """Allocate the window ring and an empty sparse store. key_states: [B, T, G, E]."""
        B, _, G, E = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.window:
            self.window_keys = key_states.new_zeros(B, self.window, G, E)
            self.window_values = key_states.new_zeros(B, self.window, G, E)
        self.keys = key_states.new_zeros(B, 1, G, E)
        self.values = key_states.new_zeros(B, 1, G, E)
        self.positions = torch.full((B, 1), -1, dtype=torch.int32, device=self.device)
        self.count = torch.zeros(B, dtype=torch.int32, device=self.device)
        self.document_slot = torch.zeros_like(self.count)
        self._most_used = 0  # upper bound of `count`, known without reading the device
        self.is_initialized = True

    @property
    def slots(self):
        """Sparse slots P held per row."""
        return self.keys.shape[1] - 1

    def update(self, key_states, value_states, position_BK, count_B):
        """Append `count_B` routed tokens per row: [B, K, G, E] keys and values, [B, K] position ids.

        Returns all keys and values, [B, P, G, E]; slots past a row's count hold nothing meaningful.
        """
        K = key_states.shape[1]
        self._reserve(K)
        slot_K = torch.arange(K, device=self.device)
        slot_BK = torch.where(slot_K < count_B[:, None], self.count[:, None] + slot_K, self.slots)
        index = slot_BK[..., None, None].expand_as(key_states)
        self.keys = self.keys.scatter_(1, index, key_states.to(self.dtype))
        self.values = self.values.scatter_(1, index, value_states.to(self.dtype))
        self.positions = self.positions.scatter_(1, slot_BK, position_BK.to(torch.int32))
        self.count = self.count + count_B
        return self.keys[:, : self.slots], self.values[:, : self.slots]

    def _reserve(self, K):
        if self._most_used + K > self.slots:  # the bound assumes that everything was routed: look before growing
            self._most_used = int(self.count.max()) if self.count.numel() else 0
        self._most_used += K
        if self._most_used > self.slots:
            wanted = max(self._most_used, int(self.slots * GROWTH))
            extra = -(-wanted // SLOT_BLOCK) * SLOT_BLOCK - self.slots
            for name in ("keys", "values", "positions"):
                held = getattr(self, name)
                setattr(self, name, torch.cat([held, held.new_zeros(held.shape[0], extra, *held.shape[2:])], 1))

    def window_history(self, seen_B):
        """Keys and values of the W real tokens before this call, oldest first, [B, W, G, E] each."""
        slot_W = torch.arange(self.window, device=self.device)
        index = ((seen_B[:, None] + slot_W) % self.window)[..., None, None].expand_as(self.window_keys)
        return self.window_keys.gather(1, index), self.window_values.gather(1, index)

    def write_window(self, k_BTGE, v_BTGE, seen_B, length_B):
        """Overwrite the ring with the last real tokens of this call."""
        end_B = seen_B + length_B
        slot_W = torch.arange(self.window, device=self.device)
        latest_BW = end_B[:, None] - 1 - (end_B[:, None] - 1 - slot_W) % self.window
        token_BW = (latest_BW - seen_B[:, None])[..., None, None]
        index = token_BW.clamp(min=0).expand_as(self.window_keys)
        self.window_keys = torch.where(token_BW >= 0, k_BTGE.gather(1, index), self.window_keys)
        self.window_values = torch.where(token_BW >= 0, v_BTGE.gather(1, index), self.window_values)

    def get_mask_sizes(self, query_length):
        """Key length and offset of a dense mask over all columns, as transformers asks for it."""
        return self.columns + query_length, 0

    def get_seq_length(self):
        """Input columns seen, padding included."""
        return self.columns

    def get_max_length(self):
        """-1: grows without bound."""
        return -1

    def reset(self):
        """Forget everything; the next call allocates anew."""
        self.columns, self.is_initialized = 0, False
        for name in self._batched:
            setattr(self, name, None)

    def map_rows(self, function):
        """Apply `function` to every tensor that has a batch dimension."""
        for name in self._batched:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))

    def reorder_cache(self, beam_idx):
        """Row i becomes old row beam_idx[i]."""
        self.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        """Each row becomes `repeats` equal rows."""
        self.map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        """Keep the rows named by `indices`."""
        self.map_rows(lambda x: x[indices.to(x.device)] if isinstance(indices, torch.Tensor) else x[indices])


class HSPMNCache(Cache):
    """The cache of an HSPMN model, created by `forward(use_cache=True)` and by `generate()`.

    Attributes: `layers`, one `HSPMNCacheLayer` per block; `seen`, real tokens seen per row [B]; `document_seen`,
    those of the row's current document [B]; `last_position`, the position id of the last real token per row [B].
    """

    def __init__(self, config):
        super().__init__(layers=[HSPMNCacheLayer(config.sliding_window) for _ in range(config.num_hidden_layers)])
        self.columns = 0
        self.seen = self.document_seen = self.last_position = None

    def start_rows(self, batch_size, device):
        """Begin `batch_size` rows if this is the first call; raise ValueError if the batch size changed."""
        if self.seen is None:
            self.seen = torch.zeros(batch_size, dtype=torch.long, device=device)
            self.document_seen, self.last_position = self.seen, self.seen - 1
        elif self.seen.shape[0] != batch_size:
            raise ValueError(
                f"past_key_values holds {self.seen.shape[0]} rows but the input has batch size {batch_size}; "
                "use batch_repeat_interleave or batch_select_indices, or a fresh cache"
            )

    def advance(self, columns, length_B, start_BT, position_BT):
        """Account for one call of `columns` tokens per row, `length_B` of them real, after all layers have run."""
        self.columns += columns
        for layer in self.layers:
            layer.columns = self.columns
        last = (length_B - 1).clamp(min=0)[:, None]
        some = length_B > 0
        document_seen = length_B - start_BT.expand(len(length_B), -1).gather(1, last)[:, 0]
        position = position_BT.expand(len(length_B), -1).gather(1, last)[:, 0]
        self.document_seen = torch.where(some, document_seen, self.document_seen)
        self.last_position = torch.where(some, position, self.last_position)
        self.seen = self.seen + length_B

    def get_seq_length(self, layer_idx=0):
        """Input columns seen, padding included; the same for every layer."""
        return self.columns

    def has_previous_state(self, layer_idx=None, state_idx=None):
        """Whether any token has been seen."""
        return self.columns > 0

    @property
    def batch_size(self):
        """Rows held, -1 before the first call."""
        return -1 if self.seen is None else self.seen.shape[0]

    def crop(self, *args, **kwargs):
        """Refused: a linear state cannot be rewound."""
        raise ValueError(
            "an HSPMNCache cannot be cropped: the linear state cannot be rewound; "
            "copy the cache (copy.deepcopy) before the tokens you may want to take back"
        )

    def reset(self):
        """Forget everything; the next call may have any batch size."""
        super().reset()
        self.columns = 0
        self.seen = self.document_seen = self.last_position = None

    def _map_rows(self, function):
        for name in ("seen", "document_seen", "last_position"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))

    def reorder_cache(self, beam_idx):
        """Row i becomes old row beam_idx[i], as beam search needs."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        """Each row becomes `repeats` equal rows."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        """Keep the rows named by `indices`."""
        super().batch_select_indices(indices)
        self._map_rows(lambda x: x[indices])
