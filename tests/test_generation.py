"""generate(): every way of decoding gives what uncached decoding gives."""

import pytest
import torch
from hspmn import modeling_hspmn
from hspmn.cache_hspmn import HSPMNCache
from transformers.generation import BaseStreamer
from transformers.utils import logging

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}


def tokens(B, T, seed=0):
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["gated", "elu", "sinks"])
def model(tiny_model, request):
    options = {"gated": {}, "elu": {"linear_attention": "elu"}, "sinks": {"num_sink_tokens": 2}}
    return tiny_model(**options[request.param])


def generate(model, ids, **kwargs):
    return model.generate(ids, **GREEDY | kwargs)


def test_greedy_with_cache_equals_without(model):
    ids, options = tokens(2, 20), {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (generate(model, ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert cached.sequences.shape == (2, 32)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=1e-4)
    assert type(cached.past_key_values) is HSPMNCache and cached.past_key_values.get_seq_length() == 31


def test_greedy_is_the_argmax_of_a_plain_forward(model):
    ids = tokens(1, 20)
    for _ in range(12):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:, 1:].argmax(-1) + 1], 1)
    assert torch.equal(generate(model, tokens(1, 20)), ids)


def test_sampling_with_a_seed_is_the_same_with_and_without_cache(model):
    sequences = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        sequences.append(generate(model, tokens(2, 20), do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(*sequences)
    torch.manual_seed(4)
    assert not torch.equal(sequences[0], generate(model, tokens(2, 20), do_sample=True, top_k=0))


def test_beams_with_cache_equal_beams_without(model):
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    cached, uncached = (generate(model, tokens(2, 20), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=0, atol=1e-4)
    assert len(cached.sequences.unique(dim=0)) == 6
    assert not torch.equal(cached.sequences[::3], generate(model, tokens(2, 20)))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_left_padded_rows_equal_rows_alone(model, num_beams, use_cache):
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :13] = 0
    mask[1, :1] = 0
    ids[mask == 0] = 0
    batch = generate(model, ids, attention_mask=mask, num_beams=num_beams, use_cache=use_cache)
    for row, real in enumerate(mask.bool()):
        alone = generate(model, ids[row : row + 1, real], num_beams=num_beams)
        assert torch.equal(batch[row, 20:], alone[0, real.sum() :])


@pytest.mark.parametrize("size", [1, 7, 20, 64])
def test_chunked_prefill_generates_the_same(model, size):
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = 0
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=size), expected)


@pytest.fixture
def pieces(model):
    """Tokens per row of every call of the model, in order."""
    lengths = []

    def note(module, args, kwargs):
        lengths.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    return lengths


def test_generate_reads_long_prompts_in_pieces(model, pieces, monkeypatch):
    expected = generate(model, tokens(2, 20))
    assert pieces == [20, *[1] * 11]  # all of it fits the memory
    monkeypatch.setattr(type(model), "piece_size", lambda self, rows: 6)
    pieces.clear()
    assert torch.equal(generate(model, tokens(2, 20)), expected)
    assert pieces == [2, 6, 6, 6, *[1] * 11]
    pieces.clear()
    assert torch.equal(generate(model, tokens(2, 20), prefill_chunk_size=15), expected)
    assert pieces == [5, 15, *[1] * 11]


def test_a_long_turn_continues_a_cache_in_pieces(model, pieces):
    first = generate(model, tokens(2, 20), max_new_tokens=5, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens(2, 30, seed=1)], 1)
    mask, expected = torch.ones_like(turn), generate(model, turn)
    pieces.clear()
    continued = generate(model, turn, past_key_values=first.past_key_values, attention_mask=mask, prefill_chunk_size=9)
    assert torch.equal(continued, expected) and pieces == [4, 9, 9, 9, *[1] * 11]


@pytest.mark.parametrize("size", [1, 7, 20, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_gives_what_one_call_gives(model, pieces, size, padded):
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, : 9 if padded else 0] = 0
    expected = model(ids, attention_mask=mask)
    pieces.clear()
    outputs = model.prefill(ids, mask if padded else None, chunk_size=size)
    assert len(pieces) == -(-20 // size) and max(pieces) == min(size, 20) == pieces[-1]
    torch.testing.assert_close(outputs.logits, expected.logits[:, -1:], rtol=0, atol=1e-4)
    assert not outputs.logits.requires_grad and outputs.past_key_values.get_seq_length() == 20
    step, mask = tokens(2, 1, seed=1), torch.cat([mask, mask[:, -1:]], 1)
    want = model(torch.cat([ids, step], 1), attention_mask=mask, use_cache=False).logits[:, -1:]
    with torch.no_grad():
        got = model(step, attention_mask=mask, past_key_values=outputs.past_key_values).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_prefill_continues_a_cache_and_keeps_the_logits_asked_for(model):
    ids = tokens(2, 50)
    packed = torch.cat([torch.arange(23), torch.arange(27)])[None]
    with torch.no_grad():
        cache = model(ids[:, :11], position_ids=packed[:, :11]).past_key_values
    outputs = model.prefill(
        ids[:, 11:], past_key_values=cache, chunk_size=8, logits_to_keep=8, position_ids=packed[:, 11:]
    )
    assert outputs.past_key_values is cache
    expected = model(ids, position_ids=packed, use_cache=False).logits[:, -8:]
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"chunk_size": 0}, {"logits_to_keep": 0}, {"logits_to_keep": 9, "chunk_size": 8}], ids=str
)
def test_prefill_refuses_sizes_by_name(model, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        model.prefill(tokens(1, 20), **options)


def test_prefill_shows_its_progress_when_it_takes_long(model, capsys, monkeypatch):
    logging.enable_progress_bar()  # the scripts turn it off, and other tests run them in this process
    shown = []
    for delay in (modeling_hspmn.BAR_DELAY, 0.0):
        monkeypatch.setattr(modeling_hspmn, "BAR_DELAY", delay)
        for progress in (None, False, True):
            model.prefill(tokens(1, 20), chunk_size=1, progress=progress)
            shown.append("prefill" in capsys.readouterr().err)
    assert shown == [False, False, True, True, False, True]


def test_prefill_and_generate_refuse_a_router_that_looks_ahead(tiny_model):
    model = tiny_model(router_mode="topk")
    for call in (model.prefill, model.generate):
        with pytest.raises(ValueError, match="router_mode='threshold'"):
            call(tokens(1, 20))


def test_generation_continues_from_a_returned_cache(model):
    ids = tokens(2, 20)
    first = generate(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens(2, 6, seed=1)], 1)
    continued = generate(model, turn, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(model, turn))


def test_generation_continues_from_the_cache_of_a_forward(model):
    ids = tokens(2, 20)
    cache = model(ids[:, :15]).past_key_values
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))
    assert cache.get_seq_length() == 31


def test_padding_is_found_through_the_pad_token(model):
    ids = tokens(2, 20)
    ids[0, :6] = 0
    assert torch.equal(generate(model, ids)[0, 20:], generate(model, ids[:1, 6:])[0, 14:])


def test_left_padded_batch_continues_from_a_returned_cache(model):
    ids, mask = tokens(2, 20), torch.ones(2, 31, dtype=torch.long)
    mask[0, :8] = 0
    ids[0, :8] = 0
    first = generate(model, ids, attention_mask=mask[:, :20], max_new_tokens=5, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens(2, 6, seed=1)], 1)
    continued = generate(model, turn, attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(model, turn, attention_mask=mask))


def test_several_sequences_per_prompt(model):
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    sequences = generate(model, tokens(2, 20), **options)
    torch.manual_seed(0)
    assert torch.equal(sequences, generate(model, tokens(2, 20), use_cache=False, **options))
    assert sequences.shape == (6, 32) and len(sequences.unique(dim=0)) == 6


def test_generation_from_embeddings(model):
    ids = tokens(2, 20)
    new = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(new, generate(model, ids)[:, 20:])


def test_end_of_text_stops_a_row_and_pads_it(model):
    ids = tokens(2, 20)
    free = generate(model, ids)
    end = free[0, 22].item()
    stopped = generate(model, ids, eos_token_id=end)
    first = free[0, 20:].tolist().index(end) + 21
    assert torch.equal(stopped[0, :first], free[0, :first])
    assert not stopped[0, first:].any()


class Recorder(BaseStreamer):
    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streaming_delivers_every_token_in_order(model):
    streamer = Recorder()
    sequence = generate(model, tokens(1, 20), streamer=streamer)
    assert streamer.ended and streamer.received == sequence[0].tolist()


def test_assisted_decoding_is_refused_because_the_state_cannot_be_rewound(model):
    with pytest.raises(ValueError, match="stateful"):
        generate(model, tokens(1, 20), assistant_model=model)
    with pytest.raises(ValueError, match="stateful"):
        generate(model, tokens(1, 20), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("implementation", ["quantized", "offloaded"])
def test_other_cache_implementations_are_refused_by_name(model, implementation):
    with pytest.raises(ValueError, match=f"cache_implementation.*{implementation}"):
        generate(model, tokens(1, 20), cache_implementation=implementation)
