"""Every kernel builds for every supported chip without a GPU, within that chip's shared memory and with few spills.

The launches are those of the operations on the inputs of `benchmarks/cases.py`: this file, run as a script with a
compute capability, a dtype and how many launches, calls them on CPU tensors with the launcher replaced by the
compiler, and prints what each build takes as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Largest shared memory of one block in bytes; CUDA C++ Programming Guide, table of compute capabilities
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# Bytes of local memory per thread. The launch that measured fastest for long SQSK rows takes 256 on sm_90; the most
# that any target takes is 392 (linear attention with packed documents in segments on sm_100)
SPILL_LIMIT = 400

FLOAT8 = {"quantize_rows_kernel", "float8_linear_kernel"}  # of which sm_80 has none
DESCRIPTORS = (90, 100)  # chips whose matrix units read tensor descriptors; swiglu_kernel runs on no others
SLOW = [(target, *kind) for kind in (("bfloat16", "every"), ("float32", "few")) for target in SHARED_LIMIT]


@pytest.mark.parametrize(
    "target, dtype, launches", [(90, "bfloat16", "few"), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)]
)
def test_every_kernel_builds_within_the_limits(target, dtype, launches):
    from hspmn import kernels_hspmn

    command = [sys.executable, __file__, str(target), dtype, launches]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    builds = json.loads(done.stdout.splitlines()[-1])
    files = Path(kernels_hspmn.__file__).parent.glob("kernels*_hspmn.py")
    kernels = re.findall(r"^@kernel\(.*\)\ndef (\w+)", "".join(file.read_text() for file in files), re.MULTILINE)
    others = set() if target in DESCRIPTORS and dtype == "bfloat16" else {"swiglu_kernel"}
    others |= FLOAT8 if target == 80 else set()
    assert {build["kernel"] for build in builds} == set(kernels) - others
    for build in builds:
        assert build["shared"] <= SHARED_LIMIT[target] and build["spilled"] <= SPILL_LIMIT, build


class Recorder:
    """Stands in for `Kernel.launch`: compiles for the arguments it was given, once per distinct build."""

    def __init__(self, target):
        self.target, self.builds = target, {}

    def launch(self, kernel, grid, *args, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: constants.pop(name) for name in list(constants) if name not in kernel.jit.arg_names}
        values = dict(zip(kernel.jit.arg_names, args, strict=False)) | constants
        signature, fixed, attributes = {}, {}, {}
        for position, parameter in enumerate(kernel.jit.params):
            value = values[parameter.name]
            kind = "constexpr" if parameter.is_constexpr else describe(value)
            signature[parameter.name] = kind
            if kind == "constexpr":
                fixed[parameter.name] = value
            elif kind.startswith("*"):
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif kind[0] == "i":  # a launch would find the build of another value
                assert parameter.do_not_specialize, f"{parameter.name} of {kernel.jit.__name__} is a whole number"
        key = repr((kernel.jit.__name__, signature, fixed, options))
        if key not in self.builds:
            source = ASTSource(kernel.jit, signature, fixed, attributes)
            built = triton.compile(source, target=GPUTarget("cuda", self.target, 32), options=options)
            taken = {"kernel": kernel.jit.__name__, "shared": built.metadata.shared, **resources(built.asm["cubin"])}
            self.builds[key] = taken | {"build": key}


def describe(value):
    """Triton's signature entry of an argument."""
    import torch
    from hspmn.kernels_common_hspmn import Tiles

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    names |= {torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1"}
    names |= {torch.float8_e4m3fn: "fp8e4nv"}
    if value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype]
    if isinstance(value, Tiles):
        return f"tensordesc<{names[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def resources(cubin):
    """Bytes of local memory per thread, read from a binary by the cuobjdump that Triton carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {"spilled": 0}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return {"spilled": sum(int(x) for x in re.search(r"STACK:(\d+).*?LOCAL:(\d+)", text).groups())}


def differentiate(operation, args):
    """Call an operation and its gradient, which is made of all arguments at once."""
    import torch

    next(x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()).requires_grad_()
    out = operation(*args, backend="train")
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    torch.autograd.backward(out, [torch.zeros_like(x) for x in out])


def build_all(target, dtype, launches):
    """Call every operation and its gradient at the sizes of the measured model; returns what the builds take."""
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest  # noqa: F401
    import torch
    from hspmn import kernels_common_hspmn as common

    common.capability, common.processors = lambda device: target, lambda device: 132
    common.dependent = lambda device: {"PDL": True, "launch_pdl": True} if target >= 90 else {"PDL": False}
    common.has_descriptors = lambda device, element_size: target in DESCRIPTORS and element_size == 2
    recorder = Recorder(target)
    common.Kernel.launch = lambda kernel, grid, *args, **constants: recorder.launch(kernel, grid, *args, **constants)
    torch.randn = torch.rand = torch.zeros  # only shapes and dtypes decide
    from hspmn.benchmarks.cases import CASES, Sizes, case
    from hspmn.kernels_hspmn import swiglu_fits
    from hspmn.operations_hspmn import REGISTRY

    # One row in segments and in one piece, heads one by one and eight at once, few and many routed tokens, few rows
    shapes = (Sizes(T=8192), Sizes(T=1024), Sizes(B=3, share=0.9), Sizes(T=1), Sizes(B=16, T=1))
    for sizes in shapes if launches == "every" else shapes[:1]:
        for operation in CASES.keys() - {"linear_add"}:  # has no kernel of its own
            variants = list(CASES[operation])
            for variant in variants if launches == "every" else {variants[0], variants[-1]}:
                narrow = {"D": 16} if operation == "gated_mlp" else {}  # whose products this machine makes
                args = case(operation, variant, sizes._replace(**narrow), getattr(torch, dtype), "cpu").args
                try:
                    if operation != "swiglu" or swiglu_fits(*args[:2]):  # else it is a product on this machine
                        REGISTRY[operation](*args, backend="triton")
                except ValueError as error:
                    if target != 80 or not str(error).startswith("float8 needs compute capability 8.9"):
                        raise
                if REGISTRY[operation].trains(*args):
                    differentiate(REGISTRY[operation], args)
    return list(recorder.builds.values())


if __name__ == "__main__":
    print(json.dumps(build_all(int(sys.argv[1]), *sys.argv[2:])))
