"""From texts to token ids: tokenizers, streams and rows of ids, and the Python sources found on the machine, which
`evaluate.py` and `benchmarks/quality.py` read. N rows, T tokens.
"""

import hashlib
import sysconfig
from array import array
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Regex
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import PreTrainedTokenizerFast

from .results import refuse

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
LONGEST_WORD = 256  # bytes that merge into one token at most; the longest run in Python's own sources has 80
CALL_TEXTS, CALL_CHARACTERS = 512, 2**18  # of a call to a tokenizer, whose encodings take 150 times a token's bytes
VALIDATION_SHARE = 50  # one file of the machine's sources in 50, chosen by the hash of its content
LARGEST_SOURCE = 1_000_000  # bytes; longer files are generated tables
BYTES_PER_TOKEN = 4  # of a 16k byte-level BPE on Python source, from above


def fit_tokenizer(texts, vocab_size, padding=False, digits=None):
    """Byte-level BPE fitted on an iterable of texts; first ids: the end of text and, if asked for, left padding. To it
    and to the saved tokenizer, special tokens spelt in a text are text. Numbers are cut into pieces of so many
    `digits` from their front; None: as BPE finds best."""
    names = {"eos_token": END_OF_TEXT} | ({"pad_token": PADDING} if padding else {})
    fitted, special = ByteLevelBPETokenizer(), list(names.values())
    bounded = Split(Regex(f".{{{LONGEST_WORD}}}"), "isolated")  # fitting takes the square of a word's length
    numbers = [] if digits is None else [Split(Regex(rf"\d{{1,{digits}}}"), "isolated")]
    fitted.pre_tokenizer = Sequence([*numbers, fitted.pre_tokenizer, bounded])
    fitted.train_from_iterator(texts, vocab_size, min_frequency=0, show_progress=False, special_tokens=special)
    options = names | {"padding_side": "left", "split_special_tokens": True}
    return PreTrainedTokenizerFast(tokenizer_object=fitted._tokenizer, **options)


def encode(tokenizer, texts, limit=None, ends=None):
    """One stream of token ids (int32) of a list of texts, at most `limit` tokens: the end-of-text token follows each
    text, or those alone that `ends` says, and special tokens spelt in a text are text."""
    if tokenizer.eos_token_id is None:
        refuse(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token; set its eos_token")
    tokens, begin, size, ends = array("i"), 0, 0, [True] * len(texts) if ends is None else ends
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size < CALL_CHARACTERS and stop - begin < CALL_TEXTS and stop < len(texts):
            continue
        if limit is not None and len(tokens) >= limit:
            break
        encoded = tokenizer(texts[begin:stop], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for ids, is_end in zip(encoded, ends[begin:stop], strict=True):
            tokens.extend([*ids, tokenizer.eos_token_id] if is_end else ids)
        begin, size = stop, 0
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
