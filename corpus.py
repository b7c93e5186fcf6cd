"""From files to packed blocks of token ids: documents, packing, and a bigram to compare with.

`train.py` reads what `--dataset` names, the standard library of the running Python by default. B batch, N rows,
T tokens.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import re
import sysconfig
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, count, islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from .results import refuse
from .tokens import encode

KINDS = dict.fromkeys((".txt", ".md", ".rst", ".py"), "text")
KINDS |= {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
PIECE = 2**16  # characters of a document that are held at once, at most, and handed on as a row of their own
BATCH = 256  # rows of documents that are read or written at once
PAGE, MAPPED = 4096, 2**26  # bytes of a page of memory, and of a mapping of a dataset's file
CUTS = re.compile(r"\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)")
SURROGATE = re.compile("[\ud800-\udfff]")
ROW = {"text": datasets.Value("string"), "ends": datasets.Value("bool")}
# Folders of the standard library that hold tests, installed packages or generated tables instead of written code
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


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


def find_files(sources):
    """Files of known types that `--dataset` names or that lie in folders it names, each once, sorted by folder. What
    is left out of a folder is said: hidden files and folders, and files of other types."""
    files, left_out = {}, {"hidden files": [], "files of other types": []}
    for source in map(Path, sources):
        if not source.exists():
            refuse(f"--dataset {source} does not exist; give a file, a folder or the name of a dataset")
        found = [] if source.is_dir() else [source]
        for folder, folders, names in os.walk(source, onerror=refuse_unreadable) if source.is_dir() else ():
            hidden = [name for name in folders + names if name.startswith(".")]
            folders[:] = [name for name in folders if name not in hidden]
            inside = [Path(folder) / name for name in names if name not in hidden]
            found += [path for path in inside if path.suffix.lower() in KINDS]
            left_out["hidden files"] += [Path(folder) / name for name in hidden]
            left_out["files of other types"] += [path for path in inside if path.suffix.lower() not in KINDS]
        if not found:
            refuse(f"--dataset {source} holds no file of a known type ({', '.join(KINDS)})")
        files |= {path.resolve(): path for path in sorted(found)}
    for kind, paths in left_out.items():
        if paths:
            few = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
            logging.warning("--dataset: %d %s are left out: %s", len(paths), kind, few)
    kind, *others = {KINDS.get(path.suffix.lower()) for path in files.values()}
    if others or kind is None:
        suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in files.values()}))
        refuse(f"--dataset must hold files of one type of {', '.join(KINDS)}, got {suffixes}")
    return list(files.values())


def refuse_unreadable(error):
    """Refuse the file that an `OSError` names."""
    refuse(f"--dataset {error.filename} cannot be read: {error.strerror}")


@contextmanager
def open_text(path):
    """A file as text, UTF-8 with any line ends; ValueError names the byte that is not."""
    with open(path, "rb") as file:
        try:
            yield io.TextIOWrapper(file, "utf-8-sig")
        except UnicodeDecodeError as error:
            place = file.tell() - len(error.object) + error.start
            raise ValueError(f"byte {place} is not UTF-8 ({error.reason})") from error


class JsonReader:
    """Reads the values of a JSON text one by one, of which it holds no more than one; `line` is where it stands."""

    SPACES, SCAN = re.compile(r"[ \t\n\r]*"), json.JSONDecoder().raw_decode

    def __init__(self, file):
        self.file, self.text, self.at, self.line = file, "", 0, 1

    def _read_on(self):
        more = self.file.read(max(PIECE, len(self.text) - self.at))  # twice as much: a long value is scanned again
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def move(self, to):
        """Go on to a place of `text`."""
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def peek(self):
        """The next character that is no space, or nothing at the end."""
        while True:
            self.move(self.SPACES.match(self.text, self.at).end())
            if self.at < len(self.text) or not self._read_on():
                return self.text[self.at : self.at + 1]

    def value(self):
        """The value that begins here; ValueError if it is broken."""
        while True:
            problem, length, begin = None, len(self.text), self.at
            try:
                value, end = self.SCAN(self.text, begin)
                goes_on = end == length or isinstance(value, int | float) and end > length - 16
            except json.JSONDecodeError as error:
                problem, goes_on = error, "Unterminated" in error.msg or error.pos > length - 16
            if goes_on and self._read_on():
                continue
            if problem is not None:
                raise ValueError(f"the value that begins in line {self.line} is broken ({problem.msg})")
            self.move(end + self.at - begin)
            return value


def json_values(path):
    """Values of a JSON file, one after another or all in one list, each after the line that it begins in."""
    with open_text(path) as file:
        reader = JsonReader(file)
        listed = reader.peek() == "["
        reader.move(reader.at + listed)
        while (begin := reader.peek()) and not (listed and begin == "]"):
            yield reader.line, reader.value()
            if listed and (after := reader.peek()) != "]":
                if after != ",":
                    problem = "goes on without a comma" if after else "has no end"
                    raise ValueError(f"line {reader.line}: the list {problem}")
                reader.move(reader.at + 1)
        if listed:
            reader.move(reader.at + len(begin))
            if begin != "]" or reader.peek():
                raise ValueError(f"line {reader.line}: the list {'goes on after its' if begin else 'has no'} end")


def column_of(path, column, others):
    """Values of a column of a JSON or Parquet file, each after the place where it stands. A row of JSON may lack the
    column; the names of those it has are added to `others` then."""
    if KINDS[path.suffix.lower()] == "json":
        for line, row in json_values(path):
            if not isinstance(row, dict):
                raise ValueError(f"line {line} holds a {type(row).__name__}, not an object with a column {column}")
            if column not in row and len(others) < 100:
                others |= dict.fromkeys(row)
            yield f"line {line}", row.get(column)
        return
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        if column not in (names := file.schema_arrow.names):
            refuse(f"--text_column {column} is no text column; {path} has {', '.join(names)}")
        numbers = count(1)
        for batch in file.iter_batches(64, columns=[column]):
            yield from ((f"row {next(numbers)}", value) for value in batch.column(0).to_pylist())


def pieces(parts):
    """Rows of the document whose parts are given: one, or several of at most PIECE characters, the last of which ends
    it. They are cut before a line or a word, as tokenizers cut, and anywhere only where there is neither."""
    text = ""
    for part in parts:
        text, begin = text + part, 0
        while len(text) - begin > PIECE:
            window = begin + PIECE // 2, begin + PIECE
            cuts = (max((match.end() for match in cut.finditer(text, *window)), default=0) for cut in CUTS)
            cut = next(filter(None, cuts), begin + PIECE)
            yield {"text": text[begin:cut], "ends": False}
            begin = cut
        text = text[begin:]
    if text:
        yield {"text": text, "ends": True}


def file_rows(path, column, others):
    """Rows of the documents of a file; ValueError names the place of what is broken, or is no text."""
    if KINDS[path.suffix.lower()] == "text":
        with open_text(path) as file:
            yield from pieces(iter(partial(file.read, PIECE), ""))
        return
    for place, value in column_of(path, column, others):
        if isinstance(value, str):
            if SURROGATE.search(value):
                raise ValueError(f"{place}: column {column} holds half of a surrogate pair")
            yield from pieces([value])
        elif value is not None:
            raise ValueError(f"{place}: column {column} holds a {type(value).__name__}, not text")


def read_documents(files, column):
    """Rows (`ROW`) of the documents of `files`, tuples that begin with a path; null and empty texts are none. Refuses
    a broken file by name and place."""
    found, others = False, {}
    for name, *_ in files:
        try:
            for row in file_rows(Path(name), column, others):
                yield row
                found = True
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            refuse(f"--dataset {name} cannot be read: {reason}; mend the file or leave it out")
    if others and not found:
        refuse(f"--text_column {column} is no text column; the data has {', '.join(others)}")
    if not found:
        refuse(f"--dataset {files[0][0]}: the data is empty; give a file with at least one document")


def stored(generator, features, written, **arguments):
    """`Dataset` of a generator's rows, `written` so many at a time, in the cache of `datasets`, where other processes
    of a run find it."""
    features = datasets.Features(features)
    try:
        return datasets.Dataset.from_generator(generator, features, gen_kwargs=arguments, writer_batch_size=written)
    except ValueError:  # there are no rows; what the generator raises is a DatasetGenerationError
        return datasets.Dataset.from_dict({name: [] for name in features}, features)
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        folder = datasets.config.HF_DATASETS_CACHE
        refuse(f"the data cannot be kept in {folder}: {reason}; make room, or set HF_HOME to another disk")


def batches(documents, size):
    """All batches of `size` rows of a dataset or stream. What was read of a dataset's mapped file counts as memory of
    the process as long as the mapping lasts, so that each MAPPED bytes or so have one of their own."""
    if not isinstance(documents, datasets.Dataset):
        yield from documents.iter(size)
        return
    row = PAGE + documents.data.nbytes // max(1, documents.data.num_rows)  # bytes; drawn rows share no page
    rows = max(1, MAPPED // row // size) * size
    for begin in range(0, len(documents), rows):
        part = documents.select(range(begin, min(begin + rows, len(documents))))
        yield from pickle.loads(pickle.dumps(part)).iter(size)


def load_files(args):
    """Documents of the files that `--dataset` names: a dataset or a stream of `ROW`."""
    try:
        stats = [(str(path), path.stat()) for path in find_files(args.dataset)]
    except OSError as error:  # such as a link to nowhere
        refuse_unreadable(error)
    files = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)  # a changed file is read anew
    if not any(size for _, size, _ in files):
        refuse(f"--dataset {' '.join(args.dataset)} is empty; give a file with at least one document")
    arguments = {"files": files, "column": args.text_column}
    if args.streaming:
        features = datasets.Features(ROW)
        return datasets.IterableDataset.from_generator(read_documents, features, gen_kwargs=arguments)
    return stored(read_documents, ROW, BATCH, **arguments)


def load_named(args, split):
    """Documents of a split of the dataset that `--dataset` names: a dataset or a stream of one column, `text`."""
    name, column = args.dataset[0], args.text_column
    try:
        documents = datasets.load_dataset(name, args.dataset_config, split=split, streaming=args.streaming)
        columns = documents.features or next(iter(documents), {})
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        refuse(f"--dataset {name} cannot be read: {str(error.__cause__ or error).strip().splitlines()[0]}")
    kind = columns.get(column)
    if kind is None and documents.features or isinstance(kind, datasets.Value) and "string" not in kind.dtype:
        refuse(f"--text_column {column} is no text column; the data has {', '.join(columns)}")
    documents = documents.select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")


def load_documents(args):
    """Train and validation documents, each a dataset or a stream of rows with a `text`, and with `ends` if a document
    may have several rows: whether this is its last."""
    if not args.dataset:
        return standard_library(args.validation_fraction)
    first = Path(args.dataset[0])
    spelt_like_a_path = first.is_absolute() or args.dataset[0].startswith(".") or first.suffix.lower() in KINDS
    is_local = len(args.dataset) > 1 or first.exists() or spelt_like_a_path
    if args.validation_split and is_local:
        refuse(f"--validation_split {args.validation_split} needs a named dataset; local files have no splits")
    documents = load_files(args) if is_local else load_named(args, args.train_split)
    if args.validation_split:
        return documents, load_named(args, args.validation_split)
    if args.streaming:
        return hold_out_first(documents, args)
    most = 0
    for most in accumulate(len((row["text"] or "").encode()) + 1 for row in documents):  # a token is at least a byte
        if most >= args.seq_len:
            return hold_out(documents, args.validation_fraction)
    refuse(f"--seq_len {args.seq_len} is longer than the data ({most} tokens at most); lower it or add text")


def hold_out_first(documents, args):
    """A stream after its first documents, and these: a stream has neither a length nor an end to split by."""
    rows = (number for number, row in enumerate(documents, 1) if row.get("ends", True))
    ends = list(islice(rows, args.tokenizer_documents))
    if len(ends) < 2:
        few = f"--dataset {' '.join(args.dataset)} has {len(ends)}"
        refuse(f"--streaming holds out whole documents, and {few}; leave --streaming out, or add documents")
    held_out = ends[max(1, int(args.validation_fraction * len(ends))) - 1]
    return documents.skip(held_out), documents.take(held_out)


def hold_out(documents, fraction):
    """Train and validation part of a dataset: whole documents, drawn by a fixed seed, or the end of a single one."""
    rows = np.arange(len(documents))
    stops = 1 + (np.flatnonzero(documents.with_format("numpy")["ends"][:]) if "ends" in documents.features else rows)
    if len(stops) == 1:
        return cut_end(documents, fraction)
    starts, order = np.r_[0, stops[:-1]], np.random.default_rng(0).permutation(len(stops))
    held_out = min(max(1, round(fraction * len(stops))), len(stops) - 1)
    parts = []
    for chosen in (order[held_out:], order[:held_out]):
        lengths = stops[chosen] - starts[chosen]
        ahead = np.repeat(starts[chosen] - np.r_[0, lengths.cumsum()[:-1]], lengths)
        parts.append(documents.select(ahead + rows[: len(ahead)]))
    return parts


def cut_end(documents, fraction):
    """The rows of a single document up to a place, and those after it, so that `fraction` of its characters are."""
    ends = np.cumsum([len(text or "") for batch in batches(documents, BATCH) for text in batch["text"]])
    keep = int(ends[-1] * (1 - fraction))
    middle = min(int(np.searchsorted(ends, keep, "right")), len(ends) - 1)
    text = documents[middle]["text"] or ""
    halves = text[: len(text) - int(ends[middle]) + keep], text[len(text) - int(ends[middle]) + keep :]
    halves = [{name: [half if name == "text" else True] for name in documents.features} for half in halves]
    before, after = (datasets.Dataset.from_dict(half, documents.features) for half in halves)
    rows = np.arange(len(ends))
    before = datasets.concatenate_datasets([documents.select(rows[:middle]), before])
    return before, datasets.concatenate_datasets([after, documents.select(rows[middle + 1 :])])


def blocks(documents, tokenizer, seq_len, multiple, read):
    """Rows of one block each, int32 `input_ids` [T], cut from the stream of the tokens of all documents, each ended by
    the end-of-text token. `tokens` says how many of them the block accounts for; their sum is that of all.

    With a `multiple` the first tokens follow the last ones, so that nothing is left over of so many whole blocks.
    Without, what is left after the last block has none, unless it is all there is; the last block accounts for it.
    `read`, if given, is an int64 tensor in shared memory to which tokens are added as they are read.
    """
    rest, first, made, last = np.empty(0, np.int32), [], 0, None
    for batch in batches(documents, BATCH):
        ends = batch.get("ends", [True] * len(batch["text"]))
        texts = [pair for pair in zip(batch["text"], ends, strict=True) if pair[0]]
        tokens = encode(tokenizer, [text for text, _ in texts], ends=[end for _, end in texts])
        if read is not None:
            read += len(tokens)
        rest = np.concatenate([rest, tokens])
        for row in rest[: len(rest) // seq_len * seq_len].reshape(-1, seq_len):
            if last is not None:
                yield {"input_ids": last, "tokens": seq_len}
            last, made = row, made + 1
            if made <= multiple:
                first.append(row)
        rest = rest[len(rest) // seq_len * seq_len :].copy()
    left = len(rest)
    if last is not None:
        yield {"input_ids": last, "tokens": seq_len + (0 if multiple else left)}
    if not multiple and made == 0 and left > 1:
        yield {"input_ids": rest, "tokens": left}
    if multiple and made * seq_len + left and (missing := -(made * seq_len + left) % (multiple * seq_len)):
        again = np.resize(np.concatenate(first if made >= multiple else [*first, rest]), missing)
        if read is not None:
            read += missing
        for number, row in enumerate(np.concatenate([rest, again]).reshape(-1, seq_len)):
            yield {"input_ids": row, "tokens": min(seq_len, max(0, left - number * seq_len))}


def pack(documents, tokenizer, seq_len, multiple=0, read=None):
    """The `blocks` of documents: a dataset of a dataset's, a stream of a stream's."""
    features = {"input_ids": datasets.Sequence(datasets.Value("int32")), "tokens": datasets.Value("int64")}
    arguments = {"documents": documents, "tokenizer": tokenizer, "seq_len": seq_len, "multiple": multiple}
    if isinstance(documents, datasets.Dataset):
        return stored(blocks, features, max(1, min(1000, 2**20 // seq_len)), **arguments, read=None)
    arguments["read"] = read
    return datasets.IterableDataset.from_generator(blocks, datasets.Features(features), gen_kwargs=arguments)


def count_tokens(packed):
    """Tokens of the documents of a packed dataset."""
    return int(packed.with_format("numpy")["tokens"][:].sum()) if len(packed) else 0


def collate(rows, isolate_after=None):
    """Rows with `input_ids` to a batch; positions restart after each token `isolate_after`, if there is one."""
    ids_BT = torch.from_numpy(np.array([row["input_ids"] for row in rows], dtype=np.int64))
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
