"""Measure a saved causal language model: validation loss, needle retrieval, and its contracts.

    python evaluate.py --task loss FOLDER          nats per token, split into recall and other targets
    python evaluate.py --task needle FOLDER        a key-value needle at ten depths of 1x, 2x and 4x the trained length
    python evaluate.py --task verify FOLDER        contracts 1, 2, 6 and 7, files: pass or fail per line

FOLDER is a checkpoint with its tokenizer, such as `train.py` or `benchmarks/quality.py --save` writes. Text is Python
source found on the machine. B batch, N rows, T tokens, D width.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parent)]

from hspmn.configuration_hspmn import CHOICES
from hspmn.results import (
    DEVICES,
    ROOT,
    SEED,
    Parser,
    at_least,
    check_output,
    check_saved,
    file_name,
    loading,
    low_precision,
    merge_results,
    new_figure,
    refuse,
    row,
)
from hspmn.runs import load_model
from hspmn.tokens import rows_of, validation_tokens

PIECE, DECODED = 512, 64  # tokens of a piece, and at most so many last ones of a row, one by one, through a cache


def recall_targets(ids_BT):
    """Which targets complete a bigram already seen in their row, bool [B, T - 1]; entry t is for the target t + 1."""
    pair_BT = ids_BT[:, :-1].long() * (int(ids_BT.max()) + 1) + ids_BT[:, 1:]
    ordered_BT, order_BT = pair_BT.sort(dim=1, stable=True)
    repeated_BT = torch.nn.functional.pad(ordered_BT[:, 1:] == ordered_BT[:, :-1], (1, 0))
    return torch.zeros_like(repeated_BT).scatter(1, order_BT, repeated_BT)


def cache_pieces(tokens):
    """Lengths of the calls that read rows of `tokens` tokens through a cache: a prompt in pieces, the end token by
    token."""
    prompt = tokens - min(DECODED, -(-tokens // 8))
    return [min(PIECE, prompt - begin) for begin in range(0, prompt, PIECE)] + [1] * (tokens - prompt)


def hidden_states(model, ids, pieces):
    """The last hidden states [B, T, D], and the outputs of the last call: see `validate`."""
    if pieces is None:
        outputs = model.base_model(input_ids=ids, use_cache=False)
        return outputs.last_hidden_state, outputs
    cache, found = None, []
    for piece in ids.split(pieces, 1):
        outputs = model.base_model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        found.append(outputs.last_hidden_state)
    return torch.cat(found, 1), outputs


@torch.no_grad()
def validate(model, rows, batch_size, pieces=None):
    """Mean nats over `rows` [N, T] overall, on recall targets and on the others; loads and gate entropy per layer.
    pieces: lengths of calls that read each row through a cache, as `cache_pieces` gives them; None: in one pass
    without. Through a cache there are no loads."""
    model.eval()
    sums, router = torch.zeros(4, dtype=torch.float64, device=model.device), []
    for ids in rows.split(batch_size):
        ids, losses = ids.to(model.device), []
        with low_precision(model.device):
            hidden, outputs = hidden_states(model, ids, pieces)
            # few rows at once, which bounds the logits' memory
            for few, targets in zip(hidden[:, :-1].split(4), ids[:, 1:].split(4), strict=True):
                logits = model.get_output_embeddings()(few).float()
                losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
        losses, recall = torch.cat(losses).double(), recall_targets(ids)
        sums += torch.stack([losses[recall].sum(), losses[~recall].sum(), recall.sum(), (~recall).sum()])
        if pieces is None and getattr(outputs, "router_load", None) is not None:
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


def weave(text, room, pieces, rng):
    """A random part of `text` of `room` tokens with pieces, pairs of place (0 to 1) and tokens, put in, as a list."""
    begin = int(rng.integers(0, len(text) - room + 1))
    hay, ids, done = text[begin : begin + room].tolist(), [], 0
    for place, piece in sorted(pieces, key=lambda item: item[0]):
        cut = round(place * room)
        ids, done = ids + hay[done:cut] + piece, cut
    return ids + hay[done:]


def needle_prompt(tokenizer, text, length, depth, rng):
    """A prompt of `length` tokens ending in a question, with the needle at `depth` (0 to 1), and the value."""
    [(statement, question, value, _)] = needles(tokenizer, rng, 1)
    room = length - len(statement) - len(question)
    if room < 1:
        refuse(f"--train_length gives prompts of {length} tokens, a needle alone takes {length - room}; raise it, or "
               "--multiples")  # fmt: skip
    text = text if len(text) > room else np.tile(text, room // len(text) + 1)
    return weave(text, room, [(depth, statement), (1.0, question)], rng), value


class NeedleRows(torch.utils.data.Dataset):
    """`count` training rows, int64 [length]: real text (token ids) with needles, each asked for later in the row.

    From one needle to one per 32 tokens, uniform, as far as three quarters of the row hold them: many teach what
    `needle_prompt` asks for, since of a row with one, six tokens or so say anything about retrieval. A tenth begins
    with a needle, as prompts of depth 0 do, a place like no other. A row depends on seed and number alone.
    """

    def __init__(self, tokenizer, text, count, length, seed):
        self.tokenizer, self.text, self.count, self.length, self.seed = tokenizer, text, count, length, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        rng, pieces, room = np.random.default_rng([self.seed, index]), [], self.length
        tasks = needles(self.tokenizer, rng, int(rng.integers(1, max(4, self.length // 32) + 1)))
        for number, (statement, question, value, end) in enumerate(tasks):
            first, second = sorted(rng.random(2))
            if number == 0:
                first, second = 0.0 if rng.random() < 0.1 else first, 1.0
            asked = question + value + end
            left = room - len(statement) - len(asked)
            if left < 0.25 * self.length:
                break
            pieces, room = [*pieces, (first, statement), (second, asked)], left
        return torch.tensor(weave(self.text, room, pieces, rng))


def greedy(model, ids_BT, new_tokens, chunk):
    """Greedy continuation, int64 [B, new_tokens] at most, after prefilling `chunk` tokens at a time."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "prefill_chunk_size": chunk, "pad_token_id": 0}
    return model.generate(ids_BT, **options)[:, ids_BT.shape[1] :]


def refuse_topk(args, model):
    """A router that ranks tokens reads no row in pieces."""
    if getattr(model.config, "router_mode", None) == "topk":
        refuse(f"folder {args.folder}: a model of router_mode topk cannot generate; evaluate its loss without a cache")


def run_needle(args):
    """Task needle: share of needles whose value is generated exactly per depth and length, and a heatmap of it."""
    model, tokenizer = load(args)
    refuse_topk(args, model)
    text = validation_tokens(tokenizer, max(200_000, int(max(args.multiples) * args.train_length)))
    needle_prompt(tokenizer, text, int(min(args.multiples) * args.train_length), 0.0, np.random.default_rng(0))
    depths, grid = np.linspace(0, 1, args.depths).tolist(), {}
    for multiple in args.multiples:
        length, shares = int(multiple * args.train_length), []
        for depth in depths:
            rng = np.random.default_rng([args.seed, length, round(1000 * depth)])
            tasks, found = [needle_prompt(tokenizer, text, length, depth, rng) for _ in range(args.samples)], 0
            for begin in range(0, args.samples, args.batch_size):
                prompts, wanted = zip(*tasks[begin : begin + args.batch_size], strict=True)
                ids = torch.tensor(prompts, device=model.device)
                got = greedy(model, ids, max(map(len, wanted)), args.prefill_chunk).tolist()
                found += sum(answer[: len(value)] == value for answer, value in zip(got, wanted, strict=True))
            shares.append(found / args.samples)
        grid[f"{multiple:g}"] = shares
        print(f"x{multiple:g} ({length} tokens): " + " ".join(f"{share:.2f}" for share in shares))
    rows = [row(f"{args.label}/x{multiple}", "accuracy", float(np.mean(grid[multiple]))) for multiple in grid]
    path = args.output / f"{args.name}.json"
    merge_results(path, rows, {"grids": {args.label: {"depths": depths, "accuracy": grid}}}, args.command)
    figure, axes = new_figure(6, 4)
    if figure is not None:
        image = axes.imshow(np.array(list(grid.values())).T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(grid)), [f"{int(float(multiple) * args.train_length):,}" for multiple in grid])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel=f"prompt tokens (trained on {args.train_length:,})", ylabel="depth")
        axes.set_title(f"{args.label}: needle, exact match")
        figure.colorbar(image)
        figure.savefig(path.with_name(f"{path.stem}_{args.label}.png"), dpi=150, bbox_inches="tight")


def check_files(folder):
    """Code files named by auto_map, and those they import, are in the folder, with weights and configuration."""
    entries = json.loads((folder / "config.json").read_text()).get("auto_map", {}).values()
    code = {folder / f"{entry.split('.')[0]}.py" for entry in entries}
    lost = [] if list(folder.glob("*.safetensors")) else ["model.safetensors"]
    try:
        code = code.union(*(map(Path, get_relative_import_files(path)) for path in code))
    except FileNotFoundError as error:
        lost.append(Path(error.filename).name)
    detail = f"missing: {', '.join(lost)}" if lost else f"{len(code)} code files"
    yield "code files and weights are complete", not lost, detail
    here = [path for path in code if path.exists() and (ROOT / path.name).exists()]
    changed = sorted(path.name for path in here if path.read_bytes() != (ROOT / path.name).read_bytes())
    if changed:
        yield "code files equal this checkout's", None, f"differ: {', '.join(changed)}"


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
        cache, calls = None, []
        for ids in ids_BT.split(sizes, 1):
            calls.append(model(input_ids=ids, past_key_values=cache, use_cache=True))
            cache = calls[-1].past_key_values
        error, mask = distance(torch.cat([call.logits for call in calls], 1), whole.logits), whole.get("router_mask")
        same = mask is None or torch.equal(torch.cat([call.router_mask for call in calls], 2), mask)
        detail = f"relative difference {error:.1e}, routed sets {'equal' if same else 'differ'}"
        yield f"contract 2: {way} equals {'one call' if rounded else 'uncached'}", error <= 1e-4 and same, detail


def check_reload(model, ids_BT):
    """Contract 6: saved to an empty folder and loaded in a fresh process, the model gives the same logits."""
    want = model(input_ids=ids_BT, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.save_pretrained(folder / "model")
        torch.save({"ids": ids_BT, "logits": want}, folder / "expected.pt")
        command = [sys.executable, __file__, "--task", "compare", str(folder / "model"), "--device", model.device.type]
        result = subprocess.run(command, capture_output=True, text=True)
    detail = (result.stdout.strip() or result.stderr.strip()[-400:]).splitlines() or ["no output"]
    yield "contract 6: same logits after saving and loading", result.returncode == 0, detail[-1]


def run_compare(args):
    """The fresh process of contract 6: logits of a saved model against those in `expected.pt` beside its folder."""
    if not (path := args.folder.parent / "expected.pt").exists():
        refuse(f"--task compare is the second half of --task verify and needs {path}; run --task verify")
    model = load(args)[0]
    expected = torch.load(path, map_location=model.device)
    error = distance(model(input_ids=expected["ids"], use_cache=False).logits, expected["logits"])
    print(f"relative difference {error:.1e}")
    return int(error > 1e-6)


def check_loads(model, tokenizer, args):
    """Contract 7: on validation text every layer's load is within 0.5x to 1.5x of its target."""
    shares = getattr(model.config, "layer_sparsity", None)
    if shares is None or tokenizer is None:
        yield "contract 7: loads", None, "no router" if shares is None else "the folder has no tokenizer"
        return
    loads = validate(model, validation_rows(tokenizer, 4 * args.train_length, args.train_length), 1)["load"]
    ratios = [load / share for load, share in zip(loads, shares, strict=True) if share]
    good = all(0.5 <= ratio <= 1.5 for ratio in ratios)
    yield "contract 7: loads within 0.5x to 1.5x of target", good, " ".join(f"{ratio:.2f}" for ratio in ratios)


def run_verify(args):
    """Task verify: one line per check; exit code 1 if any fails."""
    torch.set_float32_matmul_precision("highest")
    args.dtype = "float32"
    with loading(args.folder):
        checks = list(check_files(args.folder))
    if all(passed is not False for _, passed, _ in checks):
        model, tokenizer = load(args)
        length = 96 + min(getattr(model.config, "sliding_window", None) or 0, 1024)  # past the end of the window
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
        ids = (ids if tokenizer is None else validation_rows(tokenizer, 2 * length, length)).to(model.device)
        checks += [*check_causality(model, ids), *check_cached(model, ids)]
        checks += [*check_reload(model, ids), *check_loads(model, tokenizer, args)]
    for name, passed, detail in checks:
        print(f"{ {True: 'pass', False: 'FAIL', None: 'note'}[passed] }  {name} ({detail})")
    return int(any(passed is False for _, passed, _ in checks))


def run_loss(args):
    """Task loss: validation nats of a checkpoint, and of the same tokens read through a cache."""
    model, tokenizer = load(args)
    metrics, rows = ("val", "recall", "other"), validation_rows(tokenizer, args.tokens, args.train_length)
    if args.through_cache:
        refuse_topk(args, model)
    result = validate(model, rows, args.batch_size)
    if args.through_cache:
        cached = validate(model, rows, args.batch_size, cache_pieces(args.train_length))
        result |= {f"{metric}_cache": cached[metric] for metric in metrics}
        metrics += tuple(f"{metric}_cache" for metric in metrics)
    numbers = [row(args.label, metric, result[metric]) for metric in metrics]
    merge_results(args.output / f"{args.name}.json", numbers, {}, args.command)
    print(json.dumps(result))


def validation_rows(tokenizer, tokens, length):
    """About `tokens` tokens of validation text, int64 [N, length]."""
    rows = rows_of(validation_tokens(tokenizer, tokens), length)
    if not len(rows):
        refuse(f"--train_length {length} is longer than the text; lower it, or raise --tokens {tokens}")
    return rows


def load(args):
    """Model in eval mode and tokenizer (None if the folder has none) of `args.folder`."""
    options = {"dtype": args.dtype or ("bfloat16" if args.device == "cuda" else "float32")}
    if getattr(args, "kv_cache_dtype", None) is not None:  # not every command asks for it
        options["kv_cache_dtype"] = args.kv_cache_dtype
    model, tokenizer = load_model(args.folder, "folder", **options), None
    if (args.folder / "tokenizer.json").exists():
        with loading(f"folder {args.folder}"):
            tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        sizes = f"{len(tokenizer)} tokens, its model {model.config.vocab_size}"
        refuse(f"folder {args.folder}: the tokenizer has {sizes}; they do not belong together")
    return model.to(args.device).eval(), tokenizer


TASKS = {"loss": run_loss, "needle": run_needle, "verify": run_verify, "compare": run_compare}
TINY = dict(samples=1, depths=2, multiples=[1.0, 2.0], train_length=128, tokens=1024, batch_size=2, device="cpu")


@torch.no_grad()
def main(argv=None):
    """Run one task; returns the exit code."""
    parser = Parser("evaluate.py", __doc__)
    add, positive, multiple = parser.add_argument, at_least(1), at_least(1e-3, float, 1e4)
    add("folder", type=Path, help="checkpoint to evaluate")
    add("--task", required=True, choices=TASKS)
    add("--output", type=Path, help="folder of results file and plot; that of the checkpoint by default")
    add("--name", type=file_name, help="name of the results file; the task's by default")
    add("--label", type=file_name, help="name of the model in it; the folder's by default")
    add("--device", choices=DEVICES, help="cuda where there is one (verify: cpu)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="weights; bfloat16 on cuda, float32 on cpu")
    add("--seed", type=SEED, default=0)
    add("--batch_size", type=positive, default=8)
    add("--train_length", type=positive, default=2048, help="tokens per row the model was trained on")
    add("--tokens", type=positive, default=1_000_000, help="loss: validation tokens")
    add("--multiples", type=multiple, nargs="+", default=[1.0, 2.0, 4.0], help="needle: lengths over --train_length")
    add("--depths", type=at_least(2), default=10)
    add("--samples", type=positive, default=8, help="needle: prompts per depth and length")
    add("--through_cache", action="store_true", help=f"loss: also of the same rows read through a cache, in pieces of "
        f"{PIECE} tokens, the last {DECODED} one by one")  # fmt: skip
    add("--kv_cache_dtype", choices=CHOICES["kv_cache_dtype"], help="form of an HSPMN's cache; its own by default")
    add("--prefill_chunk", type=positive, default=65536, help="needle: tokens read at once")
    add("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    args = parser.parse(argv, TINY)
    transformers.utils.logging.disable_progress_bar()
    writes = args.task in ("loss", "needle")
    check_saved(args.folder, "config.json", *["tokenizer.json"] * writes)
    args.device = args.device or ("cpu" if args.task == "verify" else DEVICES[0])
    if args.kv_cache_dtype is not None:
        with loading(f"folder {args.folder}"):
            kind = json.loads((args.folder / "config.json").read_text())["model_type"]
        if kind != "hspmn":
            refuse(f"--kv_cache_dtype {args.kv_cache_dtype}: a {kind} has no such field; leave it out")
        if args.task == "loss" and not args.through_cache:
            refuse(f"--kv_cache_dtype {args.kv_cache_dtype}: --task loss reads no cache; add --through_cache")
    args.output, args.name = args.output or args.folder, args.name or args.task
    args.label = args.label or args.folder.resolve().name
    if writes:
        check_output(args.output / f"{args.name}.json")
    return TASKS[args.task](args) or 0


if __name__ == "__main__":
    sys.exit(main())
