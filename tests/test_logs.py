"""benchmarks/logs.py: reports stand where they should, classes are counted exactly, and the tiny run."""

import json
import subprocess
import sys
from argparse import Namespace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from hspmn.benchmarks import logs, peers
from hspmn.streams import LogStream


@pytest.fixture(scope="module")
def encoder():
    return logs.Encoder(600)


@pytest.fixture(scope="module")
def args():
    return logs.make_parser().parse(["--tiny"], logs.TINY)


@pytest.fixture(scope="module")
def stream(encoder):
    return logs.AskedStream(encoder, "here", 1024, 5, every=20)


def test_cutting_at_details_leaves_the_tokens_as_they_are(encoder):
    for line in islice(LogStream("cut", test=True, every=2), 500):
        ids, begin, end = encoder.line(line)
        assert ids == encoder.ids(line.text)
        assert encoder.tokenizer.decode(ids[begin:end]) == ("" if line.given is None else line.text[line.given : -1])


def test_reports_stand_at_their_distance(encoder, stream):
    text_of = [encoder.tokenizer.decode(stream.ids[stream.line_T == n]) for n in range(len(stream.labels))]
    begins = np.searchsorted(stream.line_T, np.arange(len(text_of)))
    first = {text.split(" id=")[1][:9]: n for n, text in reversed([*enumerate(text_of)]) if " id=" in text}
    asked = set()
    for begin, end in stream.answers:
        n = stream.line_T[begin]
        about = first[text_of[n].split(" id=")[1][:9]]
        assert stream.labels[n] == "report" and stream.labels[about] == "incident"
        assert 0 <= begins[n] - begins[about] - 1024 < 100
        assert encoder.tokenizer.decode(stream.ids[begin:end]) in text_of[about]
        asked.add(n)
    assert len(asked) == len(stream.answers) == 5
    assert begins[min(asked)] > len(stream.ids) - 1.5 * stream.tail


def test_training_rows_mark_what_reports_give(encoder):
    rows = logs.LogRows(encoder, 8, 1024, 0, shortest=256, grown=0.5)
    assert len(rows) == 8 and torch.equal(rows[3], rows[3]) and not torch.equal(rows[3], rows[4])
    ids_BT, given_BT, position_BT = torch.stack(list(rows)).unbind(1)
    assert ids_BT.shape == (8, 1024) and 0.01 < given_BT.float().mean() < 0.2
    text = encoder.tokenizer.decode(ids_BT[given_BT > 0])
    assert not set(text) - set("0123456789.abcdefghijklmnopqrstuvwxyz")
    assert torch.equal(position_BT[0], torch.arange(1024) % 256)  # documents grow after the first row
    assert ((position_BT[:, 1:] == 0) | (position_BT.diff() == 1)).all() and position_BT[4:].max() > 300


def test_routers_are_taught_what_answers_read(encoder, args):
    """Tokens before an answer's window are wanted as far as it reads them; nothing else is, nor another document's."""
    config = logs.arm_config("hspmn", args, 5)
    config.vocab_size, config.sliding_window = 600, 4
    model = peers.build_model("hspmn", config, 0)
    router = model.base_model.layers[1].router
    ids_BT = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14, 7, 8]])
    given_BT = torch.zeros_like(ids_BT)
    given_BT[0, 9] = 1
    reads = []
    for position_T in (torch.arange(10), torch.arange(10) % 8):
        router.zero_grad()
        outputs = model.base_model(ids_BT, position_ids=position_T[None], use_cache=False, output_hidden_states=True)
        outputs.router_scores.retain_grad()
        logs.read_loss(model, outputs, given_BT, position_T[None]).backward()
        reads.append((outputs.router_scores.sigmoid() - 10 * outputs.router_scores.grad)[1, 0].detach())
        assert router.weight.grad.abs().sum() > 0
    assert reads[0][:5].max() > 0.05 and reads[0][5:].abs().max() < 1e-6 and reads[1].abs().max() < 1e-6


def test_classes_are_counted_exactly(stream):
    label_T = np.array(stream.labels)[stream.line_T]
    scores_T, share_T = (label_T == "incident") * 2.0, np.where(label_T == "incident", 0.75, 0.25)
    found = logs.by_line(stream, scores_T, share_T)
    assert (found["incident_share"], found["routine_share"], found["report_share"]) == (0.75, 0.25, 0.25)
    assert found["auc"] == 1.0
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 50), rng.integers(0, 7, 70)
    pairs = np.sign(positive[:, None] - negative) / 2 + 0.5
    assert logs.area_under_curve(positive, negative) == pytest.approx(pairs.mean())


def test_reading_in_pieces_gives_the_same_and_biases_keep_the_share(args, stream):
    config = logs.arm_config("hspmn", args, 10)
    config.vocab_size = 600
    model = peers.build_model("hspmn", config, 0).eval()
    assert config.layer_sparsity == [0.0, 0.2]
    logs.set_biases(model, stream.ids[None])
    whole, cut = (logs.read(model, stream.ids, stream.answers, piece) for piece in (len(stream.ids), 100))
    assert np.array_equal(whole[0], cut[0]) and np.array_equal(whole[2], cut[2])
    np.testing.assert_allclose(whole[1], cut[1], atol=1e-5)
    assert whole[2].mean() == pytest.approx(0.2, abs=0.001)
    model.lm_head.weight.data.zero_()  # every token is as likely, and the first one chosen
    assert not logs.read(model, stream.ids, stream.answers, 100)[0].any()
    assert logs.read(model, torch.zeros_like(stream.ids), stream.answers, 100)[0].all()


@pytest.mark.parametrize("arm", ["hspmn", "random"])
def test_routers_wait_until_recall_may_have_formed(encoder, args, arm):
    """Everything is kept and no weight moves; then one that learns does, and a random one balances its bias alone."""
    config = logs.arm_config(arm, args, 5)
    config.vocab_size, args = 600, Namespace(**vars(args) | {"hold": 0.5, "fall": 0.25})
    model = peers.build_model(logs.ARMS[arm], config, 0)
    router, start = model.base_model.layers[1].router, model.base_model.layers[1].router.weight.detach().clone()
    schedule, rows = logs.Schedule(model, arm, args), torch.utils.data.DataLoader(logs.LogRows(encoder, 8, 128, 0))
    loss_function = partial(logs.report_loss, weight=0.5, schedule=schedule)
    trained = peers.train_steps(model, rows, loss_function, 8, 1e-3, schedule)
    for step, (_, outputs) in enumerate(trained):
        if step < 4:
            assert outputs.router_load[1] == 1.0 and outputs.aux_loss == 0.0 and router.bias == logs.OPEN_BIAS
            assert torch.equal(router.weight, start * (arm == "random"))
        elif step > 4:
            assert router.bias < logs.OPEN_BIAS and (outputs.aux_loss > 0.0) == (arm != "random")
            assert torch.equal(router.weight, start) == (arm == "random")


def test_tiny_run(tmp_path):
    command = ["--tiny", "--output", str(tmp_path), "--percents", "2.5"]
    assert logs.main(command) == 0 and logs.main([*command, "--arms", "hspmn", "--seeds", "1"]) == 0
    document = json.loads((tmp_path / "logs.json").read_text())
    values = {(row["case"], row["metric"]): row["value"] for row in document["rows"]}
    arms = ("hspmn/2.5", "random/2.5", "window/2.5", "full/100")
    cases = {f"{arm}/{distance}" for arm in arms for distance in (128, 512)}
    assert {case for case, _ in values} == cases and len(document["runs"]) == 5
    assert values["hspmn/2.5/512", "seeds"] == 2 and values["full/100/512", "seeds"] == 1
    for case in cases:
        assert 0 <= values[case, "incident_accuracy"] <= 1
    share = values["window/2.5/512", "bytes_per_line"] / values["full/100/512", "bytes_per_line"]
    assert share == pytest.approx(0.025, abs=0.001)  # 13 of 512 tokens
    for metric in ("incident_share", "routine_share", "report_share", "auc"):
        assert 0 <= values["hspmn/2.5/128", metric] <= 1 and ("window/2.5/128", metric) not in values


def test_a_machine_without_datasets_runs_it():
    code = (
        "import runpy, sys\n"
        "class Lacks:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('datasets', 'pyarrow'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Lacks())\n"
        "sys.argv = ['logs.py', '--help']\n"
        f"runpy.run_path({logs.__file__!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--percents" in done.stdout, done.stderr


@pytest.mark.parametrize("arguments", ["--percents 99", "--vocab_size 100", "--arms hspnm", "--lengths 1"])
def test_wrong_arguments_are_refused_in_one_line(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        logs.main(["--tiny", "--output", str(tmp_path), *arguments.split()])
    assert arguments.split()[0] in capsys.readouterr().err and not list(tmp_path.iterdir())
