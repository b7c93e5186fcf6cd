"""HSPMNStaticCache: the same as the growing cache and as none, at fixed addresses, in a size it never exceeds."""

import copy

import pytest
import torch
from caches import MOVES, assert_same, every_tensor, feed, static_cache
from hspmn.cache_hspmn import HSPMNCache, HSPMNStaticCache
from torch._dynamo.utils import counters
from transformers import CompileConfig

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
CLOSE = {"rtol": 0, "atol": 1e-4}
CUTS = {"one_shot": [30], "chunked": [7, 1, 12, 10], "tokens": [1] * 30, "decode": [21] + [1] * 9}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}


@pytest.fixture(autouse=True)
def inference():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.set_stance("default")


@pytest.fixture(params=["gated", "elu", "sinks", "bare"])
def model(tiny_model, request):
    options = {
        "gated": {"sparsity_k": [0.4, 0.0, 1.0], "linear_attention_horizon": 6, "router_initial_tokens": 4},
        "elu": {"linear_attention": "elu"},
        "sinks": {"num_sink_tokens": 2, "routed_intermediate_size": 24},
        "bare": {"sliding_window": 0, "conv_kernel_size": 1},
    }
    return tiny_model(**options[request.param])


def tokens(B, T, seed=0):
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def addresses(cache):
    return {name: x.data_ptr() for name, x in every_tensor(cache).items()}


# The same as the growing cache and as none


def inputs_of(kind):
    """Mask and position ids of three rows of 30 tokens."""
    mask, positions = torch.ones(3, 30, dtype=torch.long), None
    if kind == "padded":
        mask[0, :9], mask[1, 26:], mask[2] = 0, 0, 0
    if kind == "packed":
        positions = torch.stack([torch.cat([torch.arange(n), torch.arange(30 - n)]) for n in (6, 22, 30)])
    return mask if kind == "padded" else None, positions


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
@pytest.mark.parametrize("cuts", CUTS)
def test_static_equals_growing_equals_uncached(model, cuts, kind):
    ids, (mask, positions) = tokens(3, 30), inputs_of(kind)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    growing, fixed = HSPMNCache(model.config), static_cache(model)
    for cache in (growing, fixed):
        logits, routed = feed(model, ids, cache, CUTS[cuts], mask, positions)
        torch.testing.assert_close(logits, expected.logits, **CLOSE)
        assert torch.equal(routed, expected.router_mask)
        assert cache.get_seq_length() == 30 and cache.has_previous_state()
    assert_same(fixed, growing)


# Addresses and rows that move


def test_every_tensor_stays_where_it_is(model):
    cache, other = static_cache(model), static_cache(model)
    before = addresses(cache)
    feed(model, tokens(3, 30), cache, CUTS["chunked"])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert addresses(cache) == before
    cache.reset()
    assert addresses(cache) == before and cache.get_seq_length() == 0
    assert_same(cache, other)
    feed(model, tokens(3, 30), cache, CUTS["decode"])
    feed(model, tokens(3, 30), other, CUTS["decode"])
    assert addresses(cache) == before
    assert_same(cache, other)


@pytest.mark.parametrize("move", MOVES)
def test_moved_rows_decode_as_their_own(model, move):
    ids, more, (function, rows) = tokens(3, 20), tokens(6, 5, seed=1), MOVES[move]
    cache, growing = static_cache(model), HSPMNCache(model.config)
    for x in (cache, growing):
        feed(model, ids, x, [20])
        function(x)
    assert_same(cache, growing)
    assert cache.batch_size == len(rows)
    got, _ = feed(model, more[: len(rows)], cache, [1, 3, 1])
    whole = torch.cat([ids[rows], more[: len(rows)]], 1)
    torch.testing.assert_close(got, model(whole, use_cache=False).logits[:, 20:], **CLOSE)


def test_deep_copy_shares_nothing(model):
    cache = static_cache(model)
    feed(model, tokens(3, 20), cache, [20])
    twin, before = copy.deepcopy(cache), {name: x.clone() for name, x in every_tensor(cache).items()}
    taken = {name for name, x in every_tensor(cache).items() if x.numel()}
    assert not {addresses(cache)[name] for name in taken} & {addresses(twin)[name] for name in taken}
    more = feed(model, tokens(3, 9, seed=1), twin, [1] * 9)[0]
    assert all(torch.equal(x, before[name]) for name, x in every_tensor(cache).items())
    assert twin.get_seq_length() == twin.layers[1].get_seq_length() == 29 and cache.get_seq_length() == 20
    assert torch.equal(feed(model, tokens(3, 9, seed=1), cache, [1] * 9)[0], more)


# Capacity


def test_slots_are_held_where_tokens_can_be_routed(tiny_model):
    model = tiny_model(sparsity_k=[0.4, 0.0, 1.0])
    assert [layer.slots for layer in static_cache(model).layers] == [40, 0, 40]
    assert [layer.slots for layer in static_cache(model, capacity=7).layers] == [7, 0, 7]
    assert [layer.slots for layer in static_cache(model, capacity=[16, 5, 40]).layers] == [16, 0, 40]
    assert static_cache(model).get_max_length() == 40 and HSPMNCache(model.config).get_max_length() == -1


def fill(model, cache):
    """Feed single tokens until the cache refuses, then return how many it took and its state before the refusal."""
    for step in range(100):
        before = {name: x.clone() for name, x in every_tensor(cache).items()}
        try:
            model(tokens(3, 1, seed=step), past_key_values=cache)
        except ValueError as error:
            return step, before, str(error)
    raise AssertionError("nothing was refused")


def test_a_call_that_does_not_fit_is_refused_before_anything_changes(tiny_model):
    model = tiny_model()
    cache = static_cache(model, capacity=9)
    places = addresses(cache)
    taken, before, message = fill(model, cache)
    assert 9 < taken < 30
    assert "capacity (9 sparse slots per row) of layer" in message
    assert "9 are used and 1 tokens may need as many more" in message and "larger capacity" in message
    assert all(torch.equal(x, before[name]) for name, x in every_tensor(cache).items())
    assert addresses(cache) == places and cache.get_seq_length() == taken
    ids = torch.cat([tokens(3, 1, seed=step) for step in range(taken)], 1)
    fresh, longer = HSPMNCache(model.config), static_cache(model)
    feed(model, ids, fresh, [taken])
    assert_same(cache, fresh)  # still the cache of what it took
    whole = torch.cat([ids, tokens(3, 5)], 1)
    logits, _ = feed(model, whole, longer, [taken, 1, 1, 3])
    torch.testing.assert_close(logits, model(whole, use_cache=False).logits, **CLOSE)
    cache.reset()
    feed(model, tokens(3, 8), cache, [3, 5])
    assert cache.get_seq_length() == 8


def test_a_piece_must_fit_whole_whatever_is_routed_of_it(tiny_model):
    model, ids = tiny_model(), tokens(3, 40)
    with pytest.raises(ValueError, match="0 are used and 40 tokens may need as many more; feed fewer tokens at once"):
        model(ids, past_key_values=static_cache(model, capacity=30))
    cache = static_cache(model, capacity=30)
    logits, routed = feed(model, ids, cache, [10, 10, *[1] * 20])
    assert max(routed.sum(2).flatten().tolist()) < 30
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, **CLOSE)


def test_the_device_is_read_only_when_the_bound_no_longer_suffices(tiny_model, monkeypatch):
    model, looks, tolist = tiny_model(), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: looks.append(0) or tolist(x))
    for capacity, expected in ((200, 0), (120, 8)):
        cache = static_cache(model, capacity=capacity)
        feed(model, tokens(3, 200), cache, [1] * 200)
        assert max(layer.count.max() for layer in cache.layers) < capacity
        assert len(looks) <= expected
    assert looks


def test_the_default_capacity_takes_every_token_of_the_stated_length(tiny_model):
    model = tiny_model(sparsity_k=1.0)
    cache = static_cache(model, length=30)
    feed(model, tokens(3, 30), cache, [17, 1, 12])
    assert cache.layers[0].count.tolist() == [30, 30, 30]
    with pytest.raises(ValueError, match="30 are used and 1 tokens"):
        model(tokens(3, 1), past_key_values=cache)


@pytest.mark.parametrize(
    "arguments, field",
    [((0, 40), "batch_size"), ((3, 0), "max_length"), ((3, 40, -1), "capacity"), ((3, 40, [4, 4]), "capacity")],
    ids=str,
)
def test_sizes_out_of_range_are_refused_by_name(tiny_config, arguments, field):
    with pytest.raises(ValueError, match=f"{field} must be"):
        HSPMNStaticCache(tiny_config(), *arguments)


def test_other_batch_sizes_gradients_and_rewinding_are_refused(tiny_model):
    model = tiny_model()
    cache = static_cache(model)
    with pytest.raises(ValueError, match="holds 3 rows but the input has batch size 2"):
        model(tokens(2, 4), past_key_values=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="records no gradients"):
        model(tokens(3, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="HSPMNStaticCache cannot be cropped"):
        cache.crop(-1)
    assert cache.get_seq_length() == 0 and not cache.is_croppable and cache.is_compileable


# Compiled and captured decoding


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["gated", "elu_sinks"])
def test_compiled_decoding_is_one_graph_for_every_step_and_cache(tiny_model, kind, padded):
    options = {"gated": {}, "elu_sinks": {"linear_attention": "elu", "num_sink_tokens": 1}}[kind]
    model, ids = tiny_model(num_hidden_layers=2, sparsity_k=[0.4, 0.0], **options), tokens(3, 40)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, : 6 if padded else 0] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    want = model(ids, attention_mask=mask, use_cache=False)
    for _ in range(2):
        cache = static_cache(model)
        places, logits = addresses(cache), []
        feed(model, ids[:, :12], cache, [12], mask[:, :12])
        for i in range(12, 40):
            cache.reserve(1)
            step_mask = mask[:, i : i + 1] if padded else None
            logits.append(compiled(ids[:, i : i + 1], attention_mask=step_mask, past_key_values=cache).logits)
            torch.compiler.set_stance("fail_on_recompile")
        torch.testing.assert_close(torch.cat(logits, 1), want.logits[:, 12:], **CLOSE)
        assert addresses(cache) == places and cache.get_seq_length() == 40
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_generated_code_decodes_as_eager_and_copies_no_store(tiny_model):
    model, ids = tiny_model(num_hidden_layers=1, sparsity_k=0.4, sliding_window=3), tokens(3, 40)
    compiled, cache = torch.compile(model, fullgraph=True), static_cache(model)
    places = addresses(cache)
    feed(model, ids[:, :12], cache, [12])
    got = torch.cat([compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 40)], 1)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 12:], **CLOSE)
    other = HSPMNCache(model.config)
    feed(model, ids, other, [40])
    assert_same(cache, other)
    assert addresses(cache) == places


def test_compiled_code_that_nobody_checked_drops_tokens_and_harms_nothing(tiny_model):
    model, ids = tiny_model(num_hidden_layers=1, sparsity_k=1.0), tokens(3, 20)
    compiled, cache = torch.compile(model, fullgraph=True, backend="eager"), static_cache(model, capacity=10)
    feed(model, ids[:, :8], cache, [8])
    got = torch.cat([compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 20)], 1)
    torch.testing.assert_close(got[:, :2], model(ids, use_cache=False).logits[:, 8:10], **CLOSE)
    assert got.isfinite().all()
    kept = HSPMNCache(model.config)
    feed(model, ids[:, :10], kept, [10])
    for name in ("keys", "values", "positions"):
        torch.testing.assert_close(getattr(cache.layers[0], name)[:, :10], getattr(kept.layers[0], name)[:, :10])
    assert cache.layers[0].count.tolist() == [20] * 3 and cache.layers[0].slots == 10
    with pytest.raises(ValueError, match="20 are used"):
        cache.reserve(3)  # more than the 2 that the host still knows to be free, so it looks


def generate(model, ids, **options):
    return model.generate(ids, **GREEDY | options)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_on_a_static_cache_equals_the_growing_one(model, num_beams):
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :9] = 0
    ids[0, :9] = 0
    options = {"attention_mask": mask, "num_beams": num_beams, "return_dict_in_generate": True}
    expected = generate(model, ids, **options)
    for more in ({}, {"prefill_chunk_size": 7}):
        outputs = generate(model, ids, cache_implementation="static", **options, **more)
        assert torch.equal(outputs.sequences, expected.sequences)
        assert type(outputs.past_key_values) is HSPMNStaticCache
        assert outputs.past_key_values.batch_size == 3 * num_beams
    alone = generate(model, ids[:1, 9:], num_beams=num_beams, cache_implementation="static")
    assert torch.equal(outputs.sequences[0, 20:], alone[0, 11:])


def compiling():
    """As `generate` compiles on CUDA, without the time of a code generator."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"compile_config": compiling()}], ids=["eager", "beams", "compiled"]
)
def test_generate_reserves_one_slot_per_step(tiny_model, options):
    """So the host's bound of the used slots stays that of the tokens, and it looks no sooner than it must."""
    model, rows = tiny_model(), 3 * options.get("num_beams", 1)
    cache = static_cache(model, B=rows)
    generate(model, tokens(3, 20), past_key_values=cache, **options)
    assert cache.get_seq_length() == 31
    assert [layer.most_used for layer in cache.layers] == [31, 0, 31]
    model(tokens(rows, 1), past_key_values=cache)  # nothing is left over for a call outside `generate`
    assert [layer.most_used for layer in cache.layers] == [32, 0, 32]


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_compiles_decoding_once(tiny_model, B, padded):
    model = tiny_model(num_hidden_layers=1, sparsity_k=0.4)
    options = {"cache_implementation": "static", "compile_config": compiling(), "prefill_chunk_size": 8}
    for seed in range(2):
        ids = tokens(B, 20 + seed, seed)
        ids[0, : 5 if padded else 0] = 0  # the pad token
        assert torch.equal(generate(model, ids, **options), generate(model, ids))
        torch.compiler.set_stance("fail_on_recompile")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_generate_refuses_a_static_cache_that_is_too_small_and_goes_on_with_another(tiny_model):
    model, ids = tiny_model(), tokens(3, 20)
    small = static_cache(model, capacity=25)
    with pytest.raises(ValueError, match=r"capacity \(25 sparse slots"):
        generate(model, ids, past_key_values=small, max_new_tokens=80)
    assert small.get_seq_length() > 25
    longer = static_cache(model, length=100, capacity=90)
    expected = generate(model, ids, max_new_tokens=80)
    assert torch.equal(generate(model, ids, past_key_values=longer, max_new_tokens=80), expected)


# On a GPU


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
