"""Both caches: one state however tokens come, positions, rows that move, growth, and what is refused."""

import contextlib
import copy
import gc
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
from caches import CLOSE, MOVES, VARIANTS, addresses, assert_same, feed, pack, static_cache, tokens, used
from hspmn.cache_hspmn import SLOT_BLOCK, HSPMNCache
from hspmn.configuration_hspmn import CHOICES

WHOLE = {"int8": 0.01, "int4": 0.15}  # stores of whole numbers, and the most that they change the logits
QUANTIZED = {"sparsity_k": [1.0, 0.0, 0.5], "num_sink_tokens": 2}
MODELS = VARIANTS | {kind: QUANTIZED | {"kv_cache_dtype": kind} for kind in WHOLE}
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
    if model.config.kv_cache_dtype not in WHOLE:  # read as it is stored in every cut, and only with a cache
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


@pytest.mark.parametrize("kind, most", WHOLE.items())
def test_whole_numbers_cost_little_of_the_logits(tiny_model, kind, most):
    models = (tiny_model(sparsity_k=1.0, kv_cache_dtype=kind) for kind in (kind, "auto"))
    whole, exact = (feed(model, tokens(3, 60), HSPMNCache(model.config))[0] for model in models)
    assert 0.1 * most < (whole - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("readers", CHOICES["contextual_readers"])
@pytest.mark.parametrize("kind", WHOLE)
def test_training_reads_whole_numbers_as_a_cache_holds_them(tiny_model, kind, readers):
    model, ids = tiny_model(kv_cache_dtype=kind, contextual_readers=readers, capacity_factor=8.0), tokens(3, 60)
    with torch.no_grad():
        stored, exact = (model(ids, use_cache=use_cache).logits for use_cache in (True, False))
    trained = model.train()(ids).logits
    assert (trained - stored).norm() < 1e-4 * stored.norm() < 0.1 * (exact - stored).norm()
    trained.square().sum().backward()
    assert all(layer.projection.qkv_proj.weight.grad.norm() > 0 for layer in model.model.layers)


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


@pytest.mark.parametrize("pieces", [[9], [9, 4], [9, 4, 1]])
def test_every_tensor_of_a_cache_has_memory_of_its_own(model, pieces):
    """torch 2.11 compiles writes to a part of a larger one wrongly, and says nothing."""
    for cache in (HSPMNCache(model.config), static_cache(model, 2)):
        feed(model, tokens(2, sum(pieces)), cache, pieces)
        held = [getattr(layer, name) for layer in cache.layers for name in layer._batched]
        held = [x for x in held if x.numel()]
        assert {x.storage_offset() for x in held} == {0}
        assert len({x.untyped_storage().data_ptr() for x in held}) == len(held)


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
    with pytest.raises(ValueError, match="rollback must be at least 0 tokens, got -1"):
        HSPMNCache(model.config, rollback=-1)


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("variant", ["gated", "dense", "bare"])
def test_cropped_tokens_leave_no_trace(tiny_model, new_cache, variant, kind):
    """Random calls, crops, moves of rows and copies: every answer is that of the tokens that are left."""
    model, draw = tiny_model(**VARIANTS[variant]), random.Random(kind)
    rollback, static = 5, new_cache is static_cache
    cache = static_cache(model, length=200, rollback=5) if static else HSPMNCache(model.config, rollback=5)
    held = torch.zeros(3, 3, 0, dtype=torch.long)  # ids, mask, positions
    for step in range(12):
        T = draw.choice([1, 2, 4, 7, 25])
        ids, mask = tokens(3, T, seed=step), (tokens(3, T, seed=step + 50) > 15).long()
        begin = held[2, :, -1:] + 1 if held.shape[2] and step % 3 else torch.zeros(3, 1, dtype=torch.long)
        held = torch.cat([held, torch.stack([ids, mask, begin + torch.arange(T)])], 2)
        padding = held[1] if kind == "padded" else None
        positions = held[2] if kind == "packed" else None
        inputs = {"attention_mask": padding, "position_ids": None if positions is None else positions[:, -T:]}
        with torch.no_grad():
            outputs = model(ids, past_key_values=cache, **inputs)
        logits, routed = feed(model, held[0], mask=padding, positions=positions)
        torch.testing.assert_close(outputs.logits, logits[:, -T:], **CLOSE)
        assert torch.equal(outputs.router_mask, routed[..., -T:])
        taken = draw.randint(0, min(T, rollback))
        cache.crop(-taken)
        held = held[..., : held.shape[2] - taken]
        if step % 4 == 1:
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            held, cache = held[:, [2, 0, 0]], copy.deepcopy(cache)
        assert cache.get_seq_length() == held.shape[2]
    assert sum(piece.x_BTD.shape[1] for piece in cache.pieces) <= 40 and len(cache.checkpoints) <= 3


def test_crop_goes_as_far_as_it_says_and_no_further(tiny_model, new_cache):
    model = tiny_model()
    cache = static_cache(model, rollback=6) if new_cache is static_cache else HSPMNCache(model.config, rollback=6)
    ids = tokens(3, 24)
    feed(model, ids, cache, [20, 1, 1, 2])
    for number in (-7, 3):
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=rf"crop\({number}\) must be minus .* from 0 to 6.*rollback=6"):
            cache.crop(number)
        assert_same(cache, before)
    cache.crop(-4)
    cache.crop(-2)
    torch.testing.assert_close(feed(model, ids[:, 18:], cache, 1)[0], feed(model, ids)[0][:, 18:], **CLOSE)
    cache.reset()
    feed(model, ids[:, :3], cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(feed(model, ids, cache)[0], feed(model, ids)[0], **CLOSE)
    with torch.enable_grad(), pytest.raises(ValueError, match="records no gradients"):
        model(ids[:, :1], past_key_values=cache)


MODES = {  # how a model is called, and how close its answers then are to those of float32
    "grad": (contextlib.nullcontext, 1e-4), "train": (contextlib.nullcontext, 1e-4), "no_grad": (torch.no_grad, 1e-4),
    "inference": (torch.inference_mode, 1e-4), "cast": (torch.no_grad, 0.5),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), 0.5),
}  # fmt: skip


@pytest.mark.parametrize("later", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_cache_made_in_one_mode_goes_on_in_another(tiny_model, new_cache, first, later):
    model, ids = tiny_model(router_bias_rate=0.0, capacity_factor=9.0), tokens(3, 24)
    cache, logits = new_cache(model), []
    refused = new_cache is static_cache and {first, later} & {"grad", "train", "autocast"}
    with pytest.raises(ValueError, match="records no gradients") if refused else contextlib.nullcontext():
        for mode, pieces in ((first, (9, 1)), (later, (1, 13))):
            model.train(mode == "train").to(torch.bfloat16 if mode == "cast" else torch.float32)
            for length in pieces:
                begin = cache.get_seq_length()
                with MODES[mode][0]():
                    outputs = model(ids[:, begin : begin + length], past_key_values=cache, use_cache=True)
                logits.append(outputs.logits.float())
    if not refused:
        error = (torch.cat(logits, 1) - feed(model.float().eval(), ids)[0]).abs().max()
        assert error < max(MODES[first][1], MODES[later][1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_pass_through_a_cache(tiny_model, variant):
    model, ids = tiny_model(**VARIANTS[variant]), tokens(2, 16)

    def gradients(*lengths):
        model.zero_grad()
        outputs = SimpleNamespace(past_key_values=None)
        for piece in ids.split(lengths or 16, 1):
            outputs = model(piece, past_key_values=outputs.past_key_values, use_cache=bool(lengths))
            outputs.logits.square().sum().backward(retain_graph=True)  # through the calls before, too
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    for lengths in ((16,), (7, 9), (12, 1, 1, 1, 1)):
        for name, got in gradients(*lengths).items():
            torch.testing.assert_close(got, want[name], rtol=1e-3, atol=1e-3, msg=name)
    outputs = model(ids[:, :8])
    feed(model, ids[:, 8:], outputs.past_key_values)  # leaves the graph of the call before as it was
    outputs.logits.sum().backward()


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_record_gradients_of_one_call_and_refuse_another(tiny_model, kind):
    model, ids = tiny_model(kv_cache_dtype=kind), tokens(2, 12)
    found = []
    for use_cache in (False, True):
        outputs = model(ids, use_cache=use_cache)
        found.append(torch.autograd.grad(outputs.logits.square().sum(), model.lm_head.weight)[0])
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=f"kv_cache_dtype='{kind}', through which no gradient passes"):
        model(ids, past_key_values=outputs.past_key_values)
    assert outputs.past_key_values.get_seq_length() == 12


def test_a_cache_is_refused_where_layers_run_twice(tiny_model):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    cache = HSPMNCache(model.config)
    with pytest.raises(ValueError, match="past_key_values cannot be read while gradient checkpointing trains"):
        model(tokens(2, 9), past_key_values=cache)
    assert model(tokens(2, 9), use_cache=True).past_key_values is None and cache.get_seq_length() == 0


def test_an_interrupted_call_is_refused_and_can_be_taken_back(tiny_model, new_cache):
    model, ids = tiny_model(), tokens(3, 24)

    def stop(*_):
        raise MemoryError

    for rollback in (0, 4):
        options = {"rollback": rollback}
        cache = static_cache(model, **options) if new_cache is static_cache else HSPMNCache(model.config, **options)
        feed(model, ids[:, :12], cache)
        hook = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(MemoryError):
            feed(model, ids[:, 12:], cache)
        hook.remove()
        with pytest.raises(ValueError, match="interrupted.*reset"):
            feed(model, ids[:, 12:], cache)
        if rollback:
            cache.crop(0)
            torch.testing.assert_close(feed(model, ids[:, 12:], cache)[0], feed(model, ids)[0][:, 12:], **CLOSE)
        cache.reset()
        torch.testing.assert_close(feed(model, ids, cache)[0], feed(model, ids)[0], **CLOSE)


@pytest.mark.parametrize("field, change", [
    ("num_hidden_layers", {"num_hidden_layers": 2, "sparsity_k": [0.4, 0.0]}), ("num_attention_heads", {
    "num_attention_heads": 2}), ("num_key_value_heads", {"num_key_value_heads": 4}), ("head_dim", {"head_dim": 4}),
    ("sliding_window", {"sliding_window": 6}), ("conv_kernel_size", {"conv_kernel_size": 2}),
    ("linear_attention", {"linear_attention": "elu"}), ("kv_cache_dtype", {"kv_cache_dtype": "int8"}),
    ("sparsity_k", {"sparsity_k": [0.0, 0.0, 0.5]}), ("another model", {}),
])  # fmt: skip
def test_a_cache_of_another_model_is_refused_by_name(tiny_model, new_cache, field, change):
    model, other, ids = tiny_model(), tiny_model(**change), tokens(3, 12)
    cache = new_cache(model)
    feed(model, ids[:, :6], cache)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=f"past_key_values .*{field}"):
        feed(other, ids[:, 6:], cache)
    assert_same(cache, before)
    if not change:  # a stored one goes on with the same weights, loaded anew
        stored = pickle.loads(pickle.dumps(cache))
        torch.testing.assert_close(feed(other, ids[:, 6:], stored)[0], feed(model, ids)[0][:, 6:], **CLOSE)
        del model
        gc.collect()
        feed(other, ids[:, 6:], cache)
