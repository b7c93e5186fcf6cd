"""What a cache holds, by name, and whether two caches hold the same."""

import torch


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
        if name.split(".")[-1] in ("keys", "values", "positions"):
            found |= {f"{name}.{row}": x[row, :slots] for row, slots in enumerate(layer.count.tolist())}
        else:
            found[name] = x
    return found


def assert_same(cache, other):
    expected = used(other)
    assert used(cache).keys() == expected.keys()
    for name, value in used(cache).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
