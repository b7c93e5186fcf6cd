"""`benchmark.py` in its tiny CPU settings: what its files hold, what it refuses, and what must not be timed."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from caches import needs_gpu
from hspmn import benchmark
from hspmn.benchmarks import blocks, cases, context, timing, training
from hspmn.operations_hspmn import REGISTRY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

needs_interpreter = pytest.mark.skipif(not cases.interpreted(), reason="needs Triton's interpreter")


def run(folder, mode, *arguments):
    return benchmark.main(["--tiny", "--mode", mode, "--output", str(folder), *arguments])


def values(folder, mode):
    rows = json.loads((folder / f"{mode}.json").read_text())["rows"]
    return {(row["case"], row["metric"]): row["value"] for row in rows}


def layers(way):
    return {f"{name}/{way}B2_S64" for name in (*blocks.DEFAULT_LAYERS, "hspmn", "hspmn_even", "dense")}


SERVED = {f"{model}/{case}" for model in ("hspmn", "dense") for case in (
    "prompt_32", "prompt_64", "eager_B1", "static_B1", "eager_B8", "static_B8")}  # fmt: skip
LAYER_COSTS = {"hspmn/layer_prefill", "hspmn/layer_token_B1", "hspmn/layer_token_B16"}
DOCUMENTED = {
    "throughput": {case: {"ms", "p95_ms", "tok_s", "flops"} for case in {"floor/fwd/B2_S64"} | layers("fwd/")},
    "latency": {case: {"eager_ms", "compiled_ms"} for case in layers("")},
    "train": {case: {"ms", "p95_ms", "tok_s", "flops"} for case in layers("block/")}
    | {f"{name}/model2/B2_S64": {"ms", "tok_s", "flops", "first_step_s"} for name in ("hspmn", "hspmn_even", "dense")}
    | {f"{block}/gradients": {"error"} for block in (*blocks.DEFAULT_LAYERS, "hspmn_even")},
    "context": {case: {"tokens", "peak_gb", "prefill_tok_s", "load"} for case in (
        "hspmn/model/256", "hspmn_routing/block/max", "hspmn_even/model/256", "hspmn_even/block/max")},
    "decode": {f"{model}/B{B}_S{S}": {"tok_s", "ms", "floor_ratio", "bytes"}
               for model in ("hspmn", "hspmn_even", "dense") for B in (1, 2) for S in (64, 128)},
    "serve": {case: {"ttft_ms" if "prompt" in case else "tok_s"} for case in SERVED | {"hspmn/sampled_static_B1"}}
    | {"hspmn/captured_B1": {"ms", "tok_s", "static_share"}, "hspmn/drafted_B1": {"tok_s", "speedup"}}
    | {case: {"host_us"} for case in LAYER_COSTS},
}  # fmt: skip


@pytest.mark.parametrize("mode", [
    pytest.param(mode, marks=[pytest.mark.slow] * (mode not in ("throughput", "context"))) for mode in DOCUMENTED
])  # fmt: skip
def test_results_have_the_documented_form(mode, tmp_path):
    assert run(tmp_path, mode) == 0
    document, found = json.loads((tmp_path / f"{mode}.json").read_text()), values(tmp_path, mode)
    assert {"name", "command", "date", "device", "versions", "commit", "rows"} <= document.keys()
    assert document["command"] == f"python benchmark.py --mode {mode} --tiny"
    assert str(tmp_path) not in json.dumps(document)
    assert {case for case, _ in found} == DOCUMENTED[mode].keys()
    for case, metrics in DOCUMENTED[mode].items():
        assert metrics <= {metric for name, metric in found if name == case}
    assert all(math.isfinite(value) for value in found.values())
    if mode == "throughput":  # at the stated loads and against one floor
        loads = {"hspmn_routing": 0.8, "hspmn_reflexive": 0.0, "hspmn": 0.2, "hspmn_even": 0.2}
        for name, load in loads.items():
            assert found[f"{name}/fwd/B2_S64", "load"] == pytest.approx(load, abs=1 / 128)
        routing, reflexive, mean = (found[f"{name}/fwd/B2_S64", "ms"] for name in (*blocks.DEFAULT_LAYERS, "hspmn"))
        assert mean == pytest.approx((routing + 3 * reflexive) / 4)
        assert found["hspmn/fwd/B2_S64", "floor_ratio"] == pytest.approx(found["floor/fwd/B2_S64", "ms"] / mean)
    if mode == "context":
        for layer in ("hspmn_even", "hspmn_routing"):
            assert found[f"{layer}/block/max", "limited_by_memory"] == 1
            assert found[f"{layer}/block/max", "tokens"] % 64 == 0
            assert 0 < found[f"{layer}/block/max", "peak_gb"] <= 2e-4
        assert found["hspmn_even/model/256", "tokens"] == 256 and 0.1 < found["hspmn_even/model/256", "load"] < 0.3
    if mode == "decode":  # dense: two layers of keys and values of two heads of 16 float32
        grown = found["dense/B2_S128", "bytes"] - found["dense/B1_S128", "bytes"]
        assert grown == 2 * 2 * 2 * 16 * 4 * 128
        assert found["hspmn/B2_S128", "bytes"] > found["hspmn/B1_S64", "bytes"]


@pytest.mark.parametrize("mode", ["throughput", pytest.param("decode", marks=pytest.mark.slow)])
def test_a_float8_model_is_measured_where_it_is_asked_for(mode, tmp_path):
    assert run(tmp_path, mode, "--models", "hspmn_float8") == 0
    wanted = {case.replace("/", "_float8/", 1) for case in DOCUMENTED[mode] if case.startswith("hspmn")}
    assert {case for case, _ in values(tmp_path, mode)} == {case for case in wanted if "even" not in case}


def test_later_runs_replace_their_cases_and_failing_ones_stop_no_other(tmp_path, monkeypatch, capsys):
    def fail(args, name, x_BSD):
        raise RuntimeError("no [bold] luck")

    arguments = ("throughput", "--models", "dense", "floor", "gdn", "--shapes")
    assert run(tmp_path, *arguments, "2x64") == 0
    assert "gdn/fwd/B2_S64: left out, it needs CUDA" in capsys.readouterr().out
    before = values(tmp_path, "throughput")
    monkeypatch.setitem(blocks.BLOCKS, "dense", fail)
    assert run(tmp_path, *arguments, "2x64", "1x32") == 1
    out, after = capsys.readouterr().out, values(tmp_path, "throughput")
    assert "dense/fwd/B2_S64: FAILED" in out and "no [bold] luck" in out
    assert {case for case, _ in after} == {case for case, _ in before} | {"floor/fwd/B1_S32"}
    assert after["dense/fwd/B2_S64", "ms"] == before["dense/fwd/B2_S64", "ms"]
    assert after["floor/fwd/B2_S64", "ms"] != before["floor/fwd/B2_S64", "ms"]
    document = json.loads((tmp_path / "throughput.json").read_text())
    assert len(document["commands"]) == 2 and document["commands"][1] == document["command"]


@needs_interpreter
@pytest.mark.slow
def test_every_operation_is_checked_without_a_gpu(tmp_path, capsys):
    assert run(tmp_path, "kernels") == 0
    found = values(tmp_path, "kernels")
    assert {case.split("/")[0] for case, _ in found} == REGISTRY.keys()
    assert all(case.split("/")[1] == "triton" and metric == "error" and value < 1e-5
               for (case, metric), value in found.items())  # fmt: skip
    assert "sqsk_attention/flash/B2_K40: left out, it needs CUDA" in capsys.readouterr().out


@needs_interpreter
def test_a_wrong_kernel_is_refused(monkeypatch):
    operation, args = REGISTRY["add_norm"], benchmark.parse_arguments(["--mode", "kernels", "--tiny"])
    sizes = cases.Sizes(B=2, T=9, D=16, even=True)
    assert cases.measure_operation(args, "add_norm", "triton", sizes)["error"] < 1e-6
    form = operation.form("triton")
    monkeypatch.setitem(operation._forms, "triton", lambda *inputs: tuple(1.01 * x for x in form(*inputs)))
    with pytest.raises(ValueError, match="it is not timed"):
        cases.measure_operation(args, "add_norm", "triton", sizes)


def test_what_is_not_measured_is_said(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "train", "--time_budget", "1e-9") == 0
    assert "are spent" in capsys.readouterr().out and not list(tmp_path.iterdir())
    monkeypatch.setattr(cases, "interpreted", lambda: False)
    assert run(tmp_path, "kernels") == 0
    assert "left out, Triton kernels need CUDA" in capsys.readouterr().out


def test_sizes_are_those_of_the_original_block_and_of_1_3_billion_parameters(monkeypatch):
    args = benchmark.make_parser().parse_args(["--mode", "decode"])
    args.device, args.dtype = torch.device("meta"), torch.bfloat16
    assert blocks.gemm_flops(args, 64 * 4096) == pytest.approx(31.9e12, rel=1e-2)
    assert blocks.least_bytes(args, 1) == 2 * (9 * 2048 + (16 + 16 + 8) * 128 + 3 * 8192)
    monkeypatch.setattr(context, "set_model_loads", lambda *_: None)
    for name in ("hspmn", "dense"):
        model = context.causal_lm(args, name)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.3e9, rel=0.01)


def test_host_work_is_counted_between_launches(monkeypatch):
    def event(name, start, device="CPU"):
        span = SimpleNamespace(start=start, end=start + 1)
        return SimpleNamespace(name=name, time_range=span, device_type=getattr(torch.autograd.DeviceType, device))

    events = [event("cudaDeviceSynchronize", 0), event("cudaLaunchKernel", 10), event("cudaStreamSynchronize", 15)]
    events += [event("Memcpy DtoH (Device -> Pageable)", 14, "CUDA"), event("Memcpy DtoD", 13, "CUDA")]
    events += [event("cuLaunchKernelEx", 20), event("cudaDeviceSynchronize", 30)]
    trace = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "profile", lambda activities: nullcontext(trace))
    assert timing.host_work(lambda: None) == (2, 2)
    events[:] = [event("aten::add", 5)]
    assert timing.host_work(lambda: None) == (None, None)


def test_the_recorded_command_gives_the_same_arguments():
    words = ["--mode", "throughput", "--shapes", "64x4096", "8x32768", "--set", "sliding_window=64", "--reps", "9"]
    args = benchmark.parse_arguments(words)
    assert args.command.startswith("python benchmark.py --mode")
    assert vars(benchmark.parse_arguments(args.command.split()[2:])) == vars(args)


@pytest.mark.parametrize("words", [
    ["--mode", "nonsense"], [], ["--shapes", "64"], ["--shapes", "0x4"], ["--models", "hspnm"], ["--set", "x=1"],
    ["--set", "sliding_window"], ["--sparsity_k", "0"], ["--sparsity_k", "nan"], ["--reps", "0"], ["--reps", "65"],
    ["--layers", "-3"], ["--head_dim", "7"], ["--batches", "1", "0"], ["--device", "tpu"], ["--output", __file__],
    ["--time_budget", "-1"], ["--cases", "block/4x64"], ["--cases", "model0/B1_S64"], ["--parallel", "ddp"],
], ids=" ".join)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(words if not words or words[0] == "--mode" else ["--mode", "throughput", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and all(word.strip("-") in error for word in words[:1])


def test_a_wrong_gradient_ends_the_run_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    def wrong(*args):
        x_BSD, block, forward = blocks.prepare(*args)
        return x_BSD, block, lambda x: 1.01 * forward(x)

    monkeypatch.setattr(training, "prepare", wrong)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "train", "--compile", "none", "--models", "hspmn_even")
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1 and "hspmn_even: gradient, output input is" in error
    assert not list(tmp_path.iterdir())


def test_operations_of_a_step_are_those_of_its_products():
    """Three times what a forward pass multiplies, of whose attention the causal half counts."""
    args = benchmark.parse_arguments(["--mode", "train", "--tiny", "--compile", "none", "--reps", "1"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        context.new_model(args, "dense", 2)(torch.zeros(2, 64, dtype=torch.long))
    attention = 2 * 2 * 2 * args.num_attention_heads * args.head_dim * 64**2  # of 2 layers, the other half
    metrics = training.measure_model(args, "dense", 2, (2, 64), {})
    assert metrics["flops"] == 3 * (counter.get_total_flops() - attention)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", training.PARALLEL)
def test_two_processes_train_beside_one(tmp_path, parallel):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch.append(benchmark.__file__)
    words = ["--mode", "train", "--tiny", "--compile", "none", "--models", "hspmn", "--cases", "model2/B2_S64"]
    command = [*launch, *words, "--parallel", parallel, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, case = values(tmp_path, "train"), "hspmn/model2/B2_S64"
    both = {"ddp": f"{case}/ddp2", "fsdp2": f"{case}/fsdp2"}[parallel]
    assert found[both, "scaling"] == pytest.approx(found[both, "tok_s"] / found[case, "tok_s"])
    assert found[both, "tok_s"] == pytest.approx(2 * 1e3 * 128 / found[both, "ms"])
    assert found[both, "load"] == pytest.approx(0.2, abs=0.1)


@needs_gpu
@pytest.mark.parametrize("mode", list(benchmark.CASES))
def test_every_mode_runs_on_cuda(tmp_path, mode):
    assert run(tmp_path, mode, "--device", "cuda", "--compile", "inductor", "--shapes", "1x256") == 0
