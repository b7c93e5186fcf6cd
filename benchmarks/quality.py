"""Does routing a fifth of the tokens cost quality? Trains the models of the comparison on the same data and says.

    python benchmarks/quality.py                                        all six models, three seeds, one GPU
    python benchmarks/quality.py --models dense hspmn --seeds 0 1       some of it; finished pairs are kept
    python benchmarks/quality.py --name ablations --models hspmn --seeds 0 --variants window64:sliding_window=64
    python benchmarks/quality.py --models --variants even_random@hspmn_random:sparsity_k=0.2
    python benchmarks/quality.py --tiny                                 everything, in seconds, on a CPU

Models, with the same data order, optimiser, steps and number of parameters:
    dense           LlamaForCausalLM of transformers with SDPA, from weights of twice the others' deviation: from 0.02
                    its training loss after 700 steps was 2.62, from 0.04 2.42, that of linear_full4 2.19 and 2.33
                    (one seed, H100, 2026-11-24)
    linear_full4    gated linear attention in every layer, full causal attention beside it in every fourth; HSPMN's
                    blocks with sparsity_k of 0 or 1, no local window and no bound on what a state remembers
    hspmn           HSPMN as configured: the target share is `sparsity_k` from the first step on
    hspmn_random    the same with every router frozen at its random start; its bias still balances the load
    hspmn_annealed  the target falls from 1 to `sparsity_k` over the first 60 % of the steps, states are bounded alike
    reflexive       no contextual stream at all, no such bound either
Text is Python source found on the machine, split by the hash of each file. The results file `<name>.json` keeps every
(model, seed) pair; later runs of the same code and settings append to it, and so may several processes at once, each
with models or seeds of its own. Throughput is the median over intervals of `--log_every` steps, which leaves out those
that compile; `final_tok_s` is that of the last fifth of the steps, when annealing is over.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("dense", "linear_full4", "hspmn", "hspmn_random", "hspmn_annealed", "reflexive")
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "initializer_range"),
)
SETTINGS = (
    *SIZES,
    "dense_initializer_range",
    "steps",
    "batch_size",
    "length",
    "lr",
    "needle_mix",
    "validation_tokens",
    "set",
)
PARAMETER_TOLERANCE = 0.03
TOKENIZER_BYTES = 30_000_000
END_OF_TEXT = "<|endoftext|>"


def load_evaluate():
    """The checkout's evaluate.py; by path, because the name `evaluate` belongs to a package too."""
    spec = importlib.util.spec_from_file_location("hspmn_evaluate", ROOT / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evaluate = load_evaluate()


def train_tokenizer(texts, vocab_size):
    """A tokenizer of `vocab_size` tokens fitted on the first `TOKENIZER_BYTES` of the texts."""
    sample, room = [], TOKENIZER_BYTES
    for text in texts:
        if room <= 0:
            break
        sample.append(text)
        room -= len(text)
    fitted = evaluate.fit_byte_pairs(sample, vocab_size, [END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=fitted, eos_token=END_OF_TEXT)


def prepare_data(args):
    """Tokenizer, training tokens and validation tokens (int32), from the cache folder if it holds these settings."""
    needed = args.steps * args.batch_size * args.length
    wanted = {"needed": needed, "vocab_size": args.vocab_size, "validation_tokens": args.validation_tokens}
    cached = None if args.data_cache is None else args.data_cache / "settings.json"
    if cached is not None and cached.exists() and json.loads(cached.read_text()) == wanted:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.data_cache)
        return tokenizer, np.load(args.data_cache / "train.npy"), np.load(args.data_cache / "validation.npy")
    begun = time.monotonic()
    # twice what the steps need: each seed then sees another half
    train_bytes = max(2 * needed * evaluate.BYTES_PER_TOKEN, 1_000_000)
    texts = evaluate.read_documents(train_bytes, args.validation_tokens * evaluate.BYTES_PER_TOKEN)
    tokenizer = train_tokenizer(texts[0], args.vocab_size)
    print(f"tokenizer of {len(tokenizer)} tokens after {time.monotonic() - begun:.0f} s", flush=True)
    train = evaluate.encode_documents(tokenizer, texts[0], 2 * needed)
    validation = evaluate.encode_documents(tokenizer, texts[1], args.validation_tokens)
    files = f"{len(texts[0]):,} + {len(texts[1]):,} files"
    print(f"{files}, {len(train):,} + {len(validation):,} tokens after {time.monotonic() - begun:.0f} s", flush=True)
    if cached is not None:
        tokenizer.save_pretrained(args.data_cache)
        np.save(args.data_cache / "train.npy", train)
        np.save(args.data_cache / "validation.npy", validation)
        evaluate.write_json(cached, wanted)
    return tokenizer, train, validation


class Batches:
    """Training batches, equal for every model: `of(seed)` yields int64 [batch_size, length] on the device per step.

    Rows are windows of the token stream in an order drawn per seed and epoch; a share `needle_mix` of each batch is
    needle tasks instead, the same ones for every seed, which worker processes make while training runs. `epochs` says
    how often the stream is passed.
    """

    def __init__(self, args, tokenizer, train, device):
        """Put the rows of `train` (int32 token ids) on the device."""
        self.rows = torch.from_numpy(train[: len(train) // args.length * args.length]).view(-1, args.length).to(device)
        self.steps, needles = args.steps, round(args.needle_mix * args.batch_size)
        self.needle_loader = None
        if needles:
            rows = evaluate.NeedleRows(tokenizer, train, needles * args.steps, args.length, 0)
            workers = 0 if device.type == "cpu" else min(8, os.cpu_count())
            self.needle_loader = DataLoader(rows, batch_size=needles, num_workers=workers)
        self.plain = args.batch_size - needles
        self.epochs = args.steps * self.plain / len(self.rows)
        self.order = (None, None)

    def _row_order(self, seed, epoch):
        if self.order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            self.order = ((seed, epoch), torch.randperm(len(self.rows), generator=generator))
        return self.order[1]

    def _plain_rows(self, seed, step):
        places = range(step * self.plain, (step + 1) * self.plain)
        index = [int(self._row_order(seed, place // len(self.rows))[place % len(self.rows)]) for place in places]
        return self.rows[torch.tensor(index, device=self.rows.device, dtype=torch.int64)].long()

    def of(self, seed):
        """Yield the token ids of every training step, in order."""
        needle_rows = None if self.needle_loader is None else iter(self.needle_loader)
        for step in range(self.steps):
            ids = self._plain_rows(seed, step)
            yield ids if needle_rows is None else torch.cat([ids, next(needle_rows).to(ids.device)])


def sizes_of(args, case):
    """Fields that every decoder has; the dense model has a deviation of fresh weights of its own."""
    sizes = {field: getattr(args, field) for field in SIZES}
    return sizes | {"initializer_range": args.dense_initializer_range} if case == "dense" else sizes


def next_token_loss(hidden_BTD, weight_VD, ids_BT):
    """Mean cross entropy in nats of the next token."""
    logits = F.linear(hidden_BTD, weight_VD)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())


def count_parameters(case, config):
    """Parameters of a model, tied ones once, counted without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in evaluate.build_model(case, config, 0).parameters())


def matched_config(case, sizes, overrides, target, tolerance):
    """Configuration of a case with `intermediate_size` chosen so that it has `target` parameters.

    A given `intermediate_size` in `overrides` stays. Raises ValueError beyond the tolerance.
    """
    config = evaluate.comparison_config(case, sizes, overrides)
    step = 32 if sizes["intermediate_size"] >= 512 else 4  # a multiple that tensor cores like
    count = count_parameters(case, config)
    if "intermediate_size" not in overrides:
        per_unit = 3 * config.hidden_size * config.num_hidden_layers
        config.intermediate_size += step * round((target - count) / per_unit / step)
        count = count_parameters(case, config)
    if abs(count / target - 1) > tolerance:
        raise ValueError(
            f"{case} with {overrides} has {count:,} parameters, {count / target - 1:+.1%} of the dense model's "
            f"{target:,}; set intermediate_size to match, or raise --parameter_tolerance above {tolerance}"
        )
    return config, count


def compile_layers(model, how):
    """Compile the network as `how` says and return the loss function to use with it."""
    if how == "none":
        return next_token_loss
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # layers of several targets, two stages of annealing, evaluation
    for module in model.base_model.layers if how == "layers" else [model.base_model]:
        module.compile(dynamic=False, fullgraph=True)
    return torch.compile(next_token_loss, dynamic=False)


class TrainingLog:
    """What is read from a run every `every` steps: losses, throughput and the router's state."""

    def __init__(self, every, tokens_per_step):
        """Start the clock."""
        self.every, self.tokens = every, tokens_per_step
        self.losses, self.router, self.curve, self.speeds = [], [], [], []
        self.last_time = time.monotonic()

    def add(self, step, loss, outputs):
        """Account for one step; reads the device only at the end of an interval."""
        self.losses.append(loss.detach())
        if getattr(outputs, "router_overflow", None) is not None:
            self.router.append(torch.stack([outputs.router_load, outputs.router_overflow]))
        if (step + 1) % self.every:
            return
        mean = torch.stack(self.losses).mean().item()
        if not np.isfinite(mean):
            raise ValueError(f"the training loss is {mean} at step {step + 1}; lower --lr")
        now = time.monotonic()
        self.curve.append([step + 1, round(mean, 4)])
        self.speeds.append(self.tokens * len(self.losses) / (now - self.last_time))
        self.losses, self.last_time = [], now

    def summary(self):
        """Throughputs, curve, and the overflow per layer over the last tenth of the steps."""
        tail = self.speeds[-max(1, len(self.speeds) // 5) :]
        result = {
            "train_tok_s": statistics.median(self.speeds), "final_tok_s": statistics.median(tail), "curve": self.curve
        }  # fmt: skip
        last = self.curve[-max(1, len(self.curve) // 10) :]
        result["train_loss"] = statistics.fmean(loss for _, loss in last)
        if self.router:
            last = torch.stack(self.router[-max(1, len(self.router) // 10) :]).mean(0)
            result |= {"train_load": last[0].tolist(), "overflow": last[1].tolist()}
        return result


def train(model, loss_function, batches, seed, args):
    """Train a model from its present weights; returns the summary of its log."""
    optimizer = evaluate.make_optimizer(model, args.lr)
    log = TrainingLog(min(args.log_every, args.steps), args.batch_size * args.length)
    model.train()
    for step, ids in enumerate(batches.of(seed)):
        evaluate.set_progress(model, step, args.steps)
        with evaluate.low_precision(args.device):
            outputs = model.base_model(input_ids=ids, use_cache=False)
            loss = loss_function(outputs.last_hidden_state, model.get_output_embeddings().weight, ids)
        aux_loss = getattr(outputs, "aux_loss", None)
        (loss if aux_loss is None else loss + aux_loss).backward()
        evaluate.optimizer_step(model, optimizer, step, args.steps, args.lr)
        log.add(step, loss, outputs)
        if log.curve and (step + 1) % (10 * log.every) == 0:
            print(f"  step {step + 1} loss {log.curve[-1][1]:.3f} {log.speeds[-1]:,.0f} tok/s", flush=True)
    evaluate.set_progress(model, args.steps, args.steps)
    return log.summary()


class Case:
    """One model of the comparison, compiled once and trained from fresh weights for each seed."""

    def __init__(self, name, base, overrides, args, dense_parameters):
        """Choose the sizes of case `name`, built like the model `base`; weights come with the first seed."""
        self.overrides = overrides
        self.name, self.base, self.args = name, base, args
        self.config, self.parameters = matched_config(
            base, sizes_of(args, base), overrides, dense_parameters, args.parameter_tolerance
        )
        self.model = None

    def start(self, seed):
        """Fresh weights; the compiled code of an earlier seed is kept, since only values change."""
        fresh = evaluate.build_model(self.base, self.config, seed)
        if self.model is None:
            self.model = fresh.to(self.args.device)
            self.loss_function = compile_layers(self.model, self.args.compile)
        else:
            self.model.load_state_dict(fresh.state_dict())

    def run(self, seed, batches, validation_rows):
        """Train and evaluate one seed; returns its entry of the results file."""
        begun = time.monotonic()
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.start(seed)
        entry = {"case": self.name, "seed": seed, "params": self.parameters}
        entry |= {"overrides": self.overrides, "intermediate_size": self.config.intermediate_size}
        entry |= train(self.model, self.loss_function, batches, seed, self.args)
        entry |= evaluate.validate(self.model, validation_rows, self.args.batch_size, self.args.device)
        entry["kv_bytes_per_token"] = self.kv_bytes_per_token()
        if self.args.device.type == "cuda":
            entry["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return entry | {"epochs": round(batches.epochs, 3), "seconds": round(time.monotonic() - begun, 1)}

    def kv_bytes_per_token(self):
        """Bytes by which a bfloat16 cache grows per token, on average."""
        if hasattr(self.model, "kv_bytes_per_token"):
            return self.model.kv_bytes_per_token(torch.bfloat16)
        return 2 * 2 * self.config.num_key_value_heads * self.config.head_dim * self.config.num_hidden_layers

    def save(self, folder, tokenizer):
        """A checkpoint that `evaluate.py` takes: the model, its code and the tokenizer."""
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"  saved {folder.name}", flush=True)


def load_shares(entry):
    """Load over target of every routed layer, or an empty list."""
    pairs = zip(entry.get("load", []), entry.get("target", []), strict=True)
    return [load / target for load, target in pairs if target]


def summary_rows(runs):
    """The rows of a results file: means over seeds, spread, and the loads of the worst layer and seed."""
    rows = []
    for case in dict.fromkeys(run["case"] for run in runs):
        mine = [run for run in runs if run["case"] == case]
        means = ("val", "recall", "other", "train_loss", "params", "kv_bytes_per_token", "train_tok_s", "final_tok_s")
        rows += [evaluate.row(case, metric, statistics.fmean(run[metric] for run in mine)) for metric in means]
        rows.append(evaluate.row(case, "seeds", len(mine)))
        if "peak_gb" in mine[0]:
            rows.append(evaluate.row(case, "peak_gb", max(run["peak_gb"] for run in mine)))
        if len(mine) > 1:
            spreads = [(f"{metric}_std", statistics.stdev(run[metric] for run in mine)) for metric in means[:3]]
            rows += [evaluate.row(case, metric, value) for metric, value in spreads]
        shares = [share for run in mine for share in load_shares(run)]
        if shares:
            rows += [evaluate.row(case, "load_min", min(shares)), evaluate.row(case, "load_max", max(shares))]
            rows.append(evaluate.row(case, "overflow_max", max(x for run in mine for x in run["overflow"])))
            layers = [pair for run in mine for pair in zip(run["gate_entropy"], run["target"], strict=True)]
            entropy = statistics.fmean(entropy for entropy, target in layers if target)
            rows.append(evaluate.row(case, "gate_entropy", entropy))
    return rows


class Results:
    """The results file: finished pairs of the same code and settings, saved after each one."""

    def __init__(self, args, settings):
        """Read the file to continue, if there is one; raises ValueError if it does not fit."""
        self.path, self.args, self.settings = args.output / f"{args.name}.json", args, settings
        self.code, self.runs, self.commands = evaluate.code_hash(), [], []
        self._read(args.resume if args.resume is not None and not self.path.exists() else self.path)

    def _read(self, source):
        if source.exists():
            old = json.loads(source.read_text())
            if not self.args.force:
                self._check(source, old)
            self.runs, self.commands = old["runs"], old["commands"]

    def _check(self, source, old):
        changed = [f"code {old['code']} -> {self.code}"] if old["code"] != self.code else []
        for key in sorted(old["settings"].keys() | self.settings.keys()):
            before, after = old["settings"].get(key), self.settings.get(key)
            if before != after:
                changed.append(f"{key} {before} -> {after}")
        if changed:
            raise ValueError(
                f"{source.name} holds results of other code or settings ({'; '.join(changed)}); "
                "choose another --name or --output, or append all the same with --force"
            )

    def stamp(self):
        """What a pair must have in common with this run to count as finished."""
        return {"code": self.code, "settings": hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:16]}

    def has(self, case, seed):
        """Whether a pair is finished, with this code, these settings and overrides."""
        wanted = {"case": case.name, "seed": seed, "overrides": case.overrides, "stamp": self.stamp()}
        return any(wanted == {key: run[key] for key in wanted} for run in self.runs)

    def slowest(self, case):
        """Seconds that a pair is likely to take: the longest of its model so far, or of all."""
        fitting = [run for run in self.runs if run["stamp"] == self.stamp()]
        mine = [run for run in fitting if run["case"] == case]
        return max((run["seconds"] for run in mine or fitting), default=0.0)

    def add(self, entry):
        """Keep an entry, in place of an earlier one of the same pair, and save.

        Processes that run other pairs, on other GPUs say, may share the file: each adds to what the others wrote.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self._read(self.path)
            self._write(entry)
        finally:
            os.close(folder)

    def _write(self, entry):
        key = (entry["case"], entry["seed"])
        self.runs = [run for run in self.runs if (run["case"], run["seed"]) != key] + [entry | {"stamp": self.stamp()}]
        self.runs.sort(key=lambda run: run["seed"])
        if self.args.command not in self.commands:
            self.commands.append(self.args.command)
        document = evaluate.results_header(self.args.name, self.args)
        document |= {"commands": self.commands, "settings": self.settings, "rows": summary_rows(self.runs)}
        document["mixed"] = len({json.dumps(run["stamp"]) for run in self.runs}) > 1  # appended with --force
        evaluate.write_json(self.path, document | {"runs": self.runs})

    def print_table(self):
        """One line per model on standard output."""
        rows = {(row["case"], row["metric"]): row["value"] for row in summary_rows(self.runs)}
        print(f"{'model':24} seeds    val  recall  other   std  load min-max   KV B/token    tok/s")
        for case in dict.fromkeys(case for case, _ in rows):

            def of(metric, case=case):
                return rows.get((case, metric), float("nan"))

            losses = f"{of('val'):6.3f} {of('recall'):7.3f} {of('other'):6.3f} {of('val_std'):5.3f}"
            loads = f"{of('load_min'):5.2f}-{of('load_max'):5.2f}"
            costs = f"{of('kv_bytes_per_token'):13,.0f} {of('train_tok_s'):10,.0f}"
            print(f"{case:24} {of('seeds'):5} {losses}  {loads} {costs}")


def plot_curves(path):
    """Training curves, mean over seeds, and the validation losses of a results file, as a PNG beside it."""
    figure, axes = evaluate.new_figure(8, 5)
    if figure is None:
        return
    runs = json.loads(path.read_text())["runs"]
    for case in dict.fromkeys(run["case"] for run in runs):
        mine = [run for run in runs if run["case"] == case]
        curves = np.array([[loss for _, loss in run["curve"]] for run in mine])
        width = max(1, curves.shape[1] // 35)
        smooth = np.convolve(curves.mean(0), np.ones(width) / width, mode="valid")
        steps = [step for step, _ in mine[0]["curve"]][width - 1 :]
        val, recall = (statistics.fmean(run[metric] for run in mine) for metric in ("val", "recall"))
        axes.plot(steps, smooth, label=f"{case}: val {val:.3f}, recall {recall:.3f}", linewidth=1.2)
    ends = [run["curve"][-1][1] for run in runs]
    axes.set_ylim(0.95 * min(ends), min(ends) + 2.5)
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")


def parse_variants(items):
    """Models and overrides of ablations by name, from texts such as "window64:sliding_window=64,num_sink_tokens=4"."""
    variants = {}
    for item in items:
        head, colon, fields = item.partition(":")
        name, at, model = head.partition("@")
        if not (name and colon) or name in MODELS:
            raise ValueError(f"--variants {item}: expected NAME:KEY=VALUE,... with a NAME that no model has")
        if at:
            evaluate.check_model("--variants", model, MODELS[1:])  # not dense, which has no such fields
        variants[name] = (model or "hspmn", evaluate.parse_overrides(re.split(r",(?=\w+=)", fields)))
    return variants


def list_cases(args):
    """(name, model of the comparison it is built like, overrides) of everything to run, in order."""
    for name in args.models:
        evaluate.check_model("--models", name, MODELS)
    shared = evaluate.parse_overrides(args.set)
    cases = [(name, name, {} if name == "dense" else shared) for name in args.models]
    return cases + [(name, model, shared | own) for name, (model, own) in parse_variants(args.variants).items()]


def make_cases(args):
    """Every `Case` to run, with as many parameters as the dense model."""
    dense = count_parameters("dense", evaluate.comparison_config("dense", sizes_of(args, "dense")))
    return [Case(name, base, overrides, args, dense) for name, base, overrides in list_cases(args)]


def run_all(args):
    """Run every pair that is not finished yet, within the time budget; returns the results."""
    begun = time.monotonic()
    cases = make_cases(args)
    tokenizer, train_stream, validation = prepare_data(args)
    digest = hashlib.sha256(train_stream.tobytes() + validation.tobytes()).hexdigest()[:16]
    settings = {field: getattr(args, field) for field in SETTINGS} | {
        "device": args.device.type, "compile": args.compile, "data": digest, "train_tokens": len(train_stream),
    }  # fmt: skip
    results = Results(args, settings)
    batches = Batches(args, tokenizer, train_stream, args.device)
    if batches.epochs > 1:
        print(f"the steps pass the training tokens {batches.epochs:.2f} times", flush=True)
    validation_rows = evaluate.rows_of(validation, args.length)
    whole = len(validation_rows) // args.batch_size * args.batch_size  # a smaller batch would be compiled anew
    validation_rows = validation_rows[: whole or None]
    for case in cases:
        for seed in args.seeds:
            spent = time.monotonic() - begun
            if results.has(case, seed):
                print(f"{case.name} seed {seed}: finished before", flush=True)
                continue
            if args.time_budget and spent + results.slowest(case.name) > args.time_budget:
                print(f"{case.name} seed {seed}: not started, {spent:.0f} s of {args.time_budget:.0f} s are spent")
                return results
            run_pair(case, seed, batches, validation_rows, results)
            if case.name in args.save:
                case.save(args.checkpoints / f"{case.name}-s{seed}", tokenizer)
        case.model = None
        torch.compiler.reset()  # the next model's graphs would count against the same limit
    return results


def run_pair(case, seed, batches, validation_rows, results):
    """Train and evaluate one seed of a case, record it, and print its numbers."""
    print(f"{case.name} seed {seed}: {case.parameters:,} parameters", flush=True)
    entry = case.run(seed, batches, validation_rows)
    results.add(entry)
    numbers = " ".join(f"{metric} {entry[metric]:.4f}" for metric in ("val", "recall", "other"))
    shares = " ".join(f"{share:.2f}" for share in load_shares(entry))
    print(f"  {numbers} load/target {shares or '-'} ({entry['seconds']:.0f} s)", flush=True)


TINY = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "steps": 6, "batch_size": 4, "length": 64, "validation_tokens": 1024, "seeds": [0],
    "device": "cpu", "compile": "none", "log_every": 2, "output": ROOT / "build" / "quality",
}  # fmt: skip


def make_parser():
    """Arguments; every default is the setting of the committed comparison."""
    parser = argparse.ArgumentParser(
        "benchmarks/quality.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="*", default=list(MODELS), help=f"among {', '.join(MODELS)}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of HSPMNConfig for all models but dense")
    variants = "NAME[@MODEL]:KEY=VALUE,..."
    add("--variants", nargs="*", default=[], metavar=variants, help="hspmn, or MODEL, with other fields")
    add("--name", default="quality", help="name of the results file")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file and plot")
    add("--resume", type=Path, help="results file to continue where --output has none yet")
    add("--force", action="store_true", help="append to results of other code or settings")
    add("--time_budget", type=float, default=0.0, help="seconds after which no pair is started that would not finish")
    add("--steps", type=int, default=700)
    add("--batch_size", type=int, default=32, help="rows per step")
    add("--length", type=int, default=2048, help="tokens per row")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate, the same for every model")
    add("--needle_mix", type=float, default=0.0, help="share of the rows of each batch that are needle tasks")
    add("--vocab_size", type=int, default=16384)
    add("--hidden_size", type=int, default=512)
    add("--num_hidden_layers", type=int, default=8)
    add("--num_attention_heads", type=int, default=8)
    add("--num_key_value_heads", type=int, default=2)
    add("--intermediate_size", type=int, default=1408, help="the dense model's; the others' follows from the count")
    add("--initializer_range", type=float, default=0.02, help="deviation of fresh weights of all models but dense")
    add("--dense_initializer_range", type=float, default=0.04, help="that of dense, which learns best from another")
    add("--parameter_tolerance", type=float, default=PARAMETER_TOLERANCE, help="allowed difference in parameters")
    add("--validation_tokens", type=int, default=2_000_000)
    add("--device", help="cuda or cpu; cuda where there is one")
    add("--compile", choices=("layers", "model", "none"), help="layers on cuda, none on cpu: blocks share one graph")
    add("--log_every", type=int, default=10)
    add("--data_cache", type=Path, help="folder that keeps tokenizer and tokens between runs")
    add("--save", nargs="*", default=[], metavar="MODEL", help="models whose checkpoints are kept")
    add("--checkpoints", type=Path, help="their folder; <output>/checkpoints by default")
    add("--plot_only", action="store_true", help="print and plot the results file, run nothing")
    add("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser


def check_arguments(args):
    """Fill in what depends on the machine; raises ValueError for numbers that make no sense."""
    for field in ("steps", "batch_size", "log_every"):
        if getattr(args, field) < 1:
            raise ValueError(f"--{field} must be at least 1, got {getattr(args, field)}")
    if args.length < 2:
        raise ValueError(f"--length must be at least 2 tokens, got {args.length}")
    if not 0.0 <= args.needle_mix < 1.0:
        raise ValueError(f"--needle_mix must lie in [0, 1), got {args.needle_mix}; use a share such as 0.25")
    if not 257 <= args.vocab_size <= 65536:
        raise ValueError(f"--vocab_size must lie in 257 (bytes and end of text) to 65536, got {args.vocab_size}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.compile = args.compile or ("layers" if args.device.type == "cuda" else "none")
    args.checkpoints = args.checkpoints or args.output / "checkpoints"


def main(argv=None):
    """Run the comparison; returns the exit code."""
    parser = make_parser()
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    args.command = evaluate.recorded_command(parser, args)
    check_arguments(args)
    transformers.utils.logging.disable_progress_bar()
    if args.plot_only:
        if not (args.output / f"{args.name}.json").exists():
            raise ValueError(f"--plot_only: --output has no {args.name}.json; run the comparison first")
        results = Results(argparse.Namespace(**vars(args) | {"force": True}), {})
    else:
        results = run_all(args)
    if results.runs:
        results.print_table()
        plot_curves(results.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
