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
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
SECTION = re.compile(r"<!-- results:(\w+) -->\n(.*?)<!-- /results -->", re.DOTALL)
NOTHING = "-"
HSPMN = ("hspmn", "hspmn_routing", "hspmn_reflexive", "hspmn_even")  # first in every group of rows, in this order
DEFAULT = (
    "`hspmn`: default configuration, 0.8 of the tokens in every fourth layer, none elsewhere; its block is the mean "
    "of one `hspmn_routing` and three `hspmn_reflexive`."
)
EVEN = " `hspmn_even`: original setting, 0.2 in every layer."


def three_digits(value):
    """Form with three digits, and all of them before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def millions(value):
    """Form of tokens per second."""
    return f"{value / 1e6:,.2f} M" if value >= 1e5 else f"{value:,.0f}"


WHOLE, ONE_PLACE, TWO_PLACES, THREE_PLACES = "{:,.0f}".format, "{:.1f}".format, "{:.2f}".format, "{:.3f}".format
COLUMNS = {  # a function from a value to a text, and the metric, or two of them for a range
    "val": (THREE_PLACES, "val"), "recall": (THREE_PLACES, "recall"), "other": (THREE_PLACES, "other"),
    "seeds": (WHOLE, "seeds"), "std of val": (THREE_PLACES, "val_std"),
    "load / target": (TWO_PLACES, "load_min", "load_max"),
    "KV bytes per token": (WHOLE, "kv_bytes_per_token"), "training tok/s": (millions, "train_tok_s"),
    "accuracy": (THREE_PLACES, "accuracy"), "through int8": (THREE_PLACES, "accuracy_int8"),
    "through int4": (THREE_PLACES, "accuracy_int4"), "ms": (three_digits, "ms"),
    "eager ms": (three_digits, "eager_ms"), "compiled ms": (three_digits, "compiled_ms"),
    "graph ms": (three_digits, "graph_ms"), "first token ms": (three_digits, "ttft_ms"),
    "one forward ms": (three_digits, "forward_ms"),
    "tok/s": (millions, "tok_s"), "prefill tok/s": (millions, "prefill_tok_s"),
    "decode tok/s": (millions, "decode_tok_s"), "tokens": (WHOLE, "tokens"), "peak GB": (ONE_PLACE, "peak_gb"),
    "launches": (three_digits, "launches"), "host us": (three_digits, "host_us"), "TB/s": (three_digits, "tb_s"),
    "TFLOP/s": (three_digits, "tflops"), "MFU": (TWO_PLACES, "mfu"), "first step s": (three_digits, "first_step_s"),
    "scaling": (TWO_PLACES, "scaling"), "floor ratio": (TWO_PLACES, "floor_ratio"),
    "details right": (THREE_PLACES, "incident_accuracy"), "incidents kept": (THREE_PLACES, "incident_share"),
    "routine kept": (THREE_PLACES, "routine_share"), "AUC": (THREE_PLACES, "auc"),
    "AUC, unseen": (THREE_PLACES, "auc_unseen"), "bytes per line": (WHOLE, "bytes_per_line")}  # fmt: skip
# The command that measures it, its columns, the part of a case name that keeps rows together, and whether its cases
# are of two configurations, which the table then names
Section = namedtuple("Section", "command columns group has_even", defaults=(-1, False))
MODE, SPEEDS = "python benchmark.py --mode ", ("ms", "tok/s", "peak GB", "over dense")
SECTIONS = {
    "quality": Section("python benchmarks/quality.py", (
        "val", "recall", "other", "seeds", "std of val", "load / target", "KV bytes per token", "training tok/s")),
    "serve": Section(MODE + "serve", (
        "first token ms", "one forward ms", "tok/s", "peak GB", "over dense", "launches", "host us")),
    "throughput": Section(MODE + "throughput", SPEEDS, has_even=True),
    "latency": Section(MODE + "latency", ("eager ms", "compiled ms", "graph ms"), has_even=True),
    "train": Section(MODE + "train", (
        "ms", "tok/s", "MFU", "peak GB", "over dense", "first step s", "scaling"), has_even=True),
    "kernels": Section(MODE + "kernels", ("ms", "TFLOP/s", "TB/s"), group=0),
    "decode": Section(MODE + "decode", ("ms", "tok/s", "floor ratio", "over dense"), has_even=True),
    "context": Section(MODE + "context", ("tokens", "prefill tok/s", "decode tok/s", "peak GB"), has_even=True),
    "needle": Section("python evaluate.py --task needle FOLDER", ("accuracy",), group=0),
    "mqar": Section("python benchmarks/mqar.py", ("accuracy", "through int8", "through int4")),
    "logs": Section("python benchmarks/logs.py", (
        "details right", "incidents kept", "routine kept", "AUC", "AUC, unseen", "bytes per line"))}  # fmt: skip


def cell(values, case, column):
    """The text of a column; over dense is the speed over that of the dense model in the same case, `<model>/...`."""
    dense = f"dense/{case.partition('/')[2]}"
    if column == "over dense":
        for name, power in (("tok_s", 1), ("ttft_ms", -1)):
            if {(case, name), (dense, name)} <= values.keys():
                return f"{(values[case, name] / values[dense, name]) ** power:.2f}x"
        return NOTHING
    form, *metrics = COLUMNS[column]
    known = all((case, metric) in values for metric in metrics)
    return "-".join(form(values[case, metric]) for metric in metrics) if known else NOTHING


def table(section, rows):
    """Lines of the Markdown table of a section, cases as rows; cases without any of its metrics are left out."""
    values = {(row["case"], row["metric"]): row["value"] for row in rows}
    found = {case: [cell(values, case, column) for column in section.columns] for case, _ in values}
    kept = [case for case, cells in found.items() if any(text != NOTHING for text in cells)]
    groups = {case: "/" in case and case.split("/")[section.group] for case in kept}
    order = list(dict.fromkeys(groups.values()))

    def place(case):  # repeated cases come last in the file
        model = case.split("/")[0]
        return order.index(groups[case]), HSPMN.index(model) if model in HSPMN else len(HSPMN)

    lines = [["case", *section.columns], ["---", *["---:"] * len(section.columns)]]
    lines += ([case, *found[case]] for case in sorted(kept, key=place))
    return [f"| {' | '.join(cells)} |" for cells in lines]


def refuse(message):
    """End the program with exit code 2 and one line on standard error."""
    print(f"report.py: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def section_text(name, folder):
    """What stands between the markers of section `name`."""
    section, path = SECTIONS[name], folder / f"{name}.json"
    if not path.exists():
        return f"not measured yet: `{section.command}`\n"
    try:
        return section_lines(section, path, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        problem = f"is no results file ({type(error).__name__}: {error})"
        refuse(f"--results: {path} {problem}; measure again: {section.command}")


def section_lines(section, path, document):
    """Source, remarks and table of a section whose file `path` holds `document`."""
    versions = [f"{name} {version}" for name, version in document["versions"].items() if name in ("torch", "triton")]
    source = ", ".join([document["device"], document["date"].split()[0], *versions])
    gathered, command = len(document.get("commands", [])), f"`{document['command']}`"
    if gathered > 1:
        command = f"{gathered} commands, all in `commands` of `{path.name}`, the last {command}"
    lines = [f"{source}: {command}", ""]
    if section.has_even:
        even = any(row["case"].startswith("hspmn_even/") for row in document["rows"])
        lines += [DEFAULT + EVEN * even, ""]
    return "\n".join([*lines, *table(section, document["rows"]), "", ""])


def main(argv=None):
    """Rewrite the pages or check them; returns the exit code."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(
        "benchmarks/report.py", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.error = refuse
    add = parser.add_argument
    add("--check", action="store_true", help="change nothing, exit with 1 if a page differs")
    add("--pages", type=Path, nargs="+", default=PAGES, help="files with sections, each on one of them")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the files")
    args = parser.parse_args(argv)
    try:
        old = {page: page.read_text("utf-8") for page in args.pages}
    except (OSError, ValueError) as error:
        refuse(f"--pages {' '.join(map(str, args.pages))}: {error}; name readable files")
    if not args.results.is_dir():
        refuse(f"--results {args.results} is no folder; name that of the results files")
    named = {name for text in old.values() for name, _ in SECTION.findall(text)}
    for name in sorted(named ^ SECTIONS.keys()):
        problem = f"<!-- results:{name} --> {'is unknown' if name in named else 'is missing'}"
        refuse(f"--pages: section {problem}; there is one for each of SECTIONS")

    def section(match):
        return f"<!-- results:{match[1]} -->\n{section_text(match[1], args.results)}<!-- /results -->"

    different = {page: new for page, text in old.items() if (new := SECTION.sub(section, text)) != text}
    for page, new in different.items():
        if args.check:
            print(f"{page.name} differs from {args.results.name}/*.json: run python benchmarks/report.py")
        else:
            page.write_text(new, "utf-8")
    return int(args.check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
