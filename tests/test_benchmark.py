"""`benchmark.py` in its tiny CPU settings, the search for the longest context, and what must not be timed."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hspmn import benchmark, benchmark_blocks, benchmark_common, benchmark_context, benchmark_kernels

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("one_thread")
needs_interpreter = pytest.mark.skipif(not benchmark_kernels.interpreted(), reason="needs Triton's interpreter")


def run(folder, mode, *arguments):
    return benchmark.main(["--tiny", "--mode", mode, "--output", str(folder), *arguments])


def values(folder, mode):
    rows = json.loads((folder / f"{mode}.json").read_text())["rows"]
    return {(row["case"], row["metric"]): row["value"] for row in rows}


def parse(*arguments):
    args = benchmark.make_parser().parse_args(["--device", "cpu", *arguments])
    benchmark.check_arguments(args)
    return args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of every mode but kernels."""
    folder = tmp_path_factory.mktemp("benchmark")
    for mode in ("throughput", "latency", "train", "context", "decode"):
        assert run(folder, mode) == 0
    return folder


@pytest.mark.parametrize(
    "mode, cases, metrics",
    [
        ("throughput", {"floor/fwd/B2_S64", "hspmn/fwd/B2_S64", "dense/fwd/B2_S64"}, {"ms", "p95_ms", "tok_s"}),
        ("latency", {"hspmn/B2_S64", "dense/B2_S64"}, {"eager_ms", "compiled_ms", "graph_breaks", "graphs"}),
        ("train", {"hspmn/fwd_bwd/B2_S64", "dense/fwd_bwd/B2_S64"}, {"ms", "p95_ms", "tok_s", "flops"}),
        ("context", {"model/256", "block/max"}, {"tokens", "peak_gb", "prefill_tok_s"}),
        (
            "decode",
            {f"{model}/B{B}_S{S}" for model in ("hspmn", "dense") for B in (1, 2) for S in (64, 128)},
            {"tok_s", "ms", "floor_ratio"},
        ),
    ],
)
def test_results_have_the_documented_form(folder, mode, cases, metrics):
    document = json.loads((folder / f"{mode}.json").read_text())
    assert {"name", "command", "date", "device", "versions", "commit", "rows"} <= document.keys()
    assert document["command"] == f"python benchmark.py --mode {mode} --tiny"
    assert str(folder) not in json.dumps(document)
    found = values(folder, mode)
    assert {case for case, _ in found} == cases
    assert all(metrics <= {metric for name, metric in found if name == case} for case in cases)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())


def test_blocks_are_compared_at_the_stated_load_with_one_floor(folder):
    found = values(folder, "throughput")
    assert found["hspmn/fwd/B2_S64", "load"] == pytest.approx(0.2, abs=1 / 128)
    for model in ("hspmn", "dense"):
        ratio = found["floor/fwd/B2_S64", "ms"] / found[f"{model}/fwd/B2_S64", "ms"]
        assert found[f"{model}/fwd/B2_S64", "floor_ratio"] == pytest.approx(ratio)
    latency = values(folder, "latency")
    assert latency["hspmn/B2_S64", "graphs"] == 1 and latency["hspmn/B2_S64", "graph_breaks"] == 0


def test_the_block_stops_at_its_memory_budget(folder):
    found = values(folder, "context")
    assert found["block/max", "limited_by_memory"] == 1
    assert found["block/max", "tokens"] % 64 == 0 and 0 < found["block/max", "peak_gb"] <= 2e-4
    assert found["model/256", "tokens"] == 256 and 0.1 < found["model/256", "load"] < 0.3


def test_bytes_of_a_decoding_step_are_weights_states_and_what_routed_tokens_read(folder):
    found, args = values(folder, "decode"), benchmark.parse_arguments(["--mode", "decode", "--tiny"])
    row = 2 * 2 * 16 * 4 * args.layers
    grown = found["dense/B2_S128", "bytes"] - found["dense/B1_S128", "bytes"]
    assert grown == row * 128
    weights = found["dense/B1_S64", "bytes"] - row * 64
    assert found["hspmn/B1_S64", "bytes"] > weights
    load = found["hspmn/B2_S128", "load"]
    per_row = found["hspmn/B2_S128", "bytes"] - found["hspmn/B1_S64", "bytes"]
    assert per_row > args.layers * 2 * 4 * 4 * 16 * 16 and 0 <= load <= 1  # one more float32 state, read and written


def test_later_runs_replace_their_cases_and_keep_the_others(folder, tmp_path):
    (tmp_path / "throughput.json").write_text((folder / "throughput.json").read_text())
    assert run(tmp_path, "throughput", "--models", "dense", "--shapes", "2x64", "1x32") == 0
    before, after = values(folder, "throughput"), values(tmp_path, "throughput")
    assert {case for case, _ in after} == {case for case, _ in before} | {"dense/fwd/B1_S32"}
    assert after["hspmn/fwd/B2_S64", "ms"] == before["hspmn/fwd/B2_S64", "ms"]
    assert after["dense/fwd/B2_S64", "ms"] != before["dense/fwd/B2_S64", "ms"]


def test_a_failing_case_is_named_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fail(args, x_BSD):
        raise RuntimeError("no [bold] luck")

    monkeypatch.setitem(benchmark_blocks.BLOCKS, "dense", fail)
    assert run(tmp_path, "throughput", "--models", "dense", "hspmn") == 1
    out = capsys.readouterr().out
    assert "dense/fwd/B2_S64: FAILED" in out and "no [bold] luck" in out
    assert {case for case, _ in values(tmp_path, "throughput")} == {"hspmn/fwd/B2_S64"}


def test_the_time_budget_starts_nothing_more(tmp_path, capsys):
    assert run(tmp_path, "train", "--time_budget", "1e-9") == 0
    assert "are spent" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_what_cannot_run_is_left_out_with_its_reason(tmp_path, capsys):
    assert run(tmp_path, "throughput", "--models", "gdn") == 0
    assert "gdn/fwd/B2_S64: left out, it needs CUDA" in capsys.readouterr().out


@needs_interpreter
def test_kernels_are_checked_without_a_gpu(tmp_path, capsys):
    assert run(tmp_path, "kernels") == 0
    found = values(tmp_path, "kernels")
    assert {case.split("/")[0] for case, _ in found} == set(benchmark_kernels.CASES)
    assert all(case.split("/")[1] == "triton" and metric == "error" and value < 1e-5
               for (case, metric), value in found.items())  # fmt: skip
    printed = capsys.readouterr().out
    assert "sqsk_attention/flash/B2_K40: left out, it needs CUDA" in printed
    assert "swiglu/triton/B2_T70: left out, it needs sm_90 or sm_100" in printed


@needs_interpreter
def test_every_kernel_has_a_case():
    from hspmn import kernels_hspmn

    assert set(kernels_hspmn.__all__) <= set(benchmark_kernels.OPERATIONS)


@needs_interpreter
def test_a_wrong_kernel_is_refused(tmp_path, monkeypatch, capsys):
    from hspmn import kernels_hspmn

    right = kernels_hspmn.sqsk_attention
    monkeypatch.setattr(kernels_hspmn, "sqsk_attention", lambda *inputs: 1.01 * right(*inputs))
    assert run(tmp_path, "kernels") == 1
    assert "it is not timed" in capsys.readouterr().out
    assert "sqsk_attention/triton/B2_K40" not in {case for case, _ in values(tmp_path, "kernels")}


def test_kernels_say_that_they_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_kernels, "interpreted", lambda: False)
    assert run(tmp_path, "kernels") == 0
    assert "left out, Triton kernels need CUDA" in capsys.readouterr().out


@pytest.mark.parametrize(
    "capacity, grows, expected, limited",
    [(1000, True, 960, True), (1000, False, 960, True), (30, True, 0, True), (30, False, 0, True),
     (256, False, 256, True), (10**6, True, 4096, False), (10**6, False, 4096, False)],
)  # fmt: skip
def test_the_longest_context_is_found(capacity, grows, expected, limited):
    tried = []

    def read(tokens):
        tried.append(tokens)
        fitting = capacity // 64 * 64
        return tokens if tokens <= fitting else fitting if grows else 0

    assert benchmark_context.longest(read, 256, 4096, 64) == (expected, limited)
    assert all(tokens % 64 == 0 for tokens in tried) and len(tried) == len(set(tried))


def test_costs_of_the_original_block():
    args = parse("--mode", "throughput")
    assert benchmark_blocks.gemm_flops(args, 64 * 4096) == pytest.approx(31.9e12, rel=1e-2)
    args.dtype = torch.bfloat16
    assert benchmark_blocks.least_bytes(args, 1) == 2 * (9 * 2048 + (16 + 16 + 8) * 128 + 3 * 8192)


@pytest.mark.parametrize("name", ["hspmn", "dense"])
def test_whole_models_have_about_1_3_billion_parameters(name, monkeypatch):
    args = parse("--mode", "decode")
    args.device, args.dtype = torch.device("meta"), torch.bfloat16
    monkeypatch.setattr(benchmark_context, "set_model_loads", lambda *_: None)
    model = benchmark_context.causal_lm(args, name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.3e9, rel=0.01)


def test_host_waits_are_counted_between_launches(monkeypatch):
    def event(name, start, device="CPU"):
        span = SimpleNamespace(start=start, end=start + 1)
        return SimpleNamespace(name=name, time_range=span, device_type=getattr(torch.autograd.DeviceType, device))

    events = [event("cudaDeviceSynchronize", 0), event("cudaLaunchKernel", 10), event("cudaStreamSynchronize", 15)]
    events += [event("Memcpy DtoH (Device -> Pageable)", 14, "CUDA"), event("Memcpy DtoD", 13, "CUDA")]
    events += [event("cuLaunchKernelEx", 20), event("cudaDeviceSynchronize", 30)]

    class Trace:
        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(benchmark_common, "profile", lambda activities: Trace())
    assert benchmark_common.host_syncs(lambda: None) == 2
    events[:] = [event("aten::add", 5)]
    assert benchmark_common.host_syncs(lambda: None) is None


def test_the_recorded_command_gives_the_same_arguments():
    parser = benchmark.make_parser()
    words = ["--mode", "throughput", "--shapes", "64x4096", "8x32768", "--set", "sliding_window=64", "--reps", "9"]
    args = parser.parse_args(words)
    command = benchmark.evaluate.recorded_command(parser, args).split()
    assert command[:2] == ["python", "benchmark.py"] and parser.parse_args(command[2:]) == args


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "sliding_windw=16"], "no such field"),
        (["--set", "sliding_window"], "expected KEY=VALUE"),
        (["--sparsity_k", "0"], "--sparsity_k"),
        (["--reps", "0"], "--reps must be at least 1"),
        (["--reps", "65"], "--reps must be at most 64"),
        (["--block_tokens", "100"], "use 128"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "throughput", *arguments)


@pytest.mark.parametrize("arguments", [["--shapes", "64"], ["--shapes", "0x4"], ["--models", "hspnm"]], ids=str)
def test_unknown_words_are_refused(tmp_path, arguments):
    with pytest.raises(SystemExit):
        run(tmp_path, "throughput", *arguments)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("mode", list(benchmark.CASES))
def test_every_mode_runs_on_cuda(tmp_path, mode):
    assert run(tmp_path, mode, "--device", "cuda", "--compile", "inductor", "--shapes", "1x256") == 0
