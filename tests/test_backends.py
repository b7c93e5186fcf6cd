"""One place picks what runs an operation, and the whole model gives the same on kernels as on the reference.

Without a GPU the kernels run in Triton's interpreter; with one, compiled, and under torch.compile.
"""

from collections import Counter
from functools import partial

import pytest
import torch
from caches import CLOSE, DEVICE, feed, needs_gpu, pack
from caches import tokens as tokens_on_cpu
from hspmn import block_hspmn
from hspmn.block_hspmn import pick_backend
from hspmn.cache_hspmn import HSPMNCache
from hspmn.float8_hspmn import Float8Linear, replace_layers
from hspmn.operations_hspmn import SCALINGS, STORES, Operation, operations

# Small, for the interpreter; a layer that routes and one that does not
SIZES = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
SIZES |= {"sparsity_k": [0.4, 0.0]}
ONE_LAYER = {"num_hidden_layers": 1, "sparsity_k": 0.4}
VARIANTS = {
    "gated": {},
    "elu": {"linear_attention": "elu"},
    "sinks": {"num_sink_tokens": 2, "routed_intermediate_size": 24, "router_initial_tokens": 5},
    "dense_layer": {"sparsity_k": [1.0, 0.3], "linear_attention_horizon": 6},
    "bare": {"sliding_window": 0, "conv_kernel_size": 1, "sparsity_k": 0.3},
    **{kind: {"kv_cache_dtype": kind, "sparsity_k": [1.0, 0.5]} for kind in STORES},
    "all": {"contextual_readers": "all"},
    "all_int8": {"contextual_readers": "all", "kv_cache_dtype": "int8"},
}


@pytest.fixture(autouse=True)
def full_float32(fresh_dynamo):
    with torch.no_grad():
        torch.set_float32_matmul_precision("highest")
        yield


@pytest.fixture
def pair(tiny_model):
    """Function from config overrides to the same model on the kernels and on the reference."""

    def build(**overrides):
        backends = ("triton", "reference")
        return [tiny_model(**SIZES | {"backend": backend} | overrides).to(DEVICE) for backend in backends]

    return build


def tokens(*sizes):
    return tokens_on_cpu(*sizes).to(DEVICE)


def fed(models, ids, pieces, **inputs):
    """Logits and routed tokens of each model, whose caches are fed in pieces."""
    return [feed(model, ids, HSPMNCache(model.config), pieces, **inputs) for model in models]


def assert_same(got, want, close=CLOSE):
    torch.testing.assert_close(got[0], want[0], **close)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_equal_the_reference_in_the_model(pair, variant):
    models, ids = pair(**VARIANTS[variant]), tokens(2, 31)
    without = [(out.logits, out.router_mask) for out in (model(ids, use_cache=False) for model in models)]
    assert_same(*without)
    kernels, reference = fed(models, ids, [20, 1, 1, 9])
    assert_same(kernels, reference)
    if variant not in (*STORES, "all_int8"):  # the same keys as in one pass
        assert_same(kernels, without[1])


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_kernels_equal_the_reference_with_padding_and_packing(pair, kind):
    mask = torch.ones(3, 27, dtype=torch.long, device=DEVICE)
    mask[0, :9], mask[1, 20:], mask[2] = 0, 0, 0
    inputs = {"mask": mask} if kind == "padded" else {"positions": pack(*[[14, 13]] * 3).to(DEVICE)}
    assert_same(*fed(pair(**ONE_LAYER), tokens(3, 27), [16, 1, 10], **inputs))


def test_generation_on_kernels_equals_the_reference(pair):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    got, want = (model.generate(tokens(1, 9), **options) for model in pair(**ONE_LAYER))
    assert torch.equal(got, want)


@pytest.fixture
def called(monkeypatch):
    """Names of the operations that run as kernels, in order."""
    names = []
    for forms in (block_hspmn.OPERATIONS["triton"], block_hspmn.OPERATIONS["launch"]):
        for name, form in vars(forms).items():
            monkeypatch.setattr(forms, name, lambda *a, _n=name, _f=form: names.append(_n) or _f(*a))
    return names


STREAMS = ["norm_heads", "split_heads", "linear_attention", "reflexive_merge", "route", "extend", "sqsk_merge"]
PROMPT = ["place", *STREAMS, "add_norm", "linear_add"]
TOKEN = ["place", "project_token", "split_heads", "attend_token"]
TOKEN += ["linear_add_token", "swiglu_token", "linear_add_token"]


def hooked(layer):
    layer.mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_stream(layer):
    layer.reflexive.register_forward_hook(lambda module, args, output: 2 * output)


def adapted(layer):
    """As an adapter library does it: the layer is wrapped, and a layer of the same interface takes its place."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.5 * x[..., :1]

    weight = layer.projection.qkv_proj.weight
    layer.projection.qkv_proj = Adapted(*weight.shape[::-1], bias=False)
    layer.projection.qkv_proj.weight = weight


def biased(layer):
    layer.o_proj.bias = torch.nn.Parameter(torch.ones(32, device=DEVICE))


@pytest.mark.parametrize("hook", [False, True])
def test_the_kernels_run_where_they_are_forced(pair, called, hook):
    """A model that fell back to the reference would pass every other test here; a removed hook is no reason to."""
    model, _ = pair(**ONE_LAYER)
    if hook:
        hooked(model.model.layers[0])
        model.model.layers[0].mlp.up_proj._forward_hooks.clear()
    fed([model], tokens(1, 8), [7, 1])
    assert called == [*PROMPT, *TOKEN]


FLOAT8 = ["quantize_rows", "float8_linear"]
FLOAT8_PROMPT = ["place", "norm_heads", *FLOAT8, *STREAMS[1:], *FLOAT8, "add_norm", *FLOAT8, "float8_linear"]
FLOAT8_PROMPT += ["quantize_product", "float8_linear"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_in_float8_are_fused_too(pair, called, scaling):
    """As their modules give it, but for the few roundings to e4m3 that another order of a sum turns around."""
    models = pair(**ONE_LAYER, intermediate_size=64)
    for model in models:
        replace_layers(model, partial(Float8Linear.of, scaling=scaling))
    (got, routed), want = fed(models, tokens(2, 20), [12, 7, 1])
    assert called == 2 * FLOAT8_PROMPT + (TOKEN if scaling == "rowwise" else FLOAT8_PROMPT)
    assert (got - want[0]).norm() < 5e-3 * want[0].norm() and torch.equal(routed, want[1])


def test_the_loss_runs_as_a_kernel(pair, called):
    kernels, reference = pair(**ONE_LAYER)
    got, want = (model(ids, labels=ids).loss for ids in [tokens(2, 9)] for model in (kernels, reference))
    torch.testing.assert_close(got, want)
    assert called[-1] == "token_losses"


@pytest.mark.parametrize(
    "change, reason", [(hooked, "hooked"), (hooked_stream, "hooked"), (adapted, "adapted"), (biased, "has a bias")]
)
def test_modules_that_are_changed_are_called(pair, called, change, reason):
    """Launches that use weights past their modules stand back, and what is computed is what the modules say."""
    models = pair(**ONE_LAYER)
    for model in models:
        change(model.model.layers[0])
    body, why = models[0].model.layers[0].path(torch.zeros(2, 8, 32, device=DEVICE), "triton")
    assert body == "modules" and reason in why
    assert_same(*fed(models, tokens(2, 8), [6, 1, 1]))
    assert called and not {"norm_heads", "project_token", "swiglu_token", "linear_add", "add_norm"} & set(called)


def test_an_operation_without_a_form_for_a_backend_runs_its_reference():
    def reference(x):
        return x

    operation = Operation(reference)
    assert [operation.form(backend) for backend in ("reference", "flex", "triton")] == [reference] * 3
    operation.flex(abs)
    assert operation.form("flex") is abs and operation(-1, backend="flex") == 1
    flex, train, triton = (operations(backend) for backend in ("flex", "train", "triton"))
    assert flex.take_rows is train.take_rows is not triton.take_rows  # with a gradient of its own
    assert flex.place is train.place is not triton.place  # without one


@pytest.mark.parametrize("backend, device, width, world, picked", [
    ("auto", "cpu", 64, None, "reference"), ("auto", "cuda", 64, None, "triton"),
    ("auto", "cuda", 48, None, "flex"), ("auto", "cuda", 64, "gradients", "train"),
    ("auto", "cuda", 64, "HAS_TRITON", "flex"),
    ("flex", "cpu", 64, None, "refused: backend='flex' needs a CUDA device"),
    ("triton", "cpu", 64, "interpreted", "refused: backend='triton' needs a CUDA device"),
    ("triton", "cuda", 64, "HAS_TRITON", "refused: backend='triton' needs the triton package"),
    ("triton", "cuda", 64, "gradients", "train"), ("flex", "cuda", 64, "gradients", "flex"),
])  # fmt: skip
def test_a_backend_is_picked_or_refused_where_it_cannot_run(monkeypatch, backend, device, width, world, picked):
    """By the device, the width of a head, and whether there are gradients, Triton and its interpreter."""
    if world == "HAS_TRITON":
        monkeypatch.setattr(block_hspmn, "HAS_TRITON", False)
    if world == "interpreted":
        monkeypatch.setattr(block_hspmn, "interpreted", lambda: False)
    with torch.set_grad_enabled(world == "gradients"):
        if picked.startswith("refused: "):
            with pytest.raises(ValueError, match=picked.removeprefix("refused: ")):
                pick_backend(backend, torch.device(device), width)
        else:
            assert pick_backend(backend, torch.device(device), width) == picked


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("readers", ["routed", "all"])
def test_training_on_kernels_has_the_gradients_of_the_reference(pair, kind, checkpointed, readers):
    ids, inputs = tokens(2, 13), {}
    if kind == "padded":
        inputs["attention_mask"] = (torch.arange(13, device=DEVICE) >= torch.tensor([[4], [0]], device=DEVICE)).long()
    else:
        inputs["position_ids"] = pack([6, 7], [13]).to(DEVICE)
    models, grads, ran = [model.train() for model in pair(**ONE_LAYER, contextual_readers=readers)], [], []
    for model in models:
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.model.layers[0].projection.register_forward_hook(lambda module, args, heads: ran.append(heads.v_BTGE))
        with torch.enable_grad():
            model(ids, labels=ids, **inputs).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert ["split_heads_train" in x.grad_fn.name() for x in (ran[0], ran[-1])] == [True, False]
    for name, want in grads[1].items():
        assert (grads[0][name] - want).norm() <= 1e-3 * want.norm() + 1e-7, name


def test_training_holds_of_the_contextual_stream_its_output_rows_alone(pair):
    """Neither gathered rows, which are gathered again, nor what is added to the reflexive stream."""
    held = []
    for share in (0.4, 0.0):
        model, saved = pair(num_hidden_layers=1, sparsity_k=share)[0].train(), []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x)
        with torch.enable_grad(), hooks:
            model(tokens(2, 20)).logits.sum().backward()
        held.append(Counter({x.data_ptr(): tuple(x.shape) for x in saved if x.dim() == 4}.values()))
    rows = (2, 16, 2, 16)  # B, K, H, E
    assert held[0] - held[1] == {rows: 1} and not held[1] - held[0]


@pytest.mark.parametrize("change", ["hook", "class", "forward"])
@pytest.mark.parametrize("name", ["projection.q_norm", "mlp.down_proj"])
def test_a_changed_module_whose_weight_is_used_elsewhere_is_called_in_training(pair, name, change):
    for model in pair(**ONE_LAYER):
        module = model.train().model.layers[0].get_submodule(name)
        with torch.enable_grad():
            before = model(tokens(1, 9)).logits
            if change == "hook":
                module.register_forward_hook(lambda module, args, output: 0 * output)
            elif change == "class":
                module.__class__ = type("Adapted", (type(module),), {"forward": lambda self, x: 0 * x[..., :32]})
            else:
                module.forward = lambda x: 0 * x[..., :32]
            after = model(tokens(1, 9)).logits
        assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_on_kernels_keeps_no_product_of_swiglu(pair, autocast):
    """Of its width gate and up alone are kept, by either SwiGLU; the weights have the gradients of the reference."""
    kept, grads = [], []
    for model in pair(**ONE_LAYER, routed_intermediate_size=24):
        layer, x, held = model.train().model.layers[0], torch.arange(448.0, device=DEVICE).view(2, 7, 32).sin(), []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x) or x, lambda x: x)
        with torch.enable_grad(), torch.autocast(DEVICE, torch.float16, enabled=autocast):
            with hooks:
                out = layer(x)[0]
            out.float().square().sum().backward()
        kept.append([sum(x.shape[-1:] == (N,) and x.numel() != 32 * N for x in held) for N in (48, 24)])
        grads.append([mlp.down_proj.weight.grad for mlp in (layer.mlp, layer.routed_mlp)])
    assert kept[0] == [2, 2] and min(kept[1]) > 2
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() <= (1e-2 if autocast else 1e-5) * want.norm()


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "flex"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_inference_equals_the_eager_reference(pair, variant, backend):
    model, reference = pair(**VARIANTS[variant])
    model.config.backend, compiled = backend, torch.compile(model, fullgraph=True)
    for seed in range(4):
        ids = tokens(3, 700, seed)
        want, got = (run(ids, use_cache=False) for run in (reference, compiled))
        assert_same((got.logits, got.router_mask), (want.logits, want.router_mask), {"rtol": 0, "atol": 5e-4})
        torch.compiler.set_stance("fail_on_recompile")


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "flex"])
@pytest.mark.parametrize("T", [60, 700])
def test_compiled_training_equals_the_eager_reference(pair, T, backend):
    model, reference = (model.train() for model in pair(num_hidden_layers=3, sparsity_k=[0.3, 0.05, 0.0]))
    model.config.backend, ids = backend, tokens(3, T)
    with torch.enable_grad():
        losses = [each(ids, labels=ids).loss for each in (torch.compile(model, fullgraph=True), reference)]
        sum(losses).backward()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 2e-3 * q.grad.norm() + 1e-6, name


@needs_gpu
@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_bfloat16_on_kernels_is_as_good_as_on_the_reference(pair, called, precision):
    """Long inputs take SwiGLU in one kernel on chips that have it, as exactly as the layers one by one."""
    models = pair(hidden_size=64, intermediate_size=256, sparsity_k=1.0)  # the same tokens in any precision
    ids, errors = tokens(3, 700), []
    want = models[1](ids, use_cache=False).logits
    called.clear()
    for model in models:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
            model = model.to(torch.bfloat16) if precision == "weights" else model
            got = model(ids, use_cache=False).logits
        errors.append(((got - want).norm() / want.norm()).item())
    assert errors[0] <= 1.5 * errors[1], errors
    fits = precision == "weights" and torch.cuda.get_device_capability()[0] in (9, 10)
    assert called.count("swiglu") == (models[0].config.num_hidden_layers if fits else 0)
