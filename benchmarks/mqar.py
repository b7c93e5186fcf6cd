"""Trains small models on multi-query associative recall, the synthetic task of Zoology (arXiv 2312.04927).

    python benchmarks/mqar.py --models hspmn reflexive        some of the models of `benchmarks/quality.py`, one GPU
    python benchmarks/mqar.py --tiny                          in seconds, on a CPU

Each model is trained on all lengths together; the results file `mqar.json` holds its accuracy per length and number of
pairs. B batch, T tokens, P pairs, V vocabulary, D width.
"""

import sys
import time
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch.nn import functional as F

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parents[1])]

from hspmn.benchmarks.peers import CACHELESS, MODELS, build_model, comparison_config, train_steps
from hspmn.configuration_hspmn import CHOICES
from hspmn.results import (
    DEVICES,
    RATE,
    RESULTS,
    ROOT,
    SEED,
    Parser,
    at_least,
    check_output,
    file_name,
    low_precision,
    merge_results,
    parse_overrides,
    refuse,
    row,
)

FULL = {"vocab_size": 8192, "hidden_size": 128, "num_attention_heads": 4, "tokens": 32768, "test_batches": 16}
TINY = {
    "vocab_size": 256, "hidden_size": 32, "num_attention_heads": 2, "tokens": 256, "test_batches": 1, "steps": 4,
    "lengths": [64], "device": "cpu", "output": ROOT / "build"}  # fmt: skip


def mqar_batch(batch_size, length, pairs, vocab_size, generator):
    """A batch of multi-query associative recall: ids [B, T], query positions [B, P] and their values [B, P]. The first
    2 * pairs tokens are distinct keys (lower half of the vocabulary) each followed by its value (upper half). Every
    key returns once, at an even distance that follows a power law with exponent 0.01 - 1; the rest is token 0."""
    half, slots, device = vocab_size // 2, (length - 2 * pairs) // 2, generator.device
    keys_BP = 1 + torch.rand(batch_size, half - 1, generator=generator, device=device).topk(pairs, 1).indices
    values_BP = torch.randint(half, vocab_size, (batch_size, pairs), generator=generator, device=device)
    weight = torch.arange(1, slots + 1, device=device, dtype=torch.float32) ** (0.01 - 1)
    slot_BP = torch.multinomial(weight.expand(batch_size, -1), pairs, generator=generator)
    query_BP = 2 * pairs + 2 * slot_BP
    ids_BT = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
    ids_BT[:, 0 : 2 * pairs : 2], ids_BT[:, 1 : 2 * pairs : 2] = keys_BP, values_BP
    return ids_BT.scatter(1, query_BP, keys_BP), query_BP, values_BP


def batches(lengths, args, seed):
    """Endless batches of `args.tokens` tokens that cycle through the lengths, with a pair per 16 tokens."""
    generator = torch.Generator(args.device).manual_seed(seed)
    for length in cycle(lengths):
        yield mqar_batch(max(1, args.tokens // length), length, length // 16, args.vocab_size, generator)


def query_logits(model, ids_BT, query_BP, use_cache=False):
    """Logits at the query positions, float32 [B, P, V], and the model's outputs."""
    outputs = model.base_model(input_ids=ids_BT, use_cache=use_cache)
    hidden_BTD = outputs.last_hidden_state
    picked = hidden_BTD.gather(1, query_BP[..., None].expand(-1, -1, hidden_BTD.shape[-1]))
    return model.get_output_embeddings()(picked).float(), outputs


def query_loss(model, batch):
    """Mean cross entropy in nats of the values asked for, and the model's outputs."""
    ids_BT, query_BP, values_BP = batch
    logits, outputs = query_logits(model, ids_BT, query_BP)
    return F.cross_entropy(logits.transpose(1, 2), values_BP), outputs


@torch.no_grad()
def accuracy(model, length, args):
    """Share of queries answered with the right value, on batches that training has not seen, through a cache if
    `kv_cache_dtype` says that it stores whole numbers."""
    model.eval()
    right, whole = [], getattr(model.config, "kv_cache_dtype", "auto") != "auto"
    for ids, query, values in islice(batches([length], args, args.seed + 1_000_003), args.test_batches):
        with low_precision(model.device):
            right.append(query_logits(model, ids, query, whole)[0].argmax(-1) == values)
    return torch.cat(right).double().mean().item()


def run(case, config, args):
    """Train and test one model; returns its rows of the results file."""
    model, begun = build_model(case, config, args.seed).to(args.device), time.monotonic()
    print(f"{case}: {model.num_parameters():,} parameters", flush=True)
    data = islice(batches(args.lengths, args, args.seed), args.steps)
    for step, (loss, _) in enumerate(train_steps(model, data, query_loss, args.steps, args.lr), 1):
        if step % max(1, args.steps // 5) == 0:
            print(f"  step {step} loss {loss.item():.3f} ({time.monotonic() - begun:.0f} s)", flush=True)
    if not loss.isfinite():
        refuse(f"--lr {args.lr}: the training loss is {loss.item()} at step {args.steps}; lower it")
    rows = []
    for form in args.kv_cache_dtype:
        if case not in CACHELESS:
            model.config.kv_cache_dtype = form
        elif form != "auto":
            continue
        metric = "accuracy" if form == "auto" else f"accuracy_{form}"
        rows += [row(f"{case}/T{T}_P{T // 16}", metric, accuracy(model, T, args)) for T in args.lengths]
    for each in rows:
        print("  {case} {metric}: {value:.4f}".format(**each), flush=True)
    return rows


def main(argv=None):
    """Run the comparison; every default but that of the models is the setting of the committed one."""
    parser = Parser("benchmarks/mqar.py", __doc__)
    parser.set_defaults(**FULL)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["dense", "hspmn", "reflexive"])
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of HSPMNConfig, which a Llama has not")
    add("--lengths", type=at_least(16), nargs="+", default=[256, 512, 1024, 2048], help="tokens per row")
    add("--kv_cache_dtype", nargs="+", choices=CHOICES["kv_cache_dtype"], default=["auto"],
        help="forms of the caches through which a trained HSPMN is tested; auto: without one")  # fmt: skip
    add("--steps", type=at_least(1), default=3000)
    add("--lr", type=RATE, default=2e-3)
    add("--seed", type=SEED, default=0)
    add("--device", choices=DEVICES, default=DEVICES[0])
    add("--output", type=Path, default=RESULTS, help="folder of the results file")
    add("--name", type=file_name, default="mqar", help="name of the results file")
    add("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    args = parser.parse(argv, TINY)
    transformers.utils.logging.disable_progress_bar()
    if (most := 16 * (args.vocab_size // 2 - 1)) < max(args.lengths):
        refuse(f"--lengths {max(args.lengths)} needs more keys than the vocabulary has; use at most {most}")
    check_output(args.output / f"{args.name}.json")
    sizes = {field: getattr(args, field) for field in ("vocab_size", "hidden_size", "num_attention_heads")}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": args.num_attention_heads}
    sizes["intermediate_size"] = 2 * args.hidden_size
    overrides = {"backend": "reference"} | parse_overrides("--set", args.set)  # several lengths: no compiling
    configs = {case: comparison_config(case, sizes, overrides) for case in args.models}
    for case, config in configs.items():
        merge_results(args.output / f"{args.name}.json", run(case, config, args), {}, args.command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
