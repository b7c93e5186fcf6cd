"""Every kernel builds for every supported chip without a GPU, within that chip's shared memory and with few spills.

The launches are those of the public functions: this file, run as a script with a compute capability, calls them on
CPU tensors with the launcher replaced by the compiler, and prints what each build takes as JSON.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

# Largest shared memory of one block in bytes; CUDA C++ Programming Guide, table of compute capabilities
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# Bytes of local memory per thread. The launch that measured fastest for long SQSK rows takes 256 on sm_90; the most
# that any target takes is 336 (linear attention with packed documents on sm_100)
SPILL_LIMIT = 384


# The chips whose matrix units read tensor descriptors through shared memory; swiglu_kernel runs on no others
DESCRIPTORS = (90, 100)


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_kernel_builds_within_the_limits(target):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, __file__, str(target)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    builds = json.loads(done.stdout.splitlines()[-1])
    assert {build["kernel"] for build in builds} == {
        *("norm_heads_kernel", "route_kernel", "count_kernel", "compact_kernel", "take_rows_kernel"),
        *("decay_kernel", "linear_attention_kernel", "segment_states_kernel", "linear_attention_step_kernel"),
        *("local_attention_kernel", "sqsk_attention_kernel", "combine_splits_kernel", "split_heads_kernel"),
        *(["swiglu_kernel"] if target in DESCRIPTORS else []),
        *("attend_decode_kernel", "merge_decode_kernel", "place_decode_kernel"),
        *("project_decode_kernel", "swiglu_decode_kernel", "linear_add_decode_kernel"),
    }
    for build in builds:
        assert build["shared"] <= SHARED_LIMIT[target], build
        assert build["spilled"] <= SPILL_LIMIT, build


class Recorder:
    """Stands in for a launch: compiles the kernel with the arguments it was given, once per distinct build."""

    def __init__(self, target):
        self.target, self.builds, self.seen = target, [], set()

    def run(self, kernel, *args, grid, warmup, **kwargs):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(kernel.params):
            value = bound[parameter.name]
            signature[parameter.name] = describe(value) if not parameter.is_constexpr else "constexpr"
            if signature[parameter.name] == "constexpr":
                constants[parameter.name] = value
            elif signature[parameter.name].startswith("*"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        key = repr((kernel.__name__, signature, constants, options))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(kernel, signature, constants, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", self.target, 32), options=options)
        names = ("BLOCK_M", "BLOCK_T", "BLOCK_F", "BLOCK_Q", "BLOCK_N", "E", "F", "SPLITS", "HEADS", "MERGE", "PDL")
        self.builds.append(
            {
                "kernel": kernel.__name__,
                "shared": built.metadata.shared,
                "dtype": next(text for text in signature.values() if text.startswith(("*", "tensordesc"))),
                **{name: constants[name] for name in names if name in constants},
                **options,
                **resources(built.asm["cubin"]),
            }
        )


def describe(value):
    """Triton's signature entry of an argument."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    names |= {torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1"}
    if value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{names[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def resources(cubin):
    """Registers and bytes of local memory per thread, read from a binary by the cuobjdump that Triton carries."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {"registers": -1, "spilled": 0}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack, local = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text).groups())
    return {"registers": registers, "spilled": stack + local}


def build_all(target):
    """Call every public function at its production widths in each dtype and return what the builds take."""
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest  # noqa: F401
    import torch
    from hspmn import kernels_attention_hspmn as attention
    from hspmn import kernels_decode_hspmn as decode
    from hspmn import kernels_hspmn as kernels
    from hspmn import kernels_linear_hspmn as linear
    from hspmn import kernels_mlp_hspmn as mlp
    from hspmn import kernels_projection_hspmn as projection
    from hspmn import kernels_rows_hspmn as rows
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    recorder = Recorder(target)
    JITFunction.run = lambda kernel, *args, **kwargs: recorder.run(kernel, *args, **kwargs)
    attention.capability = linear.capability = lambda device: target
    overlap = {"PDL": True, "launch_pdl": True} if target >= 90 else {"PDL": False}
    decode.dependent = projection.dependent = rows.dependent = lambda device: overlap
    attention.processors = decode.processors = linear.processors = mlp.processors = lambda device: 132
    mlp.has_descriptors = lambda x: target in (90, 100) and x.element_size() == 2

    def descriptor(x, block_n):
        if target not in (90, 100) or x.element_size() == 4:
            return None
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block_n, 1, x.shape[-1]])

    def flat_descriptor(x, rows, columns):
        if target not in (90, 100) or x.element_size() == 4:
            return None
        B, T, G, E = x.shape
        return TensorDescriptor(x, [B * T, G * E], [G * E, 1], [rows, columns])

    attention._descriptor, linear._descriptor = descriptor, flat_descriptor
    for dtype, E in ((torch.bfloat16, 128), (torch.float32, 128)):
        B, T, H, G, K = 1, 4096, 16, 4, 4096
        q, k, v = (torch.zeros(B, T, heads, E, dtype=dtype) for heads in (H, G, G))
        decay, start = torch.zeros(B, T, H), torch.zeros(B, T, dtype=torch.int64)
        length, state = torch.full((B,), T), torch.zeros(B, H, E, E)
        gate, count = torch.zeros(B, T), torch.zeros(B, dtype=torch.int32)
        x, taps, norm = torch.zeros(B, T, (H + 2 * G) * E, dtype=dtype), torch.zeros(H * E + 2 * G * E, 4), q[0, 0, 0]
        for table, mode, chip in ((torch.zeros(1, T, E), "elu", 132), (q[:, :, 0], "gated", 8)):
            projection.processors = lambda device, chip=chip: chip  # one head per program, then eight
            split = partial(kernels.split_heads, q_norm_E=norm, k_norm_E=norm, kv_heads=G, eps=1e-6, mode=mode)
            split(x, taps, None, None, table, table)
            split(x, taps.to(dtype), x[:, :3], start, table, table)
            split(x[:, :1], taps.to(dtype), x[:, :3], start[:, :1], table[:, :1], table[:, :1])
        for score_weight in (None, torch.zeros(2048)):
            kernels.norm_heads(
                torch.zeros(B, T, 2048, dtype=dtype),
                torch.zeros(2048),
                1e-6,
                torch.zeros(32, 2048, dtype=dtype),
                score_weight,
            )
        _, _, routed = kernels.route(torch.zeros(B, T, 2048, dtype=dtype), torch.zeros(2048), torch.zeros(1), 0.05)
        index, _, _ = kernels.compact(routed, K)
        for boundaries in ((None, None, None), (start, length, state)):
            kernels.linear_attention(q, k, v, decay, *boundaries)
            kernels.linear_attention(q, k, v, decay, *boundaries, segments=1)
        one = (x[:, :1].contiguous() for x in (q, k, v, decay, start))
        kernels.linear_attention_step(*one, length, state)
        one = [x[:, :1].contiguous() for x in (q, k, q, k, v)]
        begin, last, rates = start[:, :1], length.clone(), decay[0, 0]
        rings, slots = (k[:, :128].contiguous(), v[:, :128].contiguous()), torch.zeros(B, T, dtype=torch.int32)
        place, counts, scales = (begin, begin), (slots, count, count), torch.zeros(2, B, T, G)
        whole, cache = [x.to(torch.int8) for x in (k, v)], (state, *rings, k, v, *counts, *scales[:, :, :1])
        for held, router in ((None, (gate[:, :1], rates[:1], 0.05, 0)), (length, (None, None, 0.0, 0))):
            parameters = (torch.zeros(B, 1, 2 * H), rates, rates, 0.01, norm, 1e-6)
            for kept in (cache, (state, *rings, *whole, *counts, *scales)):
                kernels.attend_decode(*one, *parameters, *place, held, last, *router, *kept)
            kernels.place_decode(table[:, :1], table[:, :1], begin, begin, held)
            history = x[:, :3].contiguous()
            tables = (table[:, :1], table[:, :1], norm, norm)
            options = {"kv_heads": G, "eps": 1e-6}
            kernels.split_heads_decode(x[:, :1], taps.to(dtype), history, begin, held, *tables, **options)
        kernels.local_attention(q, k, v, None, 128)
        kernels.local_attention(q, k, v, start, 128, k[:, :128], v[:, :128], with_lse=True)
        kernels.reflexive_merge(q, k, v, None, 128, q, decay, norm, 1e-6)
        kernels.reflexive_merge(q, k, v, start, 128, q, decay, norm, 1e-6, k[:, :128], v[:, :128])
        for slots in (1, 64, K):
            first = torch.zeros(B, slots, dtype=torch.int64)
            kernels.sqsk_merge(q.clone(), gate, q, k, v, index[:, :slots], None, None, count)
            kernels.sqsk_merge(q.clone(), gate, q, k, v, index[:, :slots], first, count, count)
            kernels.sqsk_attention(q[:, :slots], k, v, first, count, count, with_lse=True)
        gate, up = torch.zeros(2, 8192, 2048, dtype=dtype)
        for tokens in (1, 8, 16):
            x, width = torch.zeros(tokens, 1, 2048, dtype=dtype), torch.zeros(2048)
            kernels.project_decode(x, width, 1e-6, gate[:3072], gate[:32], width if tokens == 1 else None)
            hidden = kernels.swiglu_decode(x, width, 1e-6, gate, up)
            kernels.linear_add_decode(x, hidden, gate.view(2048, 8192))
        x = torch.zeros(T, 2048, dtype=dtype)
        for weights in ((gate, up), (up, gate)):  # whichever lies first in memory
            if mlp.swiglu_fits(x, *weights):
                mlp.swiglu(x, *weights)
    return recorder.builds


if __name__ == "__main__":
    print(json.dumps(build_all(int(sys.argv[1]))))
