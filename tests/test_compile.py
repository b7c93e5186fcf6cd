"""torch.compile(fullgraph=True) on CPU: equal to eager, one graph, and none more as bias, target and step change."""

import pytest
import torch
from caches import left_padded, pack, tokens
from hspmn.operations_hspmn import FLEX_BLOCK, _block_mask
from torch._dynamo.utils import counters

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}
SIZES = {"num_hidden_layers": 2, "sparsity_k": [0.4, 0.0], "linear_attention_horizon": 6}
ONE_LAYER = {"num_hidden_layers": 1, "sparsity_k": 0.4}  # a code generator takes its time for every layer
KINDS = [
    {"linear_attention": "elu", "num_sink_tokens": 1},
    {"routed_intermediate_size": 16, "router_token_entropy_coef": 0.1, "router_load_entropy_coef": 0.1},
    {"router_mode": "topk"},
    {"sparsity_k": [1.0, 0.5], "sliding_window": 0, "conv_kernel_size": 1},
    {"contextual_readers": "all"},
]


def train_step(model, optimizer, ids):
    optimizer.zero_grad()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    optimizer.step()
    return outputs


# the graph alone takes no time for generated code
@pytest.mark.parametrize("backend, options", [("inductor", ONE_LAYER), *(("eager", x) for x in KINDS)])
def test_compiled_training_steps_equal_eager_without_recompiling(tiny_model, backend, options):
    """An eager twin trains beside it; recompiling as bias, target and step change is an error."""
    eager, model = tiny_model(**SIZES | options).train(), tiny_model(**SIZES | options).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (eager, model)]
    for i in range(3):
        for m in (eager, model):
            m.set_sparsity_progress(0.2 * i)
        ids = tokens(2, 33, seed=i)
        expected, outputs = train_step(eager, optimizers[0], ids), train_step(compiled, optimizers[1], ids)
        torch.testing.assert_close(outputs.loss, expected.loss, **ROUNDING)
        torch.testing.assert_close(outputs.router_load, expected.router_load, **ROUNDING)
        torch.compiler.set_stance("fail_on_recompile")
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, **ROUNDING, msg=name)
        torch.testing.assert_close(q.grad, p.grad, **ROUNDING, msg=name)
    bias, expected = (m.model.layers[0].router.bias for m in (model, eager))
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("backend, training, options", [
    ("eager", True, {}), ("eager", True, {"router_mode": "topk", "linear_attention": "elu"}), ("eager", False, {}),
    pytest.param("eager", True, {"contextual_readers": "all"}, marks=pytest.mark.slow),
    pytest.param("aot_eager", True, {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_symbolic_lengths_share_one_graph(tiny_model, backend, training, options):
    """Below, at and above a window and a chunk of the linear attention."""
    eager, model = (tiny_model(**ONE_LAYER | options).train(training) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for T in (24, 17, 4, 130, 128):
        ids = tokens(2, T)
        losses = [m(ids, labels=ids, use_cache=False).loss for m in (compiled, eager)]
        torch.testing.assert_close(*losses, **ROUNDING)
        if training:
            losses[0].backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@torch.no_grad()
def test_compiled_inference_equals_eager_without_recompiling(tiny_model):
    model = tiny_model(**ONE_LAYER)
    compiled = torch.compile(model, fullgraph=True)
    for i in range(3):
        model.model.layers[0].router.bias.fill_(0.3 * i - 0.3)
        outputs, expected = (m(tokens(2, 33, seed=i), use_cache=False) for m in (compiled, model))
        torch.testing.assert_close(outputs.logits, expected.logits, **ROUNDING)
        assert torch.equal(outputs.router_mask, expected.router_mask)
        torch.compiler.set_stance("fail_on_recompile")
    assert counters["stats"]["unique_graphs"] == 1


def test_padding_and_packing_compile_to_one_graph_each(tiny_model):
    model = tiny_model(**SIZES, router_bias_rate=0.0).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    packed = {"position_ids": pack([12, 21], [12, 21]), "seq_idx": (torch.arange(33) >= 12).expand(2, 33).int()}
    for inputs in ({"attention_mask": left_padded(2, 33, 9)}, packed):
        got, expected = (m(tokens(2, 33), **inputs).logits for m in (compiled, model))
        torch.testing.assert_close(got, expected, **ROUNDING)
    assert counters["stats"]["unique_graphs"] == 2


def test_gradient_checkpointing_compiles_to_one_graph(tiny_model):
    plain, model = tiny_model(**SIZES).train(), tiny_model(**SIZES).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 33)
    plain(ids, labels=ids).loss.backward()
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    assert torch.equal(model.model.layers[0].router.bias, plain.model.layers[0].router.bias)
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **ROUNDING, msg=name)


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
        mask = _block_mask(used_BN, index_BNM, full_BN, index_BNM, lambda b, h, query, key: key <= query, (1024, 1024))
        tensors = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
        return [see_strides(x) for x in tensors]

    SEEN_STRIDES.clear()
    counts, _, full_counts, _ = blocks(torch.tensor([1024, 300, 0]))
    assert SEEN_STRIDES == [(8, 8, 1), (64, 64, 8, 1)] * 2
    assert counts.sum((1, 2)).tolist() == [8, 3, 0] and full_counts.sum((1, 2)).tolist() == [28, 3, 0]
