"""What a cache holds, by name, whether two caches hold the same, how they are filled and how their rows move."""

import torch
from hspmn.cache_hspmn import HSPMNStaticCache

# By name: the call that moves rows of a cache of three, and the old row that each new one is
MOVES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select_list": (lambda cache: cache.batch_select_indices([0, 2]), [0, 2]),
    "select_mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
}


def static_cache(model, B=3, length=40, **options):
    return HSPMNStaticCache(model.config, B, length, device=model.device, dtype=model.dtype, **options)


def feed(model, ids, cache, lengths, mask=None, positions=None):
    """Logits and routed tokens of `ids` fed to `cache` in pieces of the given lengths."""
    outputs, end = [], 0
    for piece in ids.split(lengths, 1):
        begin, end = end, end + piece.shape[1]
        outputs.append(
            model(
                piece,
                attention_mask=None if mask is None else mask[:, begin:end],
                position_ids=None if positions is None else positions[:, begin:end],
                past_key_values=cache,
            )
        )
    return torch.cat([x.logits for x in outputs], 1), torch.cat([x.router_mask for x in outputs], 2)


def holders(cache):
    return {"": cache} | {f"{i}.": layer for i, layer in enumerate(cache.layers)}


def every_tensor(cache):
    named = {k + name: getattr(holder, name) for k, holder in holders(cache).items() for name in holder._batched}
    return named | {"columns": torch.as_tensor(cache.columns)}


def used(cache):
    """Every tensor by name, sparse slots only as far as a row uses them."""
    found = {}
    for name, x in every_tensor(cache).items():
        layer = holders(cache)[f"{name.split('.')[0]}."] if "." in name else None
        if layer is not None and name.split(".")[1] in layer.slot_tensors:
            found |= {f"{name}.{row}": x[row, :slots] for row, slots in enumerate(layer.count.tolist())}
        else:
            found[name] = x
    return found


def assert_same(cache, other):
    expected = used(other)
    assert used(cache).keys() == expected.keys()
    for name, value in used(cache).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
