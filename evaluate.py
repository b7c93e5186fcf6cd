"""Measure a saved causal language model: validation loss, needle retrieval, synthetic recall, and its contracts.

    python evaluate.py --task loss FOLDER          nats per token, split into recall and other targets
    python evaluate.py --task needle FOLDER        a key-value needle at ten depths of 1x, 2x and 4x the trained length
    python evaluate.py --task verify FOLDER        contracts 1, 2 and 6, loads, weights, files: pass or fail per line
    python evaluate.py --task mqar                 trains small models on multi-query associative recall

FOLDER is a checkpoint with its tokenizer, such as `benchmarks/quality.py --save` writes. Text is Python source found
on the machine. `benchmarks/quality.py` and `train.py` use functions of this file. B batch, T tokens, P pairs,
V vocabulary, D width.
"""

import argparse
import ast
import difflib
import hashlib
import importlib.util
import json
import math
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent
VALIDATION_SHARE = 50  # one file in 50, chosen by the hash of its content
LARGEST_SOURCE = 1_000_000  # bytes; longer files are generated tables
BYTES_PER_TOKEN = 4  # of a 16k byte-level BPE on Python source, from above
KEPT_OUT_OF_COMMAND = ("folder", "output", "resume", "data_cache", "checkpoints")  # paths of one machine


def list_sources():
    """All .py files of the standard library and the installed packages, in an order that mixes the packages."""
    paths = sysconfig.get_paths()
    found = {}
    for folder in sorted({paths[key] for key in ("stdlib", "purelib", "platlib")}):
        for path in Path(folder).rglob("*.py"):
            found[path.relative_to(folder).as_posix()] = path
    return [found[name] for name in sorted(found, key=lambda name: hashlib.blake2b(name.encode()).digest())]


def read_source(path):
    """The text of a file, or None if it is empty, very long or not UTF-8."""
    try:
        data = path.read_bytes()
        return data.decode() if 0 < len(data) <= LARGEST_SOURCE else None
    except (OSError, UnicodeDecodeError):
        return None


def read_documents(train_bytes, validation_bytes):
    """Distinct Python files as two lists of texts (train, validation), up to the given sizes.

    The hash of a file's content decides its side, so a copy of a training file never validates.
    """
    sides, room, seen, paths = ([], []), [train_bytes, validation_bytes], set(), list_sources()
    with ThreadPoolExecutor() as pool:
        for begin in range(0, len(paths), 1024):
            for text in pool.map(read_source, paths[begin : begin + 1024]):
                if text is None:
                    continue
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                side = int(int.from_bytes(digest[:4], "big") % VALIDATION_SHARE == 0)
                if digest not in seen and room[side] > 0:
                    seen.add(digest)
                    sides[side].append(text)
                    room[side] -= len(text)
            if max(room) <= 0:
                break
    return sides


def fit_byte_pairs(texts, vocab_size, special_tokens):
    """Byte-level BPE of `vocab_size` tokens fitted on an iterable of texts; special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer, texts, limit=None):
    """One stream of token ids (int32), documents separated by the end-of-text token, at most `limit` tokens."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to separate documents; set one and save it again")
    parts, total, end = [], 0, np.array([tokenizer.eos_token_id], dtype=np.int32)
    for begin in range(0, len(texts), 512):  # bounds the memory of the encodings
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[begin : begin + 512]):
            parts += [np.array(encoding.ids, dtype=np.int32), end]
            total += len(encoding) + 1
        if limit is not None and total >= limit:
            break
    return np.concatenate(parts)[:limit] if parts else np.zeros(0, dtype=np.int32)


def validation_tokens(tokenizer, limit):
    """About `limit` token ids of validation files."""
    return encode_documents(tokenizer, read_documents(0, limit * BYTES_PER_TOKEN)[1], limit)


def rows_of(tokens, length):
    """Non-overlapping rows of `length` tokens, int64 [rows, length]. Raises ValueError if there is not one."""
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, less than one row of {length}; use shorter rows")
    count = len(tokens) // length
    return torch.from_numpy(np.asarray(tokens[: count * length], dtype=np.int64)).view(count, length)


def comparison_overrides(case, layers):
    """Fields of `HSPMNConfig` that make it the named case of the comparison; None for the dense Transformer.

    linear_full4 is the usual hybrid built from the same blocks: gated linear attention in every layer, full causal
    attention beside it in every fourth (the last one of a shorter stack), no local window.
    It and the reflexive model keep their distant past in linear states, so no bound is put on what these remember.
    """
    full = [1.0 if i % 4 == 3 or (layers < 4 and i == layers - 1) else 0.0 for i in range(layers)]
    unbounded = {"linear_attention_horizon": 0}
    cases = {
        "dense": None,
        "linear_full4": {"sparsity_k": full, "sliding_window": 0} | unbounded,
        "hspmn": {},
        "hspmn_random": {},
        "hspmn_annealed": {"sparsity_anneal_fraction": 0.6},
        "reflexive": {"sparsity_k": 0.0} | unbounded,
    }
    check_model("--models", case, cases)
    return cases[case]


def check_model(option, name, known):
    """Raises ValueError for a model that is not among the known ones."""
    if name not in known:
        close = difflib.get_close_matches(name, known, 1) or known
        raise ValueError(f"{option} {name}: no such model; use {', '.join(close)}")


def parse_overrides(items):
    """Fields and values from texts such as "sliding_window=64"; values are JSON, or text if they are not."""
    fields = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: expected KEY=VALUE, such as sliding_window=64")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value
    return fields


def comparison_config(case, sizes, overrides=None):
    """Configuration of a case; `sizes` are fields that every decoder has, `overrides` fields of `HSPMNConfig`."""
    own = comparison_overrides(case, sizes["num_hidden_layers"])
    sizes = sizes | {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"], "tie_word_embeddings": True}
    if own is None:
        return LlamaConfig(**sizes, rms_norm_eps=1e-6, max_position_embeddings=1048576)
    fields = sizes | (overrides or {}) | own
    return config_with(fields)


def config_with(fields):
    """The checkout's `HSPMNConfig` with other values; raises ValueError for unknown fields and wrong values."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    for field, value in fields.items():
        if not hasattr(config, field):
            raise ValueError(f"--set {field}: HSPMNConfig has no such field; see configuration_hspmn.py")
        whole = isinstance(value, int) and not isinstance(value, bool)
        setattr(config, field, float(value) if whole and isinstance(getattr(config, field), float) else value)
    config.validate()
    return config


def build_model(case, config, seed):
    """Freshly initialised model of a case, float32; hspmn_random keeps its random router.

    There the hidden states learn nothing from the scores either: they would bend to where the frozen weights point.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    if case == "hspmn_random":
        for router in filter(None, (layer.router for layer in model.base_model.layers)):
            router.weight.requires_grad_(False)
            router.register_forward_pre_hook(detach_first)
    return model


def detach_first(module, inputs):
    """Forward pre-hook: no gradient to the first input."""
    return inputs[0].detach(), *inputs[1:]


def make_optimizer(model, lr, weight_decay=0.1):
    """AdamW with decay on the weights of linear layers and embeddings only."""
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=trained[0].is_cuda)


def optimizer_step(model, optimizer, step, steps, lr):
    """Clip to norm 1, step, clear; linear warm-up over 7 % of the steps, then a cosine down to a tenth of `lr`."""
    warmup = max(1, round(0.07 * steps))
    rise = min(1.0, (step + 1) / warmup)
    fall = max(0, step - warmup) / max(1, steps - warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr * rise * (0.1 + 0.45 * (1 + math.cos(math.pi * fall)))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def set_progress(model, step, steps):
    """Move the sparsity target of an HSPMN model to that of `step`; other models have none."""
    if hasattr(model, "anneal"):
        model.anneal(step, steps)


def low_precision(device):
    """bfloat16 autocast on CUDA, nothing on CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def recall_targets(ids_BT):
    """Which targets complete a bigram already seen in their row, bool [B, T - 1]; entry t is for the target t + 1."""
    pair_BT = ids_BT[:, :-1].long() * (int(ids_BT.max()) + 1) + ids_BT[:, 1:]
    ordered_BT, order_BT = pair_BT.sort(dim=1, stable=True)
    repeated_BT = torch.zeros_like(pair_BT, dtype=torch.bool)
    repeated_BT[:, 1:] = ordered_BT[:, 1:] == ordered_BT[:, :-1]
    return torch.zeros_like(repeated_BT).scatter(1, order_BT, repeated_BT)


def token_losses(model, hidden_BTD, ids_BT):
    """Cross entropy in nats of every target, float32 [B, T - 1]; a few rows at a time to bound the logits."""
    losses = []
    for hidden, ids in zip(hidden_BTD.split(4), ids_BT.split(4), strict=True):
        logits = model.get_output_embeddings()(hidden[:, :-1]).float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def validate(model, rows, batch_size, device):
    """Mean nats over `rows` [N, T] overall, on recall targets and on the others; loads and gate entropy per layer."""
    model.eval()
    sums, router = torch.zeros(4, dtype=torch.float64, device=device), []
    for ids in rows.split(batch_size):
        ids = ids.to(device)
        with low_precision(device):
            outputs = model.base_model(input_ids=ids, use_cache=False)
            losses = token_losses(model, outputs.last_hidden_state, ids).double()
        recall = recall_targets(ids)
        sums += torch.stack([losses[recall].sum(), losses[~recall].sum(), recall.sum(), (~recall).sum()])
        if getattr(outputs, "router_load", None) is not None:
            router.append(torch.stack([outputs.router_load, outputs.router_entropy]) * len(ids) / len(rows))
    recall, other, recalls, others = sums.tolist()
    result = {
        "val": (recall + other) / (recalls + others), "recall": recall / max(recalls, 1),
        "other": other / max(others, 1), "recall_share": recalls / (recalls + others),
    }  # fmt: skip
    if router:
        load, entropy = torch.stack(router).sum(0).tolist()
        result |= {"load": load, "gate_entropy": entropy, "target": list(model.config.layer_sparsity)}
    return result


def needles(tokenizer, rng, count):
    """Random key-value pairs, each as token lists: the statement, the question up to the value, the value, its end."""
    texts = []
    for letters, digits in zip(rng.integers(26, size=(count, 6)), rng.integers(10, size=(count, 6)), strict=True):
        key, value = "".join(chr(97 + letter) for letter in letters), "".join(str(digit) for digit in digits)
        texts += [f'\nSECRET["{key}"] = "', f'\nassert SECRET["{key}"] == "', value, '"\n']
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    parts = zip(ids[::4], ids[1::4], ids[2::4], ids[3::4], strict=True)
    return [(opening + value + end, question, value, end) for opening, question, value, end in parts]


def needle_prompt(tokenizer, text, length, depth, rng):
    """A prompt of `length` tokens ending in a question, with the needle at `depth` (0 to 1), and the value."""
    [(statement, question, value, _)] = needles(tokenizer, rng, 1)
    room = length - len(statement) - len(question)
    if room < 1:
        raise ValueError(f"a needle prompt needs more than {length - room} tokens, got length {length}")
    text = text if len(text) > room else np.tile(text, room // len(text) + 1)
    begin, cut = int(rng.integers(0, len(text) - room + 1)), round(depth * room)
    hay = text[begin : begin + room].tolist()
    return hay[:cut] + statement + hay[cut:] + question, value


class NeedleRows(Dataset):
    """Training rows, int64 [length]: real text with needles, each asked for later in the row.

    From one needle to one per 32 tokens, uniform, as far as three quarters of the row hold them: `needle_prompt` asks
    for one, and many of them teach it, since of a row with one needle six tokens or so say anything about retrieval.
    A tenth of the rows begins with a needle, as prompts of depth 0 do: no token stands before it, which no other place
    is like. A row depends on the seed and its number alone, whichever process makes it.
    """

    def __init__(self, tokenizer, text, count, length, seed):
        """`count` rows from the token ids `text`."""
        self.tokenizer, self.text, self.count, self.length, self.seed = tokenizer, text, count, length, seed

    def __len__(self):
        """Rows in all."""
        return self.count

    def __getitem__(self, index):
        """Row `index`; raises IndexError past the last."""
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        rng = np.random.default_rng([self.seed, index])
        most, pieces, room = max(4, self.length // 32), [], self.length
        tasks = needles(self.tokenizer, rng, int(rng.integers(1, most + 1)))
        for number, (statement, question, value, end) in enumerate(tasks):
            first, second = sorted(rng.random(2))
            if number == 0 and rng.random() < 0.1:
                first = 0.0
            asked = question + value + end
            left = room - len(statement) - len(asked)
            if left < 0.25 * self.length:
                break
            pieces += [(first, statement), (1.0 if number == 0 else second, asked)]
            room = left
        begin = int(rng.integers(0, len(self.text) - room + 1))
        hay, ids, done = self.text[begin : begin + room].tolist(), [], 0
        for place, piece in sorted(pieces, key=lambda item: item[0]):
            ids += hay[done : round(place * room)] + piece
            done = round(place * room)
        return torch.from_numpy(np.array(ids + hay[done:], dtype=np.int64))


@torch.no_grad()
def greedy(model, ids_BT, new_tokens, chunk):
    """Greedy continuation, int64 [B, new_tokens], after prefilling `chunk` tokens at a time."""
    cache, picked = None, []
    for ids in ids_BT.split(chunk, 1):
        outputs = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = outputs.past_key_values
    while True:
        picked.append(outputs.logits[:, -1:].argmax(-1))
        if len(picked) == new_tokens:
            return torch.cat(picked, 1)
        outputs = model(input_ids=picked[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)


def needle_accuracy(model, tokenizer, text, length, depth, args):
    """Share of `args.samples` needles at one depth of one length whose value is generated exactly."""
    rng = np.random.default_rng([args.seed, length, round(1000 * depth)])
    tasks = [needle_prompt(tokenizer, text, length, depth, rng) for _ in range(args.samples)]
    found = 0
    for begin in range(0, args.samples, args.batch_size):
        prompts, wanted = zip(*tasks[begin : begin + args.batch_size], strict=True)
        ids = torch.tensor(prompts, device=model.device)
        got = greedy(model, ids, max(map(len, wanted)), args.prefill_chunk).tolist()
        found += sum(answer[: len(value)] == value for answer, value in zip(got, wanted, strict=True))
    return found / args.samples


def run_needle(args):
    """Task needle: accuracy per depth and length, a results file and a heatmap."""
    model, tokenizer = load(args)
    text = validation_tokens(tokenizer, max(200_000, int(max(args.multiples) * args.train_length)))
    depths, grid = [i / (args.depths - 1) if args.depths > 1 else 0.5 for i in range(args.depths)], {}
    for multiple in args.multiples:
        length = int(multiple * args.train_length)
        grid[f"{multiple:g}"] = [needle_accuracy(model, tokenizer, text, length, depth, args) for depth in depths]
        print(f"x{multiple:g} ({length} tokens): " + " ".join(f"{share:.2f}" for share in grid[f"{multiple:g}"]))
    label = args.label or args.folder.name
    rows = [row(f"{label}/x{multiple}", "accuracy", sum(shares) / len(shares)) for multiple, shares in grid.items()]
    path = args.output / f"{args.name or 'needle'}.json"
    document = merge_results(path, rows, {"grids": {label: {"depths": depths, "accuracy": grid}}}, args)
    plot_needle(document["grids"][label], args.train_length, label, path.with_name(f"{path.stem}_{label}.png"))
    return 0


def plot_needle(grid, train_length, label, path):
    """Heatmap of needle accuracy, depth by prompt length."""
    figure, axes = new_figure(6, 4)
    if figure is None:
        return
    shares = np.array(list(grid["accuracy"].values())).T
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    lengths = [int(float(multiple) * train_length) for multiple in grid["accuracy"]]
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(grid["depths"])), [f"{depth:.0%}" for depth in grid["depths"]])
    axes.set(xlabel=f"prompt tokens (trained on {train_length:,})", ylabel="depth")
    axes.set_title(f"{label}: needle, exact match")
    figure.colorbar(image)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def mqar_batch(batch_size, length, pairs, vocab_size, generator, device):
    """A batch of multi-query associative recall: ids [B, T], query positions [B, pairs] and their values [B, pairs].

    The first 2 * pairs tokens are distinct keys (lower half of the vocabulary) each followed by its value (upper
    half). Every key returns once, at an even distance that follows a power law with exponent 0.01 - 1; the rest is
    token 0. The setting published with Zoology (arXiv 2312.04927).
    """
    half, slots = vocab_size // 2, (length - 2 * pairs) // 2
    if pairs > min(slots, half - 1):
        raise ValueError(
            f"{pairs} pairs do not fit in {length} tokens with {half - 1} keys; "
            f"use at most {min(length // 4, half - 1)} (--mqar_pairs)"
        )
    uniform = torch.rand(batch_size, half - 1, generator=generator, device=device)
    keys_BP = 1 + uniform.topk(pairs, 1).indices
    values_BP = torch.randint(half, vocab_size, (batch_size, pairs), generator=generator, device=device)
    weight = torch.arange(1, slots + 1, device=device, dtype=torch.float32) ** (0.01 - 1)
    slot_BP = torch.multinomial(weight.expand(batch_size, -1), pairs, generator=generator)
    query_BP = 2 * pairs + 2 * slot_BP
    ids_BT = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
    ids_BT[:, 0 : 2 * pairs : 2], ids_BT[:, 1 : 2 * pairs : 2] = keys_BP, values_BP
    return ids_BT.scatter(1, query_BP, keys_BP), query_BP, values_BP


def mqar_logits(model, ids_BT, query_BP, device):
    """Logits at the query positions, float32 [B, pairs, V], and the auxiliary loss."""
    with low_precision(device):
        outputs = model.base_model(input_ids=ids_BT, use_cache=False)
        hidden_BTD = outputs.last_hidden_state
        picked = hidden_BTD.gather(1, query_BP[..., None].expand(-1, -1, hidden_BTD.shape[-1]))
        return model.get_output_embeddings()(picked).float(), getattr(outputs, "aux_loss", None)


def train_mqar(model, settings, args, device):
    """Train on fresh batches that cycle through the (length, pairs) settings at a constant number of tokens."""
    generator = torch.Generator(device).manual_seed(args.seed)
    optimizer, begun = make_optimizer(model, args.lr), time.monotonic()
    model.train()
    for step in range(args.steps):
        length, pairs = settings[step % len(settings)]
        batch = max(1, args.mqar_tokens // length)
        ids, query, values = mqar_batch(batch, length, pairs, args.mqar_vocab, generator, device)
        set_progress(model, step, args.steps)
        logits, aux_loss = mqar_logits(model, ids, query, device)
        loss = F.cross_entropy(logits.transpose(1, 2), values)
        (loss if aux_loss is None else loss + aux_loss).backward()
        optimizer_step(model, optimizer, step, args.steps, args.lr)
        if (step + 1) % max(1, args.steps // 5) == 0:
            print(f"  step {step + 1} loss {loss.item():.3f} ({time.monotonic() - begun:.0f} s)", flush=True)


@torch.no_grad()
def mqar_accuracy(model, length, pairs, args, device):
    """Share of queries answered with the right value, on batches that training has not seen."""
    generator = torch.Generator(device).manual_seed(args.seed + 1_000_003)
    right = total = 0
    model.eval()
    for _ in range(args.mqar_test_batches):
        batch = max(1, args.mqar_tokens // length)
        ids, query, values = mqar_batch(batch, length, pairs, args.mqar_vocab, generator, device)
        right += int((mqar_logits(model, ids, query, device)[0].argmax(-1) == values).sum())
        total += values.numel()
    return right / total


def run_mqar(args):
    """Task mqar: train each model on all lengths together, report accuracy per length and number of pairs."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pairs = args.mqar_pairs or [length // 16 for length in args.mqar_lengths]
    settings = list(zip(args.mqar_lengths, pairs, strict=True))
    sizes = {
        "vocab_size": args.mqar_vocab, "hidden_size": args.mqar_hidden, "num_hidden_layers": 2,
        "num_attention_heads": args.mqar_heads, "num_key_value_heads": args.mqar_heads,
        "intermediate_size": 2 * args.mqar_hidden,
    }  # fmt: skip
    path = args.output / f"{args.name or 'mqar'}.json"
    overrides = {"backend": "reference"} | parse_overrides(args.set)  # several lengths: compiling would take longer
    for case in args.models:
        model = build_model(case, comparison_config(case, sizes, overrides), args.seed).to(device)
        print(f"{case}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        train_mqar(model, settings, args, device)
        rows = []
        for length, count in settings:
            accuracy = mqar_accuracy(model, length, count, args, device)
            rows.append(row(f"{case}/T{length}_P{count}", "accuracy", accuracy))
            print(f"  {rows[-1]['case']}: {accuracy:.4f}", flush=True)
        merge_results(path, rows, {}, args)
    return 0


def relative_imports(path):
    """Names of the sibling files that a Python file imports."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.py" for node in imports if node.level == 1 and node.module}


def check_files(folder):
    """Code files named by auto_map, and those they import, are in the folder, with weights and configuration."""
    config = json.loads((folder / "config.json").read_text())
    wanted = {f"{reference.split('.')[0]}.py" for reference in config.get("auto_map", {}).values()}
    done = set()
    while wanted - done:
        name = sorted(wanted - done)[0]
        done.add(name)
        if (folder / name).exists():
            wanted |= relative_imports(folder / name)
    lost = sorted(name for name in wanted if not (folder / name).exists())
    if not list(folder.glob("*.safetensors")):
        lost.append("model.safetensors")
    changed = [name for name in wanted - set(lost) if (ROOT / name).exists()
               and (ROOT / name).read_bytes() != (folder / name).read_bytes()]  # fmt: skip
    detail = f"missing: {', '.join(lost)}" if lost else f"{len(wanted)} code files"
    yield "code files and weights are complete", not lost, detail
    if changed:
        yield "code files equal this checkout's", None, f"differ: {', '.join(sorted(changed))}"


def check_weights(model, info):
    """Every weight has a place and a shape, and is finite."""
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    wrong = {key: names for key, names in wrong.items() if names}
    yield "weights match the configuration's shapes", not wrong, json.dumps(wrong) if wrong else "all"
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    total = sum(p.numel() for p in model.parameters())
    yield "weights are finite", not bad, ", ".join(bad[:5]) or f"{total:,} numbers"


def distance(got, want):
    """Largest absolute difference, as a share of the largest entry of `want`."""
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def check_causality(model, ids_BT):
    """Contract 1: other tokens from t + 1 on never change the logits up to t."""
    want, worst = model(input_ids=ids_BT, use_cache=False).logits, 0.0
    for t in (1, ids_BT.shape[1] // 2, ids_BT.shape[1] - 1):
        changed = ids_BT.clone()
        changed[:, t:] = (changed[:, t:] + 1) % model.config.vocab_size
        worst = max(worst, distance(model(input_ids=changed, use_cache=False).logits[:, :t], want[:, :t]))
    yield "contract 1: later tokens change nothing", worst <= 1e-5, f"relative difference {worst:.1e}"


@torch.no_grad()
def check_cached(model, ids_BT):
    """Contract 2: one-shot, chunked, token by token and uncached agree, routed sets included."""
    T = ids_BT.shape[1]
    rounded = getattr(model.config, "kv_cache_dtype", "auto") != "auto"  # then a cache alone changes the logits
    whole = model(input_ids=ids_BT, use_cache=rounded)
    ways = {"one-shot": [T], "chunked": [1, T // 3, T - 1 - T // 3], "token by token": [1] * T}
    for way, sizes in ways.items():
        cache, logits, masks = None, [], []
        for ids in ids_BT.split(sizes, 1):
            outputs = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
            masks.append(getattr(outputs, "router_mask", None))
        error = distance(torch.cat(logits, 1), whole.logits)
        same = masks[0] is None or torch.equal(torch.cat(masks, 2), whole.router_mask)
        detail = f"relative difference {error:.1e}, routed sets {'equal' if same else 'differ'}"
        yield f"contract 2: {way} equals {'one call' if rounded else 'uncached'}", error <= 1e-4 and same, detail


@torch.no_grad()
def check_reload(model, ids_BT, device):
    """Contract 6: saved to an empty folder and loaded in a fresh process, the model gives the same logits."""
    want = model(input_ids=ids_BT, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.save_pretrained(folder / "model")
        torch.save({"ids": ids_BT, "logits": want}, folder / "expected.pt")
        command = [sys.executable, __file__, "--task", "compare", str(folder / "model"), "--device", str(device)]
        result = subprocess.run(command, capture_output=True, text=True)
    detail = (result.stdout.strip() or result.stderr.strip()[-400:]).splitlines() or ["no output"]
    yield "contract 6: same logits after saving and loading", result.returncode == 0, detail[-1]


@torch.no_grad()
def run_compare(args):
    """The fresh process of contract 6: logits of a saved model against those in `expected.pt` beside its folder."""
    model, _ = load(args, needs_tokenizer=False)
    expected = torch.load(args.folder.parent / "expected.pt", map_location=model.device)
    error = distance(model(input_ids=expected["ids"], use_cache=False).logits, expected["logits"])
    print(f"relative difference {error:.1e}")
    return int(error > 1e-6)


def check_loads(model, tokenizer, args):
    """Contract 7: on validation text every layer's load is within 0.5x to 1.5x of its target."""
    shares = getattr(model.config, "layer_sparsity", None)
    if shares is None or tokenizer is None:
        yield "contract 7: loads", None, "no router" if shares is None else "the folder has no tokenizer"
        return
    rows = rows_of(validation_tokens(tokenizer, 4 * args.train_length), args.train_length)
    loads = validate(model, rows, 1, model.device)["load"]
    ratios = [load / share for load, share in zip(loads, shares, strict=True) if share]
    good = all(0.5 <= ratio <= 1.5 for ratio in ratios)
    yield "contract 7: loads within 0.5x to 1.5x of target", good, " ".join(f"{ratio:.2f}" for ratio in ratios)


def run_verify(args):
    """Task verify: one line per check; exit code 1 if any fails."""
    torch.set_float32_matmul_precision("highest")
    args.device, args.dtype = args.device or "cpu", "float32"
    checks = list(check_files(args.folder))
    if all(passed is not False for _, passed, _ in checks):
        model, tokenizer, info = load(args, needs_tokenizer=False, with_info=True)
        generator = torch.Generator().manual_seed(args.seed)
        length = 96 + min(getattr(model.config, "sliding_window", None) or 0, 1024)  # past the end of the window
        ids = torch.randint(model.config.vocab_size, (2, length), generator=generator).to(model.device)
        if tokenizer is not None:
            ids = rows_of(validation_tokens(tokenizer, 2 * length), length)[:2].to(model.device)
        checks += check_weights(model, info)
        checks += check_causality(model, ids)
        checks += check_cached(model, ids)
        checks += check_reload(model, ids, model.device)
        checks += check_loads(model, tokenizer, args)
    for name, passed, detail in checks:
        print(f"{ {True: 'pass', False: 'FAIL', None: 'note'}[passed] }  {name} ({detail})")
    return int(any(passed is False for _, passed, _ in checks))


def row(case, metric, value):
    """One number of a results file."""
    return {"case": case, "metric": metric, "value": value}


def code_hash():
    """Hash of the files that define the model, equal in every copy of the same checkout."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*_hspmn.py"), ROOT / "config.json"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def results_header(name, args):
    """Name, command, date, device, versions and commit: the first fields of every results file."""
    commit = None
    if shutil.which("git") is not None:
        git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    cuda = torch.cuda.is_available()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    if importlib.util.find_spec("triton") is not None:
        versions["triton"] = importlib.import_module("triton").__version__
    return {
        "name": name, "command": args.command, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})", "versions": versions,
        "commit": commit, "code": code_hash(),
    }  # fmt: skip


def write_json(path, document):
    """Write a results file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def merge_results(path, rows, extra, args):
    """Write rows to a results file; rows and entries of `extra` replace earlier ones of the same name."""
    old = json.loads(path.read_text()) if path.exists() else {"rows": []}
    new = {(item["case"], item["metric"]) for item in rows}
    kept = [item for item in old["rows"] if (item["case"], item["metric"]) not in new]
    merged = {key: old.get(key, {}) | value for key, value in extra.items()}
    document = results_header(path.stem, args) | merged | {"rows": kept + rows}
    write_json(path, document)
    return document


def new_figure(width, height):
    """A matplotlib figure and its axes, or two None with a notice where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return None, None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def load(args, needs_tokenizer=True, with_info=False):
    """Model and tokenizer (None if the folder has none and it is not needed) of `args.folder`, ready to evaluate."""
    if not (args.folder / "config.json").exists():
        raise ValueError(f"{args.folder} holds no config.json; give the folder of a saved model")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model, info = AutoModelForCausalLM.from_pretrained(
        args.folder, trust_remote_code=True, dtype=dtype, output_loading_info=True
    )
    tokenizer = None
    if (args.folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder)
    elif needs_tokenizer:
        raise ValueError(f"{args.folder} holds no tokenizer.json; save the tokenizer beside the model")
    model = model.to(device).eval()
    return (model, tokenizer, info) if with_info else (model, tokenizer)


def run_loss(args):
    """Task loss: validation nats of a checkpoint."""
    model, tokenizer = load(args)
    rows = rows_of(validation_tokens(tokenizer, args.tokens), args.train_length)
    result = validate(model, rows, args.batch_size, model.device)
    label = args.label or args.folder.name
    numbers = [row(label, metric, result[metric]) for metric in ("val", "recall", "other")]
    merge_results(args.output / f"{args.name or 'loss'}.json", numbers, {}, args)
    print(json.dumps(result))
    return 0


def recorded_command(parser, args):
    """The command line that gives `args`, without paths of this machine."""
    words = ["python", parser.prog]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        hidden = action.dest in (*KEPT_OUT_OF_COMMAND, "help") or not action.option_strings
        if not hidden and value not in (action.default, parser.get_default(action.dest)):
            words.append(action.option_strings[0])
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


TASKS = {
    "loss": run_loss, "needle": run_needle, "mqar": run_mqar, "verify": run_verify, "compare": run_compare
}  # fmt: skip
TINY = {
    "steps": 4, "samples": 1, "depths": 2, "multiples": [1.0, 2.0], "train_length": 128, "tokens": 1024,
    "mqar_lengths": [64], "mqar_vocab": 256, "mqar_hidden": 32, "mqar_heads": 2, "mqar_tokens": 256,
    "mqar_test_batches": 1, "batch_size": 2, "device": "cpu",
}  # fmt: skip


def make_parser():
    """Arguments of all tasks."""
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="checkpoint to evaluate (all tasks but mqar)")
    add("--task", required=True, choices=TASKS)
    add(
        "--output", type=Path, help="folder of results file and plot; that of the checkpoint, mqar: benchmarks/results"
    )
    add("--name", help="name of the results file; the task's by default")
    add("--label", help="name of the model in it; the folder's by default")
    add("--device", help="cuda or cpu; cuda where there is one (verify: cpu)")
    add("--dtype", help="weights; bfloat16 on cuda, float32 on cpu")
    add("--seed", type=int, default=0)
    add("--batch_size", type=int, default=8)
    add("--train_length", type=int, default=2048, help="tokens per row the model was trained on")
    add("--tokens", type=int, default=1_000_000, help="loss: validation tokens")
    add("--multiples", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="needle: lengths over --train_length")
    add("--depths", type=int, default=10)
    add("--samples", type=int, default=8, help="needle: prompts per depth and length")
    add("--prefill_chunk", type=int, default=65536, help="needle: tokens read at once")
    add("--models", nargs="+", default=["dense", "hspmn", "reflexive"], help="mqar")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="mqar: fields of HSPMNConfig")
    add("--steps", type=int, default=3000, help="mqar: training steps")
    add("--lr", type=float, default=2e-3, help="mqar")
    add("--mqar_lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    add("--mqar_pairs", type=int, nargs="+", help="per length; a sixteenth of it by default")
    add("--mqar_vocab", type=int, default=8192)
    add("--mqar_hidden", type=int, default=128)
    add("--mqar_heads", type=int, default=4)
    add("--mqar_tokens", type=int, default=32768, help="tokens per step")
    add("--mqar_test_batches", type=int, default=16)
    add("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    return parser


def main(argv=None):
    """Run one task; returns the exit code."""
    parser = make_parser()
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    args.command = recorded_command(parser, args)
    transformers.utils.logging.disable_progress_bar()
    if args.task != "mqar" and args.folder is None:
        parser.error(f"--task {args.task} needs the folder of a checkpoint")
    if args.output is None:
        args.output = args.folder or (ROOT / "build" if args.tiny else ROOT / "benchmarks" / "results")
    return TASKS[args.task](args)


if __name__ == "__main__":
    sys.exit(main())
