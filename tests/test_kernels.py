"""Kernels equal the reference: no further from float64 than twice what the eager low-precision reference is.

Inputs are those of `benchmarks/cases.py`. Without a GPU the kernels run in Triton's interpreter, on small shapes and
without bfloat16 (its interpreter multiplies the bit patterns of bfloat16); with one, on larger shapes, compiled, and
from a CUDA graph.
"""

import math
import sys
from contextlib import contextmanager
from inspect import signature

import pytest
import torch
from caches import CUDA, DEVICE, needs_gpu
from hspmn import kernels_attention_hspmn, kernels_decode_hspmn, kernels_hspmn  # noqa: F401  registers every kernel
from hspmn.benchmarks.cases import CASES, Sizes, case, check

from hspmn.operations_hspmn import (  # isort: skip
    NAMESPACE, REGISTRY, linear_add_token, split_heads, sqsk_merge, swiglu, swiglu_token, token_losses,
)  # fmt: skip

FILES = [file for name, file in sys.modules.items() if name.startswith("hspmn.kernels_")]
PLANS = [plan for file in FILES for plan in vars(file).values() if hasattr(plan, "cache_clear")]

SMALL = Sizes(B=3, T=70, H=4, G=2, E=16, D=40, N=48, W=24, P=90, share=0.4)
ODD = Sizes(B=5, T=33, H=6, G=2, E=32, D=72, N=64, W=7, P=20, taps=2, share=0.3)
TINY = SMALL._replace(B=2, T=3, H=2, G=1)
SIZES = {"small": SMALL, "odd": ODD, "token": SMALL._replace(T=1), "many_rows": ODD._replace(B=17, T=2)}
if CUDA:
    SIZES |= {"large": Sizes(B=3, T=1100, N=4096, P=2500), "wide": ODD._replace(T=700, H=8, E=64, P=600)}
RUNS = [
    pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.slow] * slow)
    for name in SIZES
    for dtype in (torch.float32, torch.float16) + (torch.bfloat16,) * CUDA
    for slow in [not CUDA and (name, dtype) not in (("small", torch.float32), ("odd", torch.float16))]
]
VARIANTS = [(operation, variant) for operation, variants in CASES.items() for variant in variants]


@pytest.fixture
def patch_kernels(monkeypatch):
    """Function that replaces names in all kernel files, whose cached plans are made anew."""

    def patch(**replaced):
        for file in FILES:
            for name in replaced.keys() & vars(file).keys():
                monkeypatch.setattr(file, name, replaced[name])
        for plan in PLANS:
            plan.cache_clear()

    yield patch
    monkeypatch.undo()
    patch()


@contextmanager
def poison():
    """Make every `empty` tensor hold NaN, or a wild number, so that an output nobody wrote cannot pass."""

    def poisoned(allocate):
        def wrapped(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else True if out.dtype == torch.bool else 77)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for holder, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(holder, name, poisoned(getattr(holder, name)))
        yield


def make(operation, variant, sizes, dtype, seed=0):
    torch.manual_seed(seed)
    made = case(operation, variant, sizes, dtype, DEVICE)
    return made, dict(zip(signature(REGISTRY[operation].reference).parameters, made.args, strict=True))


def exactly(arguments):
    """The same in float64, dtypes that are asked for included; integers and None as they are."""

    def widen(x):
        if isinstance(x, torch.dtype):
            return torch.float64
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {name: widen(x) for name, x in arguments.items()}


def outputs(operation, arguments, backend):
    """What an operation returns, by number, and what it writes in place, by name."""
    op = REGISTRY[operation]
    out = op(*arguments.values(), backend=backend)
    out = out if isinstance(out, tuple) else () if out is None else (out,)
    return dict(enumerate(out)) | {name: arguments[name] for name in op.mutates if arguments[name] is not None}


def assert_as_accurate(operation, variant, sizes, dtype, spread=False):
    """Outputs and arguments written in place, from inputs with NaN wherever nothing may be read."""
    made, arguments = make(operation, variant, sizes, dtype)
    eager = outputs(operation, arguments, "reference")
    exact = outputs(operation, exactly(make(operation, variant, sizes, dtype)[1]), "reference")
    _, arguments = make(operation, variant, sizes, dtype)
    for name, mask in made.unread.items():
        arguments[name][mask] = float("nan")
    read = {n for n, x in arguments.items() if isinstance(x, torch.Tensor) and n not in REGISTRY[operation].mutates}
    for name in read if spread else ():  # a number that belongs to nobody lies after each element
        arguments[name] = torch.stack((arguments[name], torch.full_like(arguments[name], 77)), -1)[..., 0]
    before = {name: arguments[name].clone() for name in read}
    with poison():
        got = outputs(operation, arguments, "triton")
    for name in read:
        torch.testing.assert_close(arguments[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert got.keys() == eager.keys()
    for name, kernel in got.items():
        assert kernel.dtype == eager[name].dtype and kernel.shape == eager[name].shape, name
        assert name in REGISTRY[operation].mutates or kernel.is_contiguous(), name
    check(got, eager, exact, made.compared)


@pytest.mark.parametrize("sizes, dtype", RUNS)
@pytest.mark.parametrize("operation, variant", VARIANTS)
def test_kernels_are_as_accurate_as_the_reference(operation, variant, sizes, dtype):
    assert_as_accurate(operation, variant, SIZES[sizes], dtype, spread=sizes == "odd")


def descriptors(on):
    return {"has_descriptors": lambda *_: on, "_reads_descriptors": lambda *_: on}


def several_blocks(*sizes, config=kernels_decode_hspmn.attend_token_config):
    return config(*sizes) | {"BLOCK_N": 16, "COLUMNS": 16}


LONG = SMALL._replace(B=5, T=1, E=32, W=40, P=700)
PRODUCT = SMALL._replace(B=1, T=300, D=72, N=264)
THREE, MANY = {"processors": lambda device: 3}, {"processors": lambda device: 16}
WAYS = [  # by operation and variant: what the size of the chip or the layout of a tensor would choose elsewhere
    *(("swiglu", "plain", PRODUCT._replace(T=T), descriptors(True) | THREE) for T in (128, 300)),
    *((operation, variant, SMALL, descriptors(not CUDA)) for operation, variants in (
        ("linear_attention", ("state", "packed_padded")), ("local_attention", ("plain", "packed_ring")),
        ("reflexive_merge", ("packed",)),
        ("sqsk_attention", ("plain", "continued", "every")), ("sqsk_merge", ("packed", "every_packed")),
    ) for variant in variants),
    *(("linear_attention", variant, SMALL, {"_segments": lambda *_: 3} | descriptors(on))
      for variant, on in (("row", False), ("packed_padded", False), ("state", True))),
    *(("route", variant, SMALL, {"ROUTE_WHOLE": 8, "ROUTE_BLOCK": 16}) for variant in CASES["route"]),
    ("split_heads", "continued", SMALL, {"processors": lambda device: 1000}),
    ("token_losses", "ignored", SMALL._replace(T=9, N=50), {"LOSS_BLOCK": 16}),
    ("sqsk_attention", "token", LONG, MANY),
    *(("sqsk_merge", variant, LONG, MANY) for variant in ("token", "every_token")),
    *(("attend_token", variant, LONG, MANY | {"attend_token_config": several_blocks})
      for variant in CASES["attend_token"]),
]  # fmt: skip


@pytest.mark.parametrize("operation, variant, sizes, patches", WAYS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_other_ways_to_launch_are_as_accurate(operation, variant, sizes, patches, dtype, patch_kernels):
    if operation == "swiglu" and CUDA:
        if dtype == torch.float32 or torch.cuda.get_device_capability()[0] not in (9, 10):
            pytest.skip("the kernel takes 16 bits on sm_90 and sm_100")
    patch_kernels(**patches)
    assert_as_accurate(operation, variant, sizes, dtype)


def test_sqsk_merge_gathers_from_views_with_spare_rows():
    _, inputs = make("sqsk_merge", "tokens", SMALL, torch.float32)
    views = {name: torch.nn.functional.pad(inputs[name], (0,) * 5 + (1,))[:, :-1] for name in ("k_BPGE", "v_BPGE")}
    results = [inputs["reflexive_BTHE"].clone() for _ in range(2)]
    for backend, result in zip(("triton", "reference"), results, strict=True):
        sqsk_merge(*(inputs | views | {"reflexive_BTHE": result}).values(), backend=backend)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_swiglu_takes_weights_in_any_order_of_memory_and_survives_extreme_values(patch_kernels):
    """SiLU of a very negative value is zero, and NaN is not hidden."""
    patch_kernels(**descriptors(True))
    x, gate, up = make("swiglu", "plain", PRODUCT, torch.float16)[1].values()
    for weights in ((gate, up), (up, gate), (gate, gate)):
        torch.testing.assert_close(swiglu(x, *weights, backend="triton"), swiglu(x, *weights), rtol=1e-2, atol=2e-3)
    x = torch.tensor([-1e4, 1e4, float("nan"), 1.0], device=DEVICE).repeat_interleave(32)[:, None].expand(128, 64)
    weight = torch.ones(128, 64, device=DEVICE) / 64
    out = swiglu(*(tensor.to(torch.float16) for tensor in (x, weight, weight / 1e4)), backend="triton")
    assert out[:32].abs().max() < 1e-6 and out[32:64].isfinite().all() and out[64:96].isnan().all()


def test_split_heads_survives_extreme_values():
    """A zero head keeps length zero, and SiLU of a large negative value is zero: nothing is NaN."""
    _, inputs = make("split_heads", "plain", SMALL._replace(B=1, T=6), torch.float32)
    inputs["weight_CL"].abs_()
    inputs["x_BTC"][:, :3], inputs["x_BTC"][:, 3:] = 0.0, -1e4
    out = split_heads(*inputs.values(), backend="triton")
    assert all(x.isfinite().all() for x in out)
    assert not out[0][:, :3].any() and not out[0][:, 3:].any()


def test_token_losses_of_several_blocks_survive_extreme_values(patch_kernels):
    """Losses near 0 keep their digits in the gradient, infinite logits have no share, wrong targets are not hidden."""
    patch_kernels(LOSS_BLOCK=16)
    logits = torch.zeros(6, 40, device=DEVICE)
    logits[0, 3], logits[1, 3], logits[2, 3], logits[3, :20], logits[3, 3] = 8, 16, 1e4, -math.inf, 1e4
    target = torch.tensor([3, 3, 5, 3, -7, 40], device=DEVICE)
    x, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    got, want = token_losses(x, target, backend="train"), token_losses(exact[:4], target[:4])
    grad, right = (torch.autograd.grad(losses[:4].sum(), each)[0] for losses, each in ((got, x), (want, exact)))
    torch.testing.assert_close(got[:4].double(), want, rtol=1e-3, atol=1e-7)  # of 1 + 1e-5 float32 keeps two digits
    at_target = grad[0, 3].double() / torch.expm1(-got[0].detach().double())
    assert got[4:].isnan().all() and abs(at_target - 1) < 1e-6
    torch.testing.assert_close(grad[:4].double(), right[:4], rtol=1e-5, atol=1e-7)
    assert torch.autograd.grad(token_losses(x, target, backend="train").sum(), x)[0][4:].isnan().all()


@needs_gpu
def test_the_loss_of_logits_takes_no_memory_beside_their_gradient():
    _, inputs = make("token_losses", "ignored", Sizes(N=16384), torch.bfloat16)
    logits, before = inputs["logits_NV"].requires_grad_(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_losses(*inputs.values(), backend="train").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.01 * logits.nbytes


def test_a_store_with_spare_slots_is_not_copied():
    """Keys and values that are the first slots of a longer buffer, as a growing cache hands them over."""
    k, v = torch.zeros(2, 2, 23, 2, 16, device=DEVICE)[:, :, :20]
    assert kernels_attention_hspmn._store_rows(k, v)[0] is k


def gradients(operation, arguments, backend, weights):
    """Of all its inputs in floating point, by name, given those of its outputs; None where there is none."""
    inputs = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    inputs = {name: x for name, x in inputs.items() if name not in ("cos_BTE", "sin_BTE")}  # tables, never asked for
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with torch.enable_grad():
        out = REGISTRY[operation](*(arguments | inputs).values(), backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    taken = [(x, weight.to(x.dtype)) for x, weight in zip(out, weights, strict=True) if x.requires_grad]
    out, weights = zip(*taken, strict=True)
    found = torch.autograd.grad(out, list(inputs.values()), weights, allow_unused=True)
    return dict(zip(inputs, found, strict=True))


TRAINED = [each for each in VARIANTS if REGISTRY[each[0]].trains(*make(*each, TINY, torch.float32)[0].args)]


def assert_gradients_as_accurate(operation, variant, sizes, dtype):
    """Of every argument, zeros where it is not read; inputs that may not be read, and memory not written, are NaN."""
    made, arguments = make(operation, variant, sizes, dtype)
    exact_arguments = exactly(arguments)
    exact_out = outputs(operation, exact_arguments, "reference")
    weights = [torch.randn_like(x) * x.isfinite() for x in exact_out.values()]
    for number, mask in made.compared.items():
        weights[number] *= mask.reshape(*mask.shape, *[1] * (weights[number].dim() - mask.dim()))
    exact = gradients(operation, exact_arguments, "reference", weights)
    eager = gradients(operation, arguments, "reference", weights)
    for name, mask in made.unread.items():
        arguments[name][mask] = float("nan")
    with poison():
        got = gradients(operation, arguments, "train", weights)
    assert [x is None for x in got.values()] == [x is None for x in exact.values()]
    got, eager, exact = ({n: x for n, x in each.items() if x is not None} for each in (got, eager, exact))
    for name, x in got.items():
        assert x.dtype == eager[name].dtype and x.shape == eager[name].shape, name
    for each in (got, eager, exact) if "log_gate_BP" in got else ():
        # Sums of differences of products of this size, of which nothing is left where a query sees a single key
        each["log_gate_BP"] = (each["log_gate_BP"] + sizes.E**0.5).to(torch.float64 if each is exact else dtype)
    check(got, eager, exact, {})


@pytest.mark.parametrize("sizes, dtype", [run for run in RUNS if not run.marks])
@pytest.mark.parametrize("operation, variant", TRAINED)
def test_gradients_are_as_accurate_as_those_of_the_reference(operation, variant, sizes, dtype):
    sizes = SIZES[sizes]
    if operation == "split_heads" and not CUDA:  # which goes token by token, for an interpreter the slowest way
        sizes = sizes._replace(B=2, T=20)
    assert_gradients_as_accurate(operation, variant, sizes, dtype)


@pytest.mark.parametrize("operation, variant", dict(TRAINED).items())
def test_the_reference_trains_what_kernels_do_not_take(operation, variant):
    """float64, and heads of a width that is none of theirs; some operations take anything, or know no heads."""
    arguments = make(operation, variant, TINY, torch.float32)[1]
    assert REGISTRY[operation].trains(*exactly(arguments).values()) == (operation == "take_rows")
    arguments = make(operation, variant, TINY._replace(E=48), torch.float32)[1]
    heedless = operation in ("take_rows", "gated_mlp", "token_losses")
    assert REGISTRY[operation].trains(*arguments.values()) == heedless


@pytest.mark.slow
@pytest.mark.parametrize("operation, variant, patches", [
    ("local_attention", "plain", descriptors(not CUDA)),
    ("sqsk_attention", "plain", descriptors(not CUDA)),  # blocks without a mask
    ("sqsk_attention", "packed", descriptors(CUDA)),
    ("sqsk_attention", "every", descriptors(not CUDA)),
    ("sqsk_attention", "every_packed", descriptors(CUDA)),
    # segments, whose borders many paths cross
    ("linear_attention", "documents", {"_segments": lambda *_: 3} | descriptors(False)),
    ("linear_attention", "plain", {"_segments": lambda *_: 2} | descriptors(True)),
    ("linear_attention", "documents", descriptors(True)),
    ("gated_mlp", "plain", {"BACK_ROWS": 250}),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_gradients_of_other_ways_to_launch_are_as_accurate(operation, variant, patches, patch_kernels):
    patch_kernels(**patches)
    assert_gradients_as_accurate(operation, variant, SMALL._replace(T=200), torch.float16)


def test_the_gradient_of_a_gate_ends_where_it_is_clamped():
    """Below the bound, not at it, and for NaN as autograd has it; in a product of several programs."""
    gate_N1 = torch.tensor([-1e4, -30.001, -30.0, -29.0, 0.0, 7.0, 1e4, float("nan")] * 300, device=DEVICE)[:, None]
    one_BTD = torch.ones(1, 1, 1, device=DEVICE)
    arguments = {"x_BTD": one_BTD, "gate_weight_ND": gate_N1, "up_weight_ND": torch.full_like(gate_N1, 1e9)}
    arguments |= {"weight_DN": torch.ones_like(gate_N1.mT)}
    got, want = (gradients("gated_mlp", arguments, backend, [one_BTD] * 3) for backend in ("train", "reference"))
    assert got["gate_weight_ND"][-8:, 0].bool().tolist() == [False, False, True, True, True, True, True, False]
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=0, equal_nan=True)


def cut(*index):
    return lambda x: x[index]


def cast(dtype):
    return lambda x: x.to(dtype)


def transposed(x):
    return x.mT.contiguous().mT


FULL, HALF = slice(None), torch.float16
ERRORS = [  # operation and variant, argument, what is done to it, what the message says
    ("linear_attention", "state", "q_BTHE", cut(FULL, FULL, slice(3)), "multiple of key/value heads"),
    ("linear_attention", "state", "v_BTGF", cut(FULL, slice(5)), "shapes disagree"),
    ("linear_attention", "state", "state_BHEF", cast(HALF), "state must be"),
    ("linear_attention", "state", "state_BHEF", transposed, "state must be contiguous"),
    ("local_attention", "plain", "q_BTHE", cast(HALF), "share a dtype"),
    ("local_attention", "plain", "window", lambda window: 0, "window must be at least 1"),
    ("local_attention", "ring", "ring_k_BWGE", cut(FULL, slice(5)), "ring must hold the window"),
    ("reflexive_merge", "plain", "head_gate_BTH", cut(..., slice(3)), "head_gate must be"),
    ("reflexive_merge", "plain", "norm_E", cut(slice(8)), "norm must be"),
    ("sqsk_merge", "store", "reflexive_BTHE", transposed, "reflexive must be contiguous"),
    ("route", "plain", "capacity", lambda capacity: -1, "capacity must be at least 0"),
    ("extend", "plain", "keys_BPGE", transposed, "keys must be contiguous"),
    ("split_heads", "plain", "kv_heads", lambda heads: 3, "multiple of kv_heads"),
    ("split_heads", "plain", "feature", lambda feature: "relu", "feature must be one of"),
    ("split_heads", "plain", "x_BTC", cast(torch.float64), "x must be float32"),
    ("split_heads", "plain", "weight_CL", cut(slice(64)), "weight must be"),
    ("split_heads", "history", "history_BLC", cut(FULL, slice(2)), "history must hold the 3 tokens"),
    ("split_heads", "history", "history_BLC", transposed, "history must be contiguous"),
    ("split_heads", "packed", "sin_BTE", cut(slice(2)), "sin must be"),
    ("split_heads", "plain", "k_norm_E", cut(slice(8)), "norm weights must be"),
    ("split_heads", "plain", "q_norm_E", cut(slice(8)), "head width must be one of"),
    ("norm_heads", "plain", "head_weight_XD", cast(HALF), "share a dtype"),
    ("norm_heads", "plain", "head_weight_XD", cut(FULL, slice(8)), "head_weight must be"),
    ("norm_heads", "scored", "score_weight_D", cut(slice(8)), "score_weight must be"),
    ("add_norm", "plain", "y_BTD", cast(HALF), "y must be"),
    ("add_norm", "plain", "norm_D", cut(slice(8)), "norm must be"),
    ("project_token", "scored", "qkv_weight_CD", cast(HALF), "qkv_weight must be"),
    ("project_token", "scored", "score_weight_D", cut(slice(8)), "score_weight must be"),
    ("swiglu_token", "plain", "up_weight_ND", cut(slice(4)), "up_weight must have the 48 rows"),
    ("swiglu_token", "plain", "x_BTD", lambda x: x.expand(-1, 2, -1), "must be one token"),
    ("linear_add_token", "plain", "residual_BTN", cut(..., slice(8)), "residual must be"),
    ("linear_add_token", "float8", "weight_ND", cast(HALF), "weight must be .* of scales"),
    ("linear_add_token", "float8", "scale_N1", cut(slice(8)), "scale of weight must be"),
    ("swiglu_token", "float8", "up_scale_N1", lambda x: None, "both weights with scales or none"),
    ("swiglu", "plain", "up_weight_NK", cut(slice(16)), r"up_weight \(16, 40\)"),
    ("token_losses", "plain", "logits_NV", cast(torch.float64), "logits must be"),
    ("token_losses", "plain", "target_N", cut(slice(3)), "target must be int64"),
    ("gated_mlp", "plain", "x_BTD", cast(torch.float64), "x must be float32"),
    ("gated_mlp", "plain", "x_BTD", cut(..., slice(8)), r"x must be \[B, T, 40\]"),
    ("gated_mlp", "plain", "up_weight_ND", cut(slice(16)), r"up_weight must be \(48, 40\)"),
    ("gated_mlp", "plain", "weight_DN", cast(HALF), r"weight must be \(40, 48\)"),
    ("linear_add", "plain", "weight_NK", cast(HALF), r"weight must be \[N, 48\]"),
    ("linear_add", "plain", "residual", transposed, "residual must be contiguous"),
    ("quantize_rows", "rowwise", "x", cast(torch.float64), "rows to quantise must be"),
    ("quantize_rows", "mx", "x", cut(..., slice(24)), "rows must have a multiple of 32"),
    ("quantize_product", "rowwise", "up", cast(HALF), "up must be"),
    ("float8_linear", "rowwise", "x", cast(HALF), "x and weight must be"),
    ("float8_linear", "rowwise", "scale", cut(slice(1)), "scale must be"),
    ("float8_linear", "mx", "weight_scale", cast(torch.float32), "scales of x and weight must share"),
    ("attend_token", "plain", "q_BTHE", lambda x: x.expand(-1, 2, -1, -1), "attend_token takes one token"),
    ("attend_token", "plain", "head_BTX", cut(..., slice(4)), "head must be"),
    ("attend_token", "plain", "score_BT", cut(slice(1)), "score must be"),
    ("attend_token", "plain", "state_BHEE", cast(HALF), "state must be contiguous torch.float32"),
    ("attend_token", "plain", "positions_BP", cast(torch.int64), "positions must be contiguous torch.int32"),
    ("attend_token", "int8", "key_scales_BPG", cut(FULL, slice(1)), "key_scales must be contiguous"),
    ("attend_token", "every", "log_gates_BP", cut(FULL, slice(1)), "log_gates must be contiguous"),
    ("sqsk_attention", "every", "log_gate_BP", cut(FULL, slice(3)), "log_gate must be"),
    ("sqsk_merge", "every_store", "log_gate_BP", cast(HALF), "log_gate must be"),
]


@pytest.mark.parametrize("operation, variant, argument, change, message", ERRORS)
def test_errors_name_what_is_wrong(operation, variant, argument, change, message):
    _, inputs = make(operation, variant, SMALL, torch.float32)
    inputs[argument] = change(inputs[argument])
    with pytest.raises(ValueError, match=message):
        REGISTRY[operation](*inputs.values(), backend="triton")


@pytest.mark.parametrize("operation", CASES)
def test_registered_operators_are_what_they_say(operation):
    """A kernel of its own; schema, gradient and fake tensors, of sizes that change too."""
    assert CASES.keys() == REGISTRY.keys() and REGISTRY[operation].form("triton") != REGISTRY[operation].reference
    made, arguments = make(operation, list(CASES[operation])[-1], TINY, torch.float32)
    # Whether a tensor has changed is not implemented for numbers of 8 bits
    small = any(isinstance(x, torch.Tensor) and x.is_floating_point() and x.itemsize == 1 for x in made.args)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += [] if small else ["test_schema"]
    torch.library.opcheck(REGISTRY[operation].form("triton"), made.args, test_utils=checks)


@pytest.mark.parametrize("operation, variant", dict(TRAINED).items())
def test_registered_gradients_are_what_they_say(operation, variant):
    _, arguments = make(operation, variant, TINY, torch.float32)
    given = [x for name, x in arguments.items() if name not in REGISTRY[operation].mutates]
    given = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
    torch.library.opcheck(getattr(getattr(torch.ops, NAMESPACE), f"{operation}_train"), given)


def assert_equal(got, want, compared):
    assert got.keys() == want.keys()
    for name, mask in {name: compared.get(name, ...) for name in want}.items():
        assert torch.equal(got[name][mask], want[name][mask]), name


@pytest.mark.parametrize("operation", [name for name, op in REGISTRY.items() if op.mutates])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
def test_what_is_written_in_place_compiles_without_a_graph_break(operation, backend):
    """Bit-equal to the eager call, of arguments and of what the graph itself has made."""
    made = REGISTRY[operation].mutates[0]
    variant = next(x for x in CASES[operation] if make(operation, x, SMALL, torch.float32)[1][made] is not None)

    def call(arguments):
        return outputs(operation, arguments | {made: 2 * arguments[made]}, "triton")

    torch.compiler.reset()
    (drawn, inputs), (_, others) = (make(operation, variant, TINY, torch.float32) for _ in range(2))
    got, want = torch.compile(call, fullgraph=True, backend=backend)(inputs), call(others)
    assert_equal(got, want, drawn.compared)
    written = [name for name in want if name in inputs and name != made]
    assert_equal(*({name: held[name] for name in written} for held in (inputs, others)), drawn.compared)


@needs_gpu
@pytest.mark.parametrize("operation, variant", VARIANTS)
def test_a_captured_operation_replays_for_other_inputs(operation, variant):
    """Without a host synchronisation, and bit-equal to an eager call."""
    (_, static), (drawn, fresh), (_, same) = (make(operation, variant, SMALL, torch.float32, i) for i in (0, 1, 1))
    outputs(operation, make(operation, variant, SMALL, torch.float32)[1], "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outputs(operation, static, "triton")
    for held, new in zip(static.values(), fresh.values(), strict=True):
        if isinstance(held, torch.Tensor):
            held.copy_(new)
    graph.replay()
    assert_equal(got, outputs(operation, same, "triton"), drawn.compared)


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_chain_of_overlapping_launches_is_in_order(captured):
    """Every launch reads what the one before wrote, and memory is used again: each result is that of a lone launch."""
    x, norm, eps = make("swiglu_token", "plain", Sizes(B=4, D=1024), torch.bfloat16)[0].args[:3]
    weights = [torch.randn(1024, 1024, device=DEVICE).bfloat16() / 64 for _ in range(12)]

    def chain(wait):
        out, y = [], x
        for gate, up in zip(weights, weights[::-1], strict=True):
            hidden = swiglu_token(y, norm, eps, gate, up, None, None, backend="triton")
            y = linear_add_token(y, hidden, up, None, backend="triton")
            wait()
            out.append(y.clone() if len(out) % 3 else y)
        return out

    want, got = chain(torch.cuda.synchronize), chain(lambda: None)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain(lambda: None)
        for _ in range(20):
            graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@needs_gpu
@pytest.mark.parametrize("operation, variant", [("split_heads", "plain"), ("reflexive_merge", "plain")])
def test_rows_of_more_elements_than_32_bits_count(operation, variant):
    """The last tokens of a long row are those of the short row that ends there."""
    sizes, tail = Sizes(T=2**20 + 300, N=64, D=64, P=64), 200
    assert sizes.T * sizes.H * sizes.E > 2**31
    _, inputs = make(operation, variant, sizes, torch.bfloat16)
    whole = outputs(operation, inputs, "triton")
    short = {n: x[:, -tail:] if isinstance(x, torch.Tensor) and x.dim() > 2 else x for n, x in inputs.items()}
    for name, x in outputs(operation, short, "triton").items():
        assert torch.equal(whole[name][:, -tail + sizes.W :], x[:, sizes.W :]), name
