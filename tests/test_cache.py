"""Both caches: one state however tokens come, positions, rows that move, growth, and what is refused."""

import copy

import pytest
import torch
from caches import CLOSE, MOVES, VARIANTS, addresses, assert_same, feed, pack, static_cache, tokens, used
from hspmn.cache_hspmn import SLOT_BLOCK, HSPMNCache

MODELS = VARIANTS | {"int8": {"kv_cache_dtype": "int8", "sparsity_k": [1.0, 0.0, 0.5], "num_sink_tokens": 2}}
MASK, POSITIONS = torch.ones(3, 24, dtype=torch.long), pack((6, 18), (17, 7), (24,))
MASK[0, :9], MASK[1, 20:], MASK[2] = 0, 0, 0


@pytest.fixture(params=MODELS)
def model(tiny_model, request):
    return tiny_model(**MODELS[request.param])


@pytest.fixture(params=["growing", "static"])
def new_cache(request, monkeypatch):
    """Function from a model to an empty cache for three rows, which has to grow soon if it can."""
    monkeypatch.setattr("hspmn.cache_hspmn.SLOT_BLOCK", 4)
    return static_cache if request.param == "static" else lambda model: HSPMNCache(model.config)


@pytest.fixture
def cache(model, new_cache):
    """One that holds packed rows."""
    cache = new_cache(model)
    feed(model, tokens(3, 24), cache, positions=POSITIONS)
    return cache


@pytest.mark.parametrize("mask, positions", [(None, None), (MASK, None), (None, POSITIONS)])
def test_state_and_answers_are_the_same_for_every_cut(model, new_cache, mask, positions):
    whole, ids = HSPMNCache(model.config), tokens(3, 24)
    expected, expected_routed = feed(model, ids, whole, None, mask, positions)
    if model.config.kv_cache_dtype != "int8":  # read as it is stored in every cut, and only with a cache
        torch.testing.assert_close(feed(model, ids, None, None, mask, positions)[0], expected, **CLOSE)
    for lengths in ([6, 1, 2, 15], [13] + [1] * 11, 1):
        cache = new_cache(model)
        logits, routed = feed(model, ids, cache, lengths, mask, positions)
        torch.testing.assert_close(logits, expected, **CLOSE)
        assert torch.equal(routed, expected_routed)
        assert_same(cache, whole)


def test_what_is_stored_are_routed_tokens_with_their_own_positions(tiny_model, new_cache):
    model, ids = tiny_model(sparsity_k=[0.4, 0.0, 1.0]), tokens(3, 24)
    cache = new_cache(model)
    routed = feed(model, ids, cache, [11, 1, 12], MASK, POSITIONS)[1]
    for layer, mask in zip(cache.layers, routed, strict=True):
        for row in range(3):
            assert layer.positions[row, : layer.count[row]].tolist() == POSITIONS[row, mask[row].bool()].tolist()
    assert 0 < routed[0].float().mean() < MASK.float().mean() and cache.layers[1].slots == 0
    assert {cache.get_seq_length(i) for i in range(3)} == {layer.get_seq_length() for layer in cache.layers} == {24}
    assert cache.seen.tolist() == MASK.sum(1).tolist() == [15, 20, 0]
    assert cache.batch_size == 3 and cache.has_previous_state()


def test_int8_costs_less_than_a_hundredth_of_the_logits(tiny_model):
    models = (tiny_model(sparsity_k=1.0, kv_cache_dtype=kind) for kind in ("int8", "auto"))
    whole, exact = (feed(model, tokens(3, 60), HSPMNCache(model.config))[0] for model in models)
    assert 1e-4 < (whole - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("move", MOVES)
def test_moved_rows_are_and_decode_as_their_own(model, cache, move):
    (function, rows), places = MOVES[move], addresses(cache)
    function(cache)
    assert move != "reorder" or not cache.is_compileable or addresses(cache) == places  # a static cache stays there
    twin, ids, positions = HSPMNCache(model.config), tokens(3, 24)[rows], POSITIONS[rows]
    feed(model, ids, twin, positions=positions)
    assert_same(cache, twin)
    assert cache.batch_size == len(rows)
    more = tokens(len(rows), 5, seed=1)
    torch.testing.assert_close(feed(model, more, cache, [1, 3, 1])[0], feed(model, more, twin)[0], **CLOSE)


def test_deep_copy_shares_nothing(model, cache):
    twin, before = copy.deepcopy(cache), {name: x.clone() for name, x in used(cache).items()}
    assert not set(addresses(cache).values()) & set(addresses(twin).values())
    more = feed(model, tokens(3, 9, seed=1), twin, 1)[0]
    assert all(torch.equal(x, before[name]) for name, x in used(cache).items())
    assert twin.get_seq_length() == twin.layers[1].get_seq_length() == 33 and cache.get_seq_length() == 24
    assert torch.equal(feed(model, tokens(3, 9, seed=1), cache, 1)[0], more)


def test_reset_forgets_everything(model, cache, new_cache):
    places, fresh = addresses(cache), new_cache(model)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.has_previous_state()
    if cache.is_compileable:
        assert addresses(cache) == places
        assert_same(cache, fresh)
    else:
        assert cache.batch_size == cache.get_max_length() == -1 and {layer.keys for layer in cache.layers} == {None}
    assert torch.equal(feed(model, tokens(3, 9), cache)[0], feed(model, tokens(3, 9), fresh)[0])
    assert_same(cache, fresh)


@pytest.mark.parametrize("every", [1, 10])
def test_room_grows_with_routed_tokens_rarely_and_nothing_is_copied_in_between(tiny_config, every):
    cache = HSPMNCache(tiny_config(num_hidden_layers=1, sparsity_k=0.5))
    layer, capacities, places = cache.layers[0], [], set()
    cache.start_call(2, 1, torch.device("cpu"))
    layer.lazy_initialization(torch.ones(2, 1, 1))
    for step in range(4000):
        cache.reserve(1)
        if step % every == 0:
            layer.keys[:, layer.count[0]] = step
            layer.count += 1
        capacities.append(layer.slots)
        places.add(layer.keys.data_ptr())
    assert capacities == sorted(capacities) and all(slots % SLOT_BLOCK == 0 for slots in capacities)
    assert len(places) <= len(set(capacities)) <= 14  # 4000 / 256 blocks grow by at least a quarter each
    assert capacities[-1] <= max(1.3 * 4000 / every, 2 * SLOT_BLOCK)
    assert torch.equal(layer.keys[1, : 4000 // every, 1, 0], torch.arange(0.0, 4000, every))


def test_refusals_say_what_to_do_and_leave_the_cache_as_it_is(model, cache):
    with pytest.raises(ValueError, match="past_key_values holds 3 rows but the input has batch size 2"):
        feed(model, tokens(2, 4), cache)
    with pytest.raises(ValueError, match=f"{type(cache).__name__} cannot be cropped: the linear state"):
        cache.crop(5)
    assert not cache.is_croppable and cache.get_seq_length() == 24
