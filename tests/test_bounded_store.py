"""max_slots: both caches are as without it until a row is full; then the lowest scores leave, of equal ones the
oldest, and nothing moves or grows, however the steps are run."""

import copy
import json

import pytest
import safetensors.torch
import torch
from caches import CLOSE, DEVICE, addresses, assert_same, feed, generate, left_padded, pack, static_cache, tokens, used
from hspmn.cache_hspmn import EVICTED, HSPMNCache, HSPMNStaticCache
from torch.nn.functional import logsigmoid

BOUND, MODELS = 16, {
    "gated": {}, "int4": {"kv_cache_dtype": "int4", "sparsity_k": [1.0, 0.0, 0.5]},
    "all": {"contextual_readers": "all"},
}  # fmt: skip
CUTS = [9, 1, 1, 5, 1, 1, 1, 12, 1, 1, 1, 4, 1, 16, 1, 1]


@pytest.fixture(params=["growing", "static"])
def new_cache(request, monkeypatch):
    """Function from a model and options to an empty cache for three rows."""
    monkeypatch.setattr("hspmn.cache_hspmn.SLOT_BLOCK", 4)
    if request.param == "growing":
        return lambda model, **options: HSPMNCache(model.config, **options)
    return lambda model, **options: static_cache(model, length=60, **options)


def left_of(held, tokens, bound):
    """The rule in words: the pairs (score, position) of a row that a call of so many tokens leaves."""
    if len(held) + tokens <= bound:
        return held
    least = max(tokens, -(-bound // EVICTED))  # how many have to be free
    leaving = sorted(range(len(held)), key=lambda slot: (held[slot][0], slot))[: len(held) + least - bound]
    return [pair for slot, pair in enumerate(held) if slot not in leaving]


@torch.no_grad()
def read(model, ids, cache, lengths, mask=None):
    """Logits; what every layer and row holds in the end by the rule; and the most slots that a call asked for."""
    held, logits, most, end = {}, [], 0, 0
    for piece in ids.split(lengths, 1):
        begin, end = end, end + piece.shape[1]
        for layer in cache.layers if begin else ():
            most = max(most, int(layer.count.max()) + piece.shape[1])
        outputs = model(piece, attention_mask=None if mask is None else mask[:, begin:end], past_key_values=cache)
        logits.append(outputs.logits)
        for i, layer in enumerate(cache.layers):
            for row in range(len(ids) if layer.routes and cache.max_slots else 0):
                chosen = outputs.router_mask[i, row].nonzero().flatten()
                places = chosen + begin - (0 if mask is None else int((mask[row] == 0).sum()))
                new = zip(outputs.router_scores[i, row, chosen].tolist(), places.tolist(), strict=True)
                held[i, row] = [*left_of(held.get((i, row), []), piece.shape[1], cache.max_slots), *new]
    return torch.cat(logits, 1), held, most


@pytest.mark.parametrize("variant", MODELS)
def test_a_store_is_the_unbounded_one_until_it_is_full_and_then_the_least_wanted_leave(tiny_model, new_cache, variant):
    model, lengths = tiny_model(**MODELS[variant]), CUTS
    ids, mask, whole = tokens(3, sum(lengths)), left_padded(3, sum(lengths), 4), new_cache(model)
    want, _, most = read(model, ids, whole, lengths, mask)
    cache = new_cache(model, max_slots=most)
    assert torch.equal(read(model, ids, cache, lengths, mask)[0], want)
    expected = used(whole)
    for name, value in used(cache).items():
        assert ("log_gates" in name and name not in expected) or torch.equal(value, expected[name]), name
    for bound in (most - 1, BOUND):
        cache = new_cache(model, max_slots=bound)
        _, held, _ = read(model, ids, cache, lengths, mask)
        for (i, row), pairs in held.items():
            layer, count = cache.layers[i], cache.layers[i].count[row]
            assert layer.positions[row, :count].tolist() == [position for _, position in pairs]
            scores = torch.tensor([score for score, _ in pairs])
            torch.testing.assert_close(layer.log_gates[row, :count], logsigmoid(scores))
        assert max(map(len, held.values())) <= bound == max(layer.slots for layer in cache.layers)
        assert max(layer.positions.max() for layer in cache.layers) < 60 == cache.get_seq_length() + 60 - sum(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("readers", ["routed", "all"])
def test_kernels_keep_the_gates_that_the_reference_keeps(tiny_model, readers):
    """A prompt and single tokens, in Triton's interpreter where there is no GPU."""
    options, lengths = {"head_dim": 16, "num_hidden_layers": 1, "sparsity_k": 0.8}, [6, 1, 1, 1, 1, 1, 1]
    options["contextual_readers"] = readers
    caches = []
    for backend in ("reference", "triton"):
        model = tiny_model(backend=backend, **options).to(DEVICE)
        caches.append(HSPMNCache(model.config, max_slots=8))
        _, routed = feed(model, tokens(2, 12).to(DEVICE), caches[-1], lengths)
    assert_same(*caches)
    assert routed.sum() > caches[0].layers[0].count.sum()  # some have left


@pytest.mark.parametrize("variant", MODELS)
def test_what_stays_is_read_as_if_the_others_had_never_been_stored(tiny_model, new_cache, variant):
    """One layer, whose other states do not depend on the store: a whole one, cut by hand."""
    model = tiny_model(**MODELS[variant] | {"num_hidden_layers": 1, "sparsity_k": 0.7})
    ids, places = tokens(3, 40), pack((10, 30), (35, 5), (40,))
    cache, whole = new_cache(model, max_slots=BOUND), HSPMNCache(model.config)
    for each in (cache, whole):
        feed(model, ids, each, [11, 1, 9, 1, 1, 12, 1, 4], positions=places)
    cache.reserve(2)  # which evicts, or there is room
    layer, other = cache.layers[0], whole.layers[0]
    for row in range(3):
        opened, count = int(other.document_slot[row]), int(other.count[row])
        key = [(slot >= opened, int(other.positions[row, slot])) for slot in range(count)]
        begun, kept = int(layer.document_slot[row]), layer.positions[row, : layer.count[row]].tolist()
        now = [key.index((slot >= begun, position)) for slot, position in enumerate(kept)]
        assert len(now) < count
        for name in other.slot_tensors:
            held = getattr(other, name)
            held[row, : len(now)] = held[row, now]
        other.count[row], other.document_slot[row] = len(now), begun
    assert_same_but_gates(cache, whole)
    more, next_places = tokens(3, 2, seed=1), places[:, -1:] + torch.arange(1, 3)
    got, want = (feed(model, more, each, positions=next_places)[0] for each in (cache, whole))
    torch.testing.assert_close(got, want, **CLOSE)


def assert_same_but_gates(cache, other):
    """`assert_same` of a bounded and of an unbounded cache."""
    expected = used(other)
    for name, value in used(cache).items():
        if "log_gates" not in name or name in expected:
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_memory_is_constant_once_the_store_is_full_and_tokens_seldom_evict(tiny_model, new_cache, monkeypatch):
    model, evictions = tiny_model(sparsity_k=[1.0, 0.0, 1.0]), []
    evict = type(HSPMNCache(model.config).layers[0]).evict
    monkeypatch.setattr("hspmn.cache_hspmn.HSPMNCacheLayer.evict", lambda *a: evictions.append(0) or evict(*a))
    cache, ids = new_cache(model, max_slots=64), tokens(1, 200).repeat(3, 1)
    feed(model, ids[:, :64], cache, [32, 32])
    layer = cache.layers[2]
    places = {name: getattr(layer, name).data_ptr() for name in layer.slot_tensors}
    feed(model, ids[:, 64:], cache, 1)
    assert len(evictions) == 2 * 17 and cache.get_seq_length() == 200  # 136 tokens in eights
    feed(model, ids[:, :64], cache)
    assert len(evictions) == 2 * 18 and layer.count.tolist() == [64] * 3
    assert places == {name: getattr(layer, name).data_ptr() for name in layer.slot_tensors}


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_steps_and_generate_evict_as_eager_ones_do(tiny_model):
    model, ids = tiny_model(num_hidden_layers=2, sparsity_k=[0.4, 0.9]), tokens(3, 60)
    eager, cache = HSPMNCache(model.config, max_slots=BOUND), static_cache(model, max_slots=BOUND)
    want, compiled = feed(model, ids, eager, [12, *[1] * 48])[0], torch.compile(model, fullgraph=True, backend="eager")
    feed(model, ids[:, :12], cache)
    places, got = addresses(cache), []
    with torch.no_grad():
        for i in range(12, 60):
            cache.reserve(1)
            got.append(compiled(ids[:, i : i + 1], past_key_values=cache).logits)
            torch.compiler.set_stance("fail_on_recompile")
    torch.testing.assert_close(torch.cat(got, 1), want[:, 12:], **CLOSE)
    assert_same(cache, eager)
    assert addresses(cache) == places
    longer = torch.cat([ids, tokens(3, 9, seed=1)], 1)
    answers = [generate(model, longer, past_key_values=each, max_new_tokens=40) for each in (eager, cache)]
    assert torch.equal(*answers)
    assert_same(cache, eager)


def test_rows_move_with_their_gates(tiny_model, new_cache):
    model, ids, rows = tiny_model(), tokens(3, 60), torch.tensor([2, 0, 0])
    cache, twin = (new_cache(model, max_slots=BOUND) for _ in range(2))
    feed(model, ids[:, :30], cache, [9, *[1] * 21])
    cache.reorder_cache(rows)
    cache = copy.deepcopy(cache)
    feed(model, ids[rows, 30:], cache, 1)
    feed(model, ids[rows], twin, [9, *[1] * 51])
    assert_same(cache, twin)


def test_tokens_are_taken_back_over_an_eviction(tiny_model, new_cache):
    """What left stays away, and of what stayed the tokens taken back are gone."""
    model, ids = tiny_model(sparsity_k=[1.0, 0.0, 1.0]), tokens(3, 60)
    cache = new_cache(model, max_slots=BOUND, rollback=6)
    feed(model, ids[:, :17], cache, [13, 1, 1, 1, 1])  # the last one evicts two of sixteen
    before = [layer.positions[:, : layer.count[0]].clone() for layer in cache.layers]
    assert before[0].shape[1] == 15
    cache.crop(-3)
    feed(model, ids[:, 14:16], cache)
    for layer, held in zip(cache.layers, before, strict=True):
        for row in range(3 if layer.routes else 0):
            expected = [position for position in held[row].tolist() if position < 14] + [14, 15]
            assert layer.positions[row, : layer.count[row]].tolist() == expected
    feed(model, ids[:, 16:], cache, 1)
    assert cache.get_seq_length() == 60 and cache.layers[0].count.max() <= BOUND


def test_refusals_name_the_bound_and_leave_the_cache_as_it_is(tiny_model, new_cache):
    model, ids = tiny_model(), tokens(3, 40)
    with pytest.raises(ValueError, match="max_slots must be at least 1, or None for no bound, got 0"):
        new_cache(model, max_slots=0)
    with pytest.raises(ValueError, match="capacity=9 and max_slots=5 both say how many slots; give one"):
        HSPMNStaticCache(model.config, 3, 40, capacity=9, max_slots=5)
    cache = new_cache(model, max_slots=BOUND)
    for begin in (0, 10):
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"max_slots=16 is too small for a call of 17 tokens.*chunk_size"):
            feed(model, ids[:, :17], cache)
        if begin:
            assert_same(cache, before)
        feed(model, ids[:, begin : begin + 10], cache)
    assert model.prefill(ids, past_key_values=cache).logits.shape[1] == 1  # which cuts the prompt itself
    assert cache.get_seq_length() == 60 and cache.get_max_length() == -1


def stored(cache):
    """The state of a cache as a file gives it back."""
    tensors, numbers = cache.state_dict()
    return safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(numbers))


@pytest.mark.parametrize("variant, bound", [("gated", BOUND), ("int4", BOUND), ("all", None), ("gated", None)])
def test_a_stored_stream_goes_on_as_if_nothing_had_been(tiny_model, new_cache, variant, bound):
    model, ids = tiny_model(**MODELS[variant]), tokens(3, 60)
    cache, twin = (new_cache(model, max_slots=bound) for _ in range(2))
    feed(model, tokens(3, 9, seed=1), twin)
    for piece in ids.split([9, 1, 15, 1, 14, 16, 4], 1):  # stored before each of them, and at first with nothing read
        twin.load_state_dict(*stored(cache))
        assert torch.equal(feed(model, piece, twin)[0], feed(model, piece, cache)[0])
        assert_same(twin, cache)
        assert twin.get_seq_length() == cache.get_seq_length()
    places = addresses(twin)
    twin.load_state_dict(*stored(cache))
    assert not twin.static or addresses(twin) == places


def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(tiny_model, new_cache):
    model, other = tiny_model(), tiny_model(sliding_window=6)
    cache, twin = (new_cache(model, max_slots=BOUND) for _ in range(2))
    for each in (cache, twin):
        feed(model, tokens(3, 9), each)
    tensors, numbers = stored(cache)
    lacking = {name: x for name, x in tensors.items() if name != "layers.2.keys"}
    for held, state, message in (
        (new_cache(other, max_slots=BOUND), (tensors, numbers), "made for sliding_window=5, this cache for 6"),
        (new_cache(model, max_slots=9), (tensors, numbers), "made for max_slots=16, this cache for 9"),
        (cache, (lacking, numbers), "layers.2.keys of the state is missing"),
        (cache, (tensors, {}), "made for num_hidden_layers=None"),
    ):
        with pytest.raises(ValueError, match=message):
            held.load_state_dict(*state)
    assert_same(cache, twin)
    taken = new_cache(model, max_slots=BOUND, rollback=4)
    feed(model, tokens(3, 9), taken)
    taken.crop(-2)
    with pytest.raises(ValueError, match="behind a crop"):
        taken.state_dict()
