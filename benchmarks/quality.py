"""Does routing a fifth of the tokens cost quality? Trains the models of the comparison on the same data and says.

    python benchmarks/quality.py                                        all models, three seeds, one GPU
    python benchmarks/quality.py --models dense hspmn --seeds 0 1       some of it; finished pairs are kept
    python benchmarks/quality.py --name ablations --models hspmn --seeds 0 --variants window64:sliding_window=64
    python benchmarks/quality.py --models --variants even_random@hspmn_random:sparsity_k=0.2
    python benchmarks/quality.py --tiny                                 everything, in seconds, on a CPU

Models, with the same data order, optimiser, steps and number of parameters:
    dense           LlamaForCausalLM of transformers with SDPA, from weights of twice the others' deviation: from 0.02
                    its training loss after 700 steps was 2.62, from 0.04 2.42, that of linear_full4 2.19 and 2.33
                    (one seed, H100, 2026-11-24)
    dense_conv      the same with HSPMN's short convolution, norms of queries and keys, and matching fresh weights
    linear_full4    gated linear attention in every layer, full causal attention beside it in every fourth
    linear_full8    the same in every eighth
    hspmn           HSPMN as configured: the target share is `sparsity_k` from the first step on
    hspmn_random    the same with every router frozen at its random start; its bias still balances the load
    hspmn_annealed  the target falls from 1 to `sparsity_k` over the first 60 % of the steps, states are bounded alike
    hspmn_delta     the same as hspmn, but states written by the gated delta rule (arXiv 2412.06464), without a cache
    reflexive       no contextual stream at all, no such bound either
The loss of a model whose `kv_cache_dtype` is int8 or int4 is measured through such a cache.
Text is Python source found on the machine, split by the hash of each file. The results file `<name>.json` keeps every
(model, seed) pair; later runs of the same code and settings append to it, and so may several processes at once, each
with models or seeds of its own. Throughput is the median over intervals of `--log_every` steps, which leaves out those
that compile; `final_tok_s` is that of the last fifth of the steps, when annealing is over.
"""

import copy
import hashlib
import json
import os
import re
import sys
import time
from functools import partial
from itertools import accumulate, chain, count, islice
from pathlib import Path
from statistics import fmean, median, stdev
from types import ModuleType

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parents[1])]

from hspmn import results
from hspmn.benchmarks.peers import (
    CACHELESS,
    LLAMAS,
    MODELS,
    PATCHED,
    build_model,
    comparison_config,
    settle,
    train_steps,
)
from hspmn.benchmarks.report import SECTIONS, table
from hspmn.configuration_hspmn import CHOICES
from hspmn.evaluate import NeedleRows, cache_pieces, validate
from hspmn.float8_hspmn import replace_layers
from hspmn.results import low_precision
from hspmn.tokens import BYTES_PER_TOKEN, encode, fit_tokenizer, read_sources, rows_of

FULL = {
    "vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 1408}  # fmt: skip
SIZES = (*FULL, "initializer_range")
SETTINGS = (*SIZES, "dense_initializer_range", "steps", "batch_size", "length", "lr", "needle_mix",
            "validation_tokens", "set", "device", "compile")  # fmt: skip
MEANS = ("val", "recall", "other", "train_loss", "params", "kv_bytes_per_token", "train_tok_s", "final_tok_s")
CACHED_ROWS = 16  # validation rows that are read through caches as well
OWN = ("runs", "settings", "code", "commands")  # what the results file has beside rows and header
TOKENIZER_BYTES = 30_000_000  # of text that the tokenizer is fitted on


def prepare_data(args):
    """Tokenizer, training tokens and validation tokens (int32), from the cache folder if it holds these settings."""
    needed = 2 * args.steps * args.batch_size * args.length  # twice what the steps need: each seed sees another half
    wanted = {"needed": needed, "vocab_size": args.vocab_size, "validation_tokens": args.validation_tokens}
    folder, limits = args.data_cache, {"train": needed, "validation": args.validation_tokens}
    settings = folder and folder / "settings.json"
    with results.loading(f"--data_cache {folder}"):
        if folder and settings.exists() and json.loads(settings.read_text()) == wanted:
            tokens = (np.load(folder / f"{side}.npy") for side in limits)
            return PreTrainedTokenizerFast.from_pretrained(folder), *tokens
    begun = time.monotonic()
    texts = read_sources(max(needed * BYTES_PER_TOKEN, 1_000_000), args.validation_tokens * BYTES_PER_TOKEN)
    sizes = accumulate(map(len, texts[0]), initial=0)
    sample = (text for text, before in zip(texts[0], sizes, strict=False) if before < TOKENIZER_BYTES)
    tokenizer = fit_tokenizer(sample, args.vocab_size)
    tokens = [encode(tokenizer, side, limit) for side, limit in zip(texts, limits.values(), strict=True)]
    for side, files, ids in zip(limits, texts, tokens, strict=True):
        print(f"{side}: {len(files):,} files, {len(ids):,} tokens after {time.monotonic() - begun:.0f} s", flush=True)
    if folder:
        tokenizer.save_pretrained(folder)
        for side, ids in zip(limits, tokens, strict=True):
            np.save(folder / f"{side}.npy", ids)
        results.write_json(settings, wanted)
    return tokenizer, *tokens


class Batches:
    """Training batches, equal for every model, from the token ids `train`. Rows are windows of the token stream in an
    order drawn per seed and epoch; a share `needle_mix` of each batch is needle tasks instead, the same ones for every
    seed, which worker processes make while training runs. `epochs` says how often the stream is passed."""

    def __init__(self, args, tokenizer, train):
        self.rows = rows_of(train, args.length).to(args.device, torch.int32)
        self.steps, needles, self.needle_loader = args.steps, round(args.needle_mix * args.batch_size), None
        if needles:
            rows = NeedleRows(tokenizer, train, needles * args.steps, args.length, 0)
            workers = 0 if args.device == "cpu" else min(8, os.cpu_count())
            self.needle_loader = DataLoader(rows, batch_size=needles, num_workers=workers)
        self.plain = args.batch_size - needles
        self.epochs = args.steps * self.plain / len(self.rows)

    def of(self, seed):
        """Yield the token ids of every training step, int64 [batch_size, length] on the device, in order."""
        seeds = (torch.Generator().manual_seed(1_000_003 * seed + epoch) for epoch in count())
        order = chain.from_iterable(torch.randperm(len(self.rows), generator=g).tolist() for g in seeds)
        needle_rows = self.needle_loader and iter(self.needle_loader)
        for _ in range(self.steps):
            ids = self.rows[list(islice(order, self.plain))].long()
            yield torch.cat([ids, next(needle_rows).to(ids.device)]) if needle_rows else ids


def sizes_of(args, case):
    """Fields that every decoder has; the Llamas have a deviation of fresh weights of their own."""
    sizes = {field: getattr(args, field) for field in SIZES}
    return sizes | {"initializer_range": args.dense_initializer_range} if case in LLAMAS else sizes


def count_parameters(case, config):
    """Parameters of a model, tied ones once, counted without allocating it."""
    with torch.device("meta"):
        return build_model(case, config, 0).num_parameters()


def matched_config(case, sizes, overrides, target, tolerance):
    """Configuration of a case with `intermediate_size` chosen so that it has `target` parameters, and their number. A
    given `intermediate_size` in `overrides` stays. Refuses what is beyond the tolerance."""
    config = comparison_config(case, sizes, overrides)
    parameters = count_parameters(case, config)
    if "intermediate_size" not in overrides:
        step = 32 if sizes["intermediate_size"] >= 512 else 4  # a multiple that tensor cores like
        per_unit = 3 * config.hidden_size * config.num_hidden_layers
        config.intermediate_size += step * round((target - parameters) / per_unit / step)
        if config.intermediate_size < 1:
            others = f"{case} with {overrides} has {parameters:,} parameters beside"
            results.refuse(f"--intermediate_size {sizes['intermediate_size']}: {others} it, dense {target:,} in all")
        parameters = count_parameters(case, config)
    if abs(parameters / target - 1) > tolerance:
        results.refuse(
            f"--parameter_tolerance {tolerance}: {case} with {overrides} has {parameters:,} parameters, "
            f"{parameters / target - 1:+.1%} of the dense model's {target:,}; raise it or set intermediate_size"
        )
    return config, parameters


def next_token_loss(hidden_BTD, weight_VD, ids_BT):
    """Mean cross entropy in nats of the next token."""
    logits = F.linear(hidden_BTD, weight_VD)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())


class Case:
    """One model of the comparison, built like the model `base` with as many parameters as the dense one. It is
    compiled as `--compile` says with the first seed and trained from fresh weights for each: only values change."""

    def __init__(self, name, base, overrides, args, dense_parameters):
        self.name, self.base, self.overrides, self.args, self.model = name, base, overrides, args, None
        sizes, tolerance, self.loss = sizes_of(args, base), args.parameter_tolerance, next_token_loss
        self.config, self.parameters = matched_config(base, sizes, overrides, dense_parameters, tolerance)

    def _prepare(self, seed):
        fresh, how = build_model(self.base, self.config, seed), self.args.compile
        if self.model is not None:
            self.model.load_state_dict(fresh.state_dict())
            return
        self.model = fresh.to(self.args.device)
        if how != "none":
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.recompile_limit = 64  # layers of several targets, two stages of annealing, evaluation
            for module in self.model.base_model.layers if how == "layers" else [self.model.base_model]:
                module.compile(dynamic=False, fullgraph=True)
            self.loss = torch.compile(next_token_loss, dynamic=False)

    def _loss_and_outputs(self, model, ids_BT):
        outputs = model.base_model(input_ids=ids_BT, use_cache=False)
        return self.loss(outputs.last_hidden_state, model.get_output_embeddings().weight, ids_BT), outputs

    def _train(self, batches, seed):  # reads the device only at the end of an interval of `--log_every` steps
        args, begun, losses, router, curve, speeds = self.args, time.monotonic(), [], [], [], []
        every = min(args.log_every, args.steps)
        steps = train_steps(self.model, batches.of(seed), self._loss_and_outputs, args.steps, args.lr)
        for step, (loss, outputs) in enumerate(steps, 1):
            losses.append(loss)
            if getattr(outputs, "router_overflow", None) is not None:
                router.append(torch.stack([outputs.router_load, outputs.router_overflow]))
            if step % every:
                continue
            mean, now = torch.stack(losses).mean().item(), time.monotonic()
            if not np.isfinite(mean):
                results.refuse(f"--lr {args.lr}: the training loss is {mean} at step {step}; lower it")
            curve.append([step, round(mean, 4)])
            speeds.append(len(losses) * args.batch_size * args.length / (now - begun))
            losses, begun = [], now
            if step % (10 * every) == 0:
                print(f"  step {step} loss {mean:.3f} {speeds[-1]:,.0f} tok/s", flush=True)
        fifth, tenth, last = max(1, len(speeds) // 5), max(1, len(curve) // 10), max(1, len(router) // 10)
        result = {"train_tok_s": median(speeds), "final_tok_s": median(speeds[-fifth:]), "curve": curve}
        result["train_loss"] = fmean(loss for _, loss in curve[-tenth:])
        if router:
            result["train_load"], result["overflow"] = torch.stack(router[-last:]).mean(0).tolist()
        return result

    @torch.compiler.set_stance("force_eager")  # the shapes of calls through a cache change
    def _through_caches(self, rows_NT):
        """Losses of a model whose cache holds whole numbers as it reads them; and validation loss of some rows in one
        pass, `val_once`, and through the cache of each form, in pieces and token by token, `val_cache_<form>`; nothing
        of a model that has no such cache."""
        config, size, T = self.model.config, self.args.batch_size, rows_NT.shape[1]
        rows, pieces = rows_NT[:CACHED_ROWS], cache_pieces(T)
        if self.base in CACHELESS or config.router_mode == "topk":
            return {}
        found, own = {"val_once": validate(self.model, rows, size)["val"]}, config.kv_cache_dtype
        if own != "auto":
            found |= validate(self.model, rows_NT, size, [T])
        for form in CHOICES["kv_cache_dtype"]:
            config.kv_cache_dtype = form
            found[f"val_cache_{form}"] = validate(self.model, rows, size, pieces)["val"]
        config.kv_cache_dtype = own
        able = self.args.device != "cuda" or torch.cuda.get_device_capability() >= (8, 9)
        return found | (self._in_float8(rows) if able and self.base not in PATCHED else {})

    @torch.no_grad()
    def _in_float8(self, rows_NT):
        """Validation loss of some rows in one pass with products in float8, and the share of decisions that flip."""
        model, flips, made = copy.deepcopy(self.model), 0, len(rows_NT) * rows_NT.shape[1]
        replace_layers(model, partial(model.float8_layer.of, scaling="rowwise"))
        found = {"val_float8": validate(model, rows_NT, self.args.batch_size)["val"]}
        for ids in rows_NT.split(self.args.batch_size):
            with low_precision(model.device):
                given = {"input_ids": ids.to(model.device), "use_cache": False}
                flips += (model.base_model(**given).router_mask != self.model.base_model(**given).router_mask).sum()
        return found | {"val_float8_flips": float(flips) / made / max(1, sum(map(bool, self.config.layer_sparsity)))}

    def run(self, seed, batches, validation_rows):
        """Train and evaluate one seed; returns its entry of the results file, where `kv_bytes_per_token` is by how
        much a bfloat16 cache grows, on average."""
        print(f"{self.name} seed {seed}: {self.parameters:,} parameters", flush=True)
        begun, args, config = time.monotonic(), self.args, self.config
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._prepare(seed)
        entry = {"case": self.name, "seed": seed, "params": self.parameters, "overrides": self.overrides}
        entry["intermediate_size"] = config.intermediate_size
        entry |= self._train(batches, seed) | validate(self.model, validation_rows, args.batch_size)
        entry |= self._through_caches(validation_rows)
        dense_bytes = 2 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        own_bytes = getattr(self.model, "kv_bytes_per_token", None)
        entry["kv_bytes_per_token"] = own_bytes(torch.bfloat16) if own_bytes else dense_bytes
        if args.device == "cuda":
            entry["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        entry |= {"epochs": round(batches.epochs, 3), "seconds": round(time.monotonic() - begun, 1)}
        numbers = " ".join(f"{metric} {entry[metric]:.4f}" for metric in MEANS[:3])
        shares = " ".join(f"{share:.2f}" for share in load_shares(entry))
        print(f"  {numbers} load/target {shares or '-'} ({entry['seconds']:.0f} s)", flush=True)
        return entry


def load_shares(entry):
    """Load over target of every routed layer, or an empty list."""
    pairs = zip(entry.get("load", []), entry.get("target", []), strict=True)
    return [load / target for load, target in pairs if target]


def by_case(runs):
    """The entries of a results file by case."""
    return {case: [run for run in runs if run["case"] == case] for case in dict.fromkeys(run["case"] for run in runs)}


def summary_rows(runs):
    """The rows of a results file: means over seeds, spread, and the loads of the worst layer and seed."""
    rows = []
    for case, mine in by_case(runs).items():
        values = {metric: fmean(run[metric] for run in mine) for metric in MEANS} | {"seeds": len(mine)}
        values |= {key: fmean(run[key] for run in mine) for key in mine[0] if key.startswith("val_")}
        if "peak_gb" in mine[0]:
            values["peak_gb"] = max(run["peak_gb"] for run in mine)
        if len(mine) > 1:
            values |= {f"{metric}_std": stdev(run[metric] for run in mine) for metric in MEANS[:3]}
        if shares := [share for run in mine for share in load_shares(run)]:
            layers = [pair for run in mine for pair in zip(run["gate_entropy"], run["target"], strict=True)]
            values |= {"load_min": min(shares), "load_max": max(shares)}
            values["overflow_max"] = max(max(run["overflow"]) for run in mine)
            values["gate_entropy"] = fmean(entropy for entropy, target in layers if target)
        rows += [results.row(case, metric, value) for metric, value in values.items()]
    return rows


class Results:
    """The results file: finished pairs of the same code and settings, saved after each one. A file that is there is
    continued; one of other code or settings is refused without `--force`."""

    def __init__(self, args, settings):
        self.path, self.args, self.settings = args.output / f"{args.name}.json", args, settings
        self.runs, self.commands = [], []
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.stamp = {"code": results.code_hash(), "settings": digest}  # of the pairs that count as finished
        self._read()

    def _read(self):
        if not self.path.exists():
            return
        old = results.read_results(self.path, OWN)
        before, after = old["settings"] | {"code": old["code"]}, self.settings | {"code": self.stamp["code"]}
        different = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
        if different and not self.args.force:
            changed = "; ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in different)
            results.refuse(f"--name {self.args.name}: its file holds results of other code or settings ({changed}); "
                           "choose another --name or --output, or append all the same with --force")  # fmt: skip
        self.runs, self.commands = old["runs"], old["commands"]

    def has(self, case, seed):
        """Whether a pair is finished, with this code, these settings and overrides."""
        wanted = {"case": case.name, "seed": seed, "overrides": case.overrides, "stamp": self.stamp}
        return any(wanted.items() <= run.items() for run in self.runs)

    def add(self, entry):
        """Keep an entry, in place of an earlier one of the same pair, and save. Processes that run other pairs, on
        other GPUs say, may share the file: each adds to what the others wrote."""
        with results.held(self.path.parent):
            self._read()
            others = [run for run in self.runs if (run["case"], run["seed"]) != (entry["case"], entry["seed"])]
            self.runs = sorted([*others, entry | {"stamp": self.stamp}], key=lambda run: run["seed"])
            self.commands = list(dict.fromkeys([*self.commands, self.args.command]))
            mixed = len({json.dumps(run["stamp"]) for run in self.runs}) > 1  # appended with --force
            results.write_json(self.path, results.results_header(self.args.name, self.args.command) | {
                "commands": self.commands, "settings": self.settings, "rows": summary_rows(self.runs),
                "mixed": mixed, "runs": self.runs})  # fmt: skip


def show(path):
    """Print the table of a results file, and plot training curves, mean over seeds, as a PNG beside it."""
    document = json.loads(path.read_text())
    print("\n".join(table(SECTIONS["quality"], document["rows"])))
    figure, axes = results.new_figure(8, 5)
    if figure is None:
        return
    for case, mine in by_case(document["runs"]).items():
        curves = np.array([run["curve"] for run in mine])  # runs, points, step and loss
        width = max(1, curves.shape[1] // 35)
        smooth = np.convolve(curves[..., 1].mean(0), np.ones(width) / width, mode="valid")
        val, recall = (fmean(run[metric] for run in mine) for metric in ("val", "recall"))
        label = f"{case}: val {val:.3f}, recall {recall:.3f}"
        axes.plot(curves[0, width - 1 :, 0], smooth, label=label, linewidth=1.2)
    least = min(run["curve"][-1][1] for run in document["runs"])
    axes.set(xlabel="step", ylabel="training loss, nats per token", ylim=(0.95 * least, least + 2.5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")


def list_cases(args):
    """By name, the model of the comparison that a case is built like and its overrides; of two, the last counts."""
    shared = results.parse_overrides("--set", args.set)
    cases = {name: (name, {} if name in LLAMAS else shared) for name in args.models}
    for item in args.variants:
        head, colon, fields = item.partition(":")
        name, at, model = head.partition("@")
        if not colon or name in MODELS or not results.is_plain(name):
            results.refuse(f"--variants {item}: expected NAME:KEY=VALUE,... with a NAME that no model has")
        model = model if at else "hspmn"
        results.check_name("--variants: the model", model, MODELS[len(LLAMAS) :])  # others have no such fields
        cases[name] = (model, shared | results.parse_overrides("--variants", re.split(r",(?=\w+=)", fields)))
    for name in args.save:
        results.check_name("--save", name, cases)
        if cases[name][0] in PATCHED:
            results.refuse(f"--save {name}: what is put into a {cases[name][0]} is in no saved code; leave it out")
    return cases


def run_all(args):
    """Run every pair that is not finished yet, within the time budget, with as many parameters as the dense model."""
    begun = time.monotonic()
    dense = count_parameters("dense", comparison_config("dense", sizes_of(args, "dense")))
    cases = [Case(name, base, overrides, args, dense) for name, (base, overrides) in list_cases(args).items()]
    tokenizer, train_stream, validation = prepare_data(args)
    digest = hashlib.sha256(train_stream.tobytes() + validation.tobytes()).hexdigest()[:16]
    settings = {field: getattr(args, field) for field in SETTINGS}
    finished = Results(args, settings | {"data": digest, "train_tokens": len(train_stream)})
    batches, rows = Batches(args, tokenizer, train_stream), rows_of(validation, args.length)
    if batches.epochs > 1:
        print(f"the steps pass the training tokens {batches.epochs:.2f} times", flush=True)
    whole = len(rows) // args.batch_size * args.batch_size  # a smaller batch would be compiled anew
    for case in cases:
        for seed in args.seeds:
            if finished.has(case, seed):
                print(f"{case.name} seed {seed}: finished before", flush=True)
                continue
            spent, longest = time.monotonic() - begun, max((run["seconds"] for run in finished.runs), default=0.0)
            if args.time_budget and spent + longest > args.time_budget:
                print(f"{case.name} seed {seed}: not started, {spent:.0f} s of {args.time_budget:.0f} s are spent")
                return
            finished.add(case.run(seed, batches, rows[: whole or None]))
            if case.name in args.save:  # what `evaluate.py` takes
                for part in (case.model, tokenizer):
                    part.save_pretrained(args.checkpoints / f"{case.name}-s{seed}")
        case.model = None
        torch.compiler.reset()  # the next model's graphs would count against the same limit


TINY = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "steps": 6, "batch_size": 4, "length": 64, "validation_tokens": 1024, "seeds": [0],
    "device": "cpu", "compile": "none", "log_every": 2, "output": results.ROOT / "build" / "quality"}  # fmt: skip


def make_parser():
    """Arguments; every default is the setting of the committed comparison."""
    parser = results.Parser("benchmarks/quality.py", __doc__)
    add, positive, rate = parser.add_argument, results.at_least(1), results.RATE
    add("--models", nargs="*", choices=MODELS, default=list(MODELS))
    add("--seeds", type=results.SEED, nargs="+", default=[0, 1, 2])
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of HSPMNConfig, which a Llama has not")
    variants = "NAME[@MODEL]:KEY=VALUE,..."
    add("--variants", nargs="*", default=[], metavar=variants, help="hspmn, or MODEL, with other fields")
    add("--name", type=results.file_name, default="quality", help="name of the results file")
    add("--output", type=Path, default=results.RESULTS, help="folder of the results file and plot")
    add("--force", action="store_true", help="append to results of other code or settings")
    add("--time_budget", type=results.at_least(0, float), default=0.0, help="seconds in which every pair must finish")
    add("--steps", type=positive, default=700)
    add("--batch_size", type=positive, default=32, help="rows per step")
    add("--length", type=results.at_least(2), default=2048, help="tokens per row")
    add("--lr", type=rate, default=1.5e-3, help="peak learning rate, the same for every model")
    add("--needle_mix", type=results.SHARE, default=0.0, help="share of the rows of each batch that are needle tasks")
    for field, size in FULL.items():
        add(f"--{field}", type=positive, default=size)
    add("--initializer_range", type=rate, default=0.02, help="deviation of fresh weights of all but the Llamas")
    add("--dense_initializer_range", type=rate, default=0.04, help="that of the Llamas, which learn best from another")
    add("--parameter_tolerance", type=results.SHARE, default=0.03, help="allowed difference in size")
    add("--validation_tokens", type=positive, default=2_000_000)
    add("--device", choices=results.DEVICES, default=results.DEVICES[0])
    add("--compile", choices=("layers", "model", "none"), help="layers on cuda, none on cpu: blocks share one graph")
    add("--log_every", type=positive, default=10)
    add("--data_cache", type=Path, help="folder that keeps tokenizer and tokens between runs")
    add("--save", nargs="*", default=[], metavar="MODEL", help="models whose checkpoints are kept")
    add("--checkpoints", type=Path, help="their folder; <output>/checkpoints by default")
    add("--plot_only", action="store_true", help="print and plot the results file, run nothing")
    add("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser


def main(argv=None):
    """Run the comparison; returns the exit code."""
    args = make_parser().parse(argv, TINY)
    settle(args)
    if args.needle_mix == 1.0:
        results.refuse(f"--needle_mix must lie in [0, 1), got {args.needle_mix}; use a share such as 0.25")
    if args.validation_tokens < args.length:
        results.refuse(f"--validation_tokens {args.validation_tokens} must be at least --length {args.length}")
    args.checkpoints = args.checkpoints or args.output / "checkpoints"
    transformers.utils.logging.disable_progress_bar()
    path = args.output / f"{args.name}.json"
    results.check_output(path, OWN)
    for flag in ("checkpoints", "data_cache"):
        if getattr(args, flag) is not None:
            results.check_folder(f"--{flag}", getattr(args, flag))
    if not args.plot_only:
        run_all(args)
    elif not path.exists():
        results.refuse(f"--plot_only: --output {args.output} has no {path.name}; run the comparison first")
    if path.exists():
        show(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
