"""streams.py: lines of logs whose reports are true, and a testing side that training never shows."""

import gzip
from itertools import islice

import pytest
from hspmn import streams
from hspmn.streams import INCIDENTS, SEEN, UNSEEN, LogStream


def lines(seed, count=4000, **options):
    return list(islice(LogStream(seed, **options), count))


def test_a_stream_is_a_function_of_its_seed():
    assert lines(7) == lines(7) and lines(7) != lines(8)


def test_the_testing_side_shares_no_value_and_has_kinds_of_its_own():
    sides = [[line for seed in range(3) for line in lines(seed, test=test, every=10)] for test in (False, True)]
    for part in (lambda line: line.id, lambda line: line.text[9:]):  # all but the time of day
        train, test = ({part(line) for line in side} for side in sides)
        assert not train & test and len(test) > 9000
    values = [{value for line in side for value in line.details.values()} for side in sides]
    assert not values[0] & values[1]
    kinds = [{line.kind for line in side if line.label == "incident"} for side in sides]
    assert kinds == [{*SEEN}, {*SEEN, *UNSEEN}] == [kinds[0], {*INCIDENTS}]


def test_incidents_may_have_names_of_their_own():
    names = {}
    for renamed in (0.0, 0.5):
        made = [line for line in lines(2, every=2, renamed=renamed) if line.label == "incident"]
        names[renamed] = [line.text.split(": ")[1].split()[1] for line in made]
    known = {template.split()[1] for _, template in INCIDENTS.values()}
    assert {*names[0.0]} < known  # those of training alone
    share = sum(name in known for name in names[0.5]) / len(names[0.5])
    assert share == pytest.approx(0.5, abs=0.1) and len({*names[0.5]} - known) > 500


def test_every_report_is_true_and_the_only_one():
    made = lines(1, 20_000, every=20, lag=100)
    told, incidents, about, given = {}, [line for line in made if line.label == "incident"], [], set()
    assert len({line.id for line in incidents}) == len(incidents) == pytest.approx(900, rel=0.1)
    for line in made:
        if line.label != "report":
            told[line.id] = line
            continue
        ((field, value),) = line.details.items()
        assert told[line.id].details[field] == value and value in told[line.id].text
        assert line.text.endswith(f" id={line.id} {field}={value}\n") and line.text[line.given :] == f"{value}\n"
        assert (line.id, field) not in given
        given.add((line.id, field))
        about.append(told[line.id].label)
    assert about.count("incident") == pytest.approx(2 * len(incidents), rel=0.05)
    assert 0 < about.count("routine") < 0.05 * len(about)


def test_the_command_writes_a_stream_with_lines_of_the_machine(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.log").write_bytes(b"status installed one\n\n\xff broken\n")
    (tmp_path / "a.log.1.gz").write_bytes(gzip.compress(b"status removed two\n"))
    monkeypatch.setattr(streams, "MACHINE_LOGS", (f"{tmp_path}/a.log*", f"{tmp_path}/none"))
    out = tmp_path / "made" / "stream.txt"
    command = ["--lines", "3000", "--seed", "3", "-o", str(out)]
    assert streams.main(command) == 0
    assert out.read_text().splitlines(keepends=True) == [line.text for line in lines(3, 3000)]
    assert streams.main([*command, "--machine"]) == 0
    assert {"status installed one\n", "status removed two\n"} < {*out.read_text().splitlines(keepends=True)}
    with pytest.raises(SystemExit, match="2"):
        streams.main(["-o", str(out / "below")])
    assert len(capsys.readouterr().err.splitlines()) == 1
