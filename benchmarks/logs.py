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
that the share is kept, and the window to that share of the distance. A test reads streams in pieces through the cache;
its values and a part of its kinds of incidents are not those of training. Reports stand at the end, each a distance
after the incident that it names; a detail is right if all of its tokens are the likeliest after those before. The
results file keeps every training, and means over seeds. B rows, T tokens.

    incident_accuracy   share of the details of incidents at this distance that are right
    incident_share      share of the tokens of incidents that are kept, mean of the routed layers; routine_share and
                        report_share alike
    auc, auc_unseen     area under the curve of a line's mean score against "incident", kinds of training and others
    bytes_per_line      bytes of bfloat16 keys and values kept per line of the stream
"""

import fcntl
import heapq
import json
import math
import os
import sys
import time
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
from hspmn.configuration_hspmn import ROUTING_PERIOD
from hspmn.streams import UNSEEN, LogStream
from hspmn.tokens import fit_tokenizer, rows_of

ARMS = {"hspmn": "hspmn", "random": "hspmn_random", "window": "hspmn", "full": "hspmn"}  # and models of `peers`
TOKENIZER_LINES, DIGITS = 20_000, 3
TRAINED_EVERY = (4, 32)  # lines per incident in training rows, drawn evenly in the logarithm
RENAMED = 0.5  # incidents of training rows with a name of their own
OPEN_BIAS = 2.0  # of routers while every token is kept
TOKENS_PER_LINE = 28  # from below
CALIBRATION = 65_536  # tokens on which biases are set
REPORT_LINES = 4  # lines per report at the end of a test, about
FULL = {
    "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 704}  # fmt: skip
BASE = {  # of all arms. Every token reads; no gate is cut off before its worth is known; rows may have many incidents
    "contextual_readers": "all", "router_noise_floor": 0.0, "router_load_entropy_coef": 0.3, "capacity_factor": 4.0,
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
    """Training rows, int64 [2, length]: token ids, and which of them give a detail again. A row depends on seed and
    number alone. Incidents are more frequent than in tests: of a row with one report few tokens say anything about
    what to keep."""

    def __init__(self, encoder, rows, length, seed):
        self.encoder, self.rows, self.length, self.seed = encoder, rows, length, seed

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        name, ids, given = f"{self.seed}/{index}", [], []
        low, high = map(math.log, TRAINED_EVERY)
        every = math.exp(Random(name).uniform(low, high))
        lag = max(2, self.length // TOKENS_PER_LINE)
        for line in LogStream(name, every=every, lag=lag, renamed=RENAMED):
            new, begin, end = self.encoder.line(line)
            ids += new
            given += [int(begin <= place < end) for place in range(len(new))]
            if len(ids) >= self.length:
                return torch.tensor([ids[: self.length], given[: self.length]])


class AskedStream:
    """A stream of the testing side at whose end stand, for each distance, `reports` reports about an incident that
    begins so many tokens, or up to two lines more, before. `every`: lines per other incident.

    ids: int64 [T]. line_T: number of the line of each token. labels, kinds: of each line. answers: begin and end of
    every detail asked for, in tokens, and its distance. tail: tokens at the end that hold all reports, about.
    """

    def __init__(self, encoder, seed, distances, reports, every=50):
        self.ids, self.line_T, self.labels, self.kinds, self.answers = [], [], [], [], []
        stream, due, step = LogStream(seed, test=True, every=every), [], REPORT_LINES * TOKENS_PER_LINE
        order = [distance for _ in range(reports) for distance in distances]
        self.tail = step * len(order)
        wanted = sorted((max(distances) + step * place - distance, distance) for place, distance in enumerate(order))
        while wanted or due:
            here, distance = len(self.ids), None
            if due and due[0][0] <= here:
                _, _, line, distance = heapq.heappop(due)
                line = stream.report(line)
            elif wanted and wanted[0][0] <= here:
                line = stream.incident()
                heapq.heappush(due, (here + wanted[0][1], here, line, wanted.pop(0)[1]))
            else:
                line = stream.incident() if stream.random.random() < 1 / every else stream.routine()
            ids, begin, end = encoder.line(line)
            if distance is not None:
                self.answers.append((here + begin, here + end, distance))
            self.ids += ids
            self.line_T += [len(self.labels)] * len(ids)
            self.labels.append(line.label)
            self.kinds.append(line.kind)
        self.ids, self.line_T = torch.tensor(self.ids), np.array(self.line_T)


def report_loss(model, batch_B2T, weight):
    """Mean cross entropy in nats of the next token, of which details given again make the share `weight`; outputs."""
    ids_BT, given_BT = batch_B2T.unbind(1)
    outputs = model.base_model(input_ids=ids_BT, use_cache=False)
    logits_BTV = model.get_output_embeddings()(outputs.last_hidden_state[:, :-1]).float()
    losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    given_BT = given_BT[:, 1:].float()
    given = (losses_BT * given_BT).sum() / given_BT.sum().clamp(min=1)
    outputs.given_loss = given.detach()
    return torch.lerp(losses_BT.mean(), given, weight), outputs


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
    the steps, the target falls, routers learn, and gates have their price. Frozen ones (arm `random`) balance their
    bias alone. States are bounded from the first step, so that recall is not theirs."""

    def __init__(self, model, arm, args):
        self.hold, self.fall, self.config = args.hold, args.fall, model.config
        self.routers = [layer.router for layer in model.base_model.layers if layer.router is not None]
        self.price, self.learns = model.config.router_load_entropy_coef, torch.zeros((), device=args.device)
        self.open = arm != "random"
        for router in self.routers:
            if self.open:
                torch.nn.init.zeros_(router.weight)
            torch.nn.init.constant_(router.bias, OPEN_BIAS)
            router.weight.register_hook(lambda gradient: gradient * self.learns)

    def __call__(self, step, steps):
        """Before each step."""
        progress = min(1.0, max(0.0, (step / steps - self.hold) / max(self.fall, 1e-9)))
        self.learns.fill_(self.open and progress > 0)
        self.config.router_load_entropy_coef = self.price if progress else 0.0
        for router in self.routers:
            router.set_progress(progress)


def train(arm, args, encoder, seed):
    """A trained model of an arm, and its entry of the results file."""
    rows = LogRows(encoder, args.steps * args.batch_size, args.length, seed)
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
    loss_function = partial(report_loss, weight=args.report_weight)
    trained = train_steps(model, batches, loss_function, args.steps, args.lr, Schedule(model, arm, args))
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
    places = torch.tensor(sorted({place - 1 for begin, end, _ in answers for place in range(begin, end)}))
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
    right = np.array([all(told[place] for place in range(begin, end)) for begin, end, _ in answers])
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


def test(arm, args, weights, streams, calm_NT, percent, distances):
    """Metrics of an arm with trained `weights` at each distance, means over the streams. Of arm `window`, which takes
    one distance, only the end of a stream is read: nothing before is in reach of its reports."""
    config = arm_config(arm, args, percent, max(2, round(percent / 100 * distances[0])))
    model = build_model("hspmn", config, 0).to(args.device, args.dtype).eval()
    model.load_state_dict(weights)
    set_biases(model, calm_NT.to(args.device))
    slot, tests = 2 * config.num_key_value_heads * config.head_dim * 2, {distance: [] for distance in distances}
    for stream in streams:
        reach = stream.tail + 2 * distances[0] if arm == "window" else len(stream.ids)
        skipped = max(0, len(stream.ids) - reach)
        answers = [(begin - skipped, end - skipped, of) for begin, end, of in stream.answers if of in distances]
        right, scores_T, kept_T = read(model, stream.ids[skipped:], answers, args.piece)
        tokens_per_line = len(stream.ids) / len(stream.labels)
        metrics = {"bytes_per_line": slot * kept_T.mean() * tokens_per_line}
        if arm == "window":
            held = slot * config.sliding_window * config.num_hidden_layers
            metrics["bytes_per_line"] = held / distances[0] * tokens_per_line
        elif arm != "full":
            metrics |= by_line(stream, scores_T, kept_T / sum(map(bool, config.layer_sparsity)))
        asked = np.array([of for _, _, of in answers])
        for distance in distances:
            tests[distance].append(metrics | {"incident_accuracy": right[asked == distance].mean()})
    return {distance: means(each) for distance, each in tests.items()}


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
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
    streams = [AskedStream(encoder, f"test {number}", args.lengths, args.reports) for number in range(args.streams)]
    calm = AskedStream(encoder, "calibration", [CALIBRATION if args.device == "cuda" else args.length], 1).ids
    calm_NT = rows_of(calm.numpy(), args.length)
    print(f"{len(streams)} streams of {len(streams[0].ids):,} tokens, {len(streams[0].labels):,} lines", flush=True)
    for seed, arm in product(args.seeds, args.arms):
        model, entry = train(arm, args, encoder, seed)
        if args.checkpoints:
            for part in (model, encoder.tokenizer):
                part.save_pretrained(args.checkpoints / f"{arm}-s{seed}")
        weights, begun = model.state_dict(), time.monotonic()
        del model
        tests = {}
        for percent in [100.0] if arm == "full" else args.percents:
            for distances in [[distance] for distance in args.lengths] if arm == "window" else [args.lengths]:
                for distance, metrics in test(arm, args, weights, streams, calm_NT, percent, distances).items():
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
    add("--reports", type=positive, default=64, help="reports per distance and stream")
    add("--streams", type=positive, default=2, help="streams of a test")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of HSPMNConfig for all arms")
    add("--steps", type=positive, default=1200)
    add("--batch_size", type=positive, default=16, help="rows per step")
    add("--length", type=results.at_least(64), default=2048, help="tokens per row")
    add("--lr", type=results.RATE, default=2e-3, help="peak learning rate")
    add("--hold", type=results.SHARE, default=0.35, help="share of the steps in which every token is kept")
    add("--fall", type=results.SHARE, default=0.45, help="share of the steps over which fewer and fewer are")
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
