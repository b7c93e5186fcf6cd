"""HSPMNStaticCache: fixed addresses, a size it never exceeds, compiled and captured decoding, `generate()`."""

import copy

import pytest
import torch
from caches import CLOSE, addresses, assert_same, feed, generate, left_padded, needs_gpu, static_cache, tokens
from hspmn.cache_hspmn import HSPMNCache, HSPMNStaticCache
from torch._dynamo.utils import counters
from transformers import CompileConfig

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def compiling():
    """As `generate` compiles on CUDA, without the time of a code generator."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    return config


def test_slots_are_held_where_tokens_can_be_routed_and_for_the_stated_length(tiny_model):
    model = tiny_model(sparsity_k=[0.4, 0.0, 1.0])
    for capacity, slots in ((7, [7, 0, 7]), ([16, 5, 40], [16, 0, 40]), (None, [40, 0, 40])):
        cache = static_cache(model, capacity=capacity)
        assert [layer.slots for layer in cache.layers] == slots and cache.get_max_length() == 40
    feed(model, tokens(3, 40), cache, [17, 1, 22])
    assert cache.layers[2].count.tolist() == [40, 40, 40]
    with pytest.raises(ValueError, match="40 are used and 1 tokens"):
        model(tokens(3, 1), past_key_values=cache)


def test_a_call_that_does_not_fit_is_refused_before_anything_changes(tiny_model):
    model, ids = tiny_model(), tokens(3, 40)
    with pytest.raises(ValueError, match="0 are used and 40 tokens may need as many more; feed fewer tokens at once"):
        model(ids, past_key_values=static_cache(model, capacity=30))  # whatever is routed of them
    cache = static_cache(model, capacity=9)
    for taken in range(40):  # noqa: B007
        before = copy.deepcopy(cache)
        try:
            model(ids[:, taken : taken + 1], past_key_values=cache)
        except ValueError as error:
            assert "capacity (9 sparse slots per row) of layer" in str(error) and "larger capacity" in str(error)
            assert "9 are used and 1 tokens may need as many more" in str(error)
            break
    assert 9 < taken < 30 and cache.get_seq_length() == taken
    assert_same(cache, before)
    fresh = HSPMNCache(model.config)
    feed(model, ids[:, :taken], fresh)
    assert_same(cache, fresh)  # still the cache of what it took
    cache.reset()
    assert feed(model, ids[:, :8], cache, [3, 5])[0].shape[1] == cache.get_seq_length() == 8


def test_the_device_is_read_only_when_the_bound_no_longer_suffices(tiny_model, monkeypatch):
    model, looks, tolist = tiny_model(), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: looks.append(0) or tolist(x))
    for capacity, expected in ((100, 0), (70, 8)):
        cache = static_cache(model, capacity=capacity)
        feed(model, tokens(3, 100), cache, 1)
        assert max(layer.count.max() for layer in cache.layers) < capacity
        assert len(looks) <= expected
    assert looks


@pytest.mark.parametrize("arguments, field", [
    ((0, 40), "batch_size"), ((3, 0), "max_length"), ((3, 40, -1), "capacity"), ((3, 40, [4, 4]), "capacity"),
], ids=str)  # fmt: skip
def test_sizes_out_of_range_and_gradients_are_refused(tiny_model, arguments, field):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"{field} must be"):
        HSPMNStaticCache(model.config, *arguments)
    with torch.enable_grad(), pytest.raises(ValueError, match="records no gradients"):
        model(tokens(3, 4), past_key_values=static_cache(model))


COMPILED = {
    "gated": ("eager", {}, 0),
    "padded": ("eager", {}, 6),
    "elu_sinks": ("eager", {"linear_attention": "elu", "num_sink_tokens": 1}, 6),
    "all": ("eager", {"contextual_readers": "all"}, 6),
    "generated": ("inductor", {"num_hidden_layers": 1, "sparsity_k": 0.4, "sliding_window": 3}, 0),  # takes its time
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_decoding_is_one_graph_for_every_step_and_cache(tiny_model, kind):
    backend, options, padding = COMPILED[kind]
    model, ids = tiny_model(**{"num_hidden_layers": 2, "sparsity_k": [0.4, 0.0]} | options), tokens(3, 30)
    mask, growing = left_padded(3, 30, padding), HSPMNCache(model.config)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    want, _ = feed(model, ids, growing, mask=mask)
    for _ in range(2):
        cache = static_cache(model)
        places, logits = addresses(cache), []
        feed(model, ids[:, :12], cache, None, mask)
        for i in range(12, 30):
            cache.reserve(1)
            step_mask = mask[:, i : i + 1] if padding else None
            logits.append(compiled(ids[:, i : i + 1], attention_mask=step_mask, past_key_values=cache).logits)
            torch.compiler.set_stance("fail_on_recompile")
        torch.testing.assert_close(torch.cat(logits, 1), want[:, 12:], **CLOSE)
        assert_same(cache, growing)
        assert addresses(cache) == places
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_compiled_code_that_nobody_checked_drops_tokens_and_harms_nothing(tiny_model):
    model, ids = tiny_model(num_hidden_layers=1, sparsity_k=1.0), tokens(3, 20)
    compiled, cache = torch.compile(model, fullgraph=True, backend="eager"), static_cache(model, capacity=10)
    feed(model, ids[:, :8], cache)
    got = torch.cat([compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 20)], 1)
    kept = HSPMNCache(model.config)
    torch.testing.assert_close(got[:, :2], feed(model, ids[:, :10], kept)[0][:, 8:], **CLOSE)
    assert got.isfinite().all()
    for name in ("keys", "values", "positions"):
        torch.testing.assert_close(getattr(cache.layers[0], name)[:, :10], getattr(kept.layers[0], name)[:, :10])
    assert cache.layers[0].count.tolist() == [20] * 3 and cache.layers[0].slots == 10
    with pytest.raises(ValueError, match="20 are used"):
        cache.reserve(3)  # more than the 2 that the host still knows to be free, so it looks


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"compile_config": compiling()}])
def test_generate_reserves_one_slot_per_step(tiny_model, options):
    """So the host's bound of the used slots stays that of the tokens, and it looks no sooner than it must."""
    model, rows = tiny_model(), 3 * options.get("num_beams", 1)
    cache = static_cache(model, B=rows)
    generate(model, tokens(3, 20), past_key_values=cache, **options)
    assert cache.get_seq_length() == 31
    assert [layer.most_used for layer in cache.layers] == [31, 0, 31]
    model(tokens(rows, 1), past_key_values=cache)  # nothing is left over for a call outside `generate`
    assert [layer.most_used for layer in cache.layers] == [32, 0, 32]


@pytest.mark.parametrize("B, padding", [(1, 0), (1, 5), (2, 5)])
def test_generate_compiles_decoding_once(tiny_model, B, padding):
    model = tiny_model(num_hidden_layers=1, sparsity_k=0.4)
    options = {"cache_implementation": "static", "compile_config": compiling(), "prefill_chunk_size": 8}
    for seed in range(2):
        ids = tokens(B, 20 + seed, seed)
        ids[0, :padding] = 0
        assert torch.equal(generate(model, ids, **options), generate(model, ids))
        torch.compiler.set_stance("fail_on_recompile")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_generate_refuses_a_static_cache_that_is_too_small_and_goes_on_with_another(tiny_model):
    model, ids = tiny_model(), tokens(3, 20)
    small, longer = static_cache(model, capacity=25), static_cache(model, length=100, capacity=60)
    with pytest.raises(ValueError, match=r"capacity \(25 sparse slots"):
        generate(model, ids, past_key_values=small, max_new_tokens=40)
    assert small.get_seq_length() > 25
    expected = generate(model, ids, max_new_tokens=40)
    assert torch.equal(generate(model, ids, past_key_values=longer, max_new_tokens=40), expected)


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_a_captured_decoding_step_replays_as_the_cache_fills(tiny_model, backend):
    torch.set_float32_matmul_precision("highest")
    model, ids = tiny_model(head_dim=16, backend=backend).cuda(), tokens(3, 60).cuda()
    want = model(ids, use_cache=False)
    cache, token = static_cache(model, length=60), ids[:, :1].clone()
    places = addresses(cache)
    model(ids[:, :20], past_key_values=cache)
    model(token, past_key_values=copy.deepcopy(cache))  # builds the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = model(token, past_key_values=cache)
    for i in range(20, 60):
        cache.reserve(1)
        token.copy_(ids[:, i : i + 1])
        graph.replay()
        torch.testing.assert_close(outputs.logits[:, 0], want.logits[:, i], rtol=0, atol=5e-4)
        assert torch.equal(outputs.router_mask[..., 0], want.router_mask[..., i])
    assert cache.get_seq_length() == 60 and addresses(cache) == places


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_generate_on_a_static_cache_equals_the_growing_one_on_cuda(tiny_model, compiled):
    """Compiled as transformers does it of itself: one graph, replayed as a CUDA graph."""
    torch.set_float32_matmul_precision("highest")
    model, ids = tiny_model(head_dim=16).cuda(), tokens(3, 20).cuda()
    expected = generate(model, ids, max_new_tokens=60)
    for _ in range(2):
        got = generate(model, ids, max_new_tokens=60, cache_implementation="static", disable_compile=not compiled)
        assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] == int(compiled)
    assert not counters["inductor"]["cudagraph_skips"]
