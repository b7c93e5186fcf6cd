"""Writes the tables between `<!-- results:NAME -->` and `<!-- /results -->` of README pages from the results files.

    python benchmarks/report.py              rewrite README.md and benchmarks/README.md from benchmarks/results/*.json
    python benchmarks/report.py --check      change nothing; exit code 1 if a page is not what the files give

benchmarks/README.md has every section, README.md any of them. A section takes the metrics named here; other rows of
its file are left out.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
SECTION = re.compile(r"<!-- results:(\w+) -->\n(.*?)<!-- /results -->", re.DOTALL)
NOTHING = "-"
HSPMN = ("hspmn", "hspmn_routing", "hspmn_reflexive", "hspmn_even")  # first in every group of rows, in this order
EVEN = "Original setting: 0.2 of the tokens are routed in every layer."
BOTH = (
    "`hspmn`: default configuration, 0.8 of the tokens in every fourth layer, none elsewhere; its block is the mean "
    "of one `hspmn_routing` and three `hspmn_reflexive`. `hspmn_even`: original setting, 0.2 in every layer."
)


class Section(NamedTuple):
    """One table: the command that measures it, its columns, and the part of a case name that keeps rows together.

    has_even: whether its cases are of two configurations, which the table then names.
    """

    command: str
    columns: tuple
    group: int = -1
    has_even: bool = False


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
    for name, power in (("tok_s", 1), ("ttft_ms", -1)):
        if {(case, name), (dense, name)} <= values.keys():
            return f"{(values[case, name] / values[dense, name]) ** power:.2f}x"
    return NOTHING


def three_digits(value):
    """Form with three digits, and all of them before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def millions(value):
    """Form of tokens per second."""
    return f"{value / 1e6:,.2f} M" if value >= 1e5 else f"{value:,.0f}"


WHOLE, TWO_PLACES, THREE_PLACES = "{:,.0f}".format, "{:.2f}".format, "{:.3f}".format
COLUMNS = {name: metric(name, THREE_PLACES) for name in ("val", "recall", "other", "accuracy")}
COLUMNS |= {f"{way} ms": metric(f"{way}_ms", three_digits) for way in ("eager", "compiled", "graph")}
COLUMNS |= {
    "std of val": metric("val_std", THREE_PLACES), "load / target": span("load_min", "load_max", TWO_PLACES),
    "KV bytes per token": metric("kv_bytes_per_token", WHOLE), "training tok/s": metric("train_tok_s", millions),
    "ms": metric("ms", three_digits), "tok/s": metric("tok_s", millions), "over dense": over_dense,
    "peak GB": metric("peak_gb", "{:.1f}".format), "first token ms": metric("ttft_ms", three_digits),
    "one forward ms": metric("forward_ms", three_digits), "launches": metric("launches", three_digits),
    "host us": metric("host_us", three_digits),
    "TFLOP/s": metric("tflops", three_digits), "TB/s": metric("tb_s", three_digits),
    "floor ratio": metric("floor_ratio", TWO_PLACES), "tokens": metric("tokens", WHOLE),
    "prefill tok/s": metric("prefill_tok_s", millions), "decode tok/s": metric("decode_tok_s", millions),
}  # fmt: skip
SPEEDS = ("ms", "tok/s", "peak GB", "over dense")
SECTIONS = {
    "quality": Section(
        "python benchmarks/quality.py",
        ("val", "recall", "other", "std of val", "load / target", "KV bytes per token", "training tok/s"),
    ),
    "serve": Section(
        "python benchmark.py --mode serve",
        ("first token ms", "one forward ms", "tok/s", "peak GB", "over dense", "launches", "host us"),
    ),
    "throughput": Section("python benchmark.py --mode throughput", SPEEDS, has_even=True),
    "latency": Section("python benchmark.py --mode latency", ("eager ms", "compiled ms", "graph ms"), has_even=True),
    "train": Section("python benchmark.py --mode train", SPEEDS, has_even=True),
    "kernels": Section("python benchmark.py --mode kernels", ("ms", "TFLOP/s", "TB/s"), group=0),
    "decode": Section(
        "python benchmark.py --mode decode", ("ms", "tok/s", "floor ratio", "over dense"), has_even=True
    ),
    "context": Section(
        "python benchmark.py --mode context", ("tokens", "prefill tok/s", "decode tok/s", "peak GB"), has_even=True
    ),
    "needle": Section("python evaluate.py --task needle FOLDER", ("accuracy",), group=0),
    "mqar": Section("python benchmarks/mqar.py", ("accuracy",)),
}


def table(section, rows):
    """Lines of the Markdown table of a section, cases as rows; cases without any of its metrics are left out."""
    values = {(row["case"], row["metric"]): row["value"] for row in rows}
    found = {case: [COLUMNS[name](case, values) for name in section.columns] for case, _ in values}
    kept = [case for case, cells in found.items() if any(cell != NOTHING for cell in cells)]

    def group(case):
        return "/" in case and case.split("/")[section.group]

    groups = list(dict.fromkeys(map(group, kept)))

    def place(case):  # repeated cases come last in the file
        model = case.split("/")[0]
        return groups.index(group(case)), HSPMN.index(model) if model in HSPMN else len(HSPMN)

    lines = [["case", *section.columns], ["---", *["---:"] * len(section.columns)]]
    lines += ([case, *found[case]] for case in sorted(kept, key=place))
    return [f"| {' | '.join(cells)} |" for cells in lines]


def section_text(name, folder):
    """What stands between the markers of section `name`."""
    section, path = SECTIONS[name], folder / f"{name}.json"
    if not path.exists():
        return f"not measured yet: `{section.command}`\n"
    document = json.loads(path.read_text())
    versions = [f"{name} {version}" for name, version in document["versions"].items() if name in ("torch", "triton")]
    source = ", ".join([document["device"], document["date"].split()[0], *versions])
    gathered = len(document.get("commands", []))
    command = f"`{document['command']}`"
    if gathered > 1:
        command = f"{gathered} commands, all in `commands` of `{path.name}`, the last {command}"
    lines = [f"{source}: {command}", ""]
    if section.has_even:
        lines += [BOTH if any(row["case"].startswith("hspmn_even/") for row in document["rows"]) else EVEN, ""]
    return "\n".join([*lines, *table(section, document["rows"]), "", ""])


def main(argv=None):
    """Rewrite the pages or check them; returns the exit code."""
    parser = argparse.ArgumentParser(
        "benchmarks/report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a page differs")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=PAGES, help="files with sections, each on one of them"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the files")
    args = parser.parse_args(argv)
    old = {page: page.read_text("utf-8") for page in args.pages}
    named = {name for text in old.values() for name, _ in SECTION.findall(text)}
    for name in sorted(named ^ SECTIONS.keys()):
        problem = "is unknown" if name in named else "is missing"
        parser.exit(
            2, f"report.py: --pages: section <!-- results:{name} --> {problem}; there is one for each of SECTIONS\n"
        )
    different = 0
    for page, text in old.items():
        new = SECTION.sub(
            lambda m: f"<!-- results:{m[1]} -->\n{section_text(m[1], args.results)}<!-- /results -->", text
        )
        if new != text and args.check:
            print(f"{page.name} differs from {args.results.name}/*.json: run python benchmarks/report.py")
            different = 1
        elif new != text:
            page.write_text(new, "utf-8")
    return different


if __name__ == "__main__":
    sys.exit(main())
