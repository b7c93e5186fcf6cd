"""Every number that defines an HSPMN model: typed, documented, validated."""

from functools import wraps

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

CONCENTRATED_SHARE, ROUTING_PERIOD = 0.2, 4  # of `sparsity_k=None`: the average share, and every which layer routes
LEAST_SHARE = 1e-6  # of routed tokens in a layer that routes any
CHOICES = {
    "contextual_readers": ("routed", "all"), "router_mode": ("threshold", "topk"),
    "linear_attention": ("gated", "elu"), "hidden_act": ("silu",),
    "backend": ("auto", "reference", "flex", "triton"), "kv_cache_dtype": ("auto", "int8", "int4"),
}  # fmt: skip
ROPE_TYPES = {  # and what each needs beside `rope_theta`
    "default": (), "linear": ("factor",), "proportional": (), "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
MOST = 2**31 - 1  # what int32, the type of positions and slots, holds
LIMITS = (  # fields, the least value and the largest: where memory, time to build or float32 end, far above real use
    (("vocab_size",), 1, 2**24),
    (("hidden_size",), 1, 2**16),
    (("intermediate_size",), 1, 2**20),
    (("routed_intermediate_size",), 0, 2**20),
    (("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), 1, 1024),
    (("conv_kernel_size",), 1, 256),
    (("sliding_window",), 0, 2**17),
    (("num_sink_tokens",), 0, 4096),
    (("max_position_embeddings", "rope_parameters['original_max_position_embeddings']"), 1, MOST),
    (("router_initial_tokens", "linear_attention_horizon"), 0, MOST),
    (("router_bias_rate", "router_token_entropy_coef", "router_load_entropy_coef"), 0.0, 1e4),
    (("router_bias_gain",), 1e-6, 1e6),
    (("initializer_range", "rms_norm_eps"), 1e-12, 1.0),  # transformers' own tests draw weights of 1e-10
    (("capacity_factor",), 1.0, 1e6),
    (("router_noise_floor",), 0.0, 1 - 2**-24),
    (("sparsity_anneal_fraction", "rope_parameters['partial_rotary_factor']"), 0.0, 1.0),
    (("rope_parameters['rope_theta']",), 1.001, 1e30),
    (("rope_parameters['factor']",), 1.0, 1e9),
    (("rope_parameters['low_freq_factor']", "rope_parameters['high_freq_factor']"), 1e-6, 1e6),
    (("rope_parameters['beta_fast']", "rope_parameters['beta_slow']"), 1e-3, 1e6),
    (("rope_parameters['attention_factor']",), 1e-3, 1e3),
    (("rope_parameters['mscale']", "rope_parameters['mscale_all_dim']"), 0.0, 1e3),
)


def raises_value_error(method):
    """`method` with strict-dataclass errors, which are plain `Exception`s, raised as `ValueError`."""

    @wraps(method)
    def wrapped(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    return wrapped


def in_one_form(setattr_):
    """`setattr_` of a config, given a float for a whole number where a float is due, and RoPE parameters without keys
    of None and without `type`, the old name of `rope_type`. A theta that they leave out stays as it was."""

    @wraps(setattr_)
    def wrapped(self, name, value):
        if HSPMNConfig.__annotations__.get(name) is float and type(value) is int and abs(value) < 10**300:
            value = float(value)
        if name == "rope_parameters" and isinstance(value, dict | None):
            value = {key: number for key, number in (value or {}).items() if number is not None}
            value.setdefault("rope_type", value.pop("type", "default"))
            if "rope_theta" in (held := self.rope_parameters or {}):
                value.setdefault("rope_theta", held["rope_theta"])
        setattr_(self, name, value)

    return wrapped


@strict
class HSPMNConfig(PreTrainedConfig):
    """Configuration of an HSPMN model; the checkout's `config.json` holds the same defaults.

    Fields that every transformers decoder has keep their usual names and meaning; `rope_theta`,
    `partial_rotary_factor` and `rope_scaling` are taken as by LlamaConfig. `validate()` runs at construction, after
    the overrides of `from_pretrained`, and again when a model is built, as fields can be set; types are checked when
    one is set, and whole numbers become floats where a float is due. Raises ValueError for a field out of range,
    all of which `LIMITS` holds, or two that contradict each other, with a message that names field and fix.
    """

    model_type = "hspmn"
    # every output but loss and logits, which alone are predictions to Trainer
    keys_to_ignore_at_inference = [
        "last_hidden_state", "past_key_values", "hidden_states", "aux_loss", "router_scores", "router_mask",
        "router_load", "router_overflow", "router_entropy",
    ]  # fmt: skip

    vocab_size: int = 16384  # number of token ids, at least 1
    hidden_size: int = 512  # width D of the residual stream, at least 1
    intermediate_size: int = 1408  # width of the SwiGLU that every token passes, at least 1
    routed_intermediate_size: int = 0  # width of a second SwiGLU for routed tokens alone; 0 leaves it out
    num_hidden_layers: int = 8  # number of blocks L, at least 1
    num_attention_heads: int = 8  # query heads H, a multiple of `num_key_value_heads`
    num_key_value_heads: int | None = 2  # key/value heads G, shared by H / G query heads each; None means H
    head_dim: int | None = None  # width E of a head, even; None means hidden_size / num_attention_heads
    hidden_act: str = "silu"  # activation of the gated feed-forward; only "silu" (SwiGLU)
    max_position_embeddings: int = 1048576  # longest context that RoPE scaling assumes; not a limit of the cache
    # As in transformers; None: {"rope_type": "default", "rope_theta": 10000.0}. Types whose frequencies depend on the
    # length ("dynamic", "longrope") are refused: keys in a cache keep those that they were rotated with.
    rope_parameters: dict | None = None
    initializer_range: float = 0.02  # standard deviation of freshly drawn weights, above 0
    rms_norm_eps: float = 1e-6  # epsilon of every RMSNorm, above 0
    use_cache: bool = True  # whether a forward without labels returns an `HSPMNCache`
    tie_word_embeddings: bool = True  # whether the LM head shares the embedding matrix
    pad_token_id: int | None = None  # padding id, below `vocab_size`
    bos_token_id: int | None = None  # begin-of-text id, below `vocab_size`
    eos_token_id: int | list[int] | None = None  # end-of-text id or ids

    # Target share of tokens routed to the contextual stream, 0.0 to 1.0; a list gives one per layer. 1.0 makes a
    # full-attention layer, 0.0 a purely reflexive one. None puts an average of 0.2 into every fourth layer and the
    # last: as many bytes of keys and values as 0.2 everywhere, and two tokens that belong together meet in one layer
    # more often, for more compute.
    sparsity_k: float | int | list[float | int] | None = None
    # Tokens that attend to the routed ones before them: "routed", these themselves, whose gate scales what they read,
    # or "all", where the logarithm of a kept token's gate is added to its scores. After 700 steps (seed 0, H200,
    # 2026-11-30) 2.018 nats and 2.018 to 2.021; with the gate on the kept value instead 2.03 to 2.07
    contextual_readers: str = "routed"
    # "threshold" (causal) or "topk" (exactly k per row, looks at the future; training and scoring only)
    router_mode: str = "threshold"
    router_noise_floor: float = 0.05  # gates below this are set to 0, 0.0 up to 1.0 (excluded)
    # First tokens of every document that are routed whatever their score, counted in the load. What the window shows
    # as well gains nothing as a query, which is all that a router learns from, but its keys may be asked for later.
    router_initial_tokens: int = 0
    router_bias_rate: float = 0.05  # largest change of the routing bias per optimizer step, in logits; 0.0 freezes it
    # Share of `router_bias_rate` applied per unit of load error, above 0; the product is clipped to [-1, 1]
    router_bias_gain: float = 5.0
    router_token_entropy_coef: float = 0.0  # weight of the loss that pushes every gate towards 0 or 1, at least 0
    # Weight of the KL loss that draws each row's mean gate to its layer's `sparsity_k`, at least 0. Nothing else
    # lowers the score of a token that does not matter: without it the router does not find those that recall needs.
    router_load_entropy_coef: float = 0.1
    # Share of the training steps over which the target falls from 1.0 to `sparsity_k` and states are bounded more and
    # more, up to `linear_attention_horizon`; 0.0 (both stand from the first step) to 1.0
    sparsity_anneal_fraction: float = 0.0
    # Routed slots held in training, as a multiple of the target share, at least 1.0; more tokens overflow
    capacity_factor: float = 2.0
    sliding_window: int = 128  # tokens seen by the local attention, the current one included; 0 leaves it out
    num_sink_tokens: int = 0  # learned key/value pairs that every softmax may attend to, at least 0
    # "gated" (data-dependent decay, normalised q/k, gated RMSNorm) or "elu" (elu(x)+1 with a running normaliser)
    linear_attention: str = "gated"
    # Tokens over which every state of the gated linear attention fades to 1 / e or less; 0 sets no bound. Unbounded,
    # a state may learn to hold whole training rows, and both recall and the routed shares fail beyond their length.
    linear_attention_horizon: int = 128
    conv_kernel_size: int = 4  # taps of the causal depthwise convolution on q, k and v, at least 1; 1 leaves it out
    # Form of the cached keys and values of routed tokens: "auto", the dtype they are computed in, "int8" or "int4",
    # whole numbers of so many bits with a bfloat16 scale per token and key head, for about a half and a quarter of
    # bfloat16's bytes. With a cache they are read as they are stored, however the tokens are fed, and training reads
    # them as they would be; a forward of `eval()` without a cache, or with gradients, reads them as they are computed.
    kv_cache_dtype: str = "auto"
    backend: str = "auto"  # "auto" picks by device; "reference", "flex" or "triton": that one, or it fails

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.rope_parameters = kwargs.pop("rope_scaling", None) or self.rope_parameters
        for name in ("rope_theta", "partial_rotary_factor"):
            given = kwargs.pop(name, None)
            if given is not None and (held := self.rope_parameters.setdefault(name, given)) not in (given,):
                raise ValueError(f"{name}={given!r} contradicts rope_parameters[{name!r}]={held!r}; give one of them")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, which sets overrides after construction: they are validated too."""
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).validate()
        return made

    @property
    def rope_theta(self) -> float:
        """Base of RoPE's wavelengths, `rope_parameters['rope_theta']`; can be set."""
        return self.rope_parameters.get("rope_theta", self.default_theta)

    @rope_theta.setter
    def rope_theta(self, value):
        self.rope_parameters = self.rope_parameters | {"rope_theta": value}

    @property
    def partial_rotary_factor(self) -> float | None:
        """Share of a head that RoPE of the proportional type rotates, of `rope_parameters`; can be set."""
        return self.rope_parameters.get("partial_rotary_factor")

    @partial_rotary_factor.setter
    def partial_rotary_factor(self, value):
        self.rope_parameters = self.rope_parameters | {"partial_rotary_factor": value}

    @property
    def layer_sparsity(self) -> list[float]:
        """Target share of routed tokens of each layer, L values in [0, 1]."""
        L, given = self.num_hidden_layers, self.sparsity_k
        if given is not None:
            return list(map(float, given if isinstance(given, list) else [given] * L))
        routing = [i % ROUTING_PERIOD == ROUTING_PERIOD - 1 or i == L - 1 for i in range(L)]
        return [round(CONCENTRATED_SHARE * L / sum(routing), 6) if routes else 0.0 for routes in routing]

    def validate_fields(self):
        """Numbers lie within their limits, choices are known, and special tokens exist in the vocabulary."""
        rope = self.rope_parameters
        given = self.__dict__ | {f"rope_parameters['{key}']": value for key, value in rope.items()}
        for fields, low, high in LIMITS:
            for field in fields:
                value = given.get(field, low)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not (number and low <= value <= high):
                    raise ValueError(f"{field} must lie in [{low}, {high}], got {value!r}")
        for field, valid in CHOICES.items():
            if given[field] not in valid:
                raise ValueError(f"{field} must be one of {', '.join(valid)}, got {given[field]!r}")
        if rope["rope_type"] not in [*ROPE_TYPES]:
            raise ValueError(
                f"rope_parameters['rope_type'] must be one of {', '.join(ROPE_TYPES)}, got {rope['rope_type']!r}; "
                "frequencies that change with the length would not fit the keys that a cache holds"
            )
        for key in ("rope_theta", *ROPE_TYPES[rope["rope_type"]]):
            if key not in rope:
                raise ValueError(f"rope_parameters['{key}'] is missing; RoPE of type {rope['rope_type']!r} needs it")
        if rope["rope_type"] != "proportional" and rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"rope_parameters['partial_rotary_factor']={rope['partial_rotary_factor']} needs "
                f"rope_parameters['rope_type']='proportional', which rotates that share of a head; got "
                f"{rope['rope_type']!r}"
            )
        if rope["rope_type"] == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
            raise ValueError(
                f"rope_parameters['high_freq_factor'] ({rope['high_freq_factor']}) must exceed "
                f"rope_parameters['low_freq_factor'] ({rope['low_freq_factor']})"
            )
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{field} must lie in [0, vocab_size={self.vocab_size}), got {token}")

    def validate_heads(self):
        """Query heads divide evenly over key/value heads; RoPE needs an even head width."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups and heads % groups:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups}); "
                f"nearest valid: {max(groups, heads // groups * groups)}"
            )
        if self.head_dim and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}; set head_dim={self.head_dim + 1}")
        if self.kv_cache_dtype == "int4" and self.head_dim % 8:
            raise ValueError(
                f"head_dim must be a multiple of 8 for kv_cache_dtype='int4', got {self.head_dim}; "
                f"set head_dim={-(-self.head_dim // 8) * 8}, or kv_cache_dtype='int8'"
            )

    def validate_routing(self):
        """Every routed share lies in [0, 1], a list has one entry per layer, and exactly k tokens leave no others."""
        if self.router_mode == "topk" and self.router_initial_tokens:
            raise ValueError(
                f"router_initial_tokens={self.router_initial_tokens} has no place beside router_mode='topk', which "
                "routes exactly k tokens; set it to 0, or router_mode='threshold'"
            )
        shares = self.layer_sparsity
        if not all(share == 0.0 or LEAST_SHARE <= share <= 1.0 for share in shares):
            raise ValueError(
                f"sparsity_k must lie in [{LEAST_SHARE}, 1] or be 0, got {self.sparsity_k!r}; use a share such as 0.2"
            )
        if len(shares) != self.num_hidden_layers:
            raise ValueError(
                f"sparsity_k has {len(shares)} entries for num_hidden_layers={self.num_hidden_layers}; "
                "give one per layer or a single number"
            )


HSPMNConfig.__setattr__ = raises_value_error(in_one_form(HSPMNConfig.__setattr__))
HSPMNConfig.__init__ = raises_value_error(HSPMNConfig.__init__)
HSPMNConfig.validate = raises_value_error(HSPMNConfig.validate)
HSPMNConfig.register_for_auto_class()

__all__ = ["HSPMNConfig"]
