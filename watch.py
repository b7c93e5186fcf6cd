"""Read a log as it grows through a model, and mark the lines that stand out.

    python watch.py FOLDER access.log                   to its end
    python watch.py FOLDER access.log --follow          and on, as it grows and is rotated, until Ctrl-C
    journalctl -f | python watch.py FOLDER --json       standard input, an object per line
    python watch.py FOLDER access.log --follow --state watch.state -o marked.txt --marked

FOLDER is a checkpoint with its tokenizer, such as `train.py` writes. The model reads one endless stream, with a cache
of --max_slots tokens per layer. A line has two numbers: its surprise, the mean of its tokens' losses in nats, and its
routing, the mean of their router scores. It is marked where one lies --threshold deviations above its running mean.
As text a line is: "!" if it is marked, surprise, routing, the line. Lines longer than a mebibyte are read in parts.

With --state what is known is kept in a file, at the end and every --save_every seconds, together with the place in the
log: the next call goes on there, through a rotation too. What was written after the last state by a process that was
killed, -o takes back before the same lines are judged again; a pipe has them twice, with the same numbers.
"""

import hashlib
import json
import os
import queue
import re
import select
import signal
import sys
import threading
import time
import zlib
from contextlib import suppress
from importlib.util import find_spec
from itertools import chain, compress, count, product
from json.encoder import encode_basestring
from math import sqrt
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parent)]

from hspmn.block_hspmn import OPERATIONS, pick_backend
from hspmn.cache_hspmn import HSPMNCache
from hspmn.configuration_hspmn import CHOICES
from hspmn.evaluate import load
from hspmn.results import DEVICES, Parser, at_least, check_folder, check_saved, complain, refuse, refusing

READ, LONGEST, HEAD = 2**20, 2**20, 1024  # bytes: read at once, of a line, by which a file is known again
IDLE = 0.01  # seconds between two looks at a file that does not grow
REFILL = 0.001  # seconds for which a writer may leave a pipe empty before what was read of it is judged
AHEAD = 16  # blocks that are tokenized before the model reads them
LOGITS = 2**28  # of a block that are held at once
NUMBERS = ("surprise", "routing")
MARKED = {above: json.dumps([*compress(NUMBERS, above)]) for above in product((False, True), repeat=2)}
WARM, HORIZON = 100, 10_000  # lines before any is marked, and over which a running mean forgets
LEAST_DEVIATION = 0.02  # lines that are all alike have none
CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
SIZES = {"cuda": (16384, 32768), "cpu": (512, 2048)}  # tokens of a block, slots per layer


class Log:
    """Bytes of a file as it grows, from its place at the last state on, or of standard input.

    A file of another inode in its place is a rotation: the old one is read to its end first. One that is shorter than
    what was read has been truncated, and is read from its start. `place`, inode, digest of the first bytes and offset,
    finds the file again, under its own name or, rotated meanwhile, under one that begins with it.
    """

    def __init__(self, path, follow=False, place=None):
        self.path, self.follow, self.position, self.head = path, follow, 0, None
        if path is None:
            self.file = sys.stdin.buffer
            return
        found = path if place is None else self._find(place)
        if found is None:
            complain(f"{path} is not what the state was at, nor is any rotated one; it is read from its start")
        self._open(found or path)
        if found is not None and place is not None:
            self.position = place["offset"]
            self.file.seek(self.position)

    def _open(self, path):
        self.file, self.position, self.head = open(path, "rb", buffering=0), 0, None
        self.inode = os.fstat(self.file.fileno()).st_ino

    def _find(self, place):
        """The file that a state was at, if it is still there."""
        names = [self.path, *sorted(self.path.parent.glob(re.sub(r"([*?[])", r"[\1]", self.path.name) + "?*"))]
        alike = []
        for path in filter(Path.is_file, names):
            with open(path, "rb") as file:
                size, inode = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_ino
                if size >= place["offset"] and digest(file.read(place["head_bytes"])) == place["head"]:
                    alike.append((inode != place["inode"], len(alike), path))
        return min(alike)[2] if alike else None

    def place(self, behind=0):
        """What a state keeps of the place `behind` bytes before the last that were read; None for standard input."""
        if self.path is None:
            return None
        offset = self.position - behind
        if self.head is None or self.head["head_bytes"] < HEAD:
            first = os.pread(self.file.fileno(), min(HEAD, offset), 0)
            self.head = {"head": digest(first), "head_bytes": len(first)}
        return {"inode": self.inode, "offset": offset} | self.head

    def chunks(self):
        """Bytes as they come; empty ones while there are none; None where what was read ends, if in a line then so."""
        while True:
            if self.path is None:
                data, wait = b"", 10 * IDLE
                while len(data) < READ and select.select([self.file], [], [], wait)[0]:
                    part, wait = os.read(self.file.fileno(), READ - len(data)), REFILL
                    if not part:
                        yield data
                        yield None
                        return
                    data += part
                yield data
                continue
            data = self.file.read(READ)
            self.position += len(data)
            there = None if data else self._there()
            if data:
                yield data
            elif there is not None and there.st_ino != self.inode:
                if os.fstat(self.file.fileno()).st_size <= self.position:  # nothing came in between
                    yield None
                    with suppress(FileNotFoundError):
                        self._open(self.path)
            elif there is not None and there.st_size < self.position:
                yield None
                self._open(self.path)
            elif self.follow:
                yield b""
                time.sleep(IDLE)
            else:
                break
        yield None

    def _there(self):
        """What has the log's name now, None for nothing, as between the steps of a rotation."""
        try:
            return os.stat(self.path)
        except FileNotFoundError:
            return None


def digest(data):
    """By what a state knows a file again."""
    return hashlib.sha256(data).hexdigest()


class Block(NamedTuple):
    """Whole lines. texts: without their ends. ids: int32, of all tokens; lengths: int32, tokens of each line. place:
    behind the last line, of `Log.place`."""

    texts: list[str]
    ids: np.ndarray
    lengths: np.ndarray
    place: dict | None


def blocks(log, tokenizer, size):
    """Blocks of `size` tokens at most, or of one line, from a `Log` as it grows; None while nothing comes."""
    rest, texts, (ids, lengths, sizes) = b"", [], [np.empty(0, np.int32)] * 3  # sizes: bytes, with the lines' ends
    for data in log.chunks():
        *lines, rest = (rest + (data or b"")).split(b"\n")
        taken = [len(line) + 1 for line in lines]
        if rest and (data is None or len(rest) >= LONGEST):
            lines, rest, taken = [*lines, rest], b"", [*taken, len(rest)]
        new = [line.removesuffix(b"\r").decode(errors="replace") for line in lines]
        encoded = tokenizer.encode_batch_fast([f"{text}\n" for text in new], add_special_tokens=False)
        flat = np.fromiter(chain.from_iterable(each.ids for each in encoded), np.int32)
        texts, ids, begin = texts + new, np.concatenate([ids, flat]), 0
        lengths = np.concatenate([lengths, np.fromiter(map(len, encoded), np.int32, len(new))])
        sizes = np.concatenate([sizes, np.array(taken, np.int32)])
        filled, passed = (np.concatenate([[0], np.cumsum(each)]) for each in (lengths, sizes))
        while begin < len(texts):
            stop = max(begin + 1, int(np.searchsorted(filled, filled[begin] + size, "right")) - 1)
            if stop == len(texts) and len(data or b"") >= READ:
                break  # what fills the block is there already
            place = log.place(len(rest) + int(passed[-1] - passed[stop]))
            yield Block(texts[begin:stop], ids[filled[begin] : filled[stop]], lengths[begin:stop], place)
            begin = stop
        texts, ids, lengths, sizes = texts[begin:], ids[filled[begin] :], lengths[begin:], sizes[begin:]
        if not begin:
            yield None


class Ahead:
    """What an iterator gives, made in a thread of its own, at most `AHEAD` items ahead; `empty` now or not."""

    def __init__(self, iterator):
        self.items, self.stopped, self.done = queue.Queue(AHEAD), threading.Event(), object()
        self.thread = threading.Thread(target=self._run, args=(iterator,), daemon=True)
        self.thread.start()

    def _run(self, iterator):
        last = self.done
        try:
            for item in iterator:
                if self.stopped.is_set():
                    return
                if item is not None:
                    self._put(item)
        except Exception as error:  # of the log or the tokenizer: raised where the item is taken
            last = error
        self._put(last)

    def _put(self, item):
        while not self.stopped.is_set():
            with suppress(queue.Full):
                return self.items.put(item, timeout=0.1)

    def get(self, timeout):
        """The next item, None if it does not come in time; StopIteration after the last."""
        try:
            item = self.items.get(timeout=timeout)
        except queue.Empty:
            return None
        if item is self.done:
            raise StopIteration
        if isinstance(item, Exception):
            raise item
        return item


class Usual:
    """Mean and deviation of the numbers so far (Welford), of which those further back than `HORIZON` fade."""

    def __init__(self, count=0, mean=0.0, variance=0.0):
        self.count, self.mean, self.variance = count, mean, variance

    def judge(self, numbers, most):
        """Deviations by which each number exceeds the mean of those before, 0.0 before `WARM` numbers. It counts in
        what comes, but not as more than `most` deviations."""
        count, mean, variance, found = self.count, self.mean, self.variance, []
        for number in numbers:  # some hundred thousand a second: names of this function alone
            deviation, above, warm = max(sqrt(variance), LEAST_DEVIATION), number - mean, count >= WARM
            count += 1
            share, step = 1 / min(count, HORIZON), min(above, most * deviation) if warm else above
            mean += share * step
            variance = (1 - share) * (variance + share * step * step)
            found.append(above / deviation if warm else 0.0)
        self.count, self.mean, self.variance = count, mean, variance
        return found


class Watcher:
    """A model, the cache of the stream that it reads, and what is usual there.

    `launch` starts the work on a block and returns at once on a GPU; `finish` waits for it and judges its lines.
    """

    def __init__(self, model, max_slots, size, threshold):
        self.model, self.size, self.threshold, self.last = model, size, threshold, None
        self.cache, self.lines, self.marked, self.tokens = HSPMNCache(model.config, 0, max_slots), 0, 0, 0
        self.usual = {name: Usual() for name in NUMBERS}
        self.routing = [i for i, share in enumerate(model.config.layer_sparsity) if share]
        self.losses = OPERATIONS[pick_backend(model.config.backend, model.device, model.config.head_dim)].token_losses
        self.span = max(1, LOGITS // model.config.vocab_size)

    def launch(self, block):
        """Start to read a block: losses and scores of its tokens, [tokens, 2], in parts on their way to the host."""
        parts, event, cuda = [], None, self.model.device.type == "cuda"
        for ids in torch.from_numpy(block.ids).split(self.size):
            part = self._read((ids.pin_memory() if cuda else ids).to(self.model.device, non_blocking=True).long())
            parts.append(torch.empty(part.shape, pin_memory=True).copy_(part, non_blocking=True) if cuda else part)
        if cuda:
            event = torch.cuda.Event()
            event.record()
        return block, parts, event

    @torch.no_grad()
    def _read(self, ids_T):
        """Losses and scores of tokens, float32 [T, 2]."""
        outputs = self.model.base_model(ids_T[None], past_key_values=self.cache, use_cache=True)
        hidden_TD = outputs.last_hidden_state[0]
        before_TD = torch.cat([hidden_TD[:1] if self.last is None else self.last, hidden_TD[:-1]])
        losses_T = torch.cat([
            self.losses(self.model.lm_head(rows), targets)
            for rows, targets in zip(before_TD.split(self.span), ids_T.split(self.span), strict=True)
        ])  # fmt: skip
        if self.last is None:
            losses_T[0] = 0  # nothing stands before the first token
        self.last = hidden_TD[-1:].clone()
        scores_T = outputs.router_scores[self.routing, 0].mean(0) if self.routing else torch.zeros_like(losses_T)
        return torch.stack([losses_T, scores_T], 1)

    def finish(self, work):
        """The block, and four lists with an entry per line: its surprise, its routing, and by how many deviations each
        is above what is usual. Raises ValueError for numbers that are not finite."""
        block, parts, event = work
        if event is not None:
            event.synchronize()
        sums = np.concatenate([np.zeros((1, 2)), *parts]).cumsum(0)[np.concatenate([[0], block.lengths.cumsum()])]
        means = np.diff(sums, axis=0) / np.maximum(block.lengths, 1)[:, None]
        if not np.isfinite(means).all():
            raise ValueError(f"the model's numbers behind line {self.lines} are not finite; try another --dtype")
        numbers = means.T.tolist()
        above = [usual.judge(each, self.threshold) for usual, each in zip(self.usual.values(), numbers, strict=True)]
        self.lines += len(block.texts)
        self.tokens += len(block.ids)
        self.marked += int((np.array(above) > self.threshold).any(0).sum())
        return block, [*numbers, *above]


class Writer:
    """Puts judged lines out, whole blocks at once. form: "json", "text" or "rich"; path: a file that is appended to,
    after its first `kept` bytes (None: all), or None for standard output."""

    def __init__(self, form, only_marked, threshold, path=None, kept=None):
        self.only_marked, self.threshold, self.path = only_marked, threshold, path
        self.form = {"json": self._json, "text": self._text, "rich": self._text}[form]
        self.file, self.console = (sys.stdout.buffer if path is None else open(path, "ab")), None
        if kept is not None:
            if os.path.getsize(path) < kept:
                raise ValueError(f"--output {path} is shorter than what the state says was written; move --state away")
            self.file.truncate(kept)
        if form == "rich":
            from rich.console import Console

            self.console = Console(highlight=False, soft_wrap=True)

    def _json(self, rows):
        form = '{"line": %d, "marked": %s, "surprise": %.4f, "routing": %.4f, "surprise_z": %.4f, "routing_z": %.4f, '
        most, form = self.threshold, form + '"text": %s}\n'  # json.dumps of all takes four times as long
        for number, text, surprise, routing, surprise_z, routing_z in rows:
            marked = MARKED[surprise_z > most, routing_z > most]
            yield form % (number, marked, surprise, routing, surprise_z, routing_z, encode_basestring(text))

    def _text(self, rows):
        for _, text, surprise, routing, surprise_z, routing_z in rows:
            mark = "!" if surprise_z > self.threshold or routing_z > self.threshold else " "
            yield "%s %6.3f %7.3f %s\n" % (mark, surprise, routing, text)  # noqa: UP031

    def write(self, number, block, verdicts):
        """Lines of a block, of which the first has a number; verdicts: of `Watcher.finish`."""
        texts, most = block.texts, self.threshold
        if self.form != self._json:
            texts = "\n".join(texts).translate(CONTROL).split("\n")
        rows = zip(count(number), texts, *verdicts, strict=False)
        if self.only_marked:
            rows = (row for row in rows if row[4] > most or row[5] > most)
        shown = self.form(rows)
        if self.console is None:
            self.file.write("".join(shown).encode(errors="replace"))
            self.file.flush()
        else:
            from rich.text import Text

            for line in shown:
                self.console.print(Text(line, "bold red" if line[0] == "!" else "dim"), end="")

    def written(self):
        """Bytes of the file that are on the disk by now; None for standard output."""
        if self.path is None:
            return None
        os.fsync(self.file.fileno())
        return os.path.getsize(self.path)


class State:
    """The file of --state: a `Watcher`, its place in the log, and how much was written; of path None there is none."""

    def __init__(self, path):
        self.path = path

    def save(self, watcher, place, written):
        """Write all of it or nothing."""
        if self.path is None:
            return
        tensors, numbers = watcher.cache.state_dict()
        tensors = tensors if watcher.last is None else tensors | {"last": watcher.last}
        usual = {name: list(vars(each).values()) for name, each in watcher.usual.items()}
        numbers = {
            "cache": numbers, "usual": usual, "lines": watcher.lines, "marked": watcher.marked, "place": place,
            "tokens": watcher.tokens, "written": written, "weights": weights_of(watcher.model),
        }  # fmt: skip
        partial = self.path.with_name(self.path.name + ".partial")
        safetensors.torch.save_file(tensors, partial, {"watch": json.dumps(numbers)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def load(self, watcher):
        """Give the watcher what is kept, and return place and bytes written; None and None if there is nothing."""
        if self.path is None or not os.path.lexists(self.path):
            return None, None
        try:
            with safetensors.safe_open(self.path, "pt", str(watcher.model.device)) as file:
                numbers = json.loads(file.metadata()["watch"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if numbers["weights"] != weights_of(watcher.model):
                raise ValueError("it is of a model with other weights, or of another --dtype")
            watcher.last = tensors.pop("last", None)
            watcher.cache.load_state_dict(tensors, numbers["cache"])
            watcher.usual = {name: Usual(*each) for name, each in numbers["usual"].items()}
            watcher.lines, watcher.marked, watcher.tokens = (numbers[x] for x in ("lines", "marked", "tokens"))
            return numbers["place"], numbers["written"]
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            refuse(f"--state {self.path} does not fit ({type(error).__name__}: {error}); move it away to begin anew")


def weights_of(model):
    """A number by which a state knows its model again."""
    return zlib.crc32(model.get_input_embeddings().weight[:256].float().cpu().numpy().tobytes())


class Stop:
    """Notes the first SIGINT or SIGTERM, so that what runs can end well; the second does what it always does. `code`:
    the exit code, 0 while there was none."""

    def __init__(self):
        self.code, self.before = 0, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
            self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.code = 128 + number
        self.__exit__()

    def __exit__(self, *error):
        while self.before:
            signal.signal(*self.before.popitem())


def report(watcher, lines, tokens, seconds):
    """One line: how much was read, how fast, and what memory is held."""
    seconds = max(seconds, 1e-9)
    memory = []
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        memory.append(f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**20:,.0f} MiB of the process")
    if watcher.model.device.type == "cuda":
        memory.append(f"{torch.cuda.memory_reserved() / 2**20:,.0f} MiB of the card")
    print(
        f"{lines:,} lines, {tokens:,} tokens in {seconds:,.1f} s: {lines / seconds:,.0f} lines/s, "
        f"{tokens / seconds:,.0f} tokens/s; {watcher.marked:,} of {watcher.lines:,} marked; {', '.join(memory)}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def run(args, watcher, tokenizer, log, place, writer, state):
    """Read, judge and write until the log ends or somebody stops it; returns the exit code."""
    start, begun, work = (watcher.lines, watcher.tokens), time.perf_counter(), None
    saved = told = begun
    changed = False
    ahead = Ahead(blocks(log, tokenizer, watcher.size))

    def settle():
        nonlocal place, changed
        if work is not None:
            number = watcher.lines + 1
            block, verdicts = watcher.finish(work)
            writer.write(number, block, verdicts)
            place, changed = block.place, True

    with Stop() as stop:
        try:
            while not stop.code:
                try:
                    block = ahead.get(10 * IDLE if work is None else 0)
                except StopIteration:
                    break
                following = None if block is None else watcher.launch(block)
                settle()
                work, now = following, time.perf_counter()
                if changed and now - saved >= args.save_every:
                    settle()
                    work, changed, saved = None, False, now
                    state.save(watcher, place, writer.written())
                if args.progress and now - told >= 1:
                    report(watcher, watcher.lines - start[0], watcher.tokens - start[1], now - begun)
                    told = now
            settle()
            state.save(watcher, place, writer.written())
        finally:
            ahead.stopped.set()
            ahead.thread.join(1)
    report(watcher, watcher.lines - start[0], watcher.tokens - start[1], time.perf_counter() - begun)
    return stop.code


@torch.no_grad()
def main(argv=None):
    """Watch a log; returns the exit code."""
    parser = Parser("watch.py", __doc__)
    add, positive = parser.add_argument, at_least(1)
    add("folder", type=Path, help="checkpoint with its tokenizer")
    add("file", nargs="?", default="-", help="log, or - for standard input (the default)")
    add("--follow", action="store_true", help="wait for more at the end, and for what takes the file's place")
    add("--json", action="store_true", help="one JSON object per line")
    add("--marked", action="store_true", help="write marked lines alone")
    add("-o", "--output", type=Path, help="file to append to in place of standard output")
    add("--threshold", type=at_least(0.0, float, 1e9), default=5.0, help="deviations above the mean that mark (5)")
    add("--state", type=Path, help="file to go on from and to keep")
    add("--save_every", type=at_least(0.0, float, 1e9), default=30.0, help="seconds between two states (30)")
    add("--max_slots", type=positive, help="tokens per layer that the cache keeps (cuda 32768, cpu 2048)")
    add("--kv_cache_dtype", choices=CHOICES["kv_cache_dtype"], help="form of these tokens; the model's own by default")
    add("--block", type=positive, help="tokens that are read at once (cuda 16384, cpu 512)")
    add("--progress", action="store_true", help="speed and memory every second, on standard error")
    add("--device", choices=DEVICES, help="cuda where there is one")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="weights; bfloat16 on cuda, float32 on cpu")
    args = parser.parse(argv, {})
    path = None if args.file == "-" else Path(args.file)
    if args.follow and path is None:
        refuse("--follow is of a file; standard input is read as it comes, leave it out")
    if path is not None and not path.is_file():
        refuse(f"FILE {path} is no file; name a log, or - for standard input")
    for flag, wanted in (("--state", args.state), ("--output", args.output)):
        if wanted is not None:
            check_folder(flag, wanted.parent)
    check_saved(args.folder, "config.json", "tokenizer.json")
    args.device = args.device or DEVICES[0]
    block, slots = SIZES[args.device]
    slots = args.max_slots or slots
    block = args.block or min(block, slots)
    if block > slots:
        refuse(f"--block {block} is more than --max_slots {slots}, of which a block may need all; lower the one")
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(args)
    if not hasattr(model.config, "layer_sparsity"):
        refuse(f"folder {args.folder}: a model of type {model.config.model_type} has no router; give an HSPMN model")
    if not tokenizer.is_fast:
        refuse(f"folder {args.folder}: its tokenizer is not a fast one, which many lines at once need")
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # spelt in a line they are text
    watcher, state = Watcher(model, slots, block, args.threshold), State(args.state)
    with refusing():
        place, written = state.load(watcher)
        log = Log(path, args.follow, place)
        form = "json" if args.json else "rich" if args.output is None and on_terminal() else "text"
        writer = Writer(form, args.marked, args.threshold, args.output, written)
        try:
            return run(args, watcher, backend, log, place or log.place(), writer, state)
        except BrokenPipeError:  # whoever read has gone: the state stays as it was
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE


def on_terminal():
    """Whether lines are shown to somebody, in colours."""
    return sys.stdout.isatty() and find_spec("rich") is not None


if __name__ == "__main__":
    sys.exit(main())
