"""torch.compile(fullgraph=True) on CPU: equal to eager, one graph, and none more as bias, target and step change."""

import pytest
import torch
from hspmn.operations_hspmn import FLEX_BLOCK, _block_mask
from torch._dynamo.utils import counters

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
SIZES = {"num_hidden_layers": 2, "sparsity_k": [0.4, 0.0], "linear_attention_horizon": 6}
ONE_LAYER = {"num_hidden_layers": 1, "sparsity_k": 0.4}  # a code generator takes its time for every layer


def tokens(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def step(model, optimizer, ids):
    optimizer.zero_grad()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    optimizer.step()
    return outputs


def assert_same_training(tiny_model, compiled_steps, backend, **options):
    """Train a compiled model and an eager twin side by side; recompiling is an error after the first step."""
    eager, model = tiny_model(**SIZES | options).train(), tiny_model(**SIZES | options).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (eager, model)]
    for i in range(compiled_steps):
        for m in (eager, model):
            m.set_sparsity_progress(0.2 * i)
        ids = tokens(2, 33, seed=i)
        expected, outputs = step(eager, optimizers[0], ids), step(compiled, optimizers[1], ids)
        torch.testing.assert_close(outputs.loss, expected.loss, **CLOSE)
        torch.testing.assert_close(outputs.router_load, expected.router_load, **CLOSE)
        torch.compiler.set_stance("fail_on_recompile")
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, **CLOSE, msg=name)
        torch.testing.assert_close(q.grad, p.grad, **CLOSE, msg=name)
    bias, expected = (m.model.layers[0].router.bias for m in (model, eager))
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    return model


def test_compiled_training_steps_equal_eager_without_recompiling(tiny_model):
    start = tiny_model(**ONE_LAYER).model.layers[0].router.bias
    model = assert_same_training(tiny_model, 4, "inductor", **ONE_LAYER)
    assert not torch.equal(model.model.layers[0].router.bias, start)


def test_compiled_inference_equals_eager_without_recompiling(tiny_model):
    model = tiny_model(**ONE_LAYER)
    compiled = torch.compile(model, fullgraph=True)
    for i in range(3):
        model.model.layers[0].router.bias.fill_(0.3 * i - 0.3)
        ids = tokens(2, 33, seed=i)
        with torch.no_grad():
            outputs, expected = (m(ids, use_cache=False) for m in (compiled, model))
        torch.testing.assert_close(outputs.logits, expected.logits, **CLOSE)
        assert torch.equal(outputs.router_mask, expected.router_mask)
        torch.compiler.set_stance("fail_on_recompile")
    assert counters["stats"]["unique_graphs"] == 1


# The graph alone, without the time of a code generator
@pytest.mark.parametrize(
    "options",
    [
        {"linear_attention": "elu", "num_sink_tokens": 1},
        {"routed_intermediate_size": 16, "router_token_entropy_coef": 0.1, "router_load_entropy_coef": 0.1},
        {"router_mode": "topk"},
        {"sparsity_k": [1.0, 0.5], "sliding_window": 0, "conv_kernel_size": 1},
    ],
    ids=["elu_sinks", "routed_mlp_entropies", "topk", "dense_layer_bare"],
)
def test_every_kind_of_layer_trains_in_one_graph(tiny_model, options):
    assert_same_training(tiny_model, 3, "eager", **options)


def test_padding_and_packing_compile_to_one_graph_each(tiny_model):
    model = tiny_model(**SIZES).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, :9] = 0
    positions = torch.cat([torch.arange(12), torch.arange(21)]).expand(2, 33)
    for inputs in ({"attention_mask": mask}, {"position_ids": positions}):
        bias = model.model.layers[0].router.bias.clone()
        expected = model(tokens(2, 33), **inputs).logits
        model.model.layers[0].router.bias.copy_(bias)
        torch.testing.assert_close(compiled(tokens(2, 33), **inputs).logits, expected, **CLOSE)
    assert counters["stats"]["unique_graphs"] == 2


def test_gradient_checkpointing_compiles_to_one_graph(tiny_model):
    plain, model = tiny_model(**SIZES).train(), tiny_model(**SIZES).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 33)
    plain(ids, labels=ids).loss.backward()
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    assert torch.equal(model.model.layers[0].router.bias, plain.model.layers[0].router.bias)
    for (name, p), q in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, **CLOSE, msg=name)


SEEN_STRIDES = []


# the tag lets inductor pass its own layout on, as it does to FlexAttention's kernels
@torch.library.custom_op("hspmn_tests::see_strides", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def see_strides(x: torch.Tensor) -> torch.Tensor:
    SEEN_STRIDES.append(x.stride())
    return x.clone()


@see_strides.register_fake
def _(x):
    return torch.empty_like(x)


@torch.no_grad()
def test_block_masks_are_row_major_in_compiled_inference():
    """FlexAttention's kernels read them so; what inductor lays out itself was read at wrong rows, some yet to come."""

    @torch.compile(fullgraph=True)
    def blocks(count_B):
        block_N = torch.arange(8)
        used_BN = block_N * FLEX_BLOCK < count_B[:, None]
        full_BN = torch.where(used_BN, block_N, 0)
        index_BNM = block_N.expand(3, 8, 8)
        mask = _block_mask(used_BN, index_BNM, full_BN, index_BNM, lambda b, h, query, key: key <= query, 1024)
        tensors = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
        return [see_strides(x) for x in tensors]

    SEEN_STRIDES.clear()
    counts, _, full_counts, _ = blocks(torch.tensor([1024, 300, 0]))
    assert SEEN_STRIDES == [(8, 8, 1), (64, 64, 8, 1)] * 2
    assert counts.sum((1, 2)).tolist() == [8, 3, 0] and full_counts.sum((1, 2)).tolist() == [28, 3, 0]
