"""One place picks what runs an operation, and the whole model gives the same on kernels as on the reference.

Without a GPU the kernels run in Triton's interpreter; with one, compiled, under torch.compile and in a CUDA graph.
"""

import pytest
import torch
from hspmn import operations_hspmn
from hspmn.operations_hspmn import pick_backend

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CLOSE = {"rtol": 0, "atol": 1e-4}
VARIANTS = {
    "gated": {},
    "elu": {"linear_attention": "elu"},
    "sinks": {"num_sink_tokens": 2},
    "routed_mlp": {"routed_intermediate_size": 24, "router_initial_tokens": 5},
    "dense_layer": {"sparsity_k": [1.0, 0.0, 0.3], "linear_attention_horizon": 6},
    "bare": {"sliding_window": 0, "conv_kernel_size": 1, "sparsity_k": 0.3},
}
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def full_float32():
    with torch.no_grad():
        torch.set_float32_matmul_precision("highest")
        yield
    torch.compiler.set_stance("default")


@pytest.fixture
def pair(tiny_model):
    """Function from config overrides to the same model on the kernels and on the reference."""

    def build(**overrides):
        return [
            tiny_model(**{"head_dim": 16, "backend": backend} | overrides).to(DEVICE)
            for backend in ("triton", "reference")
        ]

    return build


def tokens(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def feed(model, ids, cuts=(), mask=None, positions=None):
    """Logits and routed tokens of a prompt fed in pieces that end at `cuts`, through a cache."""
    borders, cache, outputs = [0, *cuts, ids.shape[1]], None, []
    for begin, end in zip(borders, borders[1:], strict=False):
        outputs.append(
            model(
                ids[:, begin:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if positions is None else positions[:, begin:end],
                past_key_values=cache,
            )
        )
        cache = outputs[-1].past_key_values
    return torch.cat([x.logits for x in outputs], 1), torch.cat([x.router_mask for x in outputs], 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_equal_the_reference_in_the_model(pair, variant):
    models, ids = pair(**VARIANTS[variant]), tokens(2, 37)
    got, want = (model(ids, use_cache=False) for model in models)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    assert torch.equal(got.router_mask, want.router_mask)
    for cuts in ((), (20, 21, 22, 23)):
        logits, routed = feed(models[0], ids, cuts)
        torch.testing.assert_close(logits, want.logits, **CLOSE)
        assert torch.equal(routed, want.router_mask)


def test_kernels_equal_the_reference_with_padding_and_packing(pair):
    models, ids = pair(), tokens(3, 37)
    mask = torch.ones(3, 37, dtype=torch.long, device=DEVICE)
    mask[0, :9], mask[1, 30:], mask[2] = 0, 0, 0
    positions = torch.cat([torch.arange(14), torch.arange(23)])[None].expand(3, -1).to(DEVICE)
    for inputs in ({"mask": mask}, {"positions": positions}):
        (got, got_routed), (want, want_routed) = (feed(model, ids, (16, 17), **inputs) for model in models)
        torch.testing.assert_close(got, want, **CLOSE)
        assert torch.equal(got_routed, want_routed)


def test_kernels_equal_the_reference_on_whole_numbers(pair):
    models, ids = pair(kv_cache_dtype="int8", sparsity_k=[1.0, 0.0, 0.5]), tokens(2, 37)
    for cuts in ((), (20, 21, 22, 23)):
        (got, got_routed), (want, want_routed) = (feed(model, ids, cuts) for model in models)
        torch.testing.assert_close(got, want, **CLOSE)
        assert torch.equal(got_routed, want_routed)


def test_generation_on_kernels_equals_the_reference(pair):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    got, want = (model.generate(tokens(1, 9), **options) for model in pair(num_hidden_layers=1, sparsity_k=0.4))
    assert torch.equal(got, want)


def test_the_kernels_run_where_they_are_forced(pair, monkeypatch):
    """A model that fell back to the reference would pass every other test here."""
    called = []
    streams = ("split_heads", "linear_attention", "reflexive_merge")
    decoding = ("project_decode", "split_heads_decode", "attend_decode", "linear_add_decode", "swiglu_decode")
    for name in (*streams, *decoding, "compact", "sqsk_merge", "place_decode"):
        kernel = getattr(operations_hspmn, f"{name}_kernel")
        monkeypatch.setattr(
            operations_hspmn, f"{name}_kernel", lambda *a, _n=name, _k=kernel, **k: called.append(_n) or _k(*a, **k)
        )
    feed(pair(num_hidden_layers=1, sparsity_k=0.4)[0], tokens(1, 8), (7,))
    assert called == [*streams, "compact", "sqsk_merge", "place_decode", *decoding, "linear_add_decode"]


def hooked(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_stream(model):
    model.model.layers[0].reflexive.register_forward_hook(lambda module, args, output: 2 * output)


def adapted(model):
    """As an adapter library does it: the layer is wrapped, and a layer of the same interface takes its place."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.5 * x[..., :1]

    layer = model.model.layers[0].projection.qkv_proj
    model.model.layers[0].projection.qkv_proj = Adapted(*layer.weight.shape[::-1], bias=False)
    model.model.layers[0].projection.qkv_proj.weight = layer.weight


def biased(model):
    model.model.layers[0].o_proj.bias = torch.nn.Parameter(torch.ones(32, device=DEVICE))


@pytest.mark.parametrize("change", [hooked, hooked_stream, adapted, biased, None])
def test_modules_that_are_changed_are_called_while_decoding(pair, monkeypatch, change):
    """Launches that use weights past their modules stand back, and what is computed is what the modules say."""
    called, models = [], pair(num_hidden_layers=1, sparsity_k=0.4)
    kernel = operations_hspmn.project_decode_kernel
    monkeypatch.setattr(operations_hspmn, "project_decode_kernel", lambda *a: called.append(0) or kernel(*a))
    ids = tokens(17 if change is None else 2, 8)
    for model in models if change else ():
        change(model)
    (got, routed), (want, want_routed) = (feed(model, ids, (6, 7)) for model in models)
    assert not called
    torch.testing.assert_close(got, want, **CLOSE)
    assert torch.equal(routed, want_routed)
    if change is hooked:
        models[0].model.layers[0].mlp.up_proj._forward_hooks.clear()  # and the launches are back
    feed(models[0], ids[:2], (6, 7))
    assert len(called) == (2 if change in (hooked, None) else 0)


def test_auto_is_the_reference_on_cpu_and_follows_gradients_on_cuda():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_backend("auto", cpu, 64) == "reference"
    assert pick_backend("auto", cuda, 64) == "triton"
    assert pick_backend("auto", cuda, 48) == "flex"
    with torch.enable_grad():
        assert pick_backend("auto", cuda, 64) == "flex"


def test_auto_without_triton_is_flex_on_cuda(monkeypatch):
    monkeypatch.setattr(operations_hspmn, "HAS_TRITON", False)
    assert pick_backend("auto", torch.device("cuda"), 64) == "flex"


def test_a_forced_backend_is_refused_where_it_cannot_run(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match="backend='flex' needs a CUDA device"):
        pick_backend("flex", cpu, 64)
    with torch.enable_grad(), pytest.raises(ValueError, match="backend='triton' computes no gradients"):
        pick_backend("triton", cuda, 64)
    monkeypatch.setattr(operations_hspmn, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA device"):
        pick_backend("triton", cpu, 64)
    monkeypatch.setattr(operations_hspmn, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="backend='triton' needs the triton package"):
        pick_backend("triton", cuda, 64)


def test_a_head_width_without_kernels_is_refused_by_name(tiny_model):
    with pytest.raises(ValueError, match="head width must be one of"):
        tiny_model(head_dim=8, backend="triton").to(DEVICE)(tokens(1, 9))


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "flex"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_inference_equals_the_eager_reference(pair, variant, backend):
    torch._dynamo.reset()
    model, reference = pair(**VARIANTS[variant])
    model.config.backend, ids = backend, tokens(3, 700)
    want = reference(ids, use_cache=False)
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(3):
        got = compiled(ids, use_cache=False)
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=5e-4)
        assert torch.equal(got.router_mask, want.router_mask)
        ids = tokens(3, 700, seed + 1)
        want = reference(ids, use_cache=False)
        torch.compiler.set_stance("fail_on_recompile")


@needs_gpu
@pytest.mark.parametrize("T", [60, 700])
def test_compiled_training_equals_the_eager_reference(tiny_model, T):
    torch._dynamo.reset()
    flex, reference = [
        tiny_model(head_dim=16, backend=backend, sparsity_k=[0.3, 0.05, 0.0]).to(DEVICE).train()
        for backend in ("flex", "reference")
    ]
    compiled, ids = torch.compile(flex, fullgraph=True), tokens(3, T)
    with torch.enable_grad():
        losses = [model(ids, labels=ids).loss for model in (compiled, reference)]
        sum(losses).backward()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)
    for (name, p), q in zip(flex.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 2e-3 * q.grad.norm() + 1e-6, name


@needs_gpu
def test_a_captured_forward_replays_for_other_tokens(pair):
    model, _ = pair()
    static, graph = tokens(2, 300), torch.cuda.CUDAGraph()
    model(static, use_cache=False)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = model(static, use_cache=False)
    for seed in (1, 2):
        ids = tokens(2, 300, seed)
        want = model(ids, use_cache=False)
        static.copy_(ids)
        graph.replay()
        assert torch.equal(outputs.logits, want.logits)
        assert torch.equal(outputs.router_mask, want.router_mask)


@needs_gpu
def test_bfloat16_weights_run_the_fused_products(pair, monkeypatch):
    """Long inputs take SwiGLU in one kernel on chips that have it, as exactly as the layers one by one."""
    called, kernel = [], operations_hspmn.swiglu_kernel
    monkeypatch.setattr(operations_hspmn, "swiglu_kernel", lambda *a: called.append(0) or kernel(*a))
    sizes = {"hidden_size": 64, "intermediate_size": 256, "sparsity_k": 1.0}  # the same tokens in any precision
    kernels, reference = pair(**sizes)
    ids = tokens(3, 700)
    want = reference(ids, use_cache=False).logits
    errors = []
    for model in (kernels, reference):
        got = model.to(torch.bfloat16)(ids, use_cache=False).logits
        errors.append(((got - want).norm() / want.norm()).item())
    assert errors[0] <= 1.5 * errors[1], errors
    fits = torch.cuda.get_device_capability()[0] in (9, 10)
    assert len(called) == (kernels.config.num_hidden_layers if fits else 0)


@needs_gpu
def test_low_precision_on_kernels_is_as_good_as_on_the_reference(pair):
    kernels, reference = pair(hidden_size=64, sparsity_k=0.4)
    ids = tokens(3, 700)
    want = reference(ids, use_cache=False).logits
    errors = []
    for model in (kernels, reference):
        with torch.autocast(DEVICE, torch.bfloat16):
            got = model(ids, use_cache=False).logits
        errors.append(((got - want).norm() / want.norm()).item())
    assert errors[0] <= 1.5 * errors[1], errors
