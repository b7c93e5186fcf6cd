"""What the kernel files share: registration of operations, device limits, and the shape legend.

Legend of shape suffixes as in `reference_hspmn`: B batch, T tokens, K routed slots, P key slots, H query heads,
G key/value heads (H = G * R), E head width, F value width, W window, D model width, S segments, N blocks.
Every kernel takes contiguous tensors and sizes; lengths are not specialised, so a new length is not a new build.
"""

import hashlib
from functools import cache

import torch

from .reference_hspmn import SCORE_GAIN

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("kernels_hspmn needs triton; modeling_hspmn runs on reference_hspmn without it") from error

HEAD_WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GAIN = tl.constexpr(SCORE_GAIN)
# Finite, so that rows that see no key need no special case: exp2(-inf - FLOOR) is 0 and exp2(FLOOR - FLOOR) is 1
FLOOR = tl.constexpr(-1.0e30)

# One file may be loaded as several modules of a process (a checkout and a saved model): each registers its own names
NAMESPACE = "hspmn_" + hashlib.sha1(__name__.encode()).hexdigest()[:8]


@triton.jit
def router_score(products, D: tl.constexpr):
    """Scores [rows] from products [rows, BLOCK_D] of float32, the parts of `score_ref`'s sum over D."""
    return tl.sum(products, 1) * (GAIN * D**-0.5)


def operation(name, mutates_args=()):
    """Register a launcher as a custom operator, opaque to `torch.compile` and without host synchronisation.

    `triton_op` was weighed and left: inductor takes an input for written where its analysis of a kernel fails (scans
    do that), which clones it, and `wrap_triton` refuses the interpreter.
    """

    def register(function):
        return torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=mutates_args)

    return register


def interpreted():
    """Whether kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return triton.knobs.runtime.interpret


@cache
def processors(device):
    """Streaming multiprocessors of a CUDA device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def capability(device):
    """Compute capability of a CUDA device as major * 10 + minor; 90 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
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


@torch.compiler.assume_constant_result
def _descriptors_on(device):
    return device.type == "cuda" and capability(device) in (90, 100)


def has_descriptors(x):
    """Whether a kernel reads `x` through tensor descriptors (TMA): 16-bit values on sm_90 and sm_100."""
    return x.element_size() == 2 and _descriptors_on(x.device)


def check_heads(q_BTHE, k_BTGE, v_BTGF):
    """Raise ValueError for head counts, head widths, batch sizes or dtypes that the kernels do not take."""
    (B, H, E), G = (q_BTHE.shape[i] for i in (0, 2, 3)), k_BTGE.shape[2]
    if H % G:
        raise ValueError(f"query heads ({H}) must be a multiple of key/value heads ({G})")
    if E not in HEAD_WIDTHS:
        raise ValueError(f"head width must be one of {HEAD_WIDTHS}, got {E}; set backend='reference' for others")
    if k_BTGE.shape[-1] != E or v_BTGF.shape[:3] != k_BTGE.shape[:3] or k_BTGE.shape[0] != B:
        raise ValueError(f"shapes disagree: q {tuple(q_BTHE.shape)}, k {tuple(k_BTGE.shape)}, v {tuple(v_BTGF.shape)}")
    if q_BTHE.dtype not in DTYPES or k_BTGE.dtype != q_BTHE.dtype or v_BTGF.dtype != q_BTHE.dtype:
        raise ValueError(
            f"q, k and v must share a dtype of float32, bfloat16, float16; got {q_BTHE.dtype}, {k_BTGE.dtype}, "
            f"{v_BTGF.dtype}"
        )


def check_vectors(x_BTD, **vectors):
    """Raise ValueError for a vector that has not the width of `x_BTD`; None passes."""
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x_BTD.shape[2:]:
            raise ValueError(f"{name} must be [{x_BTD.shape[2]}], the width of x, got {tuple(vector.shape)}")


def check_in_place(name, x, shape, dtypes):
    """Raise ValueError unless `x` is contiguous, of that shape and one of those dtypes."""
    if tuple(x.shape) != tuple(shape) or x.dtype not in dtypes or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {' or '.join(str(dtype) for dtype in dtypes)} {tuple(shape)} to be updated in "
            f"place, got {x.dtype} {tuple(x.shape)}, contiguous={x.is_contiguous()}"
        )


def rows_of(x, B):
    """A per-row integer tensor [B or 1, ...] as a contiguous [B, ...]; None stays None."""
    return None if x is None else x.expand(B, *x.shape[1:]).contiguous()


__all__ = [
    "DTYPES",
    "FLOOR",
    "HEAD_WIDTHS",
    "LN2",
    "LOG2E",
    "capability",
    "check_heads",
    "check_in_place",
    "check_vectors",
    "dependent",
    "has_descriptors",
    "interpreted",
    "operation",
    "processors",
    "rows_of",
]
