"""What tests of models and caches share: inputs, how a model is fed, what a cache holds, and how its rows move."""

import pytest
import torch
from hspmn.cache_hspmn import HSPMNStaticCache

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
CLOSE = {"rtol": 0, "atol": 1e-4}  # logits have a deviation of about 1
VARIANTS = {  # every feature of a block, in as few models as tell them apart
    "gated": {},
    "elu": {"linear_attention": "elu"},
    "sinks": {"num_sink_tokens": 2, "routed_intermediate_size": 24, "linear_attention_horizon": 6},
    "dense": {"sparsity_k": [1.0, 0.0, 0.3], "num_key_value_heads": 4, "router_initial_tokens": 6},
    "all": {"contextual_readers": "all", "router_initial_tokens": 2},
    "reflexive": {"sparsity_k": 0.0},
    "bare": {"sliding_window": 0, "conv_kernel_size": 1, "linear_attention": "elu", "sparsity_k": 0.3},
}
# By name: the call that moves rows of a cache of three, and the old row that each new one is
MOVES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select_list": (lambda cache: cache.batch_select_indices([0, 2]), [0, 2]),
    "select_mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
}


def tokens(B, T, seed=0):
    """Ids of the tiny models but for 0, the padding."""
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def pack(*rows):
    """Position ids of rows that are packed with documents of the given lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])


def left_padded(B, T, *padding):
    """Mask of `B` rows, the first of which begin with so much padding."""
    return (torch.arange(T) >= torch.tensor([*padding, *[0] * (B - len(padding))])[:, None]).long()


def generate(model, ids, **options):
    """Twelve tokens, greedily, none of them the padding."""
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}
    return model.generate(ids, **greedy | options)


def static_cache(model, B=3, length=40, **options):
    return HSPMNStaticCache(model.config, B, length, device=model.device, dtype=model.dtype, **options)


@torch.no_grad()
def feed(model, ids, cache=None, lengths=None, mask=None, positions=None):
    """Logits and routed tokens of `ids`, fed to `cache` in pieces of the given lengths, or to none in one."""
    outputs, end = [], 0
    for piece in ids.split(lengths or ids.shape[1], 1):
        begin, end = end, end + piece.shape[1]
        padding = None if mask is None else mask[:, :end]
        places = None if positions is None else positions[:, begin:end]
        options = {"past_key_values": cache, "use_cache": cache is not None}
        outputs.append(model(piece, attention_mask=padding, position_ids=places, **options))
    return torch.cat([x.logits for x in outputs], 1), torch.cat([x.router_mask for x in outputs], 2)


def every_tensor(cache):
    """By name, those of a layer after its number."""
    holders = {"": cache} | {f"{i}.": layer for i, layer in enumerate(cache.layers)}
    named = {k + name: getattr(holder, name) for k, holder in holders.items() for name in holder._batched}
    return named | {"columns": torch.as_tensor(cache.columns)}


def addresses(cache):
    held = every_tensor(cache).items()  # where `columns` of a growing one is a number made a tensor
    return {name: x.data_ptr() for name, x in held if x.numel() and (name != "columns" or cache.static)}


def used(cache):
    """Every tensor by name, sparse slots only as far as a row uses them."""
    found = every_tensor(cache)
    for i, layer in enumerate(cache.layers):
        for name in layer.slot_tensors:
            kept = found.pop(f"{i}.{name}")
            found |= {f"{i}.{name}.{row}": kept[row, :slots] for row, slots in enumerate(layer.count.tolist())}
    return found


def assert_same(cache, other):
    expected = used(other)
    assert used(cache).keys() == expected.keys()
    for name, value in used(cache).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
