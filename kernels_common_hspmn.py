"""What the kernel files share: launches, device limits, checks, and the conventions of a kernel.

Legend of shape suffixes as in `operations_hspmn`; S segments, N blocks. Every kernel takes contiguous tensors and
sizes; lengths are not specialised, so a new length is not a new build. A launcher plans its launch (grid, block sizes,
checks of shapes and dtypes) in a cached function of what the plan depends on, so that a repeated call does it no more.
"""

from functools import cache, partial
from typing import NamedTuple

import torch

from .operations_hspmn import LEAST_PEAK, SCORE_GAIN

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on operations_hspmn without it") from error

HEAD_WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GAIN = tl.constexpr(SCORE_GAIN)
LEAST = tl.constexpr(LEAST_PEAK)
# Finite, so that rows that see no key need no special case: exp2(-inf - FLOOR) is 0 and exp2(FLOOR - FLOOR) is 1
FLOOR = tl.constexpr(-1.0e30)
MOST_INT = 2**31 - 1  # of a kernel's int32
ROW_START, TOKEN_START = tl.constexpr(1), tl.constexpr(2)  # how `start_BT` is read: min(2, its width)


@cache
def interpreted():
    """Whether kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return triton.knobs.runtime.interpret


class Tiles(NamedTuple):
    """What a kernel reads and writes in tiles through TMA: the fields of Triton's descriptor, whose checks take 8 us.
    base must begin at a multiple of 16 bytes, and so must its rows (`strides` are counted in elements, the last is 1).
    Made by `of`, which gives Triton's own in the interpreter."""

    base: torch.Tensor
    shape: tuple
    strides: tuple
    block_shape: tuple
    padding: str = "zero"
    round_f32_to_tf32: bool = False

    def checked(self):
        """Triton's own descriptor of the same."""
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.block_shape))

    @classmethod
    def of(cls, *fields):
        """Of base, shape, strides and block_shape."""
        return cls(*fields).checked() if interpreted() else cls(*fields)


class Kernel:
    """A Triton kernel whose launches find their build by what decides it, in a third of Triton's own search. Called as
    Triton's are, `kernel[grid](*tensors and sizes, **constants and options)`. H200 machine, host time of a launch with
    10 tensors and 10 constants: 28 us through `triton.jit`, of which the driver takes 8."""

    def __init__(self, function, integers):
        self.jit = triton.jit(function, do_not_specialize=integers)
        self.builds = {}

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *args, **constants):
        """Launch the build for these arguments; the first of its kind makes it."""
        kinds, passed = [], []
        for x in args:
            if x is None:
                kinds.append(None)
            elif isinstance(x, torch.Tensor):
                # as a number: for a tensor the driver would look up its address and whose memory that is again
                tensor, x = x, x.data_ptr()
                kinds.append((tensor.dtype,) if x & 15 else tensor.dtype)
            elif type(x) is int:
                kinds.append(x > MOST_INT)
            elif type(x) is Tiles:
                tensor = x.base
                kinds.append((tensor.dtype, x.block_shape))
            else:
                kinds.append(type(x))
            passed.append(x)
        device = tensor.device
        if several_devices() and device.index != torch.cuda.current_device():  # a model spread over several GPUs
            with torch.cuda.device(device):
                return self.launch(grid, *args, **constants)
        key = (device.index, *kinds, *constants, *constants.values())
        found = self.builds.get(key)
        if found is None:
            args = [x.checked() if type(x) is Tiles else x for x in args]
            build = self.jit[grid](*args, **constants)
            rest = [constants[name] for name in self.jit.arg_names[len(args) :]]
            self.builds[key] = build.run, build.function, build.packed_metadata, rest
        else:
            run, function, metadata, rest = found
            stream = triton.runtime.driver.active.get_current_stream(device.index)
            run(*(*grid, 1, 1)[:3], stream, function, metadata, None, None, None, *passed, *rest)


@cache
def several_devices():
    """Whether kernels may be launched on another device than the current one."""
    return torch.cuda.device_count() > 1


def kernel(*integers):
    """Decorator of a Triton kernel; `integers`: all of its arguments that are whole numbers and no constants."""

    def wrap(function):
        # Triton's own object where it interprets, and where builds depend on more than alignment (AMD)
        plain = interpreted() or torch.version.hip is not None
        return triton.jit(function, do_not_specialize=integers) if plain else Kernel(function, integers)

    return wrap


def cdiv(a, b):
    """The quotient of two whole numbers, rounded up; `triton.cdiv` takes 2 us on the host."""
    return -(-a // b)


def power_of_2(n):
    """The least power of two from n (at least 1) up; `triton.next_power_of_2` takes 2 us on the host."""
    return 1 << (n - 1).bit_length()


@triton.jit
def from_start(first, start, b, at, real, least, START: tl.constexpr):
    """`first` or, where it is later, the start of each token (`at`, of row b), `least` for one before that."""
    if START == TOKEN_START:
        begin = tl.load(start + at, mask=real, other=0)
        first = tl.maximum(first, tl.maximum(begin, least).to(tl.int32))
    elif START == ROW_START:
        first = tl.maximum(first, tl.maximum(tl.load(start + b), least).to(tl.int32))
    return first


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact to float32 also where exp(x) is small."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@cache
def processors(device):
    """Streaming multiprocessors of a CUDA device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def capability(device):
    """Compute capability of a CUDA device as major * 10 + minor; 90 in the interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return major * 10 + minor


@cache
def dependent(device):
    """Launch options of a kernel of a decoding step, `PDL` among them: whether it may start under the one before.

    With programmatic dependent launch (sm_90 and later) a kernel's programs start once all programs of the kernel
    before have called `gdc_launch_dependents` or ended. What keeps that right, whatever the neighbours in the stream
    are: before `gdc_wait` no program loads or stores anything, and every program waits, those without work too. The
    wait ends when the kernel before has ended, whose programs have waited for the one before it, and so on back. So a
    kernel stores only when no earlier one runs, also to memory that the allocator took from an earlier one's input.
    The call comes after a kernel's loops: programs that wait from early on take the room of those that work. H200, one
    row: 71 us a layer with the call first, 53 with it last, 55 without overlap. Weights brought into L2 ahead, by the
    waiting programs or by those before the attentions, made it slower by 2 to 9 us.
    """
    overlaps = device.type == "cuda" and not interpreted() and torch.version.hip is None and capability(device) >= 90
    return {"PDL": True, "launch_pdl": True} if overlaps else {"PDL": False}


@cache
def has_descriptors(device, element_size):
    """Whether kernels read tensors of such elements through tensor descriptors (TMA): 16 bits on sm_90 and sm_100."""
    return element_size == 2 and device.type == "cuda" and capability(device) in (90, 100)


def check(*conditions):
    """Raise ValueError with the message of the first (holds, message) that does not hold."""
    for holds, message in conditions:
        if not holds:
            raise ValueError(message)


def check_heads(q_shape, k_shape, v_shape, q_dtype, k_dtype, v_dtype):
    """Raise ValueError for head counts, head widths, batch sizes or dtypes that the kernels do not take."""
    (B, _, H, E), G = q_shape, k_shape[2]
    widths = f"head width must be one of {HEAD_WIDTHS}, got {E}; set backend='reference' for others"
    dtypes = f"q, k and v must share a dtype of float32, bfloat16, float16; got {q_dtype}, {k_dtype}, {v_dtype}"
    alike = k_shape[-1] == E and tuple(v_shape[:3]) == tuple(k_shape[:3]) and k_shape[0] == B
    check(
        (H % G == 0, f"query heads ({H}) must be a multiple of key/value heads ({G})"),
        (E in HEAD_WIDTHS, widths),
        (alike, f"shapes disagree: q {tuple(q_shape)}, k {tuple(k_shape)}, v {tuple(v_shape)}"),
        (q_dtype in DTYPES and k_dtype == q_dtype and v_dtype == q_dtype, dtypes),
    )


def takes_heads(q, k, v):
    """Whether a gradient has kernels for heads of these counts, widths and dtypes; the others are not refused, as
    `check_heads` does, but left to the reference."""
    alike = q.dtype == k.dtype == v.dtype and q.shape[2] % k.shape[2] == 0
    return alike and q.dtype in DTYPES and q.shape[3] in HEAD_WIDTHS


def refuse_in_place(name, x, shape, dtype):
    """Raise ValueError for `x`, which is not contiguous, of that shape and dtype; asked for where it is launched."""
    got = f"{x.dtype} {tuple(x.shape)}, contiguous={x.is_contiguous()}"
    raise ValueError(f"{name} must be contiguous {dtype} {tuple(shape)} to be updated in place, got {got}")


def tile_maps(*fields):
    """`Tiles` of several tensors, each given as its fields; None for all if one is not aligned."""
    aligned = not any(each[0].data_ptr() % 16 for each in fields)
    return [Tiles.of(*each) if aligned else None for each in fields]
