"""Every number that defines an HSPMN model: typed, documented, validated."""

from functools import wraps

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROUTER_MODES = ("threshold", "topk")
LINEAR_ATTENTIONS = ("gated", "elu")
BACKENDS = ("auto", "reference", "flex", "triton")
KV_CACHE_DTYPES = ("auto", "int8")
CONCENTRATED_SHARE, ROUTING_PERIOD = 0.2, 4  # of `sparsity_k=None`: the average share, and every which layer routes


def raises_value_error(method):
    """`method` with strict-dataclass errors, which are plain `Exception`s, raised as `ValueError`."""

    @wraps(method)
    def wrapped(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    return wrapped


@strict
class HSPMNConfig(PreTrainedConfig):
    """Configuration of an HSPMN model; the checkout's `config.json` holds the same defaults.

    Fields that every transformers decoder has keep their usual names and meaning. `validate()` runs at construction
    and again when a model is built, because overrides passed to `from_pretrained` skip construction.

    Raises:
        ValueError: a field is out of range or two fields contradict each other; the message names field and fix.
    """

    model_type = "hspmn"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 16384
    """Number of token ids, at least 1."""
    hidden_size: int = 512
    """Width D of the residual stream, at least 1."""
    intermediate_size: int = 1408
    """Width of the SwiGLU that every token passes, at least 1."""
    routed_intermediate_size: int = 0
    """Width of a second SwiGLU for routed tokens alone; 0 leaves it out."""
    num_hidden_layers: int = 8
    """Number of blocks L, at least 1."""
    num_attention_heads: int = 8
    """Query heads H, a multiple of `num_key_value_heads`."""
    num_key_value_heads: int | None = 2
    """Key/value heads G, shared by H / G query heads each; None means H."""
    head_dim: int | None = None
    """Width E of a head, even; None means hidden_size / num_attention_heads."""
    hidden_act: str = "silu"
    """Activation of the gated feed-forward; only "silu" (SwiGLU)."""
    max_position_embeddings: int = 1048576
    """Longest context that RoPE scaling assumes, in tokens; not a limit of the cache."""
    rope_parameters: dict | None = None
    """RoPE settings as in every transformers model; None means {"rope_type": "default", "rope_theta": 10000.0}."""
    initializer_range: float = 0.02
    """Standard deviation of freshly drawn weights, above 0."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm, above 0."""
    use_cache: bool = True
    """Whether a forward without labels returns an `HSPMNCache`."""
    tie_word_embeddings: bool = True
    """Whether the LM head shares the embedding matrix."""
    pad_token_id: int | None = None
    """Padding id, below `vocab_size`."""
    bos_token_id: int | None = None
    """Begin-of-text id, below `vocab_size`."""
    eos_token_id: int | list[int] | None = None
    """End-of-text id or ids."""

    sparsity_k: float | int | list[float | int] | None = None
    """Target share of tokens routed to the contextual stream, 0.0 to 1.0; a list gives one per layer. 1.0 makes a
    full-attention layer, 0.0 a purely reflexive one. None puts an average of 0.2 into every fourth layer and the last:
    as many bytes of keys and values as 0.2 everywhere, and two tokens that belong together meet in one layer more
    often, for more compute."""
    router_mode: str = "threshold"
    """"threshold" (causal) or "topk" (exactly k per row, looks at the future; training and scoring only)."""
    router_noise_floor: float = 0.05
    """Gates below this are set to 0, 0.0 up to 1.0 (excluded)."""
    router_initial_tokens: int = 0
    """First tokens of every document that are routed whatever their score, counted in the load. What the window shows
    as well gains nothing as a query, which is all that a router learns from, but its keys may be asked for later."""
    router_bias_rate: float = 0.05
    """Largest change of the routing bias in one training step, in logits; 0.0 freezes it."""
    router_bias_gain: float = 5.0
    """Share of `router_bias_rate` applied per unit of load error, above 0; the product is clipped to [-1, 1]."""
    router_token_entropy_coef: float = 0.0
    """Weight of the loss that pushes every gate towards 0 or 1, at least 0."""
    router_load_entropy_coef: float = 0.1
    """Weight of the KL loss that draws each layer's mean gate to its `sparsity_k`, at least 0. Nothing else lowers the
    score of a token that does not matter: without it the router does not find those that associative recall needs."""
    sparsity_anneal_fraction: float = 0.0
    """Share of the training steps over which the target falls from 1.0 to `sparsity_k` and states are bounded more and
    more, up to `linear_attention_horizon`; 0.0 (both stand from the first step) to 1.0."""
    capacity_factor: float = 2.0
    """Routed slots held in training, as a multiple of the target share, at least 1.0; more tokens overflow."""
    sliding_window: int = 128
    """Tokens seen by the local attention, the current one included; 0 leaves it out."""
    num_sink_tokens: int = 0
    """Learned key/value pairs that every softmax may attend to, at least 0."""
    linear_attention: str = "gated"
    """"gated" (data-dependent decay, normalised q/k, gated RMSNorm) or "elu" (elu(x)+1 with a running normaliser)."""
    linear_attention_horizon: int = 128
    """Tokens over which every state of the gated linear attention fades to 1 / e or less; 0 sets no bound. Unbounded,
    a state may learn to hold whole training rows, and both recall and the routed shares fail beyond their length."""
    conv_kernel_size: int = 4
    """Taps of the causal depthwise convolution on q, k and v, at least 1; 1 leaves it out."""
    kv_cache_dtype: str = "auto"
    """Form of the cached keys and values of routed tokens: "auto", the dtype they are computed in, or "int8", whole
    numbers with a float32 scale per token and key head, for half of bfloat16's bytes. With a cache they are read as
    they are stored, however the tokens are fed; a forward without one reads them as they are computed."""
    backend: str = "auto"
    """"auto" picks by device; "reference", "flex" or "triton" forces one and fails where it cannot run."""

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)

    @property
    def layer_sparsity(self) -> list[float]:
        """Target share of routed tokens of each layer, L values in [0, 1]."""
        L = self.num_hidden_layers
        if isinstance(self.sparsity_k, list):
            return [float(share) for share in self.sparsity_k]
        if self.sparsity_k is not None:
            return [float(self.sparsity_k)] * L
        routing = [i % ROUTING_PERIOD == ROUTING_PERIOD - 1 or i == L - 1 for i in range(L)]
        return [round(CONCENTRATED_SHARE * L / sum(routing), 6) if routes else 0.0 for routes in routing]

    def validate_sizes(self):
        """Sizes are whole numbers from their least value on."""
        least = dict.fromkeys(
            ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 1
        ) | dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "conv_kernel_size"), 1)
        least |= dict.fromkeys(("routed_intermediate_size", "router_initial_tokens", "sliding_window"), 0)
        least |= dict.fromkeys(("num_sink_tokens", "linear_attention_horizon"), 0)
        for field, minimum in least.items():
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise ValueError(f"{field} must be a whole number of at least {minimum}, got {value!r}")

    def validate_heads(self):
        """Query heads divide evenly over key/value heads; RoPE needs an even head width."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups and heads % groups:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups}); "
                f"nearest valid: {max(groups, heads // groups * groups)}"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}; set head_dim={self.head_dim + 1}")

    def validate_choices(self):
        """Fields that name one of a few ways."""
        choices = {"router_mode": ROUTER_MODES, "linear_attention": LINEAR_ATTENTIONS, "backend": BACKENDS}
        choices |= {"kv_cache_dtype": KV_CACHE_DTYPES}
        for field, valid in (choices | {"hidden_act": ("silu",)}).items():
            if getattr(self, field) not in valid:
                raise ValueError(f"{field} must be one of {', '.join(valid)}, got {getattr(self, field)!r}")
        if self.router_mode == "topk" and self.router_initial_tokens:
            raise ValueError(
                f"router_initial_tokens={self.router_initial_tokens} has no place beside router_mode='topk', which "
                "routes exactly k tokens; set it to 0, or router_mode='threshold'"
            )

    def validate_sparsity(self):
        """Every routed share lies in [0, 1] and a list has one entry per layer."""
        if self.sparsity_k is None:
            return
        shares = self.sparsity_k if isinstance(self.sparsity_k, list) else [self.sparsity_k]
        for share in shares:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
                raise ValueError(f"sparsity_k must lie in [0, 1], got {self.sparsity_k!r}; use a share such as 0.2")
        if isinstance(self.sparsity_k, list) and len(shares) != self.num_hidden_layers:
            raise ValueError(
                f"sparsity_k has {len(shares)} entries for num_hidden_layers={self.num_hidden_layers}; "
                "give one per layer or a single number"
            )

    def validate_ranges(self):
        """Rates, coefficients and factors."""
        ranges = {
            "router_noise_floor": (0.0, 1.0, "[0, 1)"),
            "router_bias_rate": (0.0, float("inf"), "[0, inf)"),
            "router_bias_gain": (1e-12, float("inf"), "(0, inf)"),
            "router_token_entropy_coef": (0.0, float("inf"), "[0, inf)"),
            "router_load_entropy_coef": (0.0, float("inf"), "[0, inf)"),
            "sparsity_anneal_fraction": (0.0, 1.0 + 1e-9, "[0, 1]"),
            "capacity_factor": (1.0, float("inf"), "[1, inf)"),
            "initializer_range": (1e-12, float("inf"), "(0, inf)"),
            "rms_norm_eps": (1e-30, float("inf"), "(0, inf)"),
        }
        for field, (low, high, text) in ranges.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
                raise ValueError(f"{field} must lie in {text}, got {value!r}")

    def validate_rope_type(self):
        """The RoPE variant is one that transformers knows."""
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            valid = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise ValueError(f"rope_parameters['rope_type'] must be one of {valid}, got {rope_type!r}")

    def validate_tokens(self):
        """Special token ids exist in the vocabulary."""
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{field} must lie in [0, vocab_size={self.vocab_size}), got {token}")


HSPMNConfig.__init__ = raises_value_error(HSPMNConfig.__init__)
HSPMNConfig.validate = raises_value_error(HSPMNConfig.validate)
HSPMNConfig.register_for_auto_class()

__all__ = ["HSPMNConfig"]
