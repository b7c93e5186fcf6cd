"""The network's contracts on CPU in float32: causality, one answer for every way of feeding, routing, services."""

import copy
import inspect
import math
import pickle
from itertools import pairwise

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from caches import CLOSE, VARIANTS, feed, generate, left_padded, pack, static_cache, tokens
from hspmn.block_hspmn import Heads, HSPMNBlock, ReflexiveStream, Route, Stream, SwiGLU
from hspmn.cache_hspmn import HSPMNCache
from hspmn.modeling_hspmn import (
    HSPMNForCausalLM,
    HSPMNForSequenceClassification,
    HSPMNForTokenClassification,
    HSPMNModel,
    HSPMNOutput,
)
from hspmn.operations_hspmn import token_losses
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DataCollatorWithFlattening, DynamicCache
from transformers.utils import logging

PROPERTY = settings(max_examples=12, deadline=None, derandomize=True, database=None)
NO_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.0}
variants = pytest.mark.parametrize("variant", VARIANTS)
readers = pytest.mark.parametrize("readers", ["routed", "all"])
checkpointing = pytest.mark.parametrize("reentrant", [False, True])


def feed_cached(model, ids, cuts, mask=None, positions=None):
    """Logits, routed tokens and the cache of a prompt fed in pieces that end at `cuts`, where it is that long."""
    T, cache = ids.shape[1], HSPMNCache(model.config)
    borders = [0, *sorted(cut for cut in cuts if cut < T), T]
    return *feed(model, ids, cache, [end - begin for begin, end in pairwise(borders)], mask, positions), cache


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, expected, **tolerance):
    assert expected.keys() == gradients(model).keys()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], **tolerance, msg=name)


def routers(model):
    return [layer.router for layer in model.model.layers if layer.router is not None]


def biases(model):
    return torch.stack([router.bias.clone() for router in routers(model)])


def step(*models):
    """A step of one optimizer of all `models`, whose biases it moves."""
    torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.01).step()


def route_everything(model):
    for router in routers(model):
        router.bias.fill_(9.0)


@variants
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_future_tokens_change_nothing_before_them(tiny_model, variant, training):
    """Contract 1."""
    model = tiny_model(**VARIANTS[variant], capacity_factor=1.0, router_bias_rate=0.0).train(training)
    ids = tokens(2, 90)
    changed = ids.clone()
    changed[:, 70:] = (changed[:, 70:] + 7) % 61
    (first, first_routed), (second, second_routed) = (feed(model, x) for x in (ids, changed))
    # in training the shapes are fixed and the result is exact; in eager inference the number of slots follows the
    # routed tokens, and matrix products of another size round differently
    torch.testing.assert_close(first[:, :70], second[:, :70], rtol=0, atol=0 if training else 1e-5)
    assert torch.equal(first_routed[..., :70], second_routed[..., :70])
    assert not torch.allclose(first[:, 70:], second[:, 70:])


@variants
def test_every_way_of_feeding_gives_the_same(tiny_model, variant):
    """Contract 2: in one piece, in chunks and token by token, with a cache and without."""
    model = tiny_model(**VARIANTS[variant])

    @PROPERTY
    @example(70, [])
    @example(50, range(50))
    @given(st.integers(2, 90), st.sets(st.integers(1, 89), max_size=5))
    def check(T, cuts):
        ids = tokens(2, T, seed=T)
        expected, expected_routed = feed(model, ids)
        logits, routed, _ = feed_cached(model, ids, set(cuts) - {0})
        torch.testing.assert_close(logits, expected, **CLOSE)
        assert torch.equal(routed, expected_routed)

    check()


@st.composite
def padded_prompts(draw):
    """A mask with padding left, right, inside, and everywhere; where the prompt is cut; which position ids it has."""
    T = draw(st.integers(2, 30))
    left, right = draw(st.integers(0, T // 2)), draw(st.integers(0, T // 2))
    inside = draw(st.lists(st.sampled_from([0, 1, 1, 1]), min_size=T, max_size=T))
    rows = [[0] * left + [1] * (T - left), [1] * (T - right) + [0] * right, inside, [0] * T]
    return torch.tensor(rows), draw(st.sets(st.integers(1, T), max_size=4)), draw(st.sampled_from([None, 0, 1]))


@variants
def test_padded_rows_equal_rows_alone_in_one_piece_and_in_chunks(tiny_model, variant):
    """Contract 3, as the next two tests."""
    model = tiny_model(**VARIANTS[variant])
    mask_of_holes = torch.ones(2, 30, dtype=torch.long)
    mask_of_holes[0, 10:17] = 0  # a whole piece of row 0, and the beginning of its next

    @PROPERTY
    @example((mask_of_holes, {10, 15, 25}, None))
    @example((mask_of_holes, {10, 15, 25}, 1))
    @given(padded_prompts())
    def check(prompt):
        mask, cuts, padded_position = prompt
        ids, positions = tokens(*mask.shape), None
        if padded_position is not None:
            positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, padded_position)
        logits, routed, cache = feed_cached(model, ids, cuts, mask, positions)
        torch.testing.assert_close(logits, feed(model, ids, mask=mask, positions=positions)[0], **CLOSE)
        for row, real in enumerate(mask.bool()):
            if real.any():
                alone, alone_routed = feed(model, ids[row : row + 1, real])
                torch.testing.assert_close(logits[row, real], alone[0], **CLOSE)
                assert torch.equal(routed[:, row, real], alone_routed[:, 0])
        assert not routed[:, ~mask.bool()].any() and logits.isfinite().all()
        assert cache.seen.tolist() == mask.sum(1).tolist()

    check()


@variants
def test_packed_documents_equal_documents_alone(tiny_model, variant):
    model = tiny_model(**VARIANTS[variant])

    @PROPERTY
    @example([9, 21], range(12, 30))
    @given(st.lists(st.integers(1, 25), min_size=1, max_size=5), st.sets(st.integers(1, 120), max_size=3))
    def check(lengths, cuts):
        ids, positions = tokens(1, sum(lengths), seed=sum(lengths)), pack(lengths)
        logits, routed = feed(model, ids, positions=positions)
        cached, cached_routed, _ = feed_cached(model, ids, cuts, positions=positions)
        torch.testing.assert_close(cached, logits, **CLOSE)
        assert torch.equal(cached_routed, routed)
        alone = [feed(model, document) for document in ids.split(lengths, 1)]
        torch.testing.assert_close(logits, torch.cat([x for x, _ in alone], 1), **CLOSE)
        assert torch.equal(routed, torch.cat([x for _, x in alone], 2))

    check()


@st.composite
def prompts_with_holes(draw):
    """Masks of random rows that begin or end with padding too, where the prompt is cut, and columns as position ids,
    from anywhere on, or those of real tokens."""
    T = draw(st.integers(2, 16))
    mask = torch.tensor([draw(st.lists(st.sampled_from([0, 1, 1]), min_size=T, max_size=T)) for _ in range(2)])
    positions = torch.arange(T)[None] + draw(st.integers(0, 50)) if draw(st.booleans()) else mask.cumsum(1) - 1
    return mask, draw(st.sets(st.integers(1, T), max_size=4) | st.just(range(1, T))), positions


@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
def test_a_hole_in_the_mask_begins_no_document_where_positions_go_on(tiny_model, static):
    """Whether they count columns or real tokens; without RoPE both are the row without its padding."""
    model = tiny_model(rope_parameters=NO_ROPE, num_sink_tokens=1)

    @PROPERTY
    @example((torch.tensor([[1] * 4 + [0] * 2 + [1] * 6]), range(1, 12), torch.arange(12)[None]))
    @given(prompts_with_holes())
    def check(prompt):
        mask, cuts, positions = prompt
        ids, (B, T) = tokens(*mask.shape), mask.shape
        lengths = [end - begin for begin, end in pairwise([0, *sorted(cut for cut in cuts if cut < T), T])]
        cache = static_cache(model, B, 64) if static else HSPMNCache(model.config)
        with torch.no_grad():
            logits, routed = feed(model, ids, cache, lengths, mask, positions)
            torch.testing.assert_close(feed(model, ids, mask=mask, positions=positions)[0], logits, **CLOSE)
            for row, real in enumerate(mask.bool()):
                if real.any():
                    alone, alone_routed = feed(model, ids[row : row + 1, real])
                    torch.testing.assert_close(logits[row, real], alone[0], **CLOSE)
                    assert torch.equal(routed[:, row, real], alone_routed[:, 0])

    check()


def test_positions_go_on_after_trailing_padding_without_a_mask(tiny_model):
    """As columns or as real tokens; anything else begins a document."""
    model, ids, mask = tiny_model(rope_parameters=NO_ROPE), tokens(1, 11), torch.tensor([[1] * 7 + [0] * 3])
    for position, context in ((10, 7), (7, 7), (9, 0), (0, 0)):
        cache = HSPMNCache(model.config)
        feed(model, ids[:, :10], cache, mask=mask, positions=torch.arange(10)[None])
        logits, _ = feed(model, ids[:, 10:], cache, positions=torch.tensor([[position]]))
        alone = torch.cat([ids[:, 7 - context : 7], ids[:, 10:]], 1)
        torch.testing.assert_close(logits[0, -1], feed(model, alone)[0][0, -1], **CLOSE)


@pytest.mark.parametrize("window", [5, 0])
def test_logits_depend_on_no_absolute_position(tiny_model, window):
    """Sinks stand nowhere; in one piece and token by token."""
    model, ids, positions = tiny_model(num_sink_tokens=2, sliding_window=window), tokens(2, 24), torch.arange(24)[None]
    for name, parameter in model.named_parameters():
        if "sink" in name:
            nn.init.normal_(parameter, std=0.5)
    expected = feed(model, ids)[0]
    for cuts in ((), range(1, 24)):
        logits = feed_cached(model, ids, cuts, positions=positions + 37)[0]
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 4.0}, {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8},
], ids=lambda rope: rope["rope_type"])  # fmt: skip
def test_every_rope_type_gives_one_answer_before_and_after_longer_calls(tiny_model, rope):
    """A call past the assumed length leaves nothing behind, and pieces agree with the whole."""
    model, ids = tiny_model(rope_parameters=rope, max_position_embeddings=32), tokens(1, 50)
    expected, whole = feed(model, ids[:, :12])[0], feed(model, ids)[0]
    assert torch.equal(feed(model, ids[:, :12])[0], expected)
    torch.testing.assert_close(feed_cached(model, ids, range(1, 50))[0], whole, **CLOSE)
    assert not torch.allclose(whole, feed(tiny_model(), ids)[0], atol=1e-3)


def test_packed_and_padded_at_once(tiny_model):
    model, ids, mask = tiny_model(), tokens(1, 30), torch.ones(1, 30, dtype=torch.long)
    mask[0, 8:12] = 0
    logits, _, _ = feed_cached(model, ids, (10, 20), mask, pack([8, 1, 1, 1, 1, 18]))
    for document in (slice(0, 8), slice(12, 30)):
        torch.testing.assert_close(logits[:, document], feed(model, ids[:, document])[0], **CLOSE)


@readers
@checkpointing
def test_packed_gradients_equal_those_of_documents_alone_under_checkpointing(tiny_model, reentrant, readers):
    options = {"capacity_factor": 100.0, "router_bias_rate": 0.0, "contextual_readers": readers}
    packed, alone = tiny_model(**options).train(), tiny_model(**options).train()
    packed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens(1, 24)
    weights = torch.randn(1, 24, 61, generator=torch.Generator().manual_seed(1))
    (packed(ids, position_ids=pack([10, 14])).logits * weights).sum().backward()
    for part in (slice(0, 10), slice(10, 24)):
        (alone(ids[:, part]).logits * weights[:, part]).sum().backward()
    assert_same_gradients(packed, gradients(alone), rtol=1e-3, atol=1e-3)


@readers
@pytest.mark.parametrize("padding", [None, (slice(None), slice(6)), (1, slice(None))], ids=["none", "left", "row"])
def test_gradients_are_finite_and_padding_gets_none(tiny_model, padding, readers):
    options = {"num_sink_tokens": 1, "routed_intermediate_size": 8, "contextual_readers": readers}
    model, ids = tiny_model(**options).train(), tokens(3, 20)
    mask = torch.ones(3, 20, dtype=torch.long)
    if padding:
        mask[padding] = 0
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert embeds.grad.isfinite().all() and not embeds.grad[mask == 0].any() and embeds.grad[mask == 1].any()


def test_block_alone_returns_output_and_aux_loss_and_continues_a_cache(tiny_config):
    torch.manual_seed(0)
    config = tiny_config()
    block, x = HSPMNBlock(config).eval(), torch.randn(2, 30, 32)
    expected, aux_loss, no_cache = block(x)
    assert expected.shape == x.shape and aux_loss.shape == () and no_cache is None
    cache, outputs = HSPMNCache(config), []
    for piece in x.split([11, 1, 18], 1):
        output, _, returned = block(piece, past_key_values=cache)
        assert returned is cache
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **CLOSE)
    assert cache.get_seq_length() == 30


def test_routed_mlp_adds_its_gated_output_to_routed_tokens_alone(tiny_config):
    torch.manual_seed(0)
    block = HSPMNBlock(tiny_config(sparsity_k=0.4, routed_intermediate_size=24)).eval()
    x, normed = torch.randn(2, 30, 32), []
    block.post_attention_layernorm.register_forward_hook(lambda module, inputs, output: normed.append(output))
    output, *route = block(x, output_router=True)
    route = Route(*route)
    routed = route.slot_BT >= 0
    expected = block.routed_mlp(normed[0]) * (route.gate_BT * routed)[..., None]
    block.routed_mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(output - block(x)[0], expected, rtol=0, atol=1e-5)
    assert routed.any() and not routed.all() and expected.abs().max() > 1e-2


def test_elu_linear_attention_is_a_causal_mean_weighted_by_its_feature_map(tiny_config):
    stream = ReflexiveStream(tiny_config(linear_attention="elu", sliding_window=0))
    q, k, v = (torch.randn(2, 20, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    heads = Heads(F.elu(q) + 1, F.elu(k) + 1, q, k, v)
    out = stream(None, heads, Stream(None, None, None), None, "reference")
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    weights = torch.einsum("bthe,bshe->bhts", F.elu(q) + 1, F.elu(k) + 1).tril()
    mean = torch.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(out, mean, rtol=1e-5, atol=1e-5)


def test_fresh_queries_match_successors_in_one_key_head_and_equal_tokens_in_the_other(tiny_model):
    model, T = tiny_model(hidden_size=256, head_dim=32, num_hidden_layers=1, sparsity_k=1.0), 40
    h = torch.randn(1, T, 256, generator=torch.Generator().manual_seed(0))
    h[:, 30] = h[:, 5]
    upright = Stream(torch.arange(T)[None], torch.ones(1, T, 32), torch.zeros(1, T, 32))
    heads = model.model.layers[0].projection(h, upright)
    q_GXE, k_SGE = heads.q_BTHE[0, 30].unflatten(0, (2, 2)), heads.k_BTGE[0, :30]
    weights = (torch.einsum("gxe,sge->gxs", q_GXE, k_SGE) / 32**0.5).softmax(-1)
    assert weights.argmax(-1).tolist() == [[6, 6], [5, 5]] and (weights.amax(-1) > 0.5).all()


@pytest.mark.parametrize("rate", [0.07, 0.0])
def test_bias_moves_once_per_optimizer_step_by_the_clipped_error_of_the_whole_load(tiny_model, monkeypatch, rate):
    model = tiny_model(router_bias_gain=3.0, router_bias_rate=rate, capacity_factor=100.0).train()
    routers(model)[0].bias.fill_(5.0)  # routes everything: the step is clipped
    before, twin, others = biases(model), copy.deepcopy(model), torch.tensor([[20.0, 40.0], [30.0, 40.0]])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.add_(others))  # one for all layers
    mask = left_padded(2, 30, 0, 13)
    routed = model(tokens(4, 50)).router_mask.sum((1, 2))
    routed = (routed + model(tokens(2, 30, 1), attention_mask=mask).router_mask.sum((1, 2)))[[0, 2]]
    assert torch.equal(biases(model), before)
    step(model)
    error = 3.0 * (torch.tensor([0.4, 0.5]) - (routed + others[:, 0]) / (200 + mask.sum() + 40))
    assert error[0] < -1 < error[1] < 1 and error[1]
    torch.testing.assert_close(biases(model), before + rate * error.clamp(-1, 1), rtol=0, atol=1e-6)
    others.zero_()
    moved = biases(model)
    step(model)
    assert torch.equal(biases(model), moved)  # nothing was read
    assert torch.equal(biases(twin), before)  # a copy shares nothing
    assert not any(part in name for name, _ in model.named_parameters() for part in ("router.bias", "counts"))


@pytest.mark.parametrize("kind", ["eval", "no_grad", "generate", "frozen", "topk"])
def test_bias_rests_but_for_training_passes_with_gradients(tiny_model, kind):
    model = tiny_model(router_mode="topk" if kind == "topk" else "threshold").train(kind != "eval")
    model.requires_grad_(kind != "frozen").lm_head.requires_grad_()
    before, ids = biases(model), tokens(2, 20)
    with torch.set_grad_enabled(kind != "no_grad"):
        generate(model, ids) if kind == "generate" else model(ids)
    step(model)
    assert torch.equal(biases(model), before)


def test_an_optimizer_moves_the_routers_it_holds_or_else_those_that_none_does(tiny_model):
    """Flat partitions, as DeepSpeed and FSDP make them, hold no weight of a model."""
    held = tiny_model().train()
    copied, unpickled = copy.deepcopy(held), pickle.loads(pickle.dumps(held))
    optimizer, flat = (torch.optim.SGD(p, lr=0.01) for p in (held.parameters(), [nn.Parameter(torch.zeros(9))]))
    before, models = biases(held), (held, copied, unpickled)
    for stepped, moves in ((optimizer, [True, False, False]), (flat, [False, True, True])):
        start = [biases(model) for model in models]
        for model in models:
            model(tokens(2, 30))
        stepped.step()
        assert [not torch.equal(biases(m), x) for m, x in zip(models, start, strict=True)] == moves
    torch.testing.assert_close(biases(copied) - before, biases(held) - before)  # of both passes: the same load


@checkpointing
def test_bias_moves_once_under_gradient_checkpointing(tiny_model, reentrant):
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids, start = tokens(2, 30), biases(plain)
    for _ in range(2):
        for model in (plain, checkpointed):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            step(model)
    assert torch.equal(biases(plain), biases(checkpointed)) and not torch.equal(biases(plain), start)
    assert_same_gradients(checkpointed, gradients(plain), rtol=1e-4, atol=1e-5)


@readers
def test_scores_of_real_tokens_decide_mask_and_load_and_carry_a_gradient_to_the_router(tiny_model, readers):
    options = {"contextual_readers": readers, "router_load_entropy_coef": 0.0}
    model, ids, mask = tiny_model(**options), tokens(2, 40), left_padded(2, 40, 21)
    outputs = model(ids, attention_mask=mask, labels=ids)
    for layer in (0, 2):
        decided = (outputs.router_scores[layer] + model.model.layers[layer].router.bias > 0) & mask.bool()
        assert torch.equal(outputs.router_mask[layer], decided) and decided.any() and not decided.all()
    assert not outputs.router_mask[1].any()
    torch.testing.assert_close(outputs.router_load, outputs.router_mask.sum((1, 2)) / mask.sum())
    outputs.loss.backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers(model))


@pytest.mark.parametrize("cuts", [(), (7, 20), range(1, 24)], ids=str)
def test_first_tokens_of_a_document_are_routed_whatever_their_score(tiny_model, cuts):
    model, ids = tiny_model(router_initial_tokens=4, sparsity_k=[0.4, 0.0, 1.0]), tokens(3, 24)
    model.model.layers[0].router.bias.fill_(-100.0)
    mask, positions = left_padded(3, 24, 3), pack([1, 1, 1, 21], [9, 15], [24])
    want = torch.zeros(3, 24, dtype=torch.bool)
    want[0, 3:7] = want[1, :4] = want[1, 9:13] = want[2, :4] = True
    routed = feed_cached(model, ids, cuts, mask, positions)[1]
    assert torch.equal(routed[0], want) and not routed[1].any() and torch.equal(routed[2], mask.bool())


def test_every_layer_load_reaches_its_target_in_training(tiny_model):
    """Contract 7."""
    model = tiny_model(num_hidden_layers=3, sparsity_k=[0.2, 0.5, 0.05], capacity_factor=2.0).train()
    for router, bias in zip(routers(model), (3.0, -3.0, 0.0), strict=True):
        router.bias.fill_(bias)  # collapsed to everything, to nothing, and far above the target
    optimizer, loads = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(250):
        model.set_sparsity_progress(min(1.0, step / 125))
        ids = tokens(4, 48, seed=step % 8)
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(outputs.router_load)
    share = torch.stack(loads[-25:]).mean(0) / torch.tensor([0.2, 0.5, 0.05])
    assert ((share > 0.5) & (share < 1.5)).all(), share


def test_annealing_moves_every_target_from_one_to_its_share(tiny_model):
    model = tiny_model(sparsity_k=[0.2, 0.0, 1.0])
    torch.testing.assert_close(model.router_targets, torch.tensor([0.2, 1.0]))
    for progress, share in ((0.0, 1.0), (0.25, 0.8), (1.0, 0.2)):
        model.set_sparsity_progress(progress)
        torch.testing.assert_close(model.router_targets, torch.tensor([share, 1.0]))
    for fraction, step, share in ((0.5, 0, 1.0), (0.5, 1, 0.8), (0.5, 4, 0.2), (0.5, 8, 0.2), (0.0, 0, 0.2)):
        model.config.sparsity_anneal_fraction = fraction
        model.anneal(step, 8)
        torch.testing.assert_close(model.router_targets, torch.tensor([share, 1.0]))
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress"):
            model.set_sparsity_progress(progress)


@pytest.mark.parametrize("factor, training, progress, held", [
    *((factor, True, 1.0, held) for factor, held in ((1.0, 10), (1.5, 15), (2.05, 21), (9.0, 50))),
    (1.0, True, 0.5, 50), (1.0, False, 1.0, 50),  # never while annealing and in eager inference
])  # fmt: skip
def test_overflow_drops_the_latest_tokens_and_is_reported(tiny_model, caplog, factor, training, progress, held):
    model = tiny_model(num_hidden_layers=1, sparsity_k=0.2, capacity_factor=factor).train(training)
    model.set_sparsity_progress(progress)
    route_everything(model)
    logging.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        outputs = model(tokens(2, 50))
    assert outputs.router_mask[0, :, :held].all() and not outputs.router_mask[0, :, held:].any()
    torch.testing.assert_close(outputs.router_overflow, torch.tensor([1 - held / 50]))
    assert (f"capacity_factor={factor}" in caplog.text) == (held < 50)


def test_dropped_tokens_get_no_contextual_part(tiny_model):
    options = {"num_hidden_layers": 1, "capacity_factor": 1.0, "routed_intermediate_size": 16, "router_bias_rate": 0.0}
    model, reflexive = tiny_model(**options, sparsity_k=0.2).train(), tiny_model(**options, sparsity_k=0.0).train()
    reflexive.load_state_dict(model.state_dict(), strict=False)
    route_everything(model)
    logits, expected = (feed(m, tokens(1, 50))[0] for m in (model, reflexive))
    torch.testing.assert_close(logits[:, 10:], expected[:, 10:], **CLOSE)
    assert ((logits - expected)[:, :10].abs().amax(-1) > 1e-3).float().mean() > 0.5


def entropies(outputs, mask):
    """Mean gate entropy and mean gate of each layer over real tokens, in float64."""
    gate = outputs.router_scores[:, mask].double().sigmoid()
    return -(gate * gate.log() + (1 - gate) * (1 - gate).log()).mean(1), gate.mean(1)


def cross_entropy(outputs, labels):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_aux_loss_and_its_gradient_are_those_of_both_weighted_entropies_per_layer(tiny_model, progress):
    token_coef, load_coef, targets = 0.3, 0.7, torch.tensor([0.4, 0.5], dtype=torch.float64)
    model, ids = tiny_model(router_token_entropy_coef=token_coef, router_load_entropy_coef=load_coef), tokens(2, 30)
    model.set_sparsity_progress(progress)  # the loss aims at the final share throughout
    mask = left_padded(2, 30, 0, 13)
    labels = ids.masked_fill(mask == 0, -100)
    outputs = model.train()(ids, attention_mask=mask, labels=labels)
    rows, expected = [entropies(outputs, mask.bool() & (torch.arange(2) == row)[:, None]) for row in range(2)], 0.0
    for (entropy, mean), share in zip(rows, (29 / 46, 17 / 46), strict=True):  # a row's share of the targets
        entropy, mean = entropy[[0, 2]], mean[[0, 2]]
        divergence = targets * (targets / mean).log() + (1 - targets) * ((1 - targets) / (1 - mean)).log()
        expected = expected + share * (token_coef * entropy + load_coef * divergence).sum()
    torch.testing.assert_close(outputs.aux_loss.double(), expected, rtol=1e-5, atol=1e-6)
    weights = [router.weight for router in routers(model)]
    got, want = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (outputs.aux_loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    entropy = entropies(outputs, mask.bool())[0][[0, 2]]
    torch.testing.assert_close(outputs.router_entropy[[0, 2]].double(), entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs, labels) + outputs.aux_loss)
    outputs = model.eval()(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs, labels))


@readers
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_topk_routes_the_k_highest_tokens_of_a_row_and_no_padding(tiny_model, training, readers):
    model = tiny_model(router_mode="topk", sparsity_k=0.2, contextual_readers=readers).train(training)
    mask = left_padded(3, 50, 43)
    outputs = model(tokens(3, 50), attention_mask=mask)
    routed = outputs.router_mask
    assert routed.sum(-1).tolist() == [[7, 10, 10]] * 3 and not routed[:, mask == 0].any()
    lowest = outputs.router_scores.masked_fill(~routed, math.inf).amin(-1)
    highest = outputs.router_scores.masked_fill(routed, -math.inf).amax(-1)
    assert (lowest >= highest)[:, 1:].all()  # equal where the same token stands on both sides


def test_topk_refuses_generation_and_caches(tiny_model):
    model, ids = tiny_model(router_mode="topk"), tokens(1, 9)
    for call in (model.prefill, model.generate):
        with pytest.raises(ValueError, match="router_mode='threshold'"):
            call(ids)
    with pytest.raises(ValueError, match="topk"):
        model(ids, past_key_values=HSPMNCache(model.config))
    assert model(ids, use_cache=True).past_key_values is None


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
@pytest.mark.parametrize("variant", ["gated", "elu", "sinks"])
def test_low_precision_is_near_float32_and_the_router_stays_there(tiny_model, variant, cast):
    ids, model = tokens(2, 70), tiny_model(**VARIANTS[variant] | {"sparsity_k": 1.0})
    (expected, _), scores = feed(model, ids), [router.weight.clone() for router in routers(model)]
    model = model.to(torch.float16) if cast == "to" else getattr(model, cast)()
    for router, weight in zip(routers(model), scores, strict=True):
        assert {x.dtype for x in (router.weight, router.bias, router.target)} == {torch.float32}
        assert torch.equal(router.weight, weight)
    logits, _, _ = feed_cached(model, ids, (30, 31))
    assert logits.dtype == (torch.bfloat16 if cast == "bfloat16" else torch.float16)
    error = (logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 8 * torch.finfo(logits.dtype).eps


def test_router_scores_are_float32_under_autocast(tiny_model):
    model, ids = tiny_model(num_hidden_layers=1, sparsity_k=0.4).train(), tokens(2, 40)
    expected = model(ids).router_scores
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.router_scores.dtype == torch.float32
    torch.testing.assert_close(outputs.router_scores, expected)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", ["gated", "elu"])
def test_extreme_float16_activations_stay_finite(tiny_model, variant):
    model = tiny_model(**VARIANTS[variant], initializer_range=0.6).half()
    embeds = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0)).sign() * 2e4
    outputs = model(inputs_embeds=embeds.half())
    assert outputs.logits.isfinite().all() and outputs.router_scores.isfinite().all()


def test_overflowing_swiglu_gate_gives_zero_and_not_nan():
    swiglu = SwiGLU(8, 4).half()
    for p in swiglu.parameters():
        nn.init.ones_(p)
    x = torch.full((1, 1, 8), -3e4, dtype=torch.float16)  # the gate's sum is -inf in float16
    assert not F.silu(x @ swiglu.gate_proj.weight.T).isfinite().any()
    swiglu.up_proj.weight.data.zero_()
    assert not swiglu(x).any()


def test_labels_are_shifted_ignored_at_minus_100_and_divided_by_the_items_of_the_batch(tiny_model):
    model, ids = tiny_model(), tokens(2, 12)
    labels = ids.clone()
    labels[0, :7] = -100
    outputs = model(ids, labels=labels)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs, labels))
    part = model(ids, labels=labels, num_items_in_batch=torch.tensor(64)).loss
    torch.testing.assert_close(part, outputs.loss * 16 / 64)


def test_the_reference_of_the_loss_is_cross_entropy_with_its_gradients():
    logits = 4 * torch.randn(11, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = tokens(1, 11).flatten() % 31
    targets[4:6] = -100
    assert torch.autograd.gradcheck(token_losses, (logits.requires_grad_(), targets))
    assert torch.autograd.gradgradcheck(token_losses, (logits, targets))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = logits.detach().to(dtype).requires_grad_()
        expected = F.cross_entropy(x if dtype == torch.float64 else x.float(), targets, reduction="none")
        got = token_losses(x, targets)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(losses.square().sum(), x)[0] for losses in (got, expected)]
        torch.testing.assert_close(*grads)


def test_labels_of_other_tokens_than_those_of_the_logits_are_refused(tiny_model):
    model, ids = tiny_model(), tokens(2, 12)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=3)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    kept = model(ids, shift_labels=shifted[:, -3:], logits_to_keep=3)
    expected = F.cross_entropy(model(ids).logits[:, -3:].flatten(0, 1), shifted[:, -3:].flatten())
    torch.testing.assert_close(kept.loss, expected)


def test_a_loss_of_ones_own_takes_the_place_of_the_models(tiny_model):
    model, ids = tiny_model(), tokens(2, 12)
    model.loss_function = lambda logits, labels, *args, **kwargs: logits.sum() + labels.sum()
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.loss, outputs.logits.sum() + ids.sum())


def test_logits_are_kept_where_asked_for_and_a_tuple_begins_with_the_loss(tiny_model):
    model, ids = tiny_model(), tokens(2, 12)
    loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    assert loss.shape == () and isinstance(tiny_model(HSPMNModel)(ids, return_dict=False), tuple)
    for kept, columns in ((1, [11]), (3, [9, 10, 11]), (0, range(12)), (torch.tensor([2, 5]), [2, 5])):
        outputs = model(ids, logits_to_keep=kept)
        torch.testing.assert_close(outputs.logits, logits[:, list(columns)], rtol=0, atol=1e-6)


def test_hidden_states_are_embeddings_and_every_block(tiny_model):
    model, ids, mask = tiny_model(), tokens(2, 12), left_padded(2, 12, 4)
    embeds = model.get_input_embeddings()(ids)
    outputs = model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(outputs.logits, model(ids, attention_mask=mask).logits)
    assert len(outputs.hidden_states) == 4
    torch.testing.assert_close(outputs.hidden_states[0][mask == 1], embeds[mask == 1])
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert not outputs.last_hidden_state[mask == 0].any()
    expected = model.model.layers[1](outputs.hidden_states[1][1:])[0]
    torch.testing.assert_close(outputs.hidden_states[2][1:], expected, **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_as_configured_and_survive_saving(tiny_model, tmp_path, tied):
    model, ids = tiny_model(tie_word_embeddings=tied), tokens(2, 30)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    routers(model)[0].bias.fill_(0.123)
    model.set_sparsity_progress(0.5)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != tied
    assert "model.layers.0.router.bias" in names and not any("target" in name for name in names)
    loaded = HSPMNForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(feed(loaded, ids)[0], feed(model, ids)[0])
    torch.testing.assert_close(loaded.router_targets, torch.tensor([0.4, 0.5]))


IDS = tokens(2, 9)
BAD_INPUTS = [
    ("seq_idx", {"input_ids": IDS, "seq_idx": IDS[:, :8]}),
    ("seq_idx and position_ids", {"input_ids": IDS, "seq_idx": IDS // 30, "position_ids": torch.arange(9)[None]}),
    *(
        (f"cu_seq_lens_q and {other}", {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 9, 12, 18]), other: x})
        for other, x in (("position_ids", torch.arange(9)[None]), ("seq_idx", torch.zeros(2, 9)))
    ),
    ("cu_seq_lens_q", {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 9])}),
    ("cu_seq_lens_q", {"input_ids": IDS, "cu_seq_lens_q": IDS}),
    *(("attention_mask", {"input_ids": IDS, "attention_mask": torch.ones(s)}) for s in ((2, 8), (1, 9), (9,))),
    ("attention_mask", {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 9)}),
    *(("position_ids", {"input_ids": IDS, "position_ids": IDS.new_zeros(s)}) for s in ((2, 8), (3, 9), (9,))),
    ("position_ids", {"input_ids": IDS[:1, :1], "position_ids": IDS.new_zeros(1)}),
    ("position_ids", {"input_ids": IDS, "position_ids": IDS.new_zeros(2, 1, 9)}),
    ("input_ids and inputs_embeds", {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 32)}),
    ("input_ids and inputs_embeds", {}),
    ("input_ids", {"input_ids": IDS[0]}),
    *(("input_ids", {"input_ids": ids}) for ids in (IDS[:, :0], IDS[:0], IDS - 61, torch.full((1, 2), 61))),
    ("input_ids", {"inputs_embeds": torch.zeros(0, 9, 32)}),
    *(("labels", {"input_ids": IDS, "labels": IDS.clone().fill_(label)}) for label in (-1, 61)),
    ("past_key_values", {"input_ids": IDS, "past_key_values": DynamicCache()}),
    ("output_attentions", {"input_ids": IDS, "output_attentions": True}),
]


@pytest.mark.parametrize("name, inputs", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused_by_name(tiny_model, name, inputs):
    with pytest.raises(ValueError, match=name):
        tiny_model()(**inputs)


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("kind, shape", [(HSPMNForSequenceClassification, 2), (HSPMNForTokenClassification, (2, 9))])
def test_labels_of_no_class_are_refused_by_name(tiny_model, kind, shape, label):
    with pytest.raises(ValueError, match="labels must lie in"):
        tiny_model(kind, num_labels=3)(IDS, torch.ones_like(IDS), labels=IDS.new_ones(shape) * label)


@pytest.mark.parametrize("keep", [slice(6, 15), slice(0, 9)], ids=["left", "right"])
def test_sequence_classification_reads_the_last_real_token(tiny_model, keep):
    model, ids = tiny_model(HSPMNForSequenceClassification, num_labels=3, pad_token_id=0), tokens(2, 15)
    padded = ids.clone()
    padded[0, : keep.start], padded[0, keep.stop :] = 0, 0
    alone = torch.cat([model(ids[:1, keep]).logits, model(ids[1:]).logits])
    torch.testing.assert_close(model(padded, attention_mask=(padded != 0).long()).logits, alone, **CLOSE)
    ids[0, keep.start + 4] = padded[0, keep.start + 4] = 0  # the padding's id within the text, an end of text perhaps
    alone = torch.cat([model(ids[:1, keep]).logits, model(ids[1:]).logits])
    torch.testing.assert_close(model(padded).logits, alone, **CLOSE)  # the mask found through pad_token_id
    torch.testing.assert_close(model(padded[:1]).logits, alone[:1], **CLOSE)
    torch.testing.assert_close(model.score(model.model(ids).last_hidden_state[:, -1])[1:], alone[1:], **CLOSE)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id"):
        model(ids)


TAGS = (IDS % 4).masked_fill(IDS < 9, -100)
LABELS = [
    (HSPMNForSequenceClassification, 3, torch.tensor([0, 1]), F.cross_entropy),
    (HSPMNForSequenceClassification, 1, torch.tensor([0.1, 0.9]), lambda x, labels: F.mse_loss(x[:, 0], labels)),
    (HSPMNForTokenClassification, 4, TAGS, lambda x, labels: F.cross_entropy(x.mT, labels)),  # not shifted
]


@pytest.mark.parametrize("kind, classes, labels, loss", LABELS, ids=["classes", "regression", "tokens"])
def test_classification_losses_with_what_trainer_passes(tiny_model, kind, classes, labels, loss):
    model, inputs = tiny_model(kind, num_labels=classes), {"attention_mask": torch.ones_like(IDS), "labels": labels}
    outputs = model(IDS, **inputs)
    assert outputs.logits.shape == ((2, 9, classes) if labels.dim() == 2 else (2, classes))
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    labelled = (labels != -100).sum()
    torch.testing.assert_close(model(IDS, **inputs, num_items_in_batch=labelled).loss, outputs.loss)


WHOLE, LENGTHS = tokens(4, 20), torch.tensor([20, 6, 11, 3])
REAL = (torch.arange(20) < LENGTHS[:, None]).long()
TARGETS = [
    (HSPMNForCausalLM, {}, WHOLE.masked_fill(REAL == 0, -100), 36),
    (HSPMNForTokenClassification, {"num_labels": 3}, (WHOLE % 3).masked_fill(REAL == 0, -100), 40),
    (HSPMNForSequenceClassification, {"num_labels": 3}, torch.tensor([0, 2, 1, 0]), 4),
    (HSPMNForSequenceClassification, {"num_labels": 1}, torch.tensor([0.1, 0.9, 0.4, 3.0]), 4),
    (HSPMNForSequenceClassification, {"num_labels": 2}, torch.tensor([[0.0, 1.0]] * 4), 8),
]


@pytest.mark.parametrize("kind, options, labels, items", TARGETS, ids=["lm", "tokens", "class", "regression", "multi"])
def test_loss_and_gradients_do_not_depend_on_how_the_rows_of_a_step_are_cut(tiny_model, kind, options, labels, items):
    coefficients = {"router_load_entropy_coef": 10.0, "router_token_entropy_coef": 1.0}
    model = tiny_model(kind, capacity_factor=100.0, **coefficients, **options).train()
    outputs = model(WHOLE, attention_mask=REAL, labels=labels)
    outputs.loss.backward()
    expected = gradients(model)
    assert outputs.aux_loss > 0.1
    for cut in ([4], [1, 3], [1, 1, 1, 1]):
        model.zero_grad()
        total = 0.0
        for rows in torch.arange(4).split(cut):
            width = LENGTHS[rows].max()  # no more padding than the rows have among themselves
            part = labels[rows, :width] if labels.shape == WHOLE.shape else labels[rows]
            mask = REAL[rows, :width]
            loss = model(WHOLE[rows, :width], attention_mask=mask, labels=part, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(outputs.loss.item(), rel=1e-5)
        assert_same_gradients(model, expected, rtol=1e-3, atol=1e-5)


PACKED = {
    "seq_idx": torch.tensor([[0] * 9 + [1] * 4 + [2] * 7]),
    "cu_seq_lens_q": torch.tensor([0, 9, 13, 20], dtype=torch.int32),
}
HEADS = (HSPMNModel, HSPMNForCausalLM, HSPMNForSequenceClassification, HSPMNForTokenClassification)


@pytest.mark.parametrize("kind", HEADS)
def test_what_any_decoder_is_given_is_taken_and_a_misspelt_name_is_not(tiny_model, kind):
    model, ids = tiny_model(kind), tokens(1, 20)
    said = dict.fromkeys(("token_type_ids", "cache_position", "max_length_q", "max_length_k", "cu_seq_lens_k"), ids)
    said |= {"use_cache": False, "num_items_in_batch": torch.tensor(3), "tokenizer": object()}
    for extra in (said, {"position_ids": pack([9, 4, 7])}, *({name: x} for name, x in PACKED.items())):
        expected = model(ids, position_ids=None if extra is said else pack([9, 4, 7]), return_dict=False)[0]
        torch.testing.assert_close(model(ids, **extra, return_dict=False)[0], expected, **CLOSE)
    with pytest.raises(TypeError, match="'atention_mask'; did you mean 'attention_mask'"):
        model(ids, atention_mask=ids)
    with pytest.raises(ValueError, match="is_causal"):
        model(ids, is_causal=False)


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("said", ["return_seq_idx", "return_flash_attn_kwargs"])
def test_a_flattened_batch_is_its_documents_with_whatever_says_where_they_begin(tiny_model, positions, said):
    model, rows = tiny_model().train(), [{"input_ids": tokens(1, length, length)[0].tolist()} for length in (9, 1, 13)]
    batch = DataCollatorWithFlattening(return_position_ids=positions, **{said: True})(rows)
    assert torch.equal(model(**batch).loss, model(**DataCollatorWithFlattening()(rows)).loss)


def test_document_numbers_are_read_without_padding(tiny_model):
    model, mask = tiny_model(), left_padded(2, 20, 5)
    seq_idx, positions = torch.cat([torch.full((2, 12), 3), torch.full((2, 8), 4)], 1), pack([5, 7, 8], [12, 8])
    expected, _ = feed(model, tokens(2, 20), mask=mask, positions=positions)
    for position_ids in (None, positions):
        logits = model(tokens(2, 20), attention_mask=mask, seq_idx=seq_idx, position_ids=position_ids).logits
        torch.testing.assert_close(logits, expected)


def test_shifted_labels_stand_for_labels(tiny_model):
    model, ids = tiny_model().train(), tokens(2, 20)
    expected, shifted = model(ids, labels=ids).loss, F.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, shift_labels=shifted).loss, expected)
    assert torch.equal(model(ids, labels=ids.flip(1), shift_labels=shifted, num_items_in_batch=38).loss, expected)


def test_output_switches_of_the_config_act_as_in_the_call(tiny_model):
    ids = tokens(2, 9)
    for kind in HEADS:
        model = tiny_model(kind, output_hidden_states=True, return_dict=False, pad_token_id=0)
        outputs = model(ids)
        assert isinstance(outputs, tuple) and any(isinstance(x, tuple) and len(x) == 4 for x in outputs)
        assert model(ids, output_hidden_states=False, return_dict=True).hidden_states is None
    assert generate(tiny_model(return_dict=False), ids).shape == (2, 21)


def test_only_loss_and_logits_are_predictions(tiny_config):
    fields = set(HSPMNOutput.__dataclass_fields__)
    assert {*tiny_config().keys_to_ignore_at_inference, "loss", "logits"} == fields


@pytest.mark.parametrize("linear_attention", ["gated", "elu"])
def test_every_module_is_called_so_that_hooks_see_it(tiny_model, linear_attention):
    options = {"routed_intermediate_size": 8, "num_sink_tokens": 1, "linear_attention": linear_attention}
    model, ids, called = tiny_model(**options), tokens(2, 9), set()
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(ids)
    assert called == modules.keys()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_models_compute_the_same(tiny_model, tmp_path, place):
    model, ids = tiny_model(num_sink_tokens=1), tokens(2, 9)
    logits, made = model(ids).logits, generate(model, ids)
    options = {"execution_device": torch.device("cpu"), "offload_buffers": True}
    model = cpu_offload(model, **options) if place == "cpu" else disk_offload(model, tmp_path, **options)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(model(ids).logits, logits) and torch.equal(generate(model, ids), made)


def test_forward_names_its_inputs():
    """generate() and Trainer read the signature; what it does not name, they drop or never make."""
    cached = {"past_key_values", "use_cache"}
    wanted = {HSPMNModel: cached, HSPMNForCausalLM: cached}
    for kind in (*wanted, HSPMNForSequenceClassification, HSPMNForTokenClassification):
        names = {"input_ids", "attention_mask", "position_ids", "inputs_embeds"} | wanted.get(kind, set())
        assert names <= inspect.signature(kind.forward).parameters.keys(), kind


@readers
@pytest.mark.parametrize("kind, dtype, head", [
    ("auto", None, 32), ("auto", torch.bfloat16, 16), ("int8", None, 10), ("int4", None, 6),
])  # fmt: skip
def test_kv_bytes_per_token_is_what_the_cache_grows_by(tiny_model, kind, dtype, head, readers):
    """Keys and values of heads, a position id and, where every token reads, a log gate."""
    options = {"kv_cache_dtype": kind, "contextual_readers": readers}
    model = tiny_model(sparsity_k=[1.0, 0.0, 1.0], **options).to(dtype)
    _, _, cache = feed_cached(model, tokens(2, 40), (25,))
    stored = 0
    for layer in cache.layers:
        row = sum(getattr(layer, name)[0, 0].nbytes for name in layer.slot_tensors)
        stored += row * int(layer.count.sum())
    assert stored == model.kv_bytes_per_token() * 40 * 2
    slot = 2 * 2 * head + 4 + 4 * (readers == "all")
    assert tiny_model(sparsity_k=0.25, **options).kv_bytes_per_token(dtype) == 0.25 * 3 * slot


def count_flops(model, ids):
    with FlopCounterMode(display=False) as counter:
        feed(model, ids)
    return counter.get_total_flops()


@pytest.mark.parametrize("T", [64, 256])
def test_estimate_flops_is_within_a_tenth_of_what_torch_counts(tiny_model, T):
    """The reference scores whole blocks where the formula counts the visible half: a tenth at this width."""
    sizes = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 704, "vocab_size": 512}
    model = tiny_model(**sizes, sliding_window=16, sparsity_k=[1.0, 0.0, 1.0], routed_intermediate_size=96)
    counted, estimated = count_flops(model, torch.arange(T)[None] % 512), model.estimate_flops(T)
    assert estimated == pytest.approx(counted, rel=0.1)
    assert model.estimate_flops(T, batch_size=3) == 3 * estimated


@readers
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_estimate_flops_counts_routed_work_alone(tiny_model, readers, share):
    """Causal attention to routed tokens is half of what the reference multiplies; the projections do not change."""
    options = {"num_hidden_layers": 1, "router_mode": "topk", "contextual_readers": readers}
    model, reflexive = (tiny_model(sparsity_k=x, **options) for x in (share, 0.0))
    ids = tokens(1, 64)
    counted = count_flops(model, ids) - count_flops(reflexive, ids)
    router = 2 * 32 * 64  # the router's product is no matmul: torch counts none
    assert 2 * (model.estimate_flops(64) - reflexive.estimate_flops(64) - router) == counted


def test_resized_embeddings_train_and_keep_old_logits(tiny_model):
    model, ids = tiny_model(), tokens(2, 9)
    expected = model(ids).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == 70 and model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model(ids).logits[..., :61], expected)
    new_ids = ids.clone().fill_(69)
    assert model(new_ids, labels=new_ids).loss.isfinite()


@readers
def test_training_forward_may_return_a_cache_and_still_learn(tiny_model, readers):
    options = {"capacity_factor": 100.0, "router_bias_rate": 0.0, "contextual_readers": readers}
    model, ids = tiny_model(**options).train(), tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    outputs = model(ids, labels=ids, use_cache=True)
    outputs.loss.backward()
    assert outputs.past_key_values.get_seq_length() == 30
    assert_same_gradients(model, expected, rtol=1e-4, atol=1e-5)
