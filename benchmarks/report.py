"""Writes the tables of README.md between `<!-- results:NAME -->` and `<!-- /results -->` from the results files.

    python benchmarks/report.py              rewrite README.md from benchmarks/results/*.json
    python benchmarks/report.py --check      change nothing; exit code 1 if README.md is not what the files give

A section takes the metrics named here; other rows of its file are left out.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"<!-- results:(\w+) -->\n(.*?)<!-- /results -->", re.DOTALL)
NOTHING = "-"


class Section(NamedTuple):
    """One table: the command that measures it, its columns, and the part of a case name that keeps rows together.

    columns: by heading, a function from a case and the values by (case, metric) to a text.
    """

    command: str
    columns: dict
    group: int = -1


def metric(name, form):
    """Column of one metric; `form` is a function from its value to a text."""
    return lambda case, values: form(values[case, name]) if (case, name) in values else NOTHING


def span(low, high, form):
    """Column of two metrics as a range."""

    def text(case, values):
        ends = [metric(name, form)(case, values) for name in (low, high)]
        return NOTHING if NOTHING in ends else "-".join(ends)

    return text


def over_dense(case, values):
    """Speed over that of the dense model in the same case, `<model>/...`."""
    dense = f"dense/{case.partition('/')[2]}"
    if not {(case, "tok_s"), (dense, "tok_s")} <= values.keys():
        return NOTHING
    return f"{values[case, 'tok_s'] / values[dense, 'tok_s']:.2f}x"


def three_digits(value):
    """Form with three digits, and all of them before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def millions(value):
    """Form of tokens per second."""
    return f"{value / 1e6:,.2f} M" if value >= 1e5 else f"{value:,.0f}"


WHOLE, THREE_PLACES = "{:,.0f}".format, "{:.3f}".format
MS, TOK_S, PEAK = metric("ms", three_digits), metric("tok_s", millions), metric("peak_gb", "{:.1f}".format)
SECTIONS = {
    "quality": Section(
        "python benchmarks/quality.py",
        {name: metric(name, THREE_PLACES) for name in ("val", "recall", "other")}
        | {
            "std of val": metric("val_std", THREE_PLACES),
            "load / target": span("load_min", "load_max", "{:.2f}".format),
            "KV bytes per token": metric("kv_bytes_per_token", WHOLE),
            "training tok/s": metric("train_tok_s", millions),
        },
    ),
    "throughput": Section(
        "python benchmark.py --mode throughput",
        {"ms": MS, "tok/s": TOK_S, "peak GB": PEAK, "over dense": over_dense},
    ),
    "latency": Section(
        "python benchmark.py --mode latency",
        {f"{way} ms": metric(f"{way}_ms", three_digits) for way in ("eager", "compiled", "graph")},
    ),
    "kernels": Section(
        "python benchmark.py --mode kernels",
        {"ms": MS, "TFLOP/s": metric("tflops", three_digits), "TB/s": metric("tb_s", three_digits)},
        group=0,
    ),
    "decode": Section(
        "python benchmark.py --mode decode",
        {"ms": MS, "tok/s": TOK_S, "floor ratio": metric("floor_ratio", "{:.2f}".format), "over dense": over_dense},
    ),
    "context": Section(
        "python benchmark.py --mode context",
        {"tokens": metric("tokens", WHOLE), "prefill tok/s": metric("prefill_tok_s", millions)}
        | {"decode tok/s": metric("decode_tok_s", millions), "peak GB": PEAK},
    ),
    "needle": Section("python evaluate.py --task needle FOLDER", {"accuracy": metric("accuracy", THREE_PLACES)}, 0),
    "mqar": Section("python evaluate.py --task mqar", {"accuracy": metric("accuracy", THREE_PLACES)}),
}


def table(section, rows):
    """Lines of the Markdown table of a section, cases as rows; cases without any of its metrics are left out."""
    values = {(row["case"], row["metric"]): row["value"] for row in rows}
    found = {case: [text(case, values) for text in section.columns.values()] for case, _ in values}
    kept = [case for case, cells in found.items() if any(cell != NOTHING for cell in cells)]
    groups = list(dict.fromkeys(case.split("/")[section.group] for case in kept))
    kept.sort(key=lambda case: groups.index(case.split("/")[section.group]))  # repeated cases come last in the file
    lines = [["case", *section.columns], ["---", *["---:"] * len(section.columns)]]
    return [f"| {' | '.join(cells)} |" for cells in [*lines, *([case, *found[case]] for case in kept)]]


def section_text(name, folder):
    """What stands between the markers of section `name`; raises ValueError for a name without a section."""
    if name not in SECTIONS:
        raise ValueError(f"README.md has a section results:{name}; known are {', '.join(SECTIONS)}")
    path = folder / f"{name}.json"
    if not path.exists():
        return f"not measured yet: `{SECTIONS[name].command}`\n"
    document = json.loads(path.read_text())
    versions = [f"{name} {version}" for name, version in document["versions"].items() if name in ("torch", "triton")]
    source = ", ".join([document["device"], document["date"].split()[0], *versions])
    gathered = len(document.get("commands", []))
    command = f"`{document['command']}`"
    if gathered > 1:
        command = f"{gathered} commands, all in `commands` of `{path.name}`, the last {command}"
    return "\n".join([f"{source}: {command}", "", *table(SECTIONS[name], document["rows"]), "", ""])


def report(text, folder):
    """The README `text` with every section as the results files in `folder` give it."""
    missing = SECTIONS.keys() - {name for name, _ in SECTION.findall(text)}
    if missing:
        raise ValueError(f"README.md has no section <!-- results:{sorted(missing)[0]} --> ... <!-- /results -->")
    return SECTION.sub(lambda m: f"<!-- results:{m[1]} -->\n{section_text(m[1], folder)}<!-- /results -->", text)


def main(argv=None):
    """Rewrite README.md or check it; returns the exit code."""
    parser = argparse.ArgumentParser(
        "benchmarks/report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if README.md differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the files")
    args = parser.parse_args(argv)
    old = args.readme.read_text("utf-8")
    new = report(old, args.results)
    if args.check and new != old:
        print(f"{args.readme.name} differs from {args.results.name}/*.json: run python benchmarks/report.py")
        return 1
    if new != old:
        args.readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
