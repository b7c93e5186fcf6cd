"""`generate` and `prefill`: every way of reading and decoding gives what uncached decoding gives."""

import copy
from types import SimpleNamespace

import pytest
import torch
from caches import CLOSE, feed, generate, left_padded, pack, static_cache, tokens
from hspmn import modeling_hspmn
from hspmn.cache_hspmn import HSPMNCache, HSPMNStaticCache
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

MODELS = {"sinks": {"num_sink_tokens": 2}, "elu": {"linear_attention": "elu"}, "all": {"contextual_readers": "all"}}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(tiny_model, request):
    return tiny_model(**request.param)


@pytest.fixture
def pieces(model):
    """Tokens per row of every call of the model, in order."""
    lengths = []

    def note(module, args, kwargs):
        lengths.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    return lengths


def padded(B, T, padding):
    """Ids and mask of rows of which the first begins with so much padding."""
    mask = left_padded(B, T, padding)
    return tokens(B, T) * mask, mask


def test_greedy_from_ids_and_embeddings_is_the_argmax_of_a_plain_forward(model):
    ids, logits, options = tokens(2, 20), [], {"output_logits": True, "return_dict_in_generate": True}
    for _ in range(12):
        logits.append(feed(model, ids)[0][:, -1])
        ids = torch.cat([ids, logits[-1][:, None, 1:].argmax(-1) + 1], 1)
    for use_cache in (True, False):
        outputs = generate(model, tokens(2, 20), use_cache=use_cache, **options)
        assert torch.equal(outputs.sequences, ids)
        torch.testing.assert_close(torch.stack(outputs.logits), torch.stack(logits), **CLOSE)
        cache = outputs.past_key_values
        assert (type(cache) is HSPMNCache and cache.get_seq_length() == 31) if use_cache else cache is None
    embeds = model.get_input_embeddings()(tokens(2, 20))
    assert torch.equal(generate(model, None, inputs_embeds=embeds), ids[:, 20:])


def test_sampling_with_a_seed_is_the_same_with_and_without_cache(model):
    sequences = []
    for seed, use_cache in ((3, True), (3, False), (4, True)):
        torch.manual_seed(seed)
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "use_cache": use_cache}
        sequences.append(generate(model, tokens(2, 20), **options))
    assert torch.equal(sequences[0], sequences[1]) and not torch.equal(sequences[0], sequences[2])
    assert sequences[0].shape == (6, 32) and len(sequences[0].unique(dim=0)) == 6


def test_beams_with_cache_equal_beams_without(model):
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    cached, uncached = (generate(model, tokens(2, 20), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, **CLOSE)
    assert len(cached.sequences.unique(dim=0)) == 6
    assert not torch.equal(cached.sequences[::3], generate(model, tokens(2, 20)))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("options, kind", [
    ({}, HSPMNCache), ({"use_cache": False}, type(None)),
    ({"cache_implementation": "static", "prefill_chunk_size": 7}, HSPMNStaticCache),
])  # fmt: skip
def test_left_padded_rows_equal_rows_alone(model, options, kind, num_beams):
    (ids, mask), beams = padded(2, 20, 13), {"num_beams": num_beams}
    options = options | beams
    batch = generate(model, ids, attention_mask=mask, return_dict_in_generate=True, **options)
    assert type(batch.past_key_values) is kind
    assert torch.equal(generate(model, ids, **options), batch.sequences)  # padding is found through the pad token
    for row, real in enumerate(mask.bool()):
        alone = generate(model, ids[row : row + 1, real], **beams)
        assert torch.equal(batch.sequences[row, 20:], alone[0, real.sum() :])


def test_end_of_text_stops_a_row_and_pads_it(model):
    free = generate(model, tokens(2, 20))
    end = free[0, 22].item()
    stopped = generate(model, tokens(2, 20), eos_token_id=end)
    first = free[0, 20:].tolist().index(end) + 21
    assert torch.equal(stopped[0, :first], free[0, :first]) and not stopped[0, first:].any()


def test_streaming_delivers_every_token_in_order(model):
    received = []
    streamer = SimpleNamespace(put=lambda ids: received.extend(ids.flatten()), end=lambda: received.append("end"))
    assert [*generate(model, tokens(1, 20), streamer=streamer)[0], "end"] == received


@pytest.mark.parametrize("options, message", [
    ({"prompt_lookup_num_tokens": 3, "cache_implementation": "static"}, "Static cache"),
    *(({"cache_implementation": kind}, f"cache_implementation.*{kind}") for kind in ("quantized", "offloaded")),
], ids=str)  # fmt: skip
def test_what_cannot_decode_is_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokens(1, 20), **options)


@pytest.mark.parametrize("size, read", [(None, [2, 6, 6, 6]), (15, [5, 15]), (1, [1] * 20), (20, [20]), (64, [20])])
def test_generate_reads_a_prompt_in_pieces(model, pieces, monkeypatch, size, read):
    ids, mask = padded(2, 20, 9)
    expected = generate(model, ids, attention_mask=mask)
    assert pieces == [20, *[1] * 11]  # at once, while memory is free
    monkeypatch.setattr(model, "piece_size", lambda rows: 6)
    pieces.clear()
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=size), expected)
    assert pieces == [*read, *[1] * 11]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_prefill_gives_what_one_call_gives(model, pieces, size):
    ids, mask = padded(2, 21, 9)
    outputs = model.prefill(ids[:, :20], mask[:, :20], chunk_size=size)
    assert len(pieces) == -(-20 // size) and max(pieces) == min(size, 20) == pieces[-1]
    assert not outputs.logits.requires_grad and outputs.past_key_values.get_seq_length() == 20
    with torch.no_grad():
        step = model(ids[:, 20:], attention_mask=mask, past_key_values=outputs.past_key_values)
    expected = feed(model, ids, mask=mask)[0][:, -2:]
    torch.testing.assert_close(torch.cat([outputs.logits, step.logits], 1), expected, **CLOSE)


def test_prefill_continues_a_cache_and_keeps_the_logits_asked_for(model):
    ids, packed = tokens(2, 50), pack([23, 27])
    with torch.no_grad():
        cache = model(ids[:, :11], position_ids=packed[:, :11]).past_key_values
    options = {"past_key_values": cache, "chunk_size": 8, "logits_to_keep": 8, "position_ids": packed[:, 11:]}
    outputs = model.prefill(ids[:, 11:], **options)
    assert outputs.past_key_values is cache
    torch.testing.assert_close(outputs.logits, feed(model, ids, positions=packed)[0][:, -8:], **CLOSE)


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"logits_to_keep": 0}, {"logits_to_keep": 9, "chunk_size": 8}])
def test_prefill_refuses_sizes_by_name(tiny_model, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        tiny_model().prefill(tokens(1, 20), **options)


def test_prefill_shows_its_progress_when_it_takes_long(tiny_model, capsys, monkeypatch):
    model = tiny_model()
    logging.enable_progress_bar()  # the scripts turn it off, and other tests run them in this process
    shown = []
    for delay in (modeling_hspmn.BAR_DELAY, 0.0):
        monkeypatch.setattr(modeling_hspmn, "BAR_DELAY", delay)
        for progress in (None, False, True):
            model.prefill(tokens(1, 20), chunk_size=1, progress=progress)
            shown.append("prefill" in capsys.readouterr().err)
    assert shown == [False, False, True, True, False, True]


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("padding", [0, 8])
def test_generation_continues_from_a_returned_cache(model, pieces, size, padding):
    ids, mask = padded(2, 20, padding)
    first = generate(model, ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens(2, 30, seed=1)], 1)
    mask = torch.cat([mask, torch.ones(2, 35, dtype=torch.long)], 1)
    expected = generate(model, turn, attention_mask=mask)
    pieces.clear()
    given = {"attention_mask": mask} if padding else {}  # all ones: not needed
    options = given | {"past_key_values": first.past_key_values, "prefill_chunk_size": size}
    assert torch.equal(generate(model, turn, **options), expected)
    assert pieces == [*([31] if size is None else [4, 9, 9, 9]), *[1] * 11]


@pytest.fixture
def llama():
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).eval()


@pytest.mark.parametrize("kind", ["lookup", "llama", "smaller", "itself", "static", "padded", "placed"])
def test_assisted_decoding_gives_the_tokens_of_plain_greedy_decoding(model, tiny_model, llama, pieces, kind):
    ids, options = tokens(1, 12).repeat(1, 2), {"prompt_lookup_num_tokens": 4}
    expected = generate(model, ids, max_new_tokens=24)
    if kind in ("llama", "smaller", "itself"):
        smaller = tiny_model(num_hidden_layers=1, sparsity_k=0.4)
        options = {"assistant_model": {"llama": llama, "smaller": smaller, "itself": model}[kind]}
    elif kind == "static":
        options["past_key_values"] = static_cache(model, B=1, length=60)
    elif kind == "padded":
        ids[:, :3] = 0
        options["attention_mask"] = left_padded(1, 24, 3)
        expected = generate(model, ids, attention_mask=options["attention_mask"], max_new_tokens=24)
    elif kind == "placed":
        options["position_ids"] = torch.arange(24)[None]
    pieces.clear()
    outputs = generate(model, ids, max_new_tokens=24, return_dict_in_generate=True, **options)
    assert torch.equal(outputs.sequences, expected)
    assert pieces[0] == 23 and max(pieces[1:]) > 1  # the prompt is read once
    more, cache = torch.cat([expected, tokens(1, 5)], 1), outputs.past_key_values
    assert cache.get_seq_length() == 47 and cache.rollback == 0
    given = {"attention_mask": left_padded(1, 53, 3)} if kind == "padded" else {}
    assert torch.equal(generate(model, more, past_key_values=cache, **given), generate(model, more, **given))


def test_an_hspmn_model_drafts_for_another_and_sampling_runs(model, llama):
    ids = tokens(1, 24)
    assert torch.equal(generate(llama, ids, assistant_model=model), generate(llama, ids))
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assert generate(model, ids, do_sample=True, **options).shape == (1, 36)


def test_one_prefix_serves_many_requests(model):
    prefix = tokens(1, 20)
    stored = model(prefix).past_key_values  # while gradients are recorded, as often happens
    for seed, options in ((1, {}), (2, {"prompt_lookup_num_tokens": 3}), (1, {})):
        request = torch.cat([prefix, tokens(1, 6, seed)], 1)
        got = generate(model, request, past_key_values=copy.deepcopy(stored), **options)
        assert torch.equal(got, generate(model, request))
    assert stored.get_seq_length() == 20
