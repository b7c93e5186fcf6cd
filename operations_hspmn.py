"""Every operation of HSPMN, in plain PyTorch: the executable specification of the kernels and of every gradient.

An operation is one typed function, its reference. From that come the schema, the shapes that `torch.compile` sees and
the gradient; Triton kernels, FlexAttention and hand-written gradients register beside it. `operations(backend)` says
which form of each runs. In order: routing, heads, the reflexive and the contextual stream, the cache, one decoded
token, SwiGLU, float8, the loss, FlexAttention.

Legend of shape suffixes:
    B batch, T tokens of this call, K routed slots of this call, P key slots (cached ones first), S key tokens,
    H query heads, G key/value heads (H = G * R), E head width, F value width, C channels, W window, D model width,
    X any width, N any number, L taps, V vocabulary.

Two integer tensors carry packing, padding and cache continuation through every operation:
    start_BT  index of the first token that token t may see, counted in tokens of this call; negative values reach
              into the cached past (-3: the last three cached tokens are visible). It never decreases along a row;
              [B, 1] says it for a row's only document, None that every row is one document from token 0.
    length_B  tokens of this call that are real; rows are right-padded, so they are tokens 0 .. length - 1.
              None: all are.
Tensors of the cache are written IN PLACE by every form of an operation; None stands for a call without a cache.
"""

import hashlib
import math
from functools import cache, partial, update_wrapper
from inspect import Parameter, Signature, signature
from types import SimpleNamespace
from typing import get_args

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

LINEAR_CHUNK = 64  # tokens per chunk of the linear attention
LINEAR_SPAN = 4096  # tokens whose chunk states are combined in one product; longer rows loop over spans
QUERY_SPAN = 1024  # queries scored at once against all keys, which bounds the memory of long prompts
SILU_LIMIT = 30.0  # SiLU is linear or zero beyond it to float32 precision; keeps fp16 products finite
SCORE_GAIN = 2.0  # a step of Adam moves a router's score by this times lr * sqrt(D); without 1 / sqrt(D) by lr * D
# Stores of whole numbers: dtypes by `kv_cache_dtype`, and the levels of a number by dtype
STORES = {"int8": torch.int8, "int4": torch.int32}
LEVELS = {torch.int8: 256, torch.int32: 16}
# Shifts of eight neighbouring numbers in an int32: of two neighbours, one mask makes the halves of a kernel's register
NIBBLES = (0, 16, 4, 20, 8, 24, 12, 28)
NEAR = 2**20  # positions up to which a product with a frequency in float32 is a precise enough angle
LEAST_PEAK = 1e-30  # of a head that is stored as whole numbers; one of smaller elements is stored as zeros
# Float8: what stands for a number, the largest of these, and by scaling the features that share a scale, and its dtype
E4M3, E4M3_PEAK = torch.float8_e4m3fn, 448.0
FLOAT8_CAPABILITY = 89  # compute capability from which on CUDA devices multiply such numbers
SCALINGS = {"rowwise": (None, torch.float32), "mx": (32, torch.float8_e8m0fnu)}
HIDDEN_SCORE = -1e30  # finite, since a softmax over nothing but -inf has no value
IGNORED = -100  # the target of a token that has none
EVERY_TOKEN = 2**31 - 1  # as many first tokens of a document as there can be
FLEX_BLOCK = 128  # query and key block of the FlexAttention masks

# One file may be loaded as several modules of a process (a checkout and a saved model): each registers its own names
NAMESPACE = "hspmn_" + hashlib.sha1(__name__.encode()).hexdigest()[:8]
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
REGISTRY = {}  # operations by name
# Arguments that one call leaves to the next
KEPT = (
    *("ring_k_BWGE", "ring_v_BWGE", "keys_BPGE", "values_BPGE", "positions_BP"),
    *("key_scales_BPG", "value_scales_BPG", "log_gates_BP"),
)


class Operation:
    """A typed reference function and the other forms that compute it, called as `route(*args, backend="triton")`.

    Attributes: `reference`; `mutates`, the arguments written in place.
    """

    def __init__(self, reference, mutates=()):
        update_wrapper(self, reference)
        self.reference, self.mutates = reference, mutates
        self._forms = {"reference": reference}
        self.trains = lambda *args: False  # whether the kernel has the gradient of a call with these arguments

    def __call__(self, *args, backend="reference"):
        """Run the form of `backend`."""
        return self.form(backend)(*args)

    def form(self, backend):
        """The function that runs on a backend: its own form, or the reference."""
        if backend == "flex" and "flex" not in self._forms:
            backend = "train"
        return self._forms.get(backend, self.reference)

    def kernel(self, launch=None, strided=()):
        """Register the launcher of a Triton kernel as a custom operator, opaque to `torch.compile`. It is given
        contiguous tensors but for those `strided`, which it takes laid out in any way.

        Through `torch.library.Library`, since `custom_op` takes 317 us per call of 29 arguments on a CPU core where
        this takes 9. With `triton_op` inductor clones inputs that it takes for written where its analysis of a kernel
        fails (scans do that), and `wrap_triton` refuses the interpreter.
        """
        if launch is None:
            return partial(self.kernel, strided=strided)
        self._forms["triton"] = self._define(
            self.__name__, self._parameters(), launch, self._fake, self.mutates, strided
        )
        self._forms["launch"] = launch
        return launch

    def _parameters(self, without=()):
        return [each for name, each in signature(self.reference).parameters.items() if name not in without]

    def _define(self, name, parameters, launch, fake, mutates=(), strided=(), returns=None):
        """A custom operator of `parameters` that runs `launch`, given contiguous tensors but for those `strided`."""
        kept = [each.name in (*mutates, *strided) for each in parameters]

        def contiguous(*args):
            pairs = zip(args, kept, strict=True)
            return launch(*[x if keep or not isinstance(x, Tensor) else x.contiguous() for x, keep in pairs])

        returns = signature(self.reference).return_annotation if returns is None else returns
        contiguous.__signature__ = Signature(parameters, return_annotation=returns)
        LIBRARY.define(name + torch.library.infer_schema(contiguous, mutates_args=mutates))
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, contiguous, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def flex(self, function):
        """Register the form that FlexAttention computes, with gradients, on CUDA."""
        self._forms["flex"] = function
        return function

    def gradient(self, launch=None, wrt=(), keeps=(), takes=None, outputs=None):
        """Register the gradient of the kernel, with which it trains: launch(*gradients of the outputs, *arguments,
        *outputs) gives those of the arguments `wrt`, in their order. It becomes an operator of its own, so that a
        compiler sees neither. Of what the operation returns it is given the outputs numbered `keeps`, and gradients of
        the first `outputs` (None: all), beyond which the reference detaches them; what the operation writes in place
        it is not given: a call with any of that, or that `takes` (a function of the arguments) refuses, is the
        reference's, with autograd's gradient. An argument of `wrt` that is None has no place among the gradients.
        """
        if launch is None:
            return partial(self.gradient, wrt=wrt, keeps=keeps, takes=takes, outputs=outputs)
        everything, given = self._parameters(), self._parameters(self.mutates)
        at = [i for i, each in enumerate(everything) if each.name not in self.mutates]
        places = [i for i, each in enumerate(given) if each.name in wrt]
        outputs = outputs or len(get_args(signature(self.reference).return_annotation)) or 1
        extra = [f"grad_{i}" for i in range(outputs)] + [f"output_{i}" for i in keeps]
        extra = [Parameter(each, Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor) for each in extra]

        def whole(args):
            found = dict(zip(at, args, strict=True))
            return [found.get(i) for i in range(len(everything))]

        def back_fake(*args):
            return [x.new_empty(x.shape) for x in (args[outputs + i] for i in places) if x is not None]

        train = self._define(
            f"{self.__name__}_train", given, lambda *args: self._forms["launch"](*whole(args)),
            lambda *args: self._fake(*whole(args)),
        )  # fmt: skip
        back = self._define(
            f"{self.__name__}_backward", [*extra[:outputs], *given, *extra[outputs:]],
            lambda *args: list(launch(*args)), back_fake, returns=list[Tensor],
        )  # fmt: skip

        def keep(ctx, inputs, output):
            output = output if isinstance(output, tuple) else (output,)
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *(output[i] for i in keeps))
            ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]
            if output[outputs:]:
                ctx.mark_non_differentiable(*output[outputs:])
                ctx.set_materialize_grads(False)  # zeros as large as these

        def backward(ctx, *grads):
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if other is None else other[0] for other in ctx.others]
            asked = [i for i in places if inputs[i] is not None]
            found = dict(zip(asked, back(*grads[:outputs], *inputs, *saved), strict=True))
            return tuple(found.get(i) for i in range(len(inputs)))

        torch.library.register_autograd(train.name(), backward, setup_context=keep, lib=LIBRARY)

        def trains(*args):
            return all(x is None for i, x in enumerate(args) if i not in at) and (takes is None or takes(*args))

        def form(*args):
            return train(*[args[i] for i in at]) if trains(*args) else self.reference(*args)

        self._forms["train"], self.trains = form, trains
        return launch

    def _fake(self, *args):
        """Outputs of the reference as fresh tensors, as kernels allocate them."""
        return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.new_empty(x.shape), self.reference(*args))


def operation(*mutates):
    """Make a typed reference an `Operation`; `mutates`: the arguments that it writes in place."""

    def register(reference):
        return REGISTRY.setdefault(reference.__name__, Operation(reference, mutates))

    return register


@cache
def operations(backend):
    """The form of every operation on a backend, as attributes by name: "reference"; "flex", with gradients, on CUDA;
    "train", kernels with gradients; "triton", those without, which a compiler may see; "launch", the same without the
    dispatcher, for eager calls without gradients whose tensors are contiguous.
    """
    return SimpleNamespace(**{name: op.form(backend) for name, op in REGISTRY.items()})


def wide(x):
    """`x` in float32, or in float64 if it is float64: what scores, softmaxes and states are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_open(tokens, most):
    """Whether a compiler that makes code for any number of tokens cannot tell if they are more than `most`: an `if`
    would restrict that code to one answer."""
    return not (statically_known_true(tokens <= most) or statically_known_true(tokens > most))


def spans(tokens, most):
    """Ranges (begin, end) of at most `most` tokens; one of all where the number is still a symbol."""
    if is_open(tokens, most) or tokens <= most:
        return [(0, tokens)]
    return [(begin, min(begin + most, tokens)) for begin in range(0, tokens, most)]


def blocks_of(tokens, size):
    """Tokens per block (`size`, or all if there are fewer) and number of blocks that hold `tokens` tokens. While that
    is still a symbol there are two or more and the last is never full, which serves any length."""
    if is_open(tokens, size):
        return size, torch.sym_max(tokens // size + 1, 2)
    block = min(size, tokens)
    return block, -(-tokens // block)


def router_score(h_BTD, weight_D):
    """Router score of each token, 2 h.w / sqrt(D), in float32: no matmul, which autocast or TF32 would round."""
    h_BTD = h_BTD.to(torch.promote_types(h_BTD.dtype, torch.float32))
    return (h_BTD * weight_D).sum(-1) * (SCORE_GAIN * h_BTD.shape[-1] ** -0.5)


def compact(mask_BT, capacity):
    """Ordered compaction of the true entries of a mask into `capacity` slots per row; the latest beyond get none.

    Returns index_BK (int64, token of each slot or -1), slot_BT (int64, slot of each token or -1) and count_B (int32).
    """
    slot_BT = mask_BT.long().cumsum(1) - 1
    slot_BT = torch.where(mask_BT & (slot_BT < capacity), slot_BT, -1)
    token_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(slot_BT)
    index_BK = slot_BT.new_full((mask_BT.shape[0], capacity + 1), -1)
    index_BK = index_BK.scatter(1, torch.where(slot_BT < 0, capacity, slot_BT), token_BT)[:, :capacity]
    return index_BK, slot_BT, (slot_BT >= 0).sum(1, dtype=torch.int32)


def assign(score_BT, wanted_BT, real_BT, noise_floor, capacity):
    """Gates, slots and statistics, as `route` returns them, of tokens that are wanted or not."""
    gate_BT = score_BT.sigmoid()
    index_BK, slot_BT, count_B = compact(wanted_BT, capacity)
    entropy_BT = F.softplus(score_BT) - gate_BT * score_BT
    sums_B2 = torch.where(real_BT, torch.stack([entropy_BT, gate_BT]), 0).sum(-1).T
    routed_B = wanted_BT.sum(1)
    sums_B4 = torch.cat([torch.stack([routed_B, routed_B - count_B], 1).to(sums_B2.dtype), sums_B2], 1)
    return gate_BT * (gate_BT >= noise_floor), index_BK, slot_BT, count_B, sums_B4


@operation()
def route(
    score_BT: Tensor, bias: Tensor, start_BT: Tensor | None, length_B: Tensor | None, noise_floor: float, initial: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gates of router scores, and the ordered slots of the tokens whose score and bias exceed 0.

    bias: scalar; it steers the decision and never enters the gate (arXiv 2408.15664). noise_floor: gates below it
    are 0. initial: so many first tokens of every document are routed whatever their score. capacity: slots per row.
    Returns gate_BT in score's dtype (float32); index_BK, slot_BT and count_B, see `compact`; and sums_B4 over a row's
    real tokens: routed, without a slot, entropy of the gates in nats, gates.
    """
    token_T = torch.arange(score_BT.shape[1], device=score_BT.device)
    real_BT = torch.ones_like(score_BT, dtype=torch.bool) if length_B is None else token_T < length_B[:, None]
    wanted_BT = score_BT + bias > 0
    if initial:
        wanted_BT = wanted_BT | (token_T - (0 if start_BT is None else start_BT) < initial)
    return assign(score_BT, wanted_BT & real_BT, real_BT, noise_floor, capacity)


def first_slot(index_BK, slot_BT, start_BT, held_B=None, document_slot_B=None):
    """First slot of the document of each routed token, [B, K] int32, or of every token, where index_BK is None; slots
    are counted with the `held_B` cached ones, and document_slot_B is that of each row's document that began in an
    earlier call."""
    routed_BT, start_BT = slot_BT >= 0, start_BT.expand_as(slot_BT)
    before_BT = (routed_BT.cumsum(1) - routed_BT.long()).gather(1, start_BT.clamp(min=0))
    if held_B is not None:
        before_BT = torch.where(start_BT < 0, document_slot_B[:, None], before_BT + held_B[:, None])
    return (before_BT if index_BK is None else before_BT.gather(1, index_BK.clamp(min=0))).to(torch.int32)


def end_slot(slot_BT):
    """How many of a call's slots each token sees that reads without being routed, its own included: [B, T] int32."""
    return (slot_BT >= 0).cumsum(1, dtype=torch.int32)


@operation()
def take_rows(x_BTX: Tensor, index_BK: Tensor, inverse_BT: Tensor) -> Tensor:
    """Rows of `x_BTX` [B, T, ...] named by `index_BK`, as [B, K, ...]; index -1 gives zeros.

    inverse_BT: for each row of x its row of the result or -1, so that a kernel's backward is no atomic scatter.
    """
    index = index_BK.reshape(*index_BK.shape, *[1] * (x_BTX.dim() - 2))
    rows = x_BTX.gather(1, index.clamp(min=0).expand(-1, -1, *x_BTX.shape[2:]))
    return rows.masked_fill(index < 0, 0)


@operation()
def place(
    tokens: int, position_BT: Tensor | None, document_seen_B: Tensor, last_position_B2: Tensor, frequency_F: Tensor,
    scaling: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Where the tokens of a cached call stand: T of each row's document, or a single one with its own position.

    tokens: T. position_BT: None to count on in the row's document, or [B or 1, 1] position ids of a single token,
    which starts a document if it is neither of `last_position_B2` + 1, the positions of the last token and of the last
    column. document_seen_B: tokens of the row's document so far.
    frequency_F, scaling: RoPE's inverse frequencies [E / 2] and its tables' factor. Returns cos and sin [B, T, E] in
    `dtype`, start [B, 1] and position [B, T] in int64.
    """
    start_BT = -document_seen_B[:, None]
    if position_BT is None:
        position_BT = torch.arange(tokens, device=start_BT.device) - start_BT
    else:
        position_BT = position_BT.expand_as(start_BT) + 0
        start_BT = torch.where((position_BT == last_position_B2 + 1).any(1, keepdim=True), start_BT, 0)
    frequency_F = wide(frequency_F)  # also where a model, and its frequencies with it, is cast
    near_BT1 = (position_BT % NEAR)[..., None]  # and the rest, which is 0 for all but endless streams, in float64
    far_BTF = (position_BT[..., None] - near_BT1).double() * frequency_F.double() % math.tau
    angle_BTE = (near_BT1.to(frequency_F.dtype) * frequency_F + far_BTF.to(frequency_F.dtype)).repeat(1, 1, 2)
    return (angle_BTE.cos() * scaling).to(dtype), (angle_BTE.sin() * scaling).to(dtype), start_BT, position_BT


def causal_conv(x_BTC, weight_CL, history_BLC, start_BT, length_B):
    """Depthwise causal convolution: y_t = sum_i weight_i x_(t - L + 1 + i) over visible tokens, in x's dtype; one tap
    leaves x as it is. history_BLC: the L - 1 real tokens before this call, moved on IN PLACE, or None for zeros."""
    T, lags = x_BTC.shape[1], weight_CL.shape[1] - 1
    if not lags:
        return x_BTC
    before = x_BTC.new_zeros(x_BTC.shape[0], lags, x_BTC.shape[2]) if history_BLC is None else history_BLC
    padded, weight_CL = torch.cat([before.to(x_BTC.dtype), x_BTC], 1), weight_CL.to(x_BTC.dtype)
    token_T = torch.arange(T, device=x_BTC.device)
    y_BTC = x_BTC * weight_CL[:, -1]
    for lag in range(1, lags + 1):
        past_BTC = padded[:, lags - lag : lags - lag + T]
        if start_BT is not None:
            past_BTC = torch.where((token_T - lag >= start_BT)[..., None], past_BTC, 0)
        y_BTC = y_BTC + past_BTC * weight_CL[:, -1 - lag]
    if history_BLC is not None:
        latest_BLC = padded[:, T:]
        if length_B is not None:
            index_BL = length_B[:, None] + torch.arange(lags, device=x_BTC.device)
            latest_BLC = padded.gather(1, index_BL[..., None].expand(-1, -1, x_BTC.shape[2]))
        history_BLC.copy_(latest_BLC)
    return y_BTC


def feature_map(x, kind):
    """What linear attention reads of q and k: "gated", SiLU over its length (at least 1e-12), or "elu", elu(x) + 1."""
    wider = F.silu(x).to(torch.promote_types(x.dtype, torch.float32))
    if kind == "gated":
        return F.normalize(wider, dim=-1).to(x.dtype)
    return (F.elu(x.to(wider.dtype)) + 1).to(x.dtype)


def rotate(x_BTHE, cos_BTE, sin_BTE):
    """RoPE (arXiv 2104.09864) of halves, in x's dtype; the tables' first dimension is 1 or B."""
    low, high = x_BTHE.chunk(2, -1)
    cos, sin = cos_BTE[:, :, None].to(x_BTHE.dtype), sin_BTE[:, :, None].to(x_BTHE.dtype)
    return x_BTHE * cos + torch.cat([-high, low], -1) * sin


@operation("history_BLC")
def split_heads(
    x_BTC: Tensor, weight_CL: Tensor, history_BLC: Tensor | None, start_BT: Tensor | None, length_B: Tensor | None,
    cos_BTE: Tensor, sin_BTE: Tensor, q_norm_E: Tensor, k_norm_E: Tensor, kv_heads: int, eps: float, feature: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """From the shared projection to what both streams read: convolution, heads, feature map, norms and RoPE.

    x_BTC: C = (H + 2 * kv_heads) * E channels, queries first, then keys, then values. weight_CL, history_BLC: of
    `causal_conv`. q_norm_E, k_norm_E: weights of the RMSNorm per head, with `eps` inside its root. feature: the kind
    of `feature_map`. Returns q_linear [B, T, H, E], k_linear [B, T, G, E], q [B, T, H, E], k and v
    [B, T, G, E] in x's dtype, in which the convolution and RoPE are computed too (a kernel may round less).
    """
    E = q_norm_E.shape[0]
    x_BTC = causal_conv(x_BTC, weight_CL, history_BLC, start_BT, length_B)
    q, k, v = x_BTC.unflatten(-1, (-1, E)).split((x_BTC.shape[2] // E - 2 * kv_heads, kv_heads, kv_heads), 2)
    # Autocast on CUDA has a float32 norm
    q_normed = F.rms_norm(q, (E,), q_norm_E.to(q.dtype), eps).to(q.dtype)
    k_normed = F.rms_norm(k, (E,), k_norm_E.to(k.dtype), eps).to(k.dtype)
    features = feature_map(q, feature), feature_map(k, feature)
    return *features, rotate(q_normed, cos_BTE, sin_BTE), rotate(k_normed, cos_BTE, sin_BTE), v


def log_decay(decay_BTH, log_rate_H, bias_H, least):
    """Log-decay of tokens and heads, -least - exp(log_rate) * softplus(decay + bias), float32 or wider, at most 0.
    Every head forgets at least `least` nats per token, so that no state remembers without end."""
    kind = torch.promote_types(decay_BTH.dtype, torch.float32)
    return -log_rate_H.to(kind).exp() * F.softplus(decay_BTH.to(kind) + bias_H.to(kind)) - least


@operation()
def norm_heads(
    x_BTD: Tensor, norm_D: Tensor, eps: float, head_weight_XD: Tensor, log_rate_H: Tensor, rate_bias_H: Tensor,
    least: float, score_weight_D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """RMSNorm of a block's input, and what the linear attention and the router make of it in narrow products.

    head_weight_XD: the H rows of the decays' inputs, then the H rows of the gates. log_rate, rate_bias, least: of
    `log_decay`. Returns h [B, T, D] in x's dtype, log_decay [B, T, H] in float32, the gates before their sigmoid
    [B, T, H] in x's dtype, and the score [B, T] in float32, [B, 0] without a weight.
    """
    h_BTD = F.rms_norm(x_BTD, norm_D.shape, norm_D.to(x_BTD.dtype), eps)
    decay_BTH, gate_BTH = F.linear(h_BTD, head_weight_XD).chunk(2, -1)
    score_BT = wide(h_BTD)[:, :0, 0] if score_weight_D is None else router_score(h_BTD, score_weight_D)
    return h_BTD, log_decay(decay_BTH, log_rate_H, rate_bias_H, least), gate_BTH, score_BT


@operation()
def add_norm(x_BTD: Tensor, y_BTD: Tensor, norm_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its RMSNorm, in x's dtype."""
    sum_BTD = x_BTD + y_BTD
    return sum_BTD, F.rms_norm(sum_BTD, norm_D.shape, norm_D.to(x_BTD.dtype), eps)


def linear_attention_recurrent(q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, length_B, state_BHEF):
    """Decayed linear attention, one token at a time: S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T and o_t = S_t^T q_t.

    The state restarts at zero where start_t = t; tokens past `length_B` leave it as it was. Returns o_BTHF in q's
    dtype and the last state in float32 or wider. Linear Transformers (arXiv 2006.16236), decays of arXiv 2405.21060.
    """
    (B, T), R, dtype = q_BTHE.shape[:2], q_BTHE.shape[2] // k_BTGE.shape[2], q_BTHE.dtype
    q_BTHE, k_BTGE, v_BTGF = wide(q_BTHE), wide(k_BTGE), wide(v_BTGF)
    start_BT = None if start_BT is None else start_BT.expand(B, T)
    state, outputs = state_BHEF.to(q_BTHE.dtype), []
    for t in range(T):
        update = (k_BTGE[:, t, :, :, None] * v_BTGF[:, t, :, None]).repeat_interleave(R, 1)
        decay = log_decay_BTH[:, t].to(state.dtype).exp()[..., None, None]
        if start_BT is not None:
            decay = decay * (start_BT[:, t] < t)[:, None, None, None]
        advanced = decay * state + update
        if length_B is not None:
            advanced = torch.where((t < length_B)[:, None, None, None], advanced, state)
        state = advanced
        outputs.append((q_BTHE[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, 1).to(dtype), state


@operation("state_BHEF")
def linear_attention(
    q_BTHE: Tensor, k_BTGE: Tensor, v_BTGF: Tensor, log_decay_BTH: Tensor, start_BT: Tensor | None,
    length_B: Tensor | None, state_BHEF: Tensor | None,
) -> Tensor:  # fmt: skip
    """`linear_attention_recurrent` in chunks of `LINEAR_CHUNK` tokens: the same result from matrix products.

    Products run in q's dtype, decays and states in float32. state_BHEF: float32, advanced IN PLACE, or None for zeros.
    Returns o_BTHF in q's dtype, finite and meaningless past `length_B`. Chunkwise form of Gated Linear Attention
    (arXiv 2312.06635) and the state-space dual (arXiv 2405.21060).
    """
    B, T, H, E = q_BTHE.shape
    kind = torch.promote_types(q_BTHE.dtype, torch.float32)
    state = q_BTHE.new_zeros(B, H, E, v_BTGF.shape[-1], dtype=kind) if state_BHEF is None else state_BHEF.to(kind)
    start_BT = None if start_BT is None else start_BT.expand(B, T)
    if length_B is not None:
        real_BT = torch.arange(T, device=q_BTHE.device) < length_B[:, None]
        log_decay_BTH = torch.where(real_BT[..., None], log_decay_BTH, 0)
        k_BTGE = torch.where(real_BT[..., None, None], k_BTGE, 0)
    outputs = []
    for begin, end in spans(T, LINEAR_SPAN):
        span, start = slice(begin, end), None if start_BT is None else start_BT[:, begin:end] - begin
        out, state = _linear_attention_span(
            q_BTHE[:, span], k_BTGE[:, span], v_BTGF[:, span], log_decay_BTH[:, span], start, state
        )
        outputs.append(out)
    if state_BHEF is not None:
        state_BHEF.copy_(state)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _linear_attention_span(q_BTHE, k_BTGE, v_BTGF, log_decay_BTH, start_BT, state_BHEF):
    (B, T, H, E), (G, V) = q_BTHE.shape, v_BTGF.shape[2:]
    R, (L, N) = H // G, blocks_of(T, LINEAR_CHUNK)
    padding = N * L - T
    if padding:  # empty tokens: no key, no decay
        tail = (0, 0, 0, 0, 0, padding)
        q_BTHE, k_BTGE, v_BTGF = F.pad(q_BTHE, tail), F.pad(k_BTGE, tail), F.pad(v_BTGF, tail)
        log_decay_BTH = F.pad(log_decay_BTH, tail[2:])
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
        visible = (visible & (token_L >= start[..., None]))[:, :, None, None]
    weight = (decay[..., :, None] - decay[..., None, :]).masked_fill(~visible, float("-inf")).exp()
    scores = (q.reshape(B, N, G, R * L, E) @ k.transpose(-1, -2)).reshape(B, N, G, R, L, L)
    out = ((scores * weight).to(v.dtype).reshape(B, N, G, R * L, L) @ v).reshape(B, N, G, R, L, V)
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
    sources = torch.cat([state_BHEF[:, None], updates.to(state_BHEF.dtype).reshape(B, N, H, E, V)], 1)
    with torch.autocast(q.device.type, enabled=False):  # it would round the states to bfloat16
        states = torch.einsum("bhnm,bmhx->bnhx", carry, sources.flatten(3)).reshape(B, N + 1, G, R, E, V)
    from_begin = decay.exp()
    if start_BT is not None:
        from_begin = from_begin * (start < 0)[:, :, None, None]
    out = out + (q @ states[:, :-1].to(q.dtype)) * from_begin[..., None]
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(B, N * L, H, V)[:, :T]
    return out.to(q_BTHE.dtype), states[:, -1].reshape(B, H, E, V)


def masked_attention(q_BTHE, k_BNSGE, v_BNSGE, visible_BNTS, log_gate_BNS=None):
    """Attention of N blocks of queries, each over its own S keys, whose log gates are added to their scores; T = N *
    (queries per block)."""
    (B, T, H, E), (N, _, G) = q_BTHE.shape, k_BNSGE.shape[1:4]
    kind = torch.promote_types(q_BTHE.dtype, torch.float32)
    if not k_BNSGE.shape[2]:
        return torch.zeros_like(q_BTHE), q_BTHE.new_full((B, T, H), float("-inf"), dtype=kind)
    q = q_BTHE.reshape(B, N, T // N, G, H // G, E).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)  # [B, N, G, R * T/N, E]
    k, v = k_BNSGE.transpose(2, 3), v_BNSGE.transpose(2, 3)  # [B, N, G, S, E]
    visible = visible_BNTS[:, :, None, None]
    scores = (q @ k.transpose(-1, -2)).to(kind).unflatten(3, (H // G, T // N)) * E**-0.5
    if log_gate_BNS is not None:
        scores = scores + log_gate_BNS[:, :, None, None, None]
    scores = scores.masked_fill(~visible, HIDDEN_SCORE)
    weights, empty = scores.softmax(-1), ~visible.any(-1)
    # the largest weight is exp(largest score - lse), so the sum of exponentials is not needed a second time
    lse = (scores.amax(-1) - weights.amax(-1).log()).masked_fill(empty, float("-inf"))
    out = (weights.to(v.dtype).flatten(3, 4) @ v).unflatten(3, (H // G, T // N)).masked_fill(empty[..., None], 0)
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(B, T, H, E)
    return out, lse.permute(0, 1, 4, 2, 3).reshape(B, T, H)


@operation()
def local_attention(
    q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, start_BT: Tensor | None, window: int, ring_k_BWGE: Tensor | None,
    ring_v_BWGE: Tensor | None, seen_B: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention of token t over the visible tokens among t - window + 1 .. t.

    ring_*: keys and values of the last `window` of `seen_B` real tokens before this call, token i at i modulo the
    window; None: none are visible. Blocks of queries see only their own stretch of keys, so time and memory are
    O(T * window). Returns out_BTHE in q's dtype and the log-sum-exp lse_BTH, float32, of scores scaled by 1/sqrt(E).
    """
    B, T, G, E = k_BTGE.shape
    block, N = blocks_of(T, window)
    padding = N * block - T
    start_BT = q_BTHE[:1, :, 0, 0].new_zeros(1, T, dtype=torch.long) if start_BT is None else start_BT.expand(-1, T)
    past_k = past_v = k_BTGE.new_zeros(B, window, G, E)
    if ring_k_BWGE is None:
        start_BT = start_BT.clamp(min=0)
    else:
        slot_BW = (seen_B[:, None] + torch.arange(window, device=seen_B.device)) % window
        # not gather, whose gradient keeps the ring, which this call writes before backward
        at = torch.arange(B, device=seen_B.device)[:, None], slot_BW
        past_k, past_v = ring_k_BWGE[at].to(k_BTGE.dtype), ring_v_BWGE[at].to(v_BTGE.dtype)
    tail = (0, 0, 0, 0, 0, padding)
    q, k, v = F.pad(q_BTHE, tail), torch.cat([past_k, k_BTGE], 1), torch.cat([past_v, v_BTGE], 1)
    # Stretches of window + block keys, one per block of queries; blocks are `window` long unless there is one
    kv = F.pad(torch.stack([k, v]), tail).unflatten(2, (-1, window) if N > 1 else (1, -1))
    k, v = torch.cat([kv[:, :, :-1], kv[:, :, 1:]], 3) if N > 1 else kv
    token = torch.arange(N * block, device=q.device).reshape(N, block, 1)
    key = torch.arange(-window, block, device=q.device) + torch.arange(0, N * block, block, device=q.device)[:, None]
    key = key[:, None]  # [N, 1, window + block]
    start = F.pad(start_BT, (0, padding)).reshape(-1, N, block, 1)
    visible = ((key <= token) & (key > token - window) & (key >= start)).expand(B, -1, -1, -1)
    out, lse = masked_attention(q, k, v, visible)
    return out[:, :T], lse[:, :T]


@operation()
def reflexive_merge(
    q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, start_BT: Tensor | None, window: int, ring_k_BWGE: Tensor | None,
    ring_v_BWGE: Tensor | None, seen_B: Tensor | None, linear_BTHE: Tensor, head_gate_BTH: Tensor, norm_E: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """The reflexive stream: local attention + RMSNorm(linear) * sigmoid(head_gate), norm and gate per head.

    The first eight are those of `local_attention`; linear_BTHE is of `linear_attention`. Returns [B, T, H, E] in q's
    dtype; norm, gate and sum are float32 or wider.
    """
    local_BTHE, _ = local_attention.reference(
        q_BTHE, k_BTGE, v_BTGE, start_BT, window, ring_k_BWGE, ring_v_BWGE, seen_B
    )
    normed_BTHE = F.rms_norm(wide(linear_BTHE), norm_E.shape, wide(norm_E), eps)
    return (local_BTHE + normed_BTHE * wide(head_gate_BTH).sigmoid()[..., None]).to(q_BTHE.dtype)


@operation()
def sqsk_attention(
    q_BKHE: Tensor, k_BPGE: Tensor, v_BPGE: Tensor, log_gate_BP: Tensor | None, first_BK: Tensor | None,
    held_B: Tensor | None, count_B: Tensor, end_BK: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention to the routed keys: query i sees slots first_i .. held + end_i - 1; one that sees none gives zeros.

    k_BPGE holds `held_B` earlier slots (None: none) before the `count_B` of this call, all ordered by position, with
    RoPE of original positions. log_gate_BP, float32, is added to the scores q . k / sqrt(E) of its slot; None adds
    nothing. end_BK, which never decreases along a row: how many slots of this call, of those that
    are used, each query sees. None: the queries are these slots, which see each other up to themselves (SQSK: dense
    causal attention on compacted rows); unused ones give zeros. first_BK is the first visible slot (packed documents),
    None for slot 0. Returns out_BKHE in q's dtype and the log-sum-exp of the scores lse_BKH in float32, -inf where
    nothing is seen.
    """
    K, P, held_B1 = q_BKHE.shape[1], k_BPGE.shape[1], 0 if held_B is None else held_B[:, None]
    slot_K, key_P = torch.arange(K, device=q_BKHE.device), torch.arange(P, device=q_BKHE.device)
    if end_BK is None:
        end_BK = torch.where(slot_K < count_B[:, None], slot_K + 1 + held_B1, 0)
    else:
        end_BK = end_BK.minimum(count_B[:, None]) + held_B1
    outputs, log_gate_B1P = [], None if log_gate_BP is None else log_gate_BP[:, None]
    for begin, end in spans(K, QUERY_SPAN):
        visible = key_P < end_BK[:, begin:end, None]
        if first_BK is not None:
            visible = visible & (key_P >= first_BK[:, begin:end, None])
        kept = k_BPGE[:, None], v_BPGE[:, None], visible[:, None], log_gate_B1P
        outputs.append(masked_attention(q_BKHE[:, begin:end], *kept))
    if len(outputs) == 1:
        return outputs[0]
    return tuple(torch.cat(parts, 1) for parts in zip(*outputs, strict=True))


def add_sinks(out_BTHE, lse_BTH, q_BTHE, sink_k_NGE, sink_v_NGE):
    """Attention output as if N learned keys and values had taken part in the softmax (arXiv 2309.17453)."""
    N, G, E = sink_k_NGE.shape
    q = wide(q_BTHE).unflatten(2, (G, -1))
    scores = torch.einsum("btgre,nge->btgrn", q, wide(sink_k_NGE)).flatten(2, 3) * E**-0.5
    total = torch.logaddexp(lse_BTH, scores.logsumexp(-1))
    weights = (scores - total[..., None]).exp().unflatten(2, (G, -1))
    sinks = torch.einsum("btgrn,nge->btgre", weights, wide(sink_v_NGE)).flatten(2, 3)
    return (wide(out_BTHE) * (lse_BTH - total).exp()[..., None] + sinks).to(out_BTHE.dtype)


@operation()
def contextual(
    q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, gate_BT: Tensor, index_BK: Tensor, slot_BT: Tensor,
    first_BK: Tensor | None, count_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """gate * SQSK attention of the routed tokens of a call among themselves, zeros at the others: `sqsk_merge` of all
    keys in token order, with gradients.

    index_BK, slot_BT, count_B: of `route`. first_BK: of `sqsk_attention`. Returns out_BTHE in q's dtype and, detached,
    the two outputs of `sqsk_attention`: what a kernel's gradient keeps beside the arguments.
    """
    # gather and not take_along_dim, which fixes a symbolic length
    token, slot = index_BK.clamp(min=0)[..., None, None], slot_BT[..., None, None]
    q_at, kv_at = token.expand(-1, -1, *q_BTHE.shape[2:]), token.expand(-1, -1, *k_BTGE.shape[2:])
    rows = q_BTHE.gather(1, q_at), k_BTGE.gather(1, kv_at), v_BTGE.gather(1, kv_at)
    out_BKHE, lse_BKH = sqsk_attention.reference(*rows, None, first_BK, None, count_B, None)
    out_BTHE = out_BKHE.gather(1, slot.clamp(min=0).expand_as(q_BTHE)) * gate_BT[..., None, None].to(out_BKHE.dtype)
    return out_BTHE.masked_fill(slot < 0, 0), out_BKHE.detach(), lse_BKH.detach()


@operation("reflexive_BTHE")
def sqsk_merge(
    reflexive_BTHE: Tensor, gate_BT: Tensor, q_BTHE: Tensor, k_BPGE: Tensor, v_BPGE: Tensor,
    log_gate_BP: Tensor | None, index_BK: Tensor, first_BN: Tensor | None, held_B: Tensor | None, count_B: Tensor,
    end_BT: Tensor | None,
) -> None:  # fmt: skip
    """Add the contextual stream to `reflexive_BTHE`, IN PLACE: gate * SQSK attention to the routed tokens, the others
    not being touched, or, with end_BT, what each token reads of the routed ones, not gated.

    index_BK, count_B: of `route`. held_B given: k_BPGE, v_BPGE and log_gate_BP are the sparse store, as in
    `sqsk_attention`. None: they are this call's, in token order (P = T). first_BN: of `sqsk_attention`, for the K
    routed tokens or, with end_BT, for all T.
    """
    kept = k_BPGE, v_BPGE, log_gate_BP
    if held_B is None:
        kept = [None if x is None else take_rows.reference(x, index_BK, index_BK) for x in kept]
    kept = *kept, first_BN, held_B, count_B, end_BT
    if end_BT is not None:
        reflexive_BTHE.add_(sqsk_attention.reference(q_BTHE, *kept)[0])
        return
    token = index_BK.clamp(min=0)[..., None, None].expand(-1, -1, *q_BTHE.shape[2:])
    out_BKHE, _ = sqsk_attention.reference(q_BTHE.gather(1, token), *kept)
    weight_BK = torch.where(index_BK >= 0, gate_BT.gather(1, token[..., 0, 0]), 0)
    added_BKHE = (out_BKHE * weight_BK[..., None, None]).to(reflexive_BTHE.dtype)
    reflexive_BTHE.scatter_add_(1, token, torch.where(weight_BK[..., None, None] > 0, added_BKHE, 0))


def quantize(x_BKGE, dtype):
    """Rows as a store of `dtype` holds them, int8 [B, K, G, E] or int32 [B, K, G, E / 8], and their scales [B, K, G],
    bfloat16. `LEVELS` equal steps span the range from minus to plus a head's largest element; a step is twice the
    scale, and an element is the number of its step. Zeros have scale 0.
    """
    half, x_BKGE = LEVELS[dtype] // 2, wide(x_BKGE)
    peak_BKG = x_BKGE.abs().amax(-1)
    # The kernel has the same bits: scales are rounded, up, as integers, and no compiler joins the product with a sum
    bits_BKG = torch.where(peak_BKG > LEAST_PEAK, peak_BKG / LEVELS[dtype], 0).float().view(torch.int32) + 0xFFFF
    scale_BKG = (bits_BKG & -0x10000).view(torch.float32)
    factor_BKG = torch.where(scale_BKG > 0, 0.5 / scale_BKG.to(x_BKGE.dtype), 0)
    number_BKGE = (x_BKGE * factor_BKG[..., None]).floor().clamp(-half, half - 1).to(dtype)
    if dtype == torch.int32:
        shift = torch.tensor(NIBBLES, dtype=dtype, device=x_BKGE.device)
        number_BKGE = ((number_BKGE + half).unflatten(-1, (-1, 8)) << shift).sum(-1, dtype=dtype)
    return number_BKGE, scale_BKG.bfloat16()


def dequantize(kept_BPGE, scales_BPG, dtype):
    """What `quantize` gave, as rows [B, P, G, E] in `dtype`: the middles of the steps, odd multiples of the scales."""
    if kept_BPGE.dtype == torch.int8:
        odd_BPGE = 2 * kept_BPGE.float() + 1
    else:
        shift = torch.tensor(NIBBLES, dtype=kept_BPGE.dtype, device=kept_BPGE.device)
        odd_BPGE = (2 * (kept_BPGE[..., None] >> shift & 15) - 15).flatten(-2).float()
    return (odd_BPGE * scales_BPG[..., None]).to(dtype)  # exact before: each factor has 8 bits


def as_stored(x_BTGE, dtype):
    """Rows as a store of `dtype` gives them back, with the gradient of the rows themselves (straight-through, arXiv
    1308.3432): who trains this way is used to how coarse they are."""
    kept_BTGE = dequantize(*quantize(x_BTGE.detach(), dtype), x_BTGE.dtype)
    return kept_BTGE + (x_BTGE - x_BTGE.detach())


def write_slots(kept_BPGE, scales_BPG, at, x_BKGE):
    """Put rows into the slots `at` of a sparse store, IN PLACE; their scales too if it is one of whole numbers."""
    if kept_BPGE.dtype in LEVELS:
        x_BKGE, scale_BKG = quantize(x_BKGE, kept_BPGE.dtype)
        scales_BPG.index_put_(at, scale_BKG.to(scales_BPG.dtype))
    # index_put and not scatter: inductor does the one in place, and copies the whole store for the other
    kept_BPGE.index_put_(at, x_BKGE.to(kept_BPGE.dtype))


def read_slots(kept_BPGE, scales_BPG, dtype):
    """A sparse store without its spare slot, as it is or, if of whole numbers, what it stands for in `dtype`."""
    kept_BPGE = kept_BPGE[:, :-1]
    return dequantize(kept_BPGE, scales_BPG[:, :-1], dtype) if kept_BPGE.dtype in LEVELS else kept_BPGE


@operation(*KEPT)
def extend(
    k_BTGE: Tensor, v_BTGE: Tensor, position_BT: Tensor, start_BT: Tensor, length_B: Tensor | None, seen_B: Tensor,
    score_BT: Tensor | None, index_BK: Tensor | None, slot_BT: Tensor | None, count_B: Tensor | None, every: bool,
    ring_k_BWGE: Tensor, ring_v_BWGE: Tensor, keys_BPGE: Tensor, values_BPGE: Tensor, positions_BP: Tensor,
    held_B: Tensor, document_slot_B: Tensor, key_scales_BPG: Tensor, value_scales_BPG: Tensor, log_gates_BP: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What a call leaves to the next: its last tokens in the window's ring, its routed tokens in the sparse store.

    k_BTGE, v_BTGE: of `split_heads`. position_BT: position ids, first dimension 1 or B. seen_B: real tokens before
    this call. score_BT, index_BK, slot_BT, count_B: of `route`, or None for a layer that routes nothing. every:
    whether each token reads, or the routed ones alone. ring_* [B, W, G, E]: of `local_attention`. keys, values
    [B, P + 1, G, E], positions [B, P + 1] (int32): the sparse store, whose last slot takes discarded writes.
    held_B (int32): tokens routed before, of which at most P have a slot. document_slot_B (int32): the first slot of
    each row's document. *_scales_BPG: of `quantize`, where keys and values are of a dtype of `LEVELS` (of int32, they
    are [B, P + 1, G, E / 8]), else unused. log_gates_BP (float32): log sigmoid(score), where they have the shape of
    the positions, else unused. Ring and store are written IN PLACE.
    Returns, int32, first_BN of `sqsk_merge`; slots held before, and tokens of this call that have one (the latest
    are left out of a full store) [2, B]; and the next call's `held_B` and `document_slot_B`, each in memory of its
    own, as a compiled call asks of what it writes; empty ones for a layer that routes nothing.
    """
    T, W = k_BTGE.shape[1], ring_k_BWGE.shape[1]
    if W:
        last_B1 = (seen_B + (T if length_B is None else length_B))[:, None] - 1
        token_BW = last_B1 - (last_B1 - torch.arange(W, device=seen_B.device)) % W - seen_B[:, None]
        token, new = token_BW.clamp(min=0)[..., None, None].expand_as(ring_k_BWGE), (token_BW >= 0)[..., None, None]
        for ring_BWGE, x_BTGE in ((ring_k_BWGE, k_BTGE), (ring_v_BWGE, v_BTGE)):
            ring_BWGE.copy_(torch.where(new, x_BTGE.gather(1, token).to(ring_BWGE.dtype), ring_BWGE))
    if index_BK is None:
        return held_B[:0], held_B[:0], held_B[:0], held_B[:0]
    (B, K), P = index_BK.shape, keys_BPGE.shape[1] - 1
    before_B, after_B = held_B.clamp(max=P), held_B + count_B
    kept_B = after_B.clamp(max=P) - before_B
    slot_K = torch.arange(K, device=held_B.device)
    slot_BK = torch.where(slot_K < kept_B[:, None], before_B[:, None] + slot_K, P)
    at = (torch.arange(B, device=held_B.device)[:, None], slot_BK.long())
    write_slots(keys_BPGE, key_scales_BPG, at, take_rows.reference(k_BTGE, index_BK, slot_BT))
    write_slots(values_BPGE, value_scales_BPG, at, take_rows.reference(v_BTGE, index_BK, slot_BT))
    token_BK = index_BK.clamp(min=0)
    position_BK = position_BT.expand_as(slot_BT).gather(1, token_BK)
    positions_BP.index_put_(at, position_BK.to(positions_BP.dtype))
    if log_gates_BP.shape == positions_BP.shape:
        log_gates_BP.index_put_(at, F.logsigmoid(score_BT.gather(1, token_BK)).to(log_gates_BP.dtype))
    first_BN = first_slot(None if every else index_BK, slot_BT, start_BT, held_B, document_slot_B)
    last_B1 = torch.full_like(slot_BT[:, :1], slot_BT.shape[1] - 1)
    document_B = first_slot(last_B1, slot_BT, start_BT, held_B, document_slot_B)[:, 0]
    return first_BN, torch.stack([before_B, kept_B]), after_B, document_B


def few_rows(x_BTD, weight_ND, scale_N1):
    """The product with a weight in x's dtype or, given scales of its rows, in e4m3. So few rows are bound by the
    weight's bytes and stay as they are, where `float8_linear` takes e4m3 on both sides.
    """
    if scale_N1 is not None:
        kind = torch.promote_types(x_BTD.dtype, torch.float32)
        weight_ND = dequantize_rows(weight_ND, scale_N1, kind).to(x_BTD.dtype)
    return F.linear(x_BTD, weight_ND)


@operation()
def project_token(
    x_BTD: Tensor, norm_D: Tensor, eps: float, qkv_weight_CD: Tensor, head_weight_XD: Tensor,
    score_weight_D: Tensor | None, qkv_scale_C1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From RMSNorm of a single token (T = 1): qkv [B, 1, C] in x's dtype, head [B, 1, X] (the inputs of the decays,
    then the gates) and the score [B, 1], [B, 0] without a weight, in float32. qkv_scale_C1: of `few_rows`.
    """
    h_BTD = F.rms_norm(x_BTD, norm_D.shape, norm_D.to(x_BTD.dtype), eps)
    score_BT = wide(h_BTD)[:, :0, 0] if score_weight_D is None else router_score(h_BTD, score_weight_D)
    return few_rows(h_BTD, qkv_weight_CD, qkv_scale_C1), wide(F.linear(h_BTD, head_weight_XD)), score_BT


@operation("state_BHEE", "held_B", "document_slot_B", *KEPT)
def attend_token(
    q_linear_BTHE: Tensor, k_linear_BTGE: Tensor, q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, head_BTX: Tensor,
    log_rate_H: Tensor, rate_bias_H: Tensor, least: float, norm_E: Tensor, eps: float, position_BT: Tensor,
    start_BT: Tensor, length_B: Tensor | None, seen_B: Tensor, score_BT: Tensor | None, bias: Tensor | None,
    noise_floor: float, initial: int, every: bool, state_BHEE: Tensor, ring_k_BWGE: Tensor, ring_v_BWGE: Tensor,
    keys_BPGE: Tensor, values_BPGE: Tensor, positions_BP: Tensor, held_B: Tensor, document_slot_B: Tensor,
    key_scales_BPG: Tensor, value_scales_BPG: Tensor, log_gates_BP: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both streams of a single token (T = 1): linear attention, window, and what `sqsk_merge` adds.

    q_linear, k_linear, q, k, v: of `split_heads`. head_BTX: of `project_token`. log_rate, rate_bias, least: of
    `log_decay`. norm_E, eps: of `reflexive_merge`. score_BT, bias, noise_floor, initial: of `route`, score None for a
    layer that routes nothing. The rest is that of `extend`, and log gates are held where every token reads. State,
    ring, store and counts are updated IN PLACE. A routed token without a free slot is counted and else treated as not
    routed; the output of padding (length 0) means nothing. Returns the sum [B, 1, H, E] in q's
    dtype and slot_BT (int64), 0 for a token that has a slot, else -1.
    """
    decay_BTH, gate_BTH = head_BTX.chunk(2, -1)
    decay_BTH = log_decay(decay_BTH, log_rate_H, rate_bias_H, least)
    linear_BTHE, state = linear_attention_recurrent(
        q_linear_BTHE, k_linear_BTGE, v_BTGE, decay_BTH, start_BT, length_B, state_BHEE
    )
    state_BHEE.copy_(state)
    ring = (ring_k_BWGE, ring_v_BWGE)
    window = (q_BTHE, k_BTGE, v_BTGE, start_BT, ring_k_BWGE.shape[1], *ring, seen_B)
    merged_BTHE = reflexive_merge.reference(*window, linear_BTHE, gate_BTH, norm_E, eps)
    gate_BT, index_BK, slot_BT, count_B = None, None, torch.full_like(start_BT, -1), None
    if score_BT is not None:
        gate_BT, index_BK, slot_BT, count_B, _ = route.reference(
            score_BT, bias, start_BT, length_B, noise_floor, initial, 1
        )
    first_BN, numbers_2B, after_B, document_B = extend.reference(
        k_BTGE, v_BTGE, position_BT, start_BT, length_B, seen_B, score_BT, index_BK, slot_BT, count_B, every, *ring,
        keys_BPGE, values_BPGE, positions_BP, held_B, document_slot_B, key_scales_BPG, value_scales_BPG, log_gates_BP,
    )  # fmt: skip
    if score_BT is None:
        return merged_BTHE, slot_BT
    before_B, kept_B = numbers_2B
    held_B.copy_(after_B)
    document_slot_B.copy_(document_B)
    kv = (read_slots(keys_BPGE, key_scales_BPG, q_BTHE.dtype), read_slots(values_BPGE, value_scales_BPG, q_BTHE.dtype))
    log_gate_BP, end_BT = (log_gates_BP[:, :-1], end_slot(slot_BT)) if every else (None, None)
    sqsk_merge.reference(merged_BTHE, gate_BT, q_BTHE, *kv, log_gate_BP, index_BK, first_BN, before_B, kept_B, end_BT)
    return merged_BTHE, torch.where(kept_B[:, None] > 0, slot_BT, -1)


@operation()
def swiglu_token(
    x_BTD: Tensor, norm_D: Tensor, eps: float, gate_weight_ND: Tensor, up_weight_ND: Tensor,
    gate_scale_N1: Tensor | None, up_scale_N1: Tensor | None,
) -> Tensor:  # fmt: skip
    """`swiglu` of RMSNorm(x), of a single token (T = 1); scales: of `few_rows`."""
    h_BTD = F.rms_norm(x_BTD, norm_D.shape, norm_D.to(x_BTD.dtype), eps)
    return gated_product(few_rows(h_BTD, gate_weight_ND, gate_scale_N1), few_rows(h_BTD, up_weight_ND, up_scale_N1))


@operation()
def linear_add_token(residual_BTN: Tensor, x_BTD: Tensor, weight_ND: Tensor, scale_N1: Tensor | None) -> Tensor:
    """residual [B, 1, N] + the product of x [B, 1, D] with the weight, in x's dtype; scale_N1: of `few_rows`."""
    return residual_BTN + few_rows(x_BTD, weight_ND, scale_N1)


def gated_product(gate, up):
    """silu(max(gate, -SILU_LIMIT)) * up, in their dtype."""
    return F.silu(gate.clamp(min=-SILU_LIMIT)) * up


@operation()
def swiglu(x: Tensor, gate_weight_NK: Tensor, up_weight_NK: Tensor) -> Tensor:
    """`gated_product` of x [..., K] times the weights (arXiv 2002.05202), [..., N] in x's dtype, in which gate and up
    are rounded too (a kernel may round less).
    """
    return gated_product(F.linear(x, gate_weight_NK), F.linear(x, up_weight_NK))


@operation()
def gated_mlp(
    x_BTD: Tensor, gate_weight_ND: Tensor, up_weight_ND: Tensor, weight_DN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu` of x times the weight, [B, T, D] in x's dtype (arXiv 2002.05202), and, detached, gate and up [B, T, N]:
    what a kernel's gradient keeps beside the arguments, as the product costs one pass to make again.
    """
    gate_BTN, up_BTN = F.linear(x_BTD, gate_weight_ND), F.linear(x_BTD, up_weight_ND)
    return F.linear(gated_product(gate_BTN, up_BTN), weight_DN), gate_BTN.detach(), up_BTN.detach()


@operation("residual")
def linear_add(residual: Tensor, x: Tensor, weight_NK: Tensor) -> None:
    """Add the product of x [..., K] with the weight to residual [..., N], IN PLACE."""
    residual.add_(F.linear(x, weight_NK))


def check_float8(capability):
    """ValueError for the compute capability, as major * 10 + minor, of a device that does not multiply e4m3."""
    if capability < FLOAT8_CAPABILITY:
        raise ValueError(
            f"float8 needs compute capability {FLOAT8_CAPABILITY / 10} or more, the device has {capability / 10}; "
            "load the model without quantization_config, or call its dequantize()"
        )


def scale_exponent(peak):
    """e8m0 bits of the least power of two by which a positive `peak` is divided to be at most `E4M3_PEAK`."""
    bits = (peak / E4M3_PEAK).float().view(torch.int32)
    return ((bits >> 23) + (bits & 0x7FFFFF != 0)).clamp(max=254).to(torch.uint8)


@operation()
def quantize_rows(x: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Rows x [..., K] in e4m3 and the scales that they are to be multiplied by, of the largest element of each:
    "rowwise" float32 [..., 1]; "mx" e8m0 [..., K / 32], rounded up (OCP Microscaling Formats 1.0, arXiv 2506.08027).
    """
    group, kind = SCALINGS[scaling]
    size = group or x.shape[-1]
    groups = wide(x).unflatten(-1, (x.shape[-1] // size, size))
    peak = groups.abs().amax(-1).clamp(min=LEAST_PEAK)
    scale = scale_exponent(peak).view(kind) if group else (peak / E4M3_PEAK).float()
    return (groups * scale.to(groups.dtype).reciprocal()[..., None]).flatten(-2).to(E4M3), scale


@operation()
def quantize_product(gate: Tensor, up: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the `gated_product` of gate and up [..., K] (which a kernel does not round in between)."""
    return quantize_rows.reference(gated_product(gate, up), scaling)


def dequantize_rows(x, scale, dtype=torch.float32):
    """What `quantize_rows` gave, as rows [..., K] in `dtype`, exact in float32."""
    sizes = scale.shape[-1], x.shape[-1] // scale.shape[-1]
    return (x.to(dtype).unflatten(-1, sizes) * scale.to(dtype)[..., None]).flatten(-2)


@operation()
def float8_linear(x: Tensor, scale: Tensor, weight_NK: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product [..., N] in `dtype` of x [..., K] with a weight, both of `quantize_rows` with their scales."""
    kind = torch.promote_types(dtype, torch.float32)
    return F.linear(dequantize_rows(x, scale, kind), dequantize_rows(weight_NK, weight_scale, kind)).to(dtype)


@operation()
def token_losses(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Cross entropy in nats of each row of logits with its target (int64), 0 for `IGNORED`: [N], float32 or wider."""
    log_share_NV = logits_NV.log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    loss_N = -log_share_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0]
    return loss_N.masked_fill(target_N == IGNORED, 0.0)  # cross_entropy's fake has no shape of rows in torch 2.13


compiled_flex_attention = cache(partial(torch.compile, flex_attention))  # made when it is first needed


def _flex(q_BTHE, k_BSGE, v_BSGE, blocks, visible, score_mod=None):
    attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSGE, v_BSGE))
    mask = _block_mask(*blocks, visible, (q.shape[2], k.shape[2]))
    out, aux = attend(
        q, k, v, score_mod, mask, enable_gqa=q.shape[1] != k.shape[1],
        # Fewer than 128 queries would go to a kernel for decoding, which inductor does not find for masks of ours
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True}, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


def _block_mask(counts_BN, indices_BNM, full_counts_BN, full_indices_BNM, visible, lengths):
    """`BlockMask` of key blocks per query block, the same for all heads; the full ones (or None) need no mask.

    FlexAttention's kernels take the tensors for row-major, also in the head dimension of size 1, where inductor lays
    out its own as it likes: in inference, row b of a [B, 1, N] tensor with strides (N, B * N, 1) was read B rows
    further on. `as_strided` fixes the layout.
    """

    def row_major(x):
        x = x[:, None].to(torch.int32).contiguous()
        strides = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
        return x.as_strided(x.shape, strides)

    tensors = (None if x is None else row_major(x) for x in (counts_BN, indices_BNM, full_counts_BN, full_indices_BNM))
    return BlockMask.from_kv_blocks(*tensors, BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=lengths)


def _blocks(first_BN, last_BN, M):
    """Counts and indices of the key blocks first .. last (both included), of M, of each query block."""
    index_BNM = first_BN[..., None] + torch.arange(M, device=first_BN.device)
    return (last_BN - first_BN + 1).clamp(min=0), index_BNM.clamp(max=M - 1)


@local_attention.flex
def _(q_BTHE, k_BTGE, v_BTGE, start_BT, window, ring_k_BWGE, ring_v_BWGE, seen_B):
    if ring_k_BWGE is not None:
        ring = (ring_k_BWGE, ring_v_BWGE, seen_B)
        return local_attention.reference(q_BTHE, k_BTGE, v_BTGE, start_BT, window, *ring)
    B, T = q_BTHE.shape[:2]
    N = -(-T // FLEX_BLOCK)
    block_N = torch.arange(N, device=q_BTHE.device)
    first_BN = ((block_N * FLEX_BLOCK - window + 1).clamp(min=0) // FLEX_BLOCK).expand(B, N)
    start_BT = None if start_BT is None else start_BT.expand(B, T)

    def visible(b, h, query, key):
        near = (key <= query) & (key > query - window)
        return near if start_BT is None else near & (key >= start_BT[b, query])

    return _flex(q_BTHE, k_BTGE, v_BTGE, (*_blocks(first_BN, block_N.expand(B, N), N), None, None), visible)


@sqsk_attention.flex
def _(q_BKHE, k_BPGE, v_BPGE, log_gate_BP, first_BK, held_B, count_B, end_BK):
    """Only blocks of keys that a block of queries sees are visited, so no [K, P] mask exists."""
    if held_B is not None:
        return sqsk_attention.reference(q_BKHE, k_BPGE, v_BPGE, log_gate_BP, first_BK, held_B, count_B, end_BK)
    K, P = q_BKHE.shape[1], k_BPGE.shape[1]
    slot_K, own = torch.arange(K, device=q_BKHE.device), end_BK is None
    end_BK = torch.where(slot_K < count_B[:, None], slot_K + 1, 0) if own else end_BK.minimum(count_B[:, None])
    end_BNX = F.pad(end_BK, (0, -K % FLEX_BLOCK)).unflatten(1, (-1, FLEX_BLOCK))
    last_BN, M = (end_BNX.amax(-1) - 1) // FLEX_BLOCK, -(-P // FLEX_BLOCK)
    if first_BK is None:
        full_BN = end_BNX.amin(-1) // FLEX_BLOCK
        blocks = (*_blocks(full_BN, last_BN, M), *_blocks(torch.zeros_like(full_BN), full_BN - 1, M))
    else:
        blocks = (*_blocks(first_BK[:, ::FLEX_BLOCK] // FLEX_BLOCK, last_BN, M), None, None)

    def visible(b, h, query, key):
        seen = key <= query if own else key < end_BK[b, query]
        return seen if first_BK is None else seen & (key >= first_BK[b, query])

    def gated(score, b, h, query, key):
        return score + log_gate_BP[b, key]

    return _flex(q_BKHE, k_BPGE, v_BPGE, blocks, visible, None if log_gate_BP is None else gated)


@contextual.flex
def _(q_BTHE, k_BTGE, v_BTGE, gate_BT, index_BK, slot_BT, first_BK, count_B):
    take = take_rows.form("train")
    rows = (take(x, index_BK, slot_BT) for x in (q_BTHE, k_BTGE, v_BTGE))
    out_BKHE, lse_BKH = sqsk_attention(*rows, None, first_BK, None, count_B, None, backend="flex")
    out_BTHE = take(out_BKHE, slot_BT, index_BK) * gate_BT[..., None, None].to(out_BKHE.dtype)
    return out_BTHE, out_BKHE.detach(), lse_BKH.detach()
