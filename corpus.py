"""From files to packed blocks of token ids: sources, documents, tokenizers, packing, and a bigram to compare with.

`train.py` reads what `--dataset` names, the standard library of the running Python by default. `evaluate.py` and
`benchmarks/quality.py` read the Python sources found on the machine. B batch, N rows, T tokens.
"""

import hashlib
import sysconfig
from array import array
from itertools import accumulate
from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from .results import refuse

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
BUILDERS = dict.fromkeys((".txt", ".md", ".rst", ".py"), "text")
BUILDERS |= {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Folders of the standard library that hold tests, installed packages or generated tables instead of written code
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
VALIDATION_SHARE = 50  # one file of the machine's sources in 50, chosen by the hash of its content
LARGEST_SOURCE = 1_000_000  # bytes; longer files are generated tables
BYTES_PER_TOKEN = 4  # of a 16k byte-level BPE on Python source, from above


def fit_tokenizer(texts, vocab_size, padding=False):
    """Byte-level BPE fitted on an iterable of texts; first ids: the end of text and, if asked for, left padding."""
    names = {"eos_token": END_OF_TEXT} | ({"pad_token": PADDING} if padding else {})
    fitted, special = ByteLevelBPETokenizer(), list(names.values())
    fitted.train_from_iterator(texts, vocab_size, min_frequency=0, show_progress=False, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=fitted._tokenizer, padding_side="left", **names)


def encode(tokenizer, texts, limit=None):
    """One stream of token ids (int32), each text followed by the end-of-text token, at most `limit` tokens."""
    if tokenizer.eos_token_id is None:
        refuse(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token; set its eos_token")
    tokens = array("i")
    for begin in range(0, len(texts), 512):  # bounds the memory of the encodings
        if limit is not None and len(tokens) >= limit:
            break
        for ids in tokenizer(texts[begin : begin + 512], add_special_tokens=False)["input_ids"]:
            tokens.extend([*ids, tokenizer.eos_token_id])
    return np.array(tokens, dtype=np.int32)[:limit]


def rows_of(tokens, length):
    """Non-overlapping rows of `length` tokens, int64 [N, T]; what is left after the last is dropped."""
    count = len(tokens) // length
    return torch.from_numpy(np.asarray(tokens[: count * length], dtype=np.int64)).view(count, length)


def read_sources(train_bytes, validation_bytes):
    """Distinct Python files of the standard library and of installed packages, mixed, as lists of texts (train,
    validation) of the given sizes at most. The hash of its content decides a file's side, so copies never validate."""
    paths, found = sysconfig.get_paths(), {}
    for folder in sorted({paths[key] for key in ("stdlib", "purelib", "platlib")}):
        found |= {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*.py")}
    sides, room, seen = ([], []), [train_bytes, validation_bytes], set()
    for name in sorted(found, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        if max(room) <= 0:
            break
        try:
            data = found[name].read_bytes()
            text = data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.blake2b(data, digest_size=16).digest()
        side = int(int.from_bytes(digest[:4], "big") % VALIDATION_SHARE == 0)
        if 0 < len(data) <= LARGEST_SOURCE and digest not in seen and room[side] > 0:
            seen.add(digest)
            sides[side].append(text)
            room[side] -= len(text)
    return sides


def validation_tokens(tokenizer, limit):
    """About `limit` token ids (int32) of the machine's validation files."""
    return encode(tokenizer, read_sources(0, limit * BYTES_PER_TOKEN)[1], limit)


def standard_library(validation_fraction):
    """Sources of the running Python's standard library as train and validation `Dataset`, by a hash of their path."""
    root, sides = Path(sysconfig.get_paths()["stdlib"]), ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        text = "" if SKIPPED_FOLDERS & set(name.parts) else path.read_text("utf-8", errors="replace")
        if text.strip():
            share = int(hashlib.sha256(name.as_posix().encode()).hexdigest()[:8], 16) / 2**32
            sides[share < validation_fraction].append(text)
    if not sides[0]:
        refuse(f"the standard library at {root} has no .py files; pass --dataset")
    return tuple(datasets.Dataset.from_dict({"text": texts}) for texts in sides)


def load_split(args, split, is_local):
    """One split of the data that `--dataset` names, a (streaming or in-memory) dataset of one column, `text`."""
    name, options = f"--dataset {' '.join(args.dataset)}", {"split": split, "name": args.dataset_config}
    builder, files = args.dataset[0], []
    try:
        if is_local:
            for source in map(Path, args.dataset):
                if not source.exists():
                    refuse(f"--dataset {source} does not exist")
                inside = (file for file in source.rglob("*") if file.is_file() and file.suffix in BUILDERS)
                found = sorted(inside) if source.is_dir() else [source]
                files += found
                if not found:
                    refuse(f"--dataset {source} holds no file of a known type ({', '.join(BUILDERS)})")
            builder, *others = {BUILDERS.get(file.suffix) for file in files}
            if others or builder is None:
                suffixes = ", ".join(sorted({file.suffix or "no suffix" for file in files}))
                refuse(f"--dataset must hold files of one type of {', '.join(BUILDERS)}, got {suffixes}")
            if not any(file.stat().st_size for file in files):
                refuse(f"{name} is empty; give a file with at least one document")
            options = {"split": "train", "data_files": list(map(str, files))}
            options |= {"sample_by": "document"} if builder == "text" else {}
        documents = datasets.load_dataset(builder, streaming=args.streaming, **options)
        first = next(iter(documents), None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        refuse(f"{name} cannot be read: {str(error.__cause__ or error).strip().splitlines()[0]}")
    if first is None:
        refuse(f"{name} is empty; give a file or split with at least one document")
    if not isinstance(first.get(args.text_column), str):
        refuse(f"--text_column {args.text_column} is no text column; the data has {', '.join(first)}")
    documents = documents.select_columns([args.text_column])
    if args.text_column != "text":
        documents = documents.rename_column(args.text_column, "text")
    if not args.streaming:
        most = 0
        for most in accumulate(len(row["text"].encode()) + 1 for row in documents):  # a token is at least one byte
            if most >= args.seq_len:
                return documents
        refuse(f"--seq_len {args.seq_len} is longer than the data ({most} tokens at most); lower it or add text")
    return documents


def load_documents(args):
    """Train and validation documents as datasets of one column, `text`."""
    if not args.dataset:
        return standard_library(args.validation_fraction)
    first = Path(args.dataset[0])
    spelt_like_a_path = first.is_absolute() or args.dataset[0].startswith(".") or first.suffix in BUILDERS
    is_local = len(args.dataset) > 1 or first.exists() or spelt_like_a_path
    if args.validation_split and is_local:
        refuse(f"--validation_split {args.validation_split} needs a named dataset; local files have no splits")
    documents = load_split(args, args.train_split, is_local)
    if args.validation_split:
        return documents, load_split(args, args.validation_split, is_local)
    if args.streaming:  # the first documents are held out: a stream has neither a length nor an end to split by
        held_out = max(1, int(args.validation_fraction * args.tokenizer_documents))
        return documents.skip(held_out), datasets.Dataset.from_list(list(documents.take(held_out)))
    if len(documents) == 1:  # one file: its end is held out
        text = documents[0]["text"]
        cut = int(len(text) * (1 - args.validation_fraction))
        return tuple(datasets.Dataset.from_dict({"text": [part]}) for part in (text[:cut], text[cut:]))
    split = documents.train_test_split(max(1, round(args.validation_fraction * len(documents))), seed=0)
    return split["train"], split["test"]


def pack(documents, tokenizer, seq_len, batch_size=256):
    """Blocks of `seq_len` token ids, each document ended by the end-of-text token; a batch's last part is dropped."""

    def to_blocks(batch):
        return {"input_ids": rows_of(encode(tokenizer, list(filter(None, batch["text"]))), seq_len).tolist()}

    return documents.map(to_blocks, batched=True, batch_size=batch_size, remove_columns=["text"])


def collate(rows, isolate_after=None):
    """Rows with `input_ids` to a batch; positions restart after each token `isolate_after`, if there is one."""
    ids_BT = torch.tensor([row["input_ids"] for row in rows])
    batch = {"input_ids": ids_BT, "labels": ids_BT}
    if isolate_after is not None:
        token_T = torch.arange(ids_BT.shape[1])
        starts_BT = torch.where(ids_BT[:, :-1] == isolate_after, token_T[1:], 0)  # of the documents after the first
        batch["position_ids"] = token_T - torch.nn.functional.pad(starts_BT, (1, 0)).cummax(1).values
    return batch


class Bigram:
    """Interpolated Kneser-Ney bigram with one discount, fitted on blocks of token ids [N, T]."""

    def __init__(self, blocks, vocab_size):
        self.vocab_size = vocab_size
        self.codes, self.counts = np.unique(self._pairs(blocks), return_counts=True)
        first, second = np.divmod(self.codes, vocab_size)
        self.total = np.bincount(first, self.counts, vocab_size)
        self.followers = np.bincount(first, minlength=vocab_size)
        preceders = np.bincount(second, minlength=vocab_size) + 0.5  # half a count keeps unseen tokens possible
        self.lower = preceders / preceders.sum()

    def _pairs(self, blocks):
        return (blocks[:, :-1].astype(np.int64) * self.vocab_size + blocks[:, 1:]).ravel()

    def loss(self, blocks, discount):
        """Mean nats per token of all tokens but the first of each block."""
        pairs = self._pairs(blocks)
        first, second = np.divmod(pairs, self.vocab_size)
        place = np.searchsorted(self.codes, pairs).clip(max=len(self.codes) - 1)
        count = np.where(self.codes[place] == pairs, self.counts[place], 0)
        saved = np.where(self.total[first] > 0, discount * self.followers[first], 1.0)
        mass = np.maximum(count - discount, 0) + saved * self.lower[second]
        return float(-np.log(mass / np.maximum(self.total[first], 1)).mean())


def bigram_loss(train, validation, vocab_size, max_tokens):
    """Loss of a bigram of at most `max_tokens` training tokens, its discount chosen on a held-out twentieth of it."""
    validation = np.array(validation["input_ids"][:], dtype=np.int32)
    most = max(2, max_tokens // validation.shape[1])
    blocks = np.array([row["input_ids"] for row in train.take(most)], dtype=np.int32)
    tuned = max(1, len(blocks) // 20)
    part = Bigram(blocks[:-tuned] if len(blocks) > tuned else blocks, vocab_size)
    discount = min(np.arange(0.3, 1.0, 0.05), key=lambda d: part.loss(blocks[-tuned:], d))
    return Bigram(blocks, vocab_size).loss(validation, discount)
