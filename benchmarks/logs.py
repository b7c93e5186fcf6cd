"""What is a router worth on streams of logs? Trains small models on them and asks for incidents that are long past.

    python benchmarks/logs.py                                        every arm, share and seed, one GPU
    python benchmarks/logs.py --arms hspmn --seeds 0 --percents 2.5  some of it; added to the results
    python benchmarks/logs.py --tiny                                 everything, in seconds, on a CPU

Arms, trained alike on rows of `streams.py` whose reports ask for incidents of the same row:
    hspmn    two routed layers share the bytes; the router learns
    random   the same with every router frozen at its random start; its bias still balances the load
    window   no routed layers, the local window sees the whole row; later it is as wide as the bytes allow
    full     every layer keeps every token: 100 % of the bytes
One training serves every share of bytes: before a test the biases of the routers are set, on a stream of its own, so
that the share is kept, and the window to that share of the distance. A test reads streams as long as its distance in
pieces through the cache; values and a part of the kinds of incidents are not those of training. Reports stand at the
end, each a distance after the incident that it names; a detail is right if all of its tokens are the likeliest after
those before. The results file keeps every training, and means over seeds. B rows, T tokens.

    incident_accuracy   share of the details of incidents at this distance that are right
    incident_share      share of the tokens of incidents that are kept, mean of the routed layers; routine_share and
                        report_share alike
    auc, auc_unseen     area under the curve of a line's mean score against "incident", kinds of training and others
    bytes_per_line      bytes of bfloat16 keys and values kept per line of the stream
"""

import json
import math
import os
import sys
import time
from collections import deque
from functools import partial
from itertools import islice, product
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from types import ModuleType

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import DataLoader

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parents[1])]

from hspmn import results
from hspmn.benchmarks.peers import build_model, comparison_config, settle, train_steps
from hspmn.benchmarks.report import SECTIONS, table
from hspmn.block_hspmn import make_stream
from hspmn.configuration_hspmn import ROUTING_PERIOD
from hspmn.streams import UNSEEN, LogStream
from hspmn.tokens import fit_tokenizer, rows_of

ARMS = {"hspmn": "hspmn", "random": "hspmn_random", "window": "hspmn", "full": "hspmn"}  # and models of `peers`
TOKENIZER_LINES, DIGITS = 20_000, 3
TRAINED_EVERY = (2, 32)  # lines per incident in training rows, drawn evenly in the logarithm
RENAMED = 0.5  # incidents of training rows with a name of their own
OPEN_BIAS = 2.0  # of routers while every token is kept
TOKENS_PER_LINE = 28  # from below
CALIBRATION = 65_536  # tokens on which biases are set
REPORT_LINES = 4  # lines per report at the end of a test, about
FULL = {
    "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 704}  # fmt: skip
BASE = {  # of all arms. Every token reads; no gate is cut off before its worth is known; rows may have many incidents
    "contextual_readers": "all", "router_noise_floor": 0.0, "capacity_factor": 4.0,
    # as for needles: what would turn slowly does not turn at all
    "rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}  # fmt: skip


class Encoder:
    """From lines to token ids. A report is cut before the detail that it gives, where its tokenizer cuts as well."""

    def __init__(self, vocab_size):
        lines = islice(LogStream("tokenizer", every=10, lag=100), TOKENIZER_LINES)
        self.tokenizer = fit_tokenizer((line.text for line in lines), vocab_size, digits=DIGITS)

    def ids(self, text):
        """Token ids of a text."""
        return self.tokenizer.backend_tokenizer.encode(text).ids

    def line(self, line):
        """Token ids of a `Line`, and begin and end of the detail that it gives, both its length if it gives none."""
        if line.given is None:
            return (ids := self.ids(line.text)), len(ids), len(ids)
        head, detail = self.ids(line.text[: line.given]), self.ids(line.text[line.given : -1])
        return head + detail + self.ids(line.text[-1:]), len(head), len(head) + len(detail)


class LogRows(torch.utils.data.Dataset):
    """Training rows, int64 [3, length]: token ids, which of them give a detail again, and positions, which begin anew
    with each document. A row depends on seed and number alone. Documents have `shortest` tokens at first; the longest,
    up to the row, double in even steps until `grown` of the rows: recall forms among a few lines, and one that only
    ever told a few incidents from each other fails among thousands. Incidents are more frequent than in tests: of a
    row with one report few tokens say anything about what to keep."""

    def __init__(self, encoder, rows, length, seed, shortest=512, grown=0.5):
        self.encoder, self.rows, self.length, self.seed = encoder, rows, length, seed
        self.shortest, self.grown = min(shortest, length), grown

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        random, row = Random(f"{self.seed}/{index}"), [[], [], []]
        grown = min(1.0, index / max(1.0, self.grown * self.rows))
        longest = self.shortest * (self.length / self.shortest) ** grown
        while (left := self.length - len(row[0])) > 0:
            tokens = min(left, round(math.exp(random.uniform(math.log(self.shortest), math.log(longest)))))
            for part, new in zip(row, (*self.document(random, tokens), range(tokens)), strict=True):
                part += new
        return torch.tensor(row)

    def document(self, random, tokens):
        """Ids of so many tokens of a stream, and which of them give a detail again."""
        every, ids, given = math.exp(random.uniform(*map(math.log, TRAINED_EVERY))), [], []
        lag = max(2, tokens // TOKENS_PER_LINE)
        for line in LogStream(random.random(), every=every, lag=lag, renamed=RENAMED):
            new, begin, end = self.encoder.line(line)
            ids += new
            given += [int(begin <= place < end) for place in range(len(new))]
            if len(ids) >= tokens:
                return ids[:tokens], given[:tokens]


class AskedStream:
    """A stream of the testing side at whose end stand `reports` reports, each about an incident that begins `distance`
    tokens, or up to two lines more, before. `every`: lines per other incident.

    ids: int64 [T]. line_T: number of the line of each token. labels, kinds: of each line. answers: begin and end of
    every detail asked for, in tokens. tail: tokens at the end that hold all reports, about.
    """

    def __init__(self, encoder, seed, distance, reports, every=50):
        self.ids, self.line_T, self.labels, self.kinds, self.answers = [], [], [], [], []
        stream, due, step = LogStream(seed, test=True, every=every), deque(), REPORT_LINES * TOKENS_PER_LINE
        self.tail = step * reports
        wanted = deque(range(0, self.tail, step))
        while wanted or due:
            here, asks = len(self.ids), False
            if due and due[0][0] <= here:
                line, asks = stream.report(due.popleft()[1]), True
            elif wanted and wanted[0] <= here:
                line, _ = stream.incident(), wanted.popleft()
                due.append((here + distance, line))
            else:
                line = stream.incident() if stream.random.random() < 1 / every else stream.routine()
            ids, begin, end = encoder.line(line)
            if asks:
                self.answers.append((here + begin, here + end))
            self.ids += ids
            self.line_T += [len(self.labels)] * len(ids)
            self.labels.append(line.label)
            self.kinds.append(line.kind)
        self.ids, self.line_T = torch.tensor(self.ids), np.array(self.line_T)


def report_loss(model, batch_B3T, weight, schedule=None):
    """Mean cross entropy in nats of the next token, of which details given again make the share `weight`; outputs.
    Where the schedule says so, `read_loss` is added to their `aux_loss`."""
    ids_BT, given_BT, position_BT = batch_B3T.unbind(1)
    teaches = schedule is not None and schedule.teaches
    outputs = model.base_model(
        input_ids=ids_BT, position_ids=position_BT, use_cache=False, output_hidden_states=teaches
    )
    if teaches:
        outputs.aux_loss = outputs.aux_loss + read_loss(model, outputs, given_BT, position_BT)
    logits_BTV = model.get_output_embeddings()(outputs.last_hidden_state[:, :-1]).float()
    losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    given_BT = given_BT[:, 1:].float()
    given = (losses_BT * given_BT).sum() / given_BT.sum().clamp(min=1)
    outputs.given_loss = given.detach()
    return torch.lerp(losses_BT.mean(), given, weight), outputs


def read_loss(model, outputs, given_BT, position_BT):
    """Sum over routed layers of the cross entropy of sigmoid(router score) with what is read of a token: most of the
    attention of any head that is about to give a token of a detail, from beyond the window.

    Gates alone teach a router nothing here: equal gates, however low, leave a softmax as it is and have paid their
    price, and a gate of a tenth takes nothing from a match that stands out by ten nats; so every token is wanted as
    much as any other until the threshold drops what it happens to. All reads, not those of details alone, are mostly
    of words that thousands of lines share. A token that was dropped is read as if it had not been."""
    base, window, total = model.base_model, model.config.sliding_window, 0.0
    stream = make_stream(outputs.hidden_states[0], None, base.rotary_emb, position_BT)
    token_T = torch.arange(given_BT.shape[1], device=given_BT.device)
    for layer, x_BTD, score_BT in zip(base.layers, outputs.hidden_states[:-1], outputs.router_scores, strict=True):
        if layer.router is None:
            continue
        with torch.no_grad():
            heads, read_BT = layer.projection(layer.input_layernorm(x_BTD), stream), torch.zeros_like(score_BT)
            for row, (q_THE, k_TGE) in enumerate(zip(heads.q_BTHE, heads.k_BTGE, strict=True)):
                at_Q = given_BT[row, 1:].nonzero()[:, 0]
                if not len(at_Q):
                    continue
                q_QGXE = q_THE[at_Q].unflatten(1, (k_TGE.shape[1], -1))
                scores_GXQT = torch.einsum("qgxe,tge->gxqt", q_QGXE, k_TGE).float() * k_TGE.shape[-1] ** -0.5
                scores_GXQT += F.logsigmoid(score_BT[row])
                first_Q1, at_Q1 = (at_Q - position_BT[row, at_Q])[:, None], at_Q[:, None]
                scores_GXQT.masked_fill_((token_T < first_Q1) | (token_T > at_Q1), float("-inf"))
                far_QT = token_T <= at_Q1 - window
                read_BT[row] = (scores_GXQT.softmax(-1) * far_QT).amax((0, 1, 2))
        total = total + F.binary_cross_entropy_with_logits(score_BT, read_BT)
    return total


def arm_config(arm, args, percent, window=None):
    """Configuration of an arm that keeps `percent` of the bytes; window: that of arm `window`, the row by default."""
    sizes, L = {field: getattr(args, field) for field in FULL}, args.num_hidden_layers
    config = comparison_config(ARMS[arm], sizes, BASE | results.parse_overrides("--set", args.set))
    routing = [i % ROUTING_PERIOD == ROUTING_PERIOD - 1 or i == L - 1 for i in range(L)]
    if (share := percent / 100 * L / sum(routing)) > 1 and arm in ("hspmn", "random"):
        results.refuse(f"--percents {percent:g} is more than the {sum(routing)} routed of {L} layers hold; lower it")
    config.sparsity_k = {"window": 0.0, "full": 1.0}.get(arm, [min(1.0, share) * routes for routes in routing])
    if arm == "window":
        config.sliding_window = window or args.length
    return config


class Schedule:
    """What routers do at each step of training, in three parts. Until `--hold` of the steps every token is kept and
    nothing is learned about keeping: recall forms only while nothing is missing, and before it nobody knows what a
    token is worth. A router that will learn starts at weight zero, so that all gates are equal. Then, over `--fall` of
    the steps, the target falls, and routers learn what is read (`read_loss`), or at `--price` what gates are worth.
    Frozen ones (arm `random`) balance their bias alone. States are bounded from the first step, so that recall is not
    theirs."""

    def __init__(self, model, arm, args):
        self.hold, self.fall, self.config = args.hold, args.fall, model.config
        self.routers = [layer.router for layer in model.base_model.layers if layer.router is not None]
        self.learns, self.open = torch.zeros((), device=args.device), arm != "random"
        self.taught, self.price = arm == "hspmn" and not args.price, args.price
        self.teaches = False
        for router in self.routers:
            if self.open:
                torch.nn.init.zeros_(router.weight)
            torch.nn.init.constant_(router.bias, OPEN_BIAS)
            router.weight.register_hook(lambda gradient: gradient * self.learns)

    def __call__(self, step, steps):
        """Before each step."""
        progress = min(1.0, max(0.0, (step / steps - self.hold) / max(self.fall, 1e-9)))
        self.learns.fill_(self.open and progress > 0)
        self.teaches = self.taught and progress > 0
        self.config.router_load_entropy_coef = self.price if progress else 0.0
        for router in self.routers:
            router.set_progress(progress)


def train(arm, args, encoder, seed):
    """A trained model of an arm, and its entry of the results file."""
    rows = LogRows(encoder, args.steps * args.batch_size, args.length, seed, args.shortest, args.grown)
    workers = 0 if args.device == "cpu" else min(12, os.cpu_count())
    loader = DataLoader(rows, batch_size=args.batch_size, num_workers=workers, pin_memory=workers > 0)
    model = build_model(ARMS[arm], arm_config(arm, args, args.train_percent), seed).to(args.device)
    if args.compile == "layers":
        torch._dynamo.config.recompile_limit = 64
        for layer in model.base_model.layers:
            layer.compile(dynamic=False, fullgraph=True)
    print(f"{arm} seed {seed}: {model.num_parameters():,} parameters", flush=True)
    begun, losses, every = time.monotonic(), [], max(1, args.steps // 10)
    batches = (batch.to(args.device, non_blocking=True) for batch in loader)
    schedule = Schedule(model, arm, args)
    loss_function = partial(report_loss, weight=args.report_weight, schedule=schedule)
    trained = train_steps(model, batches, loss_function, args.steps, args.lr, schedule)
    for step, (loss, outputs) in enumerate(trained, 1):
        losses.append(torch.stack([loss, outputs.given_loss]))
        if step % every == 0:
            (loss, given), losses = torch.stack(losses).mean(0).tolist(), []
            if not math.isfinite(loss):
                results.refuse(f"--lr {args.lr}: the training loss is {loss} at step {step}; lower it")
            load = " ".join(f"{share:.3f}" for share in outputs.router_load.tolist() if share)
            seconds = time.monotonic() - begun
            print(f"  step {step} loss {loss:.3f} given {given:.3f} load {load or '-'} ({seconds:.0f} s)", flush=True)
    entry = {"arm": arm, "seed": seed, "steps": args.steps, "loss": loss, "given_loss": given}
    return model, entry | {"train_s": round(time.monotonic() - begun, 1)}


@torch.no_grad()
def set_biases(model, rows_NT):
    """Set the bias of each router, layer by layer, so that it keeps its share of the tokens of rows [N, T]."""
    for layer, share in enumerate(model.config.layer_sparsity):
        if 0 < share < 1:
            scores_NT = model.base_model(rows_NT, use_cache=False).router_scores[layer]
            model.base_model.layers[layer].router.bias.copy_(-scores_NT.flatten().quantile(1 - share))


@torch.no_grad()
def read(model, ids_T, answers, piece):
    """Read a stream in pieces through the cache. Returns which answers are right, bool [answers], and of each token,
    float64 [T] each, the mean score over routed layers and how many layers keep it."""
    places = torch.tensor(sorted({place - 1 for begin, end in answers for place in range(begin, end)}))
    weight_VD = model.get_output_embeddings().weight.float()  # no two tokens are equally likely by rounding
    routed, right, scores, kept, cache = list(map(bool, model.config.layer_sparsity)), [], [], [], None
    for begin in range(0, len(ids_T), piece):
        ids = ids_T[begin : begin + piece].to(model.device)
        outputs = model.base_model(ids[None], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        here = places[(places >= begin) & (places < begin + piece)]
        hidden_PD = outputs.last_hidden_state[0, (here - begin).to(model.device)].float()
        right.append((hidden_PD @ weight_VD.T).argmax(-1).cpu() == ids_T[here + 1])
        scores.append(outputs.router_scores[routed, 0].sum(0).cpu() / max(1, sum(routed)))
        kept.append(outputs.router_mask[:, 0].sum(0).cpu())
    told = dict(zip((places + 1).tolist(), torch.cat(right).tolist(), strict=True))
    right = np.array([all(told[place] for place in range(begin, end)) for begin, end in answers])
    return right, torch.cat(scores).double().numpy(), torch.cat(kept).double().numpy()


def area_under_curve(positive, negative):
    """Probability that a positive has a higher value than a negative, ties counting half."""
    negative = np.sort(negative)
    places = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(places.sum() / (2 * len(negative) * len(positive)))


def by_line(stream, scores_T, share_T):
    """Shares kept by class of line, and areas under the curve of the lines' mean scores."""
    line_T, labels, kinds = stream.line_T, np.array(stream.labels), np.array(stream.kinds)
    found = {f"{label}_share": share_T[labels[line_T] == label].mean() for label in ("incident", "routine", "report")}
    score, incident, unseen = np.bincount(line_T, scores_T), labels == "incident", np.isin(kinds, UNSEEN)
    score /= np.bincount(line_T)
    for name, chosen in (("auc", incident & ~unseen), ("auc_unseen", incident & unseen)):
        if chosen.any():
            found[name] = area_under_curve(score[chosen], score[labels == "routine"])
    return found


def test(arm, args, weights, streams, calm_NT, percent, distance):
    """Metrics of an arm with trained `weights`, means over the streams of a distance. Of arm `window` only the end of
    a stream is read: nothing before is in reach of its reports."""
    config, each = arm_config(arm, args, percent, max(2, round(percent / 100 * distance))), []
    model = build_model("hspmn", config, 0).to(args.device, args.dtype).eval()
    model.load_state_dict(weights)
    set_biases(model, calm_NT.to(args.device))
    slot = 2 * config.num_key_value_heads * config.head_dim * 2
    for stream in streams:
        skipped = max(0, len(stream.ids) - stream.tail - 2 * distance) if arm == "window" else 0
        answers = [(begin - skipped, end - skipped) for begin, end in stream.answers]
        right, scores_T, kept_T = read(model, stream.ids[skipped:], answers, args.piece)
        held, metrics = slot * kept_T.mean(), {"incident_accuracy": right.mean()}
        if arm == "window":
            held = slot * config.sliding_window * config.num_hidden_layers / distance
        elif arm != "full":
            metrics |= by_line(stream, scores_T, kept_T / sum(map(bool, config.layer_sparsity)))
        each.append(metrics | {"bytes_per_line": held * len(stream.ids) / len(stream.labels)})
    return means(each)


def means(each):
    """Of several metrics by name, the mean of each over those that have it."""
    names = dict.fromkeys(name for metrics in each for name in metrics)
    return {name: fmean(metrics[name] for metrics in each if name in metrics) for name in names}


def summary_rows(runs):
    """The rows of a results file: means over seeds, and the spread of the accuracy."""
    cases = {}
    for run in runs.values():
        for case, metrics in run["tests"].items():
            cases.setdefault(case, []).append(metrics)
    rows = []
    for case, each in cases.items():
        values = means(each)
        if len(each) > 1:
            values["incident_accuracy_std"] = stdev(metrics["incident_accuracy"] for metrics in each)
        rows += [results.row(case, name, value) for name, value in (values | {"seeds": len(each)}).items()]
    return rows


def add_run(path, name, entry, command):
    """Add a training to the results file, in place of an earlier one; other processes may add theirs."""
    with results.held(path.parent):
        runs = results.read_results(path).get("runs", {}) | {name: entry}
        results.merge_results(path, summary_rows(runs), {"runs": {name: entry}}, command)


def show(path):
    """Print the table of a results file and plot accuracy over distance as a PNG beside it."""
    rows = json.loads(path.read_text())["rows"]
    print("\n".join(table(SECTIONS["logs"], rows)))
    figure, axes = results.new_figure(7, 4)
    if figure is None:
        return
    curves = {}
    for row in rows:
        if row["metric"] == "incident_accuracy":
            arm, distance = row["case"].rsplit("/", 1)
            curves.setdefault(arm, []).append((int(distance), row["value"]))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=".", label=f"{name} %", linewidth=1.2)
    axes.set(xlabel="tokens between incident and report", ylabel="details right", xscale="log", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")


def run_all(args, path):
    """Train and test every arm with every seed."""
    encoder = Encoder(args.vocab_size)
    streams = {
        distance: [AskedStream(encoder, f"test {number}", distance, args.reports) for number in range(args.streams)]
        for distance in args.lengths}  # fmt: skip
    calm = AskedStream(encoder, "calibration", CALIBRATION if args.device == "cuda" else args.length, 1).ids
    calm_NT = rows_of(calm.numpy(), args.length)
    for distance, (stream, *_) in streams.items():
        print(f"distance {distance:,}: {len(stream.ids):,} tokens, {len(stream.labels):,} lines", flush=True)
    for seed, arm in product(args.seeds, args.arms):
        model, entry = train(arm, args, encoder, seed)
        if args.checkpoints:
            for part in (model, encoder.tokenizer):
                part.save_pretrained(args.checkpoints / f"{arm}-s{seed}")
        weights, begun = model.state_dict(), time.monotonic()
        del model
        tests = {}
        for percent, distance in product([100.0] if arm == "full" else args.percents, args.lengths):
            metrics = test(arm, args, weights, streams[distance], calm_NT, percent, distance)
            tests[f"{arm}/{percent:g}/{distance}"] = metrics
            numbers = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"  {arm}/{percent:g}/{distance}: {numbers}", flush=True)
        entry |= {"test_s": round(time.monotonic() - begun, 1), "tests": tests}
        add_run(path, f"{arm}/{seed}", entry, args.command)
        torch.compiler.reset()  # the next model's graphs would count against the same limit


TINY = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "steps": 2, "batch_size": 2, "length": 256, "lengths": [128, 512], "reports": 2,
    "streams": 1, "seeds": [0], "device": "cpu", "compile": "none", "piece": 384,
    "output": results.ROOT / "build"}  # fmt: skip


def make_parser():
    """Arguments; every default is the setting of the committed comparison."""
    parser = results.Parser("benchmarks/logs.py", __doc__)
    add, positive = parser.add_argument, results.at_least(1)
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--seeds", type=results.SEED, nargs="+", default=[0, 1, 2])
    add("--percents", type=results.at_least(1e-3, float, 100.0), nargs="+", default=[5.0, 2.5, 1.0],
        help="shares of the full cache's bytes to test")  # fmt: skip
    add("--train_percent", type=results.at_least(1e-3, float, 100.0), default=2.5, help="share to train with")
    add("--lengths", type=results.at_least(64, most=2**21), nargs="+", default=[1024, 8192, 131072, 1048576],
        help="tokens between an incident and its report")  # fmt: skip
    add("--reports", type=positive, default=256, help="reports per stream")
    add("--streams", type=positive, default=2, help="streams per distance")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of HSPMNConfig for all arms")
    add("--steps", type=positive, default=3000)
    add("--batch_size", type=positive, default=2, help="rows per step")
    add("--length", type=results.at_least(64), default=16384, help="tokens per row")
    add("--shortest", type=results.at_least(64), default=512, help="tokens of a document at least, and at first")
    add("--grown", type=results.SHARE, default=0.5, help="share of the steps after which documents fill a row")
    add("--lr", type=results.RATE, default=2e-3, help="peak learning rate")
    add("--hold", type=results.SHARE, default=0.5, help="share of the steps in which every token is kept")
    add("--fall", type=results.SHARE, default=0.3, help="share of the steps over which fewer and fewer are")
    add("--price", type=results.at_least(0.0, float), default=0.0,
        help="router_load_entropy_coef while routers learn, in the place of what is read")  # fmt: skip
    add("--report_weight", type=results.SHARE, default=0.5, help="share of the details given again in the loss")
    for field, size in FULL.items():
        add(f"--{field}", type=positive, default=size)
    add("--piece", type=positive, default=65536, help="tokens that a test reads at once")
    add("--device", choices=results.DEVICES, default=results.DEVICES[0])
    add("--compile", choices=("layers", "none"), help="layers on cuda, none on cpu")
    add("--checkpoints", type=Path, help="folder that keeps the trained models")
    add("--output", type=Path, default=results.RESULTS, help="folder of the results file and plot")
    add("--name", type=results.file_name, default="logs", help="name of the results file")
    add("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser


def main(argv=None):
    """Run the comparison; returns the exit code."""
    args = make_parser().parse(argv, TINY)
    settle(args)
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    for percent in (args.train_percent, *args.percents):
        arm_config("hspmn", args, percent)  # refuses before any work what no layers hold
    path = args.output / f"{args.name}.json"
    results.check_output(path)
    if args.checkpoints is not None:
        results.check_folder("--checkpoints", args.checkpoints)
    torch.set_float32_matmul_precision("high")
    transformers.utils.logging.disable_progress_bar()
    run_all(args, path)
    show(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
