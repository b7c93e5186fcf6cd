"""benchmarks/report.py: the README's tables are what the results files give."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("hspmn_report", ROOT / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

VALUES = {
    "quality": {
        "dense": {
            "val": 2.3561,
            "recall": 1.1484,
            "other": 3.6962,
            "kv_bytes_per_token": 8192.0,
            "train_tok_s": 1.17e6,
        },
        "hspmn": {"val": 2.35, "val_std": 0.0041, "load_min": 0.812, "load_max": 1.1, "train_loss": 2.0},
    },
    "throughput": {
        "floor/fwd/B1_S64": {"ms": 1.0, "tok_s": 64000.0},
        "dense/fwd/B1_S64": {"ms": 2.5, "tok_s": 25600.0, "peak_gb": 15.46},
        "dense/fwd/B8_S32": {"ms": 1234.5, "tok_s": 2.3e6},
        "hspmn/fwd/B1_S64": {"ms": 0.031249, "tok_s": 51200.0, "peak_gb": 3.0},
    },
    "kernels": {"route/triton/B2_T70": {"error": 1e-6}, "sqsk_merge/triton/B2_T70": {"ms": 99.97, "tflops": 351.2}},
    "decode": {
        "hspmn/B8_S128": {"ms": 1.5, "tok_s": 5333.0, "floor_ratio": 0.834},
        "dense/B8_S128": {"ms": 3.0, "tok_s": 2666.5, "floor_ratio": 0.4},
    },
    "context": {"model/256": {"tokens": 256, "prefill_tok_s": 340000.0, "decode_tok_s": 99.0, "peak_gb": 30.24}},
    "needle": {f"{label}/x{n}": {"accuracy": 1 / n} for n in (1, 2) for label in ("hspmn", "dense")},
}
WANTED = {
    "quality": [
        "| case | val | recall | other | std of val | load / target | KV bytes per token | training tok/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| dense | 2.356 | 1.148 | 3.696 | - | - | 8,192 | 1.17 M |",
        "| hspmn | 2.350 | - | - | 0.004 | 0.81-1.10 | - | - |",
    ],
    "throughput": [
        "| case | ms | tok/s | peak GB | over dense |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| floor/fwd/B1_S64 | 1.00 | 64,000 | - | 2.50x |",
        "| dense/fwd/B1_S64 | 2.50 | 25,600 | 15.5 | 1.00x |",
        "| hspmn/fwd/B1_S64 | 0.0312 | 51,200 | 3.0 | 2.00x |",
        "| dense/fwd/B8_S32 | 1,234 | 2.30 M | - | 1.00x |",
    ],
    "kernels": [
        "| case | ms | TFLOP/s | TB/s |",
        "| --- | ---: | ---: | ---: |",
        "| sqsk_merge/triton/B2_T70 | 100 | 351 | - |",
    ],
    "decode": [
        "| case | ms | tok/s | floor ratio | over dense |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| hspmn/B8_S128 | 1.50 | 5,333 | 0.83 | 2.00x |",
        "| dense/B8_S128 | 3.00 | 2,666 | 0.40 | 1.00x |",
    ],
    "context": [
        "| case | tokens | prefill tok/s | decode tok/s | peak GB |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| model/256 | 256 | 0.34 M | 99 | 30.2 |",
    ],
    "needle": [
        "| case | accuracy |",
        "| --- | ---: |",
        "| hspmn/x1 | 1.000 |",
        "| hspmn/x2 | 0.500 |",
        "| dense/x1 | 1.000 |",
        "| dense/x2 | 0.500 |",
    ],
}


@pytest.fixture
def files(tmp_path):
    """A README with every section, and a results file for each of them but mqar."""
    sections = [
        f"<!-- results:{name} -->\nold | text\n<!-- /results -->\n\nHow to read it.\n" for name in report.SECTIONS
    ]
    (tmp_path / "README.md").write_text("# Model\n\n" + "\n".join(sections) + "\n## Layout\n")
    for name, cases in VALUES.items():
        rows = [
            {"case": case, "metric": metric, "value": value}
            for case, metrics in cases.items()
            for metric, value in metrics.items()
        ]
        document = {"name": name, "command": f"python measure.py {name}", "date": "2026-11-24 10:30 UTC", "rows": rows}
        document |= {"device": "NVIDIA H200", "versions": {"python": "3.11", "torch": "2.13.0", "triton": "3.7.1"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return tmp_path


def run(folder, *arguments):
    return report.main(["--readme", str(folder / "README.md"), "--results", str(folder), *arguments])


def between(folder, name):
    text = (folder / "README.md").read_text()
    return text.split(f"<!-- results:{name} -->\n")[1].split("<!-- /results -->")[0]


@pytest.mark.parametrize("name", WANTED)
def test_a_section_names_its_source_and_holds_the_table(files, name):
    assert run(files) == 0
    source, empty, *lines = between(files, name).splitlines()
    assert source == f"NVIDIA H200, 2026-11-24, torch 2.13.0, triton 3.7.1: `python measure.py {name}`"
    assert not empty and lines == [*WANTED[name], ""]


def test_a_gathered_file_names_where_its_commands_stand(files):
    document = json.loads((files / "quality.json").read_text()) | {"commands": ["python a.py", "python b.py"]}
    (files / "quality.json").write_text(json.dumps(document))
    run(files)
    source = between(files, "quality").splitlines()[0]
    assert source.endswith(": 2 commands, all in `commands` of `quality.json`, the last `python measure.py quality`")


def test_a_missing_file_leaves_the_command_that_writes_it(files):
    run(files)
    assert between(files, "mqar") == "not measured yet: `python evaluate.py --task mqar`\n"


def test_what_stands_outside_of_the_sections_stays(files):
    before = report.SECTION.sub("", (files / "README.md").read_text())
    run(files)
    assert report.SECTION.sub("", (files / "README.md").read_text()) == before


def test_check_tells_whether_the_readme_is_up_to_date_and_writes_nothing(files, capsys):
    old = (files / "README.md").read_text()
    assert run(files, "--check") == 1 and "python benchmarks/report.py" in capsys.readouterr().out
    assert (files / "README.md").read_text() == old
    assert run(files) == run(files, "--check") == 0
    new = (files / "README.md").read_text()
    assert run(files) == 0 and (files / "README.md").read_text() == new
    (files / "decode.json").unlink()
    assert run(files, "--check") == 1


@pytest.mark.parametrize("old, new", [("results:decode", "results:decod"), ("<!-- results:decode -->", "")])
def test_unknown_and_missing_sections_are_refused_by_name(files, old, new):
    readme = files / "README.md"
    readme.write_text(readme.read_text().replace(old, new))
    with pytest.raises(ValueError, match="decod"):
        run(files)


def test_the_readme_is_what_the_results_files_give():
    assert report.main(["--check"]) == 0
