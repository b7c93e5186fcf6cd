"""Inputs of every operation: one maker for the tests of its kernel and for `benchmark.py --mode kernels`. Legend of
shape suffixes as in `operations_hspmn`. Nothing here imports Triton before a kernel is measured."""

import importlib.util
from collections import namedtuple
from functools import partial, partialmethod
from inspect import signature
from statistics import median
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..configuration_hspmn import CONCENTRATED_SHARE, ROUTING_PERIOD
from ..operations_hspmn import (
    EVERY_TOKEN,
    IGNORED,
    REGISTRY,
    SCALINGS,
    compact,
    end_slot,
    first_slot,
    quantize,
    quantize_rows,
)
from .timing import LeftOut, measure

CHECKED_QUERIES = 512  # the last ones of the last row, over all their keys
FEW_ROWS = 16  # that the kernels of a single token's products take


# Sizes of the inputs, by default those of a layer of the measured model; P: slots of the sparse store; share: routed
# tokens; even: rows are full and alike, as benchmarks want them, else the second one is short and the third one empty
Sizes = namedtuple(
    "Sizes", "B T H G E D N W P taps share even",
    defaults=(1, 4096, 16, 4, 128, 2048, 8192, 128, 4096, 4, 0.2, False))  # fmt: skip
# Positional arguments of an operation, and masks over their leading dimensions. compared: by output number (0 for a
# single tensor) or name of an argument written in place, which elements mean something; all where there is no mask.
# unread: by argument name, elements that must not change any of these
Case = namedtuple("Case", "args compared unread", defaults=({}, {}))


class Draw:
    """Random tensors of one set of sizes, whose fields are its attributes too."""

    def __init__(self, sizes, dtype, device):
        self.dtype, self.device = dtype, torch.device(device)
        vars(self).update(sizes._asdict())

    def normal(self, *shape, dtype=None):
        """Unit-variance values."""
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    wide = partialmethod(normal, dtype=torch.float32)  # the same in float32

    def weights(self, number, outputs, inputs):
        """Weights that keep the variance."""
        return [self.normal(outputs, inputs) / inputs**0.5 for _ in range(number)]

    def scaled(self, outputs, inputs, float8):
        """Such a weight and None or, in float8, its scales."""
        (weight,) = self.weights(1, outputs, inputs)
        return quantize_rows.reference(weight, "rowwise") if float8 else (weight, None)

    def norm(self, width):
        """A norm's weight and epsilon."""
        return torch.rand(width, device=self.device).to(self.dtype) + 0.5, 1e-6

    def heads(self, T, width=None):
        """Queries [B, T, H, E], keys [B, T, G, E] of about unit length and values [B, T, G, width]."""
        q, k = self.normal(self.B, T, self.H, self.E), self.normal(self.B, T, self.G, self.E)
        return q, k / self.E**0.5, self.normal(self.B, T, self.G, width or self.E)

    def rings(self):
        """Keys and values of the window's ring."""
        return [self.normal(self.B, self.W, self.G, self.E) for _ in range(2)]

    def rows(self, *values, dtype=torch.int64):
        """One number per row: the values in turn, or the first of them in all rows that are even."""
        values = values[:1] if self.even else values
        return torch.tensor([values[b % len(values)] for b in range(self.B)], dtype=dtype, device=self.device)

    slots = partialmethod(rows, dtype=torch.int32)  # the same in int32

    def upto(self, width, limit_B):
        """Whether each of `width` columns lies below its row's limit, if there is one."""
        return True if limit_B is None else torch.arange(width, device=self.device) < limit_B[:, None]

    def length(self, padded):
        """Real tokens per row, or None."""
        return self.rows(self.T, self.T // 2, 0, max(self.T - 1, 0)) if padded else None

    def start(self, kind, past=0, length_B=None):
        """`start_BT`: None, one per "row", or one per token of "packed" documents, none of which begins in padding."""
        if kind is None:
            return None
        if kind == "row":
            return self.rows(-past, 0, -1, -past // 2)[:, None]
        token_T = torch.arange(self.T, device=self.device)
        begins_BT = torch.rand(self.B, self.T, device=self.device) < 4 / self.T
        return torch.where(begins_BT & self.upto(self.T, length_B), token_T, -past).cummax(1).values

    def route(self, T, length_B=None):
        """index_BK, slot_BT and count_B of a share of each row's tokens; rows that are not even have free slots."""
        K = max(1, round(self.share * T))
        rank_BT = torch.rand(self.B, T, device=self.device).argsort(1).argsort(1)
        routed_BT = (rank_BT < self.rows(K, (K + 1) // 2, 0)[:, None]) & self.upto(T, length_B)
        return compact(routed_BT, K if self.even else min(T, K + 2))

    def first(self, K, past, held_B):
        """First visible slot of each of K queries; a row's first document began `past` slots before the call."""
        first_BK = self.start("packed", past)[:, :K]
        return first_BK if held_B is None else (first_BK + held_B[:, None]).clamp(min=0)

    def log_gates(self, N):
        """Of N keys per row."""
        return F.logsigmoid(2 * self.wide(self.B, N))

    def store(self, held_B, whole=None, gates=False):
        """The last eight arguments of `extend`, keys and values whole numbers of a dtype if one is given, log gates if
        they are held; and masks, by name, that leave out the spare slot."""
        kept = self.heads(self.P + 1)[1:]
        scales = [self.normal(self.B, 1, self.G, dtype=torch.bfloat16) for _ in range(2)]  # not used
        if whole is not None:
            kept, scales = zip(*(quantize(x, whole) for x in kept), strict=True)
        positions_BP = torch.zeros(self.B, self.P + 1, dtype=torch.int32, device=self.device)
        opened_B = self.slots(min(70, self.P // 2), 0, 0, 1).minimum(held_B)
        names = ("keys_BPGE", "values_BPGE", "positions_BP")
        names += (() if whole is None else ("key_scales_BPG", "value_scales_BPG")) + gates * ("log_gates_BP",)
        masks = dict.fromkeys(names, self.upto(self.P + 1, self.rows(self.P)))
        log_gates_BP = self.log_gates(self.P + 1 if gates else 1)  # a single one is not used
        return (*kept, positions_BP, held_B, opened_B, *scales, log_gates_BP), masks


CASES = {name: {"plain": maker} for name, maker in {  # by operation and variant: from a `Draw` to a `Case` or its args
    "take_rows": lambda m: (m.heads(m.T)[2], *m.route(m.T)[:2]),
    "add_norm": lambda m: (m.normal(m.B, m.T, m.D), m.normal(m.B, m.T, m.D), *m.norm(m.D)),
    "swiglu": lambda m: (m.normal(m.B, m.T, m.D), *m.weights(2, m.N, m.D)),
    "gated_mlp": lambda m: (8 * m.normal(m.B, m.T, m.D), *m.weights(2, m.N, m.D), *m.weights(1, m.D, m.N)),
    "linear_add": lambda m: (m.normal(m.B, m.T, m.D), m.normal(m.B, m.T, m.N), *m.weights(1, m.D, m.N)),
}.items()}  # fmt: skip


def case(operation, variant, sizes, dtype, device):
    """A `Case` drawn from the generator that `torch.manual_seed` sets."""
    made = CASES[operation][variant](Draw(sizes, dtype, device))
    return made if isinstance(made, Case) else Case(made)


def variants(name, **options):
    """Register a maker of an operation's inputs, with the keyword arguments that each variant gives it."""

    def register(maker):
        CASES[name] = {variant: partial(maker, **kwargs) for variant, kwargs in options.items()}
        return maker

    return register


@variants("token_losses", plain={}, ignored={"share": 0.4})
def _token_losses(m, share=0.0):
    target_N = torch.randint(m.N, (m.B * m.T,), device=m.device)
    none_N = torch.rand(m.B * m.T, device=m.device) < share
    return Case((4 * m.normal(m.B * m.T, m.N), target_N.masked_fill(none_N, IGNORED)), {}, {"logits_NV": none_N})


@variants("quantize_rows", **{scaling: {"scaling": scaling} for scaling in SCALINGS})
def _quantize_rows(m, scaling):
    return 3 * m.normal(m.B, m.T, m.N - m.N % (SCALINGS[scaling][0] or 1)), scaling


@variants("quantize_product", **{scaling: {"scaling": scaling} for scaling in SCALINGS})
def _quantize_product(m, scaling):
    gate, _ = _quantize_rows(m, scaling)
    return gate, m.normal(*gate.shape), scaling


@variants("float8_linear", **{scaling: {"scaling": scaling} for scaling in SCALINGS})
def _float8_linear(m, scaling):
    rows, _ = _quantize_rows(m, scaling)
    (weight,) = m.weights(1, m.D, rows.shape[-1])
    return *quantize_rows.reference(rows, scaling), *quantize_rows.reference(weight, scaling), m.dtype


@variants("route", plain={}, padded={"padded": True}, initial={"kind": "packed", "initial": 5},
          row={"kind": "row", "initial": 3}, every={"initial": EVERY_TOKEN}, full={"slots": 1 / 3})  # fmt: skip
def _route(m, kind=None, padded=False, initial=0, slots=1.0):
    length_B, bias = m.length(padded), torch.tensor(0.1, device=m.device)
    return m.wide(m.B, m.T), bias, m.start(kind, 1, length_B), length_B, 0.3, initial, max(1, int(slots * m.T))


@variants("split_heads", plain={}, packed={"kind": "packed"}, history={"kind": "row", "past": 9},
          elu={"feature": "elu"}, continued={"kind": "packed", "past": 2, "padded": True})  # fmt: skip
def _split_heads(m, kind=None, past=0, padded=False, feature="gated"):
    C, lags, length_B, compared, unread = (m.H + 2 * m.G) * m.E, m.taps - 1, m.length(padded), {}, {}
    history_BLC = m.normal(m.B, lags, C) if past else None
    if padded:  # the row's first document began `past` tokens ago; what lies before it may move up
        lag_L = torch.arange(lags, device=m.device)
        unread["history_BLC"] = (lag_L < lags - past).expand(m.B, lags)
        compared["history_BLC"] = length_B[:, None] + lag_L >= lags - past
    angle_BTE = 6 * torch.rand(1 if kind is None else m.B, m.T, m.E, device=m.device)
    tables = [x.to(m.dtype) for x in (angle_BTE.cos(), angle_BTE.sin())]
    (q_norm_E, eps), (k_norm_E, _) = m.norm(m.E), m.norm(m.E)
    start_BT, taps_CL = m.start(kind, past, length_B), m.normal(C, m.taps)
    args = (m.normal(m.B, m.T, C), taps_CL, history_BLC, start_BT, length_B, *tables, q_norm_E, k_norm_E, m.G, eps)
    return Case((*args, feature), compared, unread)


@variants("norm_heads", scored={}, plain={"scored": False})
def _norm_heads(m, scored=True):
    rates = (m.wide(m.H) - 2, 4 * m.wide(m.H), 1 / 128)
    score_weight_D = 0.25 * m.wide(m.D) if scored else None
    return 3 * m.normal(m.B, m.T, m.D), *m.norm(m.D), *m.weights(1, 2 * m.H, m.D), *rates, score_weight_D


@variants("project_token", scored={}, plain={"scored": False}, float8={"float8": True})
def _project_token(m, scored=True, float8=False):
    (weight, scale), heads = m.scaled((m.H + 2 * m.G) * m.E, m.D, float8), m.weights(1, 2 * m.H, m.D)
    return 3 * m.normal(m.B, 1, m.D), *m.norm(m.D), weight, *heads, m.wide(m.D) / m.D**0.5 if scored else None, scale


@variants("swiglu_token", plain={}, float8={"float8": True})
def _swiglu_token(m, float8=False):
    pairs = (m.scaled(m.N, m.D, float8) for _ in range(2))
    return 3 * m.normal(m.B, 1, m.D), *m.norm(m.D), *(x for both in zip(*pairs, strict=True) for x in both)


@variants("linear_add_token", plain={}, float8={"float8": True})
def _linear_add_token(m, float8=False):
    return m.normal(m.B, 1, m.D), m.normal(m.B, 1, m.N), *m.scaled(m.D, m.N, float8)


@variants("linear_attention", plain={"state": False}, state={}, row={"kind": "row"}, padded={"padded": True},
          packed={"kind": "packed"}, packed_padded={"kind": "packed", "padded": True}, normaliser={"columns": 1},
          documents={"kind": "packed", "padded": True, "state": False},
          training={"kind": "packed", "padded": True, "state": False, "columns": 1})  # fmt: skip
def _linear_attention(m, kind=None, padded=False, state=True, columns=0):
    length_B, width = m.length(padded), m.E + columns
    heads, decay_BTH = m.heads(m.T, width), -(torch.rand(m.B, m.T, m.H, device=m.device) ** 3)
    state_BHEF = m.wide(m.B, m.H, m.E, width) if state else None
    args = (*heads, decay_BTH, m.start(kind, 3, length_B), length_B, state_BHEF)
    if not padded:
        return args
    real_BT, names = m.upto(m.T, length_B), ("q_BTHE", "k_BTGE", "v_BTGF", "log_decay_BTH")
    return Case(args, {0: real_BT}, dict.fromkeys(names, ~real_BT))


WINDOWS = {"plain": {}, "packed": {"kind": "packed"}, "ring": {"kind": "row", "cached": True},
           "packed_ring": {"kind": "packed", "cached": True}}  # fmt: skip


@variants("local_attention", **WINDOWS)
def _local_attention(m, kind=None, cached=False):
    ring = (*m.rings(), m.rows(m.T, 3, 0, m.W)) if cached else (None, None, None)
    return *m.heads(m.T), m.start(kind, (m.W // 2 + 1) * cached), m.W, *ring


@variants("reflexive_merge", **WINDOWS)
def _reflexive_merge(m, kind=None, cached=False):
    gate_BTH = m.normal(m.B, m.T, 2 * m.H).chunk(2, -1)[1]  # strided, as the model's projection gives it
    return *_local_attention(m, kind, cached), m.normal(m.B, m.T, m.H, m.E), gate_BTH, *m.norm(m.E)


EVERY = {"every": {"every": True}, "every_packed": {"every": True, "packed": True}}  # token reads


@variants("sqsk_attention", plain={}, packed={"packed": True}, continued={"cached": True, "packed": True},
          token={"cached": True, "T": 1}, every_continued={"every": True, "cached": True}, **EVERY)  # fmt: skip
def _sqsk_attention(m, packed=False, cached=False, T=None, every=False):
    K, P = T or m.T, m.P * cached
    held_B, count_B = m.slots(P, P // 2, 0), m.slots(K, (K + 2) // 3, 0, max(K - 1, 1))
    first_BK, end_BK, S, log_gate_BP = m.first(K, P // 2, held_B) if packed else None, None, K, None
    names, unread = ("k_BPGE", "v_BPGE"), {}
    if every:
        index_BK, slot_BT, count_B = m.route(K)
        S, end_BK, names = index_BK.shape[1], end_slot(slot_BT), (*names, "log_gate_BP")
        log_gate_BP = m.log_gates(S + P)
        first_BK = first_slot(None, slot_BT, m.start("packed")) if packed else None
    else:
        unread["q_BKHE"] = ~m.upto(K, count_B)
    unread |= dict.fromkeys(names, ~m.upto(S + P, held_B + count_B))
    kept = *m.heads(S + P)[1:], log_gate_BP, first_BK, held_B if cached else None
    return Case((m.heads(K)[0], *kept, count_B, end_BK), {}, unread)


@variants("sqsk_merge", tokens={}, packed={"packed": True}, store={"cached": True, "packed": True},
          token={"cached": True, "T": 1}, **EVERY, every_store={"every": True, "cached": True},
          every_token={"every": True, "cached": True, "T": 1})  # fmt: skip
def _sqsk_merge(m, packed=False, cached=False, T=None, every=False):
    T, P, held_B = T or m.T, m.P * cached, m.slots(m.P, m.P // 2, 0) if cached else None
    (q_BTHE, *kept), (index_BK, slot_BT, count_B) = m.heads(T), m.route(T)
    kept, K, hidden = (*kept, m.log_gates(T)), index_BK.shape[1], slot_BT < 0
    if cached:  # a store without its spare slot
        kept = [x[:, :-1] for x in (*m.heads(P + K + 1)[1:], m.log_gates(P + K + 1))]
        hidden = ~m.upto(P + K, held_B + count_B)
    unread = dict.fromkeys(("k_BPGE", "v_BPGE", "log_gate_BP")[: 2 + every], hidden)
    if every:
        first_BN = first_slot(None, slot_BT, m.start("packed")) if packed else None
    else:
        unread, first_BN = unread | {"q_BTHE": slot_BT < 0}, m.first(K, P // 2, held_B) if packed else None
    merged_BTHE, gate_BT = m.normal(m.B, T, m.H, m.E), torch.rand(m.B, T, device=m.device)
    kept, end_BT = (kept, end_slot(slot_BT)) if every else ((*kept[:2], None), None)
    return Case((merged_BTHE, gate_BT, q_BTHE, *kept, index_BK, first_BN, held_B, count_B, end_BT), {}, unread)


@variants("contextual", plain={}, packed={"packed": True})
def _contextual(m, packed=False):
    (_, gate_BT, *qkv, _, index_BK, first_BK, _, count_B, _), _, unread = _sqsk_merge(m, packed)
    slot_BT = compact(~unread["q_BTHE"], index_BK.shape[1])[1]
    unread = dict.fromkeys(("q_BTHE", "k_BTGE", "v_BTGE", "gate_BT"), slot_BT < 0)
    return Case((*qkv, gate_BT, index_BK, slot_BT, first_BK, count_B), {}, unread)


@variants("extend", plain={}, packed={"kind": "packed"}, padded={"kind": "packed", "padded": True},
          int8={"whole": torch.int8, "every": True}, full={"full": True, "gates": True},
          window={"routed": False}, every={"kind": "packed", "every": True}, int4={"whole": torch.int32})  # fmt: skip
def _extend(m, kind="row", padded=False, whole=None, full=False, routed=True, every=False, gates=False):
    """full: the store overflows in the first row, and has overflowed in the second. gates: log gates are held."""
    length_B = m.length(padded)
    held_B = m.slots(m.P - 1, m.P + 2, 5) if full else m.slots(m.P // 2, m.P // 3, 0)
    store, compared = m.store(held_B, whole, gates or every)
    position_BT = torch.arange(m.T, device=m.device).expand(m.B, m.T) + 7
    place, route = (position_BT, m.start(kind, 3, length_B), length_B, m.rows(50, 3, 0)), m.route(m.T, length_B)
    compared |= {0: m.upto(route[0].shape[1], route[2])} if routed and not every else {}
    route = (4 * m.wide(m.B, m.T), *route) if routed else (None,) * 4
    return Case((*m.heads(m.T)[1:], *place, *route, every, *m.rings(), *store), compared)


@variants("place", counted={}, given={"given": "rows"}, shared={"given": "shared"}, far={"far": 2**30})
def _place(m, given=None, far=0):
    """A single token where positions are given, some of them jumps, and one that counts the columns of padding."""
    position_BT = {None: None, "rows": m.rows(70, 4, 0, 7)[:, None], "shared": m.rows(70)[:1, None]}[given]
    frequency_F = 10000.0 ** -torch.linspace(0, 1, m.E // 2, device=m.device)
    tokens, seen_B = m.T if given is None else 1, m.rows(70, 3, 0, 200) + far
    last_B2 = torch.stack([m.rows(69, 1, -1, 199), m.rows(69, 3, -1, 199)], 1)
    return tokens, position_BT, seen_B, last_B2, frequency_F, 1.0, m.dtype


@variants("attend_token", plain={}, padded={"padded": True}, initial={"initial": 3}, unrouted={"routed": False},
          int8={"whole": torch.int8}, full={"full": True, "gates": True}, every={"every": True, "padded": True},
          every_int8={"every": True, "whole": torch.int8, "full": True}, int4={"whole": torch.int32})  # fmt: skip
def _attend_token(m, padded=False, initial=0, routed=True, whole=None, full=False, every=False, gates=False):
    """Rows that are routed, routed at the start of a document, not routed, routed early, and routed with a full store.
    Slots outside of a row's document are not read, neither in the store nor in the window."""
    (q_linear, k_linear, _), heads = m.heads(1), m.heads(1)
    features = [F.normalize(x.float(), dim=-1).to(m.dtype) for x in (q_linear, k_linear)]
    if whole is not None:
        heads[1][1:2] = 0.0  # a key without a scale
    start_B, seen_B = m.rows(-500, 0, -1, -3, -9), m.rows(500, 77, 5, 2, 9)
    length_B = m.rows(1, 0, 1, 1, 1) if padded else None
    real_B = m.rows(True, not padded, True, True, True, dtype=torch.bool)
    held_B = m.slots(m.P, m.P + 1, 2, 1, m.P) if full else m.slots(m.P - 1, 2, 2, 1, m.P)
    score_BT = m.rows(0.5, -0.2, -4.0, 2.0, 0.1, dtype=torch.float32)[:, None]
    bias = torch.tensor(0.3, device=m.device)
    store, compared = m.store(held_B, whole, gates or every)
    fixed = (m.wide(m.B, 1, 2 * m.H), m.wide(m.H) - 2, 4 * m.wide(m.H), 0.125, *m.norm(m.E))
    place = (torch.arange(m.B, device=m.device)[:, None] + 1000, start_B[:, None], length_B, seen_B)
    router = (score_BT, bias) if routed else (None, None)
    router = (*router, 0.05, initial, every)
    args = (*features, *heads, *fixed, *place, *router, m.wide(m.B, m.H, m.E, m.E), *m.rings(), *store)

    ring = ("ring_k_BWGE", "ring_v_BWGE")
    kept = ("keys_BPGE", "values_BPGE") if whole is None else ("key_scales_BPG", "value_scales_BPG")
    kept += (gates or every) * ("log_gates_BP",)
    slot_W, slot_P = torch.arange(m.W, device=m.device), torch.arange(m.P + 1, device=m.device)
    hidden_BW = (seen_B[:, None] - slot_W) % m.W > -start_B[:, None]
    unused_BP = (slot_P >= held_B[:, None]) | (slot_P < store[4][:, None])
    works_B = real_B & routed & ((score_BT[:, 0] + bias > 0) | (start_B > -initial))
    written_BP = (slot_P == held_B[:, None]) & works_B[:, None]
    compared |= {0: real_B} | dict.fromkeys(ring, ~hidden_BW)
    compared |= dict.fromkeys(kept, (~unused_BP | written_BP) & (slot_P < m.P))
    return Case(args, compared, dict.fromkeys(ring, hidden_BW) | dict.fromkeys(kept, unused_BP))


# `benchmark.py --mode kernels`


def attention(backend, q_BKHE, k_BKGE, v_BKGE, *_):
    """A call of causal attention by a backend of SDPA, or by compiled FlexAttention, whose mask is made once."""
    q, k, v = (x.transpose(1, 2) for x in (q_BKHE, k_BKGE, v_BKGE))
    if backend == "flex":
        K, attend = q.shape[2], torch.compile(flex_attention, dynamic=False)
        causal = create_block_mask(lambda b, h, i, j: j <= i, None, None, K, K, device=q.device, _compile=True)
        return lambda *_: attend(q, k, v, block_mask=causal, enable_gqa=True).transpose(1, 2)

    def call(*_):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return call


def simple_gla(q, k, v, decay_BTH, *_):
    """A call of fla's gated linear attention, on keys and values of all heads."""
    if importlib.util.find_spec("fla") is None:
        raise LeftOut("flash-linear-attention is not installed")
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    return lambda *_: chunk_simple_gla(q, k, v, g=decay_BTH, scale=1.0)[0]


def compiled(name, *_):
    """A call of an operation's compiled reference."""
    return torch.compile(REGISTRY[name].reference, dynamic=False)


COMPILED = ("norm_heads", "add_norm", "swiglu", "linear_add", "token_losses")
RIVALS = {name: {"compiled": partial(compiled, name)} for name in COMPILED}
RIVALS["linear_attention"] = {"fla_simple_gla": simple_gla}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "flex": "flex"}
RIVALS["sqsk_attention"] = {name: partial(attention, backend) for name, backend in BACKENDS.items()}
MEASURED = {"norm_heads": "scored", "project_token": "scored", "sqsk_merge": "tokens", "place": "counted"}
MEASURED |= dict.fromkeys(("quantize_rows", "quantize_product", "float8_linear"), next(iter(SCALINGS)))
SINGLE_TOKEN = ("project_token", "swiglu_token", "linear_add_token")
BY_SHARE = ("take_rows", "contextual", "sqsk_merge", "extend", "attend_token")
FLOPS = {  # of attentions; of all others, those of their products
    "linear_attention": lambda a: a.q_BTHE.numel() * (2 * 64 + 4 * a.q_BTHE.shape[-1]),
    "local_attention": lambda a: 4 * a.q_BTHE.numel() * min(a.window, a.q_BTHE.shape[1]),
    "reflexive_merge": lambda a: 4 * a.q_BTHE.numel() * min(a.window, a.q_BTHE.shape[1]),
    "attend_token": lambda a: 4 * a.q_BTHE.numel() * a.keys_BPGE.shape[1],
    "sqsk_attention": lambda a: 2 * a.q_BKHE.numel() * (a.q_BKHE.shape[1] + 1),
    **dict.fromkeys(("contextual", "sqsk_merge"), lambda a: (
        2 * a.q_BTHE[:, 0].numel() * a.index_BK.shape[1] * (a.index_BK.shape[1] + 1)))}  # fmt: skip
BYTES = {  # of operations that move some rows of their tensors
    "take_rows": lambda a: 2 * routed_rows(a, a.x_BTX),
    "contextual": lambda a: routed_rows(a, a.k_BTGE, a.v_BTGE, a.q_BTHE, a.q_BTHE) + a.q_BTHE.nbytes,
    "sqsk_merge": lambda a: routed_rows(a, a.k_BPGE, a.v_BPGE, a.q_BTHE, a.reflexive_BTHE, a.reflexive_BTHE),
    "extend": lambda a: 2 * routed_rows(a, a.k_BTGE, a.v_BTGE) + 4 * a.ring_k_BWGE.nbytes,
    "attend_token": lambda a: 2 * (a.state_BHEE.nbytes + a.ring_k_BWGE.nbytes + a.keys_BPGE.nbytes)}  # fmt: skip


def routed_rows(a, *tensors):
    """Bytes of the routed rows of some tensors."""
    return a.index_BK.numel() * sum(x[0, 0].nbytes for x in tensors)


def products(a):
    """Operations of all weights with the rows of the first argument."""
    weights = sum(x.numel() for name, x in vars(a).items() if "weight" in name)
    return 2 * next(iter(vars(a).values()))[..., 0].numel() * weights if weights else 0


def results(call, operation, a):
    """What a call with the arguments `a` gives: its outputs by number, then what it writes in place by name."""
    out = call(*vars(a).values())
    outputs = out if isinstance(out, tuple) else () if out is None else (out,)
    written = {name: x for name, x in vars(a).items() if name in operation.mutates and x is not None}
    return dict(enumerate(outputs)) | written


def last_row(operation, a, widen=False):
    """Copies of the arguments for the last row alone, in float64 if they are to be wide. Of `sqsk_attention` they are
    for its last queries, over all their keys, of `token_losses` for as many rows."""
    row = SimpleNamespace(**vars(a))
    for name, x in vars(a).items():
        if isinstance(x, torch.Tensor):
            per_row = name in ("x", "scale", "residual") or name.rpartition("_")[2].startswith("B")
            x = x[-CHECKED_QUERIES:] if operation is REGISTRY["token_losses"] else x
            x = (x[-1:] if per_row else x).clone()
            setattr(row, name, x.double() if widen and x.is_floating_point() else x)
        elif widen and isinstance(x, torch.dtype):
            setattr(row, name, torch.float64)
    if operation is REGISTRY["sqsk_attention"]:
        row.q_BKHE = row.q_BKHE[:, -CHECKED_QUERIES:]
        row.held_B = row.count_B - row.q_BKHE.shape[1]
        row.count_B -= row.held_B
    return row


def check(got, eager, exact, compared):
    """Largest relative error against float64; ValueError beyond twice that of the eager reference in low precision.
    All three are `results`, of which the last two may hold the last elements of each tensor alone."""
    worst = 0.0

    def relative_rms(x, right):
        x, right = x.double(), right.double()
        difference = torch.where(x == right, 0, x - right)  # infinities that agree do not differ
        scale = right[right.isfinite()].square().mean()
        return (difference.square().mean() / scale.clamp_min(1e-30)).sqrt().item()

    for key, kernel in got.items():
        right, usual = exact[key], eager[key]
        mask = compared.get(key, torch.ones(kernel.shape[:1], dtype=torch.bool, device=kernel.device))
        kernel, mask = (x[tuple(slice(-n, None) for n in right.shape[: x.dim()])] for x in (kernel, mask))
        if right[mask].numel():
            # numbers of 8 bits are rounded by the reference too, also in float64
            rounded = kernel.is_floating_point() and kernel.itemsize > 1
            rounding = torch.finfo(kernel.dtype).eps if rounded else 0.0
            error, usual = (relative_rms(x[mask], right[mask]) for x in (kernel, usual))
            if not error <= 2 * usual + rounding:
                raise ValueError(f"output {key} is {error:.2e} off, the eager reference {usual:.2e}: it is not timed")
            worst = max(worst, error)
    return worst


@torch.no_grad()
def measure_operation(args, name, backend, sizes):
    """One operation by its kernel or a rival: its error, and on CUDA its time with cold caches."""
    if backend != "triton" and args.device.type != "cuda":
        raise LeftOut("it needs CUDA")
    importlib.import_module("...kernels_hspmn", __name__)  # registers the kernels; needs Triton, as no other mode does
    torch.manual_seed(0)
    operation, made = REGISTRY[name], case(name, MEASURED.get(name, "plain"), sizes, args.dtype, args.device)
    a = SimpleNamespace(**dict(zip(signature(operation.reference).parameters, made.args, strict=True)))
    call = operation.form("triton") if backend == "triton" else RIVALS[name][backend](*made.args)
    eager, exact = (results(operation.reference, operation, last_row(operation, a, widen)) for widen in (False, True))
    written = {name: vars(a)[name] for name in operation.mutates}
    counts = [(x, x.clone()) for x in written.values() if x is not None and x.dtype == torch.int32]
    found = results(call, operation, a)
    metrics = {"error": check(found, eager, exact, made.compared)}
    if args.device.type != "cuda":
        return metrics
    # Writing it takes longer than queueing a call, so launches never wait for the host
    flushed = torch.empty(2**29, dtype=torch.int8, device=args.device)

    def before():
        for x, held in counts:  # a store would be full after the first call
            x.copy_(held)
        flushed.zero_()

    seconds = 1e-3 * median(measure(partial(call, *made.args), args, before))
    tensors = [x for x in (*made.args, *found.values()) if isinstance(x, torch.Tensor)]
    moved = BYTES[name](a) if name in BYTES else sum(x.nbytes for x in tensors)
    metrics |= {"ms": 1e3 * seconds, "tb_s": moved / seconds / 1e12}
    flops = FLOPS.get(name, products)(a)
    return metrics | ({"tflops": flops / seconds / 1e12} if flops else {})


def kernels_cases(args):
    """`<operation>/<backend>/<shape>`; without CUDA and Triton's interpreter a single case that says so."""

    def leave_out():
        raise LeftOut("Triton kernels need CUDA, or TRITON_INTERPRET=1 to check them on a CPU")

    if args.device.type != "cuda" and not interpreted():
        yield "kernels", leave_out
        return
    fields = {"H": args.num_attention_heads, "G": args.num_key_value_heads, "E": args.head_dim, "D": args.hidden_size}
    fields |= {"N": args.intermediate_size, "W": args.sliding_window, "even": True}
    default = CONCENTRATED_SHARE * ROUTING_PERIOD  # of a routing layer of the default model
    for name in CASES:
        for text in args.sqsk_shapes if name == "sqsk_attention" else args.kernel_shapes:
            B, T = map(int, text.split("x"))
            if name in SINGLE_TOKEN:
                B, T = min(B, FEW_ROWS), 1
            for share in (default, args.sparsity_k) if name in BY_SHARE else (default,):
                K = max(1, round(share * T))
                sizes = Sizes(B=B, T=T, P=K, share=share, **fields)
                shape = f"B{B}_K{T}" if name == "sqsk_attention" else f"B{B}_T{T}" + f"_K{K}" * (name in BY_SHARE)
                for backend in ("triton", *RIVALS.get(name, ())):
                    yield f"{name}/{backend}/{shape}", partial(measure_operation, args, name, backend, sizes)


def interpreted():
    """Whether Triton runs kernels in its interpreter."""
    found = importlib.util.find_spec("triton") is not None
    return found and bool(importlib.import_module("triton").knobs.runtime.interpret)
