"""benchmarks/report.py: the tables of the README pages are what the results files give."""

import json

import pytest
from hspmn.benchmarks import report

VALUES = {
    "quality": {
        "dense": {"val": 2.3561, "recall": 1.1484, "other": 3.6962, "kv_bytes_per_token": 8192, "train_tok_s": 1.17e6},
        "hspmn": {"val": 2.35, "val_std": 0.0041, "seeds": 3, "load_min": 0.812, "load_max": 1.1, "train_loss": 2.0},
    },
    "throughput": {
        "dense/fwd/B1_S64": {"ms": 2.5, "tok_s": 25600.0, "peak_gb": 15.46},
        "dense/fwd/B8_S32": {"ms": 1234.5, "tok_s": 2.3e6},
        "hspmn_even/fwd/B1_S64": {"ms": 1.0, "tok_s": 64000.0},
        "hspmn/fwd/B1_S64": {"ms": 0.031249, "tok_s": 51200.0, "peak_gb": 3.0},
    },
    "decode": {"hspmn/B8_S128": {"ms": 99.97, "tok_s": 5333.0, "floor_ratio": 0.834}, "dense/B8_S128": {"error": 0.0}},
    "serve": {
        "dense/prompt_2048": {"ttft_ms": 90.0},
        "hspmn/prompt_2048": {"ttft_ms": 45.0, "forward_ms": 40.0, "peak_gb": 3.21},
        "hspmn/layer_token": {"launches": 8, "host_us": 61.5},
    },
    "needle": {f"{label}/x{n}": {"accuracy": 1 / n} for n in (1, 2) for label in ("hspmn", "dense")},
}  # fmt: skip
WANTED = {
    "quality": """
| case | val | recall | other | seeds | std of val | load / target | KV bytes per token | training tok/s |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| hspmn | 2.350 | - | - | 3 | 0.004 | 0.81-1.10 | - | - |
| dense | 2.356 | 1.148 | 3.696 | - | - | - | 8,192 | 1.17 M |
""",
    "throughput": f"""
{report.DEFAULT + report.EVEN}

| case | ms | tok/s | peak GB | over dense |
| --- | ---: | ---: | ---: | ---: |
| hspmn/fwd/B1_S64 | 0.0312 | 51,200 | 3.0 | 2.00x |
| hspmn_even/fwd/B1_S64 | 1.00 | 64,000 | - | 2.50x |
| dense/fwd/B1_S64 | 2.50 | 25,600 | 15.5 | 1.00x |
| dense/fwd/B8_S32 | 1,234 | 2.30 M | - | 1.00x |
""",
    "decode": f"""
{report.DEFAULT}

| case | ms | tok/s | floor ratio | over dense |
| --- | ---: | ---: | ---: | ---: |
| hspmn/B8_S128 | 100 | 5,333 | 0.83 | - |
""",
    "serve": """
| case | first token ms | one forward ms | tok/s | peak GB | over dense | launches | host us |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| hspmn/prompt_2048 | 45.0 | 40.0 | - | 3.2 | 2.00x | - | - |
| dense/prompt_2048 | 90.0 | - | - | - | 1.00x | - | - |
| hspmn/layer_token | - | - | - | - | - | 8.00 | 61.5 |
""",
    "needle": """
| case | accuracy |
| --- | ---: |
| hspmn/x1 | 1.000 |
| hspmn/x2 | 0.500 |
| dense/x1 | 1.000 |
| dense/x2 | 0.500 |
""",
}


@pytest.fixture
def folder(tmp_path):
    """A page with one section, one with all, and some of the results files."""
    sections = [f"<!-- results:{name} -->\nold | text\n<!-- /results -->\n\nProse.\n" for name in report.SECTIONS]
    (tmp_path / "README.md").write_text("# Model\n\n" + sections[0])
    (tmp_path / "all.md").write_text("# Numbers\n\n" + "\n".join(sections) + "\n## End\n")
    head = {"date": "2026-11-24 10:30 UTC", "device": "NVIDIA H200", "versions": {"python": "3.11", "torch": "2.13.0"}}
    for name, cases in VALUES.items():
        rows = [{"case": case, "metric": k, "value": v} for case, metrics in cases.items() for k, v in metrics.items()]
        document = head | {"name": name, "command": f"python measure.py {name}", "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return tmp_path


def run(folder, *arguments):
    return report.main(["--pages", *map(str, folder.glob("*.md")), "--results", str(folder), *arguments])


def between(folder, name, page="all.md"):
    return (folder / page).read_text().split(f"<!-- results:{name} -->\n")[1].split("<!-- /results -->")[0]


def test_every_section_names_its_source_and_holds_its_table(folder):
    before = report.SECTION.sub("", (folder / "all.md").read_text())
    assert run(folder) == 0
    for name, table in WANTED.items():
        source = f"NVIDIA H200, 2026-11-24, torch 2.13.0: `python measure.py {name}`\n"
        assert between(folder, name) == f"{source}{table}\n"
    assert between(folder, "mqar") == "not measured yet: `python benchmarks/mqar.py`\n"
    assert between(folder, "quality", "README.md") == between(folder, "quality")
    assert report.SECTION.sub("", (folder / "all.md").read_text()) == before


def test_a_gathered_file_names_where_its_commands_stand(folder):
    document = json.loads((folder / "quality.json").read_text()) | {"commands": ["python a.py", "python b.py"]}
    (folder / "quality.json").write_text(json.dumps(document))
    run(folder)
    source = between(folder, "quality").splitlines()[0]
    assert source.endswith(": 2 commands, all in `commands` of `quality.json`, the last `python measure.py quality`")


def test_check_tells_whether_the_pages_are_up_to_date_and_writes_nothing(folder, capsys):
    old = (folder / "all.md").read_text()
    assert run(folder, "--check") == 1 and "python benchmarks/report.py" in capsys.readouterr().out
    assert (folder / "all.md").read_text() == old
    assert run(folder) == run(folder, "--check") == 0
    (folder / "decode.json").unlink()
    assert run(folder, "--check") == 1


@pytest.mark.parametrize("old, new", [("results:decode", "results:decod"), ("<!-- results:decode -->", "")])
def test_unknown_and_missing_sections_are_refused_by_name(folder, old, new, capsys):
    (folder / "all.md").write_text((folder / "all.md").read_text().replace(old, new))
    with pytest.raises(SystemExit, match="2"):
        run(folder)
    assert "results:decod" in capsys.readouterr().err


def test_the_pages_are_what_the_results_files_give():
    assert report.main(["--check"]) == 0
