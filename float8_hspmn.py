"""Weights of a block's products in float8, chosen as any quantisation of transformers is:

    from_pretrained(folder, trust_remote_code=True, quantization_config={"quant_method": "hspmn_float8"})

Products with e4m3 weights take e4m3 activations, scaled token by token. Router, head projection, convolution, norms,
embedding and head stay as they are.
"""

from functools import partial

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .operations_hspmn import E4M3, SCALINGS, check_float8, dequantize_rows, few_rows, float8_linear, quantize_rows

METHOD = "hspmn_float8"
LAYERS = ("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # whose products are in float8


class KeepsDtypes(nn.Module):
    """A module whose tensors keep their dtypes when a model is cast."""

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Float8Linear(KeepsDtypes, nn.Linear):
    """A linear layer without bias, of an e4m3 weight with scales, whose input is quantised in the same way.

    scaling: "rowwise", a float32 scale per output row and per token, `weight_scale` [N, 1]; or "mx", an e8m0 scale per
    32 features, [N, K / 32]. Raises ValueError for a width that has no such groups.
    """

    def __init__(self, in_features, out_features, scaling="rowwise", device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scaling = in_features, out_features, scaling
        group, kind = SCALINGS[scaling]
        if in_features % (group or 1):
            raise ValueError(
                f"scaling {scaling!r} takes widths in multiples of {group}, got {in_features}: use rowwise"
            )
        for name, width, dtype in (
            ("weight", in_features, E4M3), ("weight_scale", in_features // group if group else 1, kind)
        ):  # fmt: skip
            values = torch.empty(out_features, width, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.register_parameter("bias", None)

    @classmethod
    def like(cls, linear, scaling):
        """A layer of the sizes of a `Linear`, and on its device, with no values."""
        if linear.bias is not None:
            raise ValueError("a layer with a bias has no float8 form; leave quantization_config out")
        return cls(linear.in_features, linear.out_features, scaling, linear.weight.device)

    @classmethod
    @torch.no_grad()
    def of(cls, linear, scaling):
        """The quantised form of a `Linear`."""
        layer = cls.like(linear, scaling)
        if linear.weight.is_meta:
            raise ValueError("offloaded weights cannot be quantised: load on a device that holds them and save that")
        for parameter, values in zip(layer.parameters(), quantize_rows(linear.weight, scaling), strict=True):
            parameter.copy_(values)
        return layer

    def dequantized(self, dtype):
        """The `Linear` in `dtype` that this stands for."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(dequantize_rows(self.weight, self.weight_scale).to(dtype))
        return linear

    def rounds(self, x):
        """Whether `forward` quantises x: not one that records gradients, those of adapters, nor rows of a single token
        under scales by row, see `few_rows`."""
        single = self.scaling == "rowwise" and x.shape[-2:-1] == (1,)
        return not (single or (torch.is_grad_enabled() and x.requires_grad))

    def product(self, operations, rows, dtype):
        """[..., N] in `dtype` of `rows`, e4m3 [..., K] and scales of `quantize_rows`; operations: of a backend."""
        return operations.float8_linear(*rows, self.weight, self.weight_scale, dtype)

    def forward(self, x):
        """[..., K] to [..., N] in x's dtype; see `rounds`."""
        if not self.rounds(x):
            return few_rows(x, self.weight, self.weight_scale)
        backend = "triton" if x.is_cuda else "reference"
        rows = quantize_rows(x, self.scaling, backend=backend)
        return float8_linear(*rows, self.weight, self.weight_scale, x.dtype, backend=backend)

    def extra_repr(self):
        """What a print of the layer shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling!r}"


class HSPMNFloat8Config(QuantizationConfigMixin):
    """scaling: of `Float8Linear`. Raises ValueError for one that is not known, and for other fields."""

    def __init__(self, quant_method=METHOD, scaling="rowwise", **others):
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
        if others:
            raise ValueError(f"{METHOD} has no field {', '.join(others)}; leave it out, its only one is scaling")
        self.quant_method, self.scaling = quant_method, scaling


class HSPMNFloat8Quantizer(HfQuantizer):
    """Quantises the layers `LAYERS` of a model that was loaded, or makes room for those that were saved quantised."""

    is_trainable = True  # adapters of it are
    is_compileable = True

    def is_serializable(self):
        """Weights and scales are saved as they are."""
        return True

    def validate_environment(self, *args, device_map=None, **kwargs):
        """ValueError for a CUDA device without float8."""
        for device in device_map.values() if isinstance(device_map, dict) else ():
            if isinstance(device, int) or torch.device(device).type == "cuda":
                major, minor = torch.cuda.get_device_capability(device)
                check_float8(10 * major + minor)

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            replace_layers(model, partial(model.float8_layer.like, scaling=self.quantization_config.scaling))

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            replace_layers(model, partial(model.float8_layer.of, scaling=self.quantization_config.scaling))
        return model

    def _dequantize(self, model, dtype=None):
        replace_layers(model, lambda layer: layer.dequantized(dtype))
        return model


def replace_layers(model, make):
    """Put make(layer) in the place of each layer of a model that `LAYERS` names."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if name in LAYERS:
                setattr(module, name, make(layer))


if METHOD not in AUTO_QUANTIZER_MAPPING:  # several copies of this file may be loaded; one serves the models of all
    register_quantization_config(METHOD)(HSPMNFloat8Config)
    register_quantizer(METHOD)(HSPMNFloat8Quantizer)
