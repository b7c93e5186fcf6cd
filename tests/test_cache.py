"""HSPMNCache: growth, positions, rows that move, and what it refuses."""

import copy

import pytest
import torch
from caches import assert_same, static_cache, used
from caches import feed as feed_pieces
from hspmn.block_hspmn import Route, Stream
from hspmn.cache_hspmn import SLOT_BLOCK, HSPMNCache
from hspmn.operations_hspmn import operations


def tokens(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


# Rows whose current document begins at another place each
PACKED = torch.stack([torch.cat([torch.arange(n), torch.arange(20 - n)]) for n in (6, 13, 20)])


@torch.no_grad()
def feed(model, ids, cache=None, **kwargs):
    return model(ids, past_key_values=cache, use_cache=True, **kwargs)


@pytest.fixture
def append(tiny_config):
    """Function from a token's key, value, position and whether it is routed, per row, to the layer that stores it."""
    config = tiny_config(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2, sparsity_k=0.5)
    cache, seen_B = HSPMNCache(config), torch.zeros(2, dtype=torch.long)

    def append(k, v, position, count_B):
        cache.start_call(2, 1, torch.device("cpu"))
        if not cache.layers[0].is_initialized:
            cache.layers[0].lazy_initialization(k)
        slot = count_B.long()[:, None] - 1
        route = Route(None, None, slot, slot, count_B, None)
        stream = Stream(torch.full((2, 1), position), None, None, torch.full((2, 1), -1), None, seen_B)
        cache.layers[0].update(k, v, stream, route, operations("reference"))
        return cache.layers[0]

    return append


@pytest.fixture(params=["gated", "elu"])
def model(tiny_model, request):
    return tiny_model(linear_attention=request.param, sparsity_k=[0.4, 0.0, 1.0])


@pytest.fixture
def cache(model):
    return feed(model, tokens(3, 20), position_ids=PACKED).past_key_values


# Growth


def test_appending_reallocates_rarely_and_never_copies_in_between(append):
    x, count = torch.ones(2, 1, 1, 2), torch.ones(2, dtype=torch.int32)
    capacities, addresses = [], set()
    for step in range(4000):
        layer = append(x * step, -x * step, 3 * step, count)
        capacities.append(layer.slots)
        addresses.add(layer.keys.data_ptr())
    assert capacities == sorted(capacities) and all(slots % SLOT_BLOCK == 0 for slots in capacities)
    assert len(set(capacities)) <= 14  # 4000 / 256 blocks grow by at least a quarter each
    assert len(addresses) <= len(set(capacities))
    assert capacities[-1] <= 1.3 * 4000
    step = torch.arange(4000.0)
    assert torch.equal(layer.keys[1, :4000, 0, 0], step) and torch.equal(layer.values[0, :4000, 0, 1], -step)
    assert torch.equal(layer.positions[0, :4000], (3 * step).int())


def test_slots_are_held_for_routed_tokens_and_not_for_all(append):
    x = torch.ones(2, 1, 1, 2)
    for step in range(2000):
        routed = torch.tensor([step % 10 == 0, step % 20 == 0], dtype=torch.int32)
        layer = append(x, x, step, routed)
    assert layer.count.tolist() == [200, 100]
    assert layer.slots <= 2 * SLOT_BLOCK
    assert layer.positions[1, :100].tolist() == list(range(0, 2000, 20))


def test_growth_keeps_what_a_decode_needs(tiny_model, monkeypatch):
    monkeypatch.setattr("hspmn.cache_hspmn.SLOT_BLOCK", 4)
    model, ids = tiny_model(sparsity_k=[1.0, 0.0, 0.5]), tokens(2, 40)
    cache, logits = None, []
    for piece in ids.split([7, *[1] * 33], 1):
        outputs = feed(model, piece, cache)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, 1), feed(model, ids).logits, rtol=0, atol=1e-4)
    assert 40 <= cache.layers[0].slots < 60


# Contents


def test_stored_positions_are_the_original_ones_of_routed_tokens(model):
    ids, positions = tokens(2, 30), torch.cat([torch.arange(13), torch.arange(17)]).expand(2, 30)
    cache, routed = None, []
    for begin, end in ((0, 11), (11, 12), (12, 30)):
        outputs = feed(model, ids[:, begin:end], cache, position_ids=positions[:, begin:end])
        cache = outputs.past_key_values
        routed.append(outputs.router_mask)
    routed = torch.cat(routed, 2)
    assert 0 < routed[0].float().mean() < 1
    for layer, mask in ((cache.layers[0], routed[0]), (cache.layers[2], routed[2])):
        for row in range(2):
            assert layer.positions[row, : layer.count[row]].tolist() == positions[row, mask[row]].tolist()


def test_purely_reflexive_layer_stores_no_sparse_keys(cache):
    assert cache.layers[1].count.tolist() == [0, 0, 0] and cache.layers[1].slots == 0


def test_lengths_count_columns_and_seen_counts_real_tokens(model):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    cache = feed(model, tokens(2, 12), attention_mask=mask).past_key_values
    feed(model, tokens(2, 3), cache)
    assert {cache.get_seq_length(i) for i in range(3)} == {layer.get_seq_length() for layer in cache.layers} == {15}
    assert cache.seen.tolist() == [10, 15]
    assert cache.batch_size == 2 and cache.has_previous_state()


def test_state_of_the_cache_is_the_same_for_every_cut(model):
    ids = tokens(3, 20)
    pieces = None
    for piece in ids.split([6, 1, 2, 11], 1):
        pieces = feed(model, piece, pieces).past_key_values
    whole = feed(model, ids).past_key_values
    real = torch.arange(5)  # the ring holds the window of 5 in both
    assert pieces.layers[0].window_keys.shape[1] == len(real)
    assert_same(pieces, whole)


# Keys and values as whole numbers


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("options", [{}, {"linear_attention": "elu"}, {"num_sink_tokens": 2}], ids=str)
def test_int8_is_read_as_stored_however_tokens_are_fed(tiny_model, options, static, monkeypatch):
    monkeypatch.setattr("hspmn.cache_hspmn.SLOT_BLOCK", 4)
    model, ids = tiny_model(sparsity_k=[1.0, 0.0, 0.5], kv_cache_dtype="int8", **options), tokens(3, 20)
    caches, logits = [], []
    for lengths in ([20], [6, 1, 2, 11], [1] * 20):
        caches.append(static_cache(model, length=20) if static else HSPMNCache(model.config))
        with torch.no_grad():
            logits.append(feed_pieces(model, ids, caches[-1], lengths, positions=PACKED)[0])
    for cache, got in zip(caches[1:], logits[1:], strict=True):
        torch.testing.assert_close(got, logits[0], rtol=0, atol=1e-4)
        assert_same(cache, caches[0])


def test_int8_costs_less_than_a_hundredth_of_the_logits(tiny_model):
    whole, exact = (feed(tiny_model(sparsity_k=1.0, kv_cache_dtype=kind), tokens(3, 60)) for kind in ("int8", "auto"))
    assert 1e-4 < (whole.logits - exact.logits).norm() / exact.logits.norm() < 0.01


def test_int8_rows_move_with_their_scales(tiny_model):
    model, rows = tiny_model(sparsity_k=[1.0, 0.0, 0.5], kv_cache_dtype="int8"), torch.tensor([2, 0, 0])
    cache = feed(model, tokens(3, 20)).past_key_values
    cache.reorder_cache(rows)
    assert cache.layers[0].keys.dtype == torch.int8
    more = tokens(3, 9, seed=5)
    expected = feed(model, torch.cat([tokens(3, 20)[rows], more], 1)).logits[:, 20:]
    torch.testing.assert_close(feed(model, more, cache).logits, expected, rtol=0, atol=1e-4)


# Rows that move


def rows_after(model, rows):
    return feed(model, tokens(3, 20)[rows], position_ids=PACKED[rows]).past_key_values


def test_reorder_moves_every_tensor(model, cache):
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_same(cache, rows_after(model, [2, 0, 0]))


def test_repeat_interleave_repeats_every_tensor(model, cache):
    cache.batch_repeat_interleave(2)
    assert_same(cache, rows_after(model, [0, 0, 1, 1, 2, 2]))
    assert cache.batch_size == 6


@pytest.mark.parametrize("indices", [torch.tensor([2, 1]), [0, 2], torch.tensor([True, False, True])], ids=str)
def test_select_keeps_the_named_rows(model, cache, indices):
    cache.batch_select_indices(indices)
    assert_same(cache, rows_after(model, torch.arange(3)[indices]))


def test_moved_rows_decode_as_their_own(model, cache):
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    ids = tokens(3, 20)[[1, 2, 0]]
    more, positions = tokens(3, 9, seed=5), PACKED[[1, 2, 0]]
    positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, 10)], 1)
    expected = feed(model, torch.cat([ids, more], 1), position_ids=positions).logits[:, 20:]
    torch.testing.assert_close(feed(model, more, cache).logits, expected, rtol=0, atol=1e-4)


def test_reset_forgets_everything_and_takes_another_batch_size(model, cache):
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.has_previous_state()
    logits = feed(model, tokens(2, 9), cache).logits
    torch.testing.assert_close(logits, feed(model, tokens(2, 9)).logits, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 9 and cache.batch_size == 2


def test_deep_copy_shares_nothing(model, cache):
    twin = copy.deepcopy(cache)
    before = {name: value.clone() for name, value in used(cache).items()}
    feed(model, tokens(3, 30, seed=3), twin)
    assert twin.get_seq_length() == 50 and cache.get_seq_length() == 20
    assert all(torch.equal(value, before[name]) for name, value in used(cache).items())
    first, second = (feed(model, tokens(3, 4), c).logits for c in (copy.deepcopy(cache), cache))
    assert torch.equal(first, second)


# Refusals


def test_crop_is_refused_with_the_reason(cache):
    with pytest.raises(ValueError, match="linear state"):
        cache.crop(5)
    assert not cache.is_croppable


def test_another_batch_size_is_refused_by_name(model, cache):
    with pytest.raises(ValueError, match="past_key_values holds 3 rows but the input has batch size 2"):
        feed(model, tokens(2, 4), cache)


def test_empty_cache_has_no_rows(tiny_config):
    cache = HSPMNCache(tiny_config())
    assert cache.batch_size == -1 and cache.get_seq_length() == 0 and len(cache.layers) == 3
