"""Data that is broken, odd or short is refused by name and place, or read with no document lost or doubled."""

import json
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hspmn import corpus, tokens, train
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
import forks  # noqa: E402

RUN = (
    "--dim 32 --layers 1 --head_dim 16 --vocab_size 300 --seq_len 32 --batch 2 --steps 2 --baseline_tokens 0 "
    "--use_cpu --disable_tqdm true"
).split()
LOG = "[INFO] request {} served in 12 ms by worker 7\n"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of its own, since files of one name and size are written again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()  # as train.py does
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.fit_tokenizer([LOG.format(i) for i in range(99)] + ["some words, and \n  lines"], 400, padding=True)


def load(*sources, streaming=False, **options):
    """Train and validation documents of files."""
    options = {"text_column": "text", "validation_fraction": 0.1, "seq_len": 2, "tokenizer_documents": 9} | options
    return corpus.load_documents(
        Namespace(dataset=list(map(str, sources)), streaming=streaming, validation_split=None, **options)
    )


def texts(parts):
    return sorted(row["text"] for part in parts for row in part)


def refusal(call, capsys):
    """The one line of a call that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        call()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


@pytest.mark.parametrize("streaming", [False, True])
def test_file_names_are_names_and_every_file_is_read_once(streaming, tmp_path):
    odd = ["*", "?", "a[1]", "[x]", "[!a]", "{a,b}", "a::b", "http:", "~", "$HOME", "é", " ", "%41", "\\", "**", "a1"]
    (tmp_path / "sub[1]*").mkdir()
    paths = [tmp_path / f"{name}.txt" for name in odd] + [tmp_path / "sub[1]*" / "A.TXT"]
    for path in paths:
        path.write_text(path.name)
    (tmp_path / "link.txt").symlink_to(paths[-2])
    assert texts(load(tmp_path, tmp_path, paths[2], streaming=streaming)) == sorted(path.name for path in paths)


def test_hidden_and_other_files_are_left_out_and_said(tmp_path, caplog):
    for name in ("a.txt", "b.txt", "._a.txt", ".c.txt", ".git/d.txt", "e.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(load(tmp_path)) == ["a.txt", "b.txt"]
    hidden, other = (record.getMessage() for record in caplog.records)
    assert "3 hidden files" in hidden and "._a.txt" in hidden
    assert "1 files of other types" in other and "e.bin" in other
    assert texts(load(tmp_path / ".c.txt", tmp_path / "a.txt")) == [".c.txt", "a.txt"]  # named, they are read


def parquet(path, values):
    pa.parquet.write_table(pa.table({"text": values}), path)


GOOD = b'{"text": "words"}\n' * 40
BROKEN = {
    "latin.txt": (b"abc" * 50_000 + b"\xe9 words", "byte 150000"),
    "cut.txt": (b"words" * 9 + "é".encode()[:1], "byte 45"),
    "utf16.txt": ("words".encode("utf-16"), "byte 0"),
    "broken.jsonl": (GOOD + b'{"text": "words"\n' + GOOD, "line 41"),
    "string.jsonl": (GOOD + b'{"text": "words\n' + GOOD, "line 41"),
    "cut.jsonl": (GOOD[:-4], "line 40"),
    "binary.jsonl": (GOOD + bytes(range(128, 200)), f"byte {len(GOOD)}"),
    "cut.json": (b"[" + GOOD.replace(b"\n", b",\n"), "no end"),
    "comma.json": (b"[" + GOOD + b"]", "line 2"),
    "after.json": (b'[{"text": "words"}]\n[1]', "line 2"),
    "deep.json": (b"[" * 100_000, "recursion"),
    "value.jsonl": (GOOD + b"5\n", "line 41 holds a int"),
    "number.jsonl": (GOOD + b'{"text": 5}\n', "line 41: column text holds a int"),
    "object.jsonl": (GOOD + b'{"text": {"a": "b"}}\n', "line 41: column text holds a dict"),
    "list.jsonl": (b'{"text": ["a", "b"]}\n' * 9, "line 1: column text holds a list"),
    "surrogate.jsonl": (GOOD + b'{"text": "\\ud800"}\n', "line 41"),
    "number.parquet": (list(range(40)), "row 1: column text holds a int"),
    "list.parquet": ([["a"]] * 40, "row 1: column text holds a list"),
    "bytes.parquet": ([b"a"] * 40, "row 1: column text holds a bytes"),
    "nothing.parquet": (b"", "cannot be read"),
    "no.parquet": (b"not parquet" * 9, "cannot be read"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_their_place(name, streaming, tmp_path, capsys):
    content, words = BROKEN[name]
    parquet(tmp_path / name, content) if isinstance(content, list) else (tmp_path / name).write_bytes(content)
    good = tmp_path / f"a.{name.partition('.')[2]}"
    parquet(good, ["words"] * 3) if good.suffix == ".parquet" else good.write_bytes(GOOD)
    line = refusal(lambda: load(tmp_path, streaming=streaming, tokenizer_documents=10**6), capsys)
    assert str(tmp_path / name) in line and words in line


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(1, 700), flip=st.booleans())
def test_damaged_parquet_is_refused_or_read(tmp_path_factory, cut, flip):
    """Cut anywhere it is refused; with a flipped byte it is refused, or every row is still a text."""
    path = tmp_path_factory.mktemp("damaged") / "a.parquet"
    parquet(path, [f"some words {i}" for i in range(40)])
    data = bytearray(path.read_bytes())
    cut %= len(data)
    data[cut] ^= 1 << cut % 8
    path.write_bytes(data if flip else data[:cut])
    try:
        rows = list(corpus.read_documents(((str(path),),), "text"))
    except SystemExit as ended:
        assert ended.code == 2
    else:
        assert flip and all(isinstance(row["text"], str) for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_the_column_and_not_its_first_row_has_a_type(kind, streaming, tmp_path):
    path, words = tmp_path / f"data.{kind}", [f"words {i}" for i in range(30)]
    if kind == "parquet":
        parquet(path, [None, None, *words])
    else:
        rows = [{"text": None}, {"other": 5}, *({"text": text} for text in words)]
        path.write_text(json.dumps(rows, indent=1) if kind == "json" else "\n\n".join(map(json.dumps, rows)))
    assert texts(load(path, streaming=streaming, tokenizer_documents=30)) == sorted(words)


@pytest.mark.parametrize("content", ['{"a": "x", "b": 1}\n' * 9, '{"a": null}\n'])
def test_a_column_without_text_is_refused_with_those_there_are(content, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(content)
    line = refusal(lambda: load(tmp_path / "a.jsonl"), capsys)
    assert "--text_column text is no text column; the data has a" in line


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@settings(deadline=None, max_examples=60)
@given(values=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 2]), listed=st.booleans(), ascii=st.booleans())
def test_json_is_read_in_parts_as_a_whole(values, indent, listed, ascii, tmp_path_factory):
    path, dump = tmp_path_factory.mktemp("json") / "a.json", partial(json.dumps, indent=indent, ensure_ascii=ascii)
    listed = listed or any(isinstance(value, list) for value in values[:1])  # else it would be taken for all of them
    path.write_text(dump(values) if listed else "\n".join(map(dump, values)), "utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 3)
        assert [value for _, value in corpus.json_values(path)] == values


def test_special_tokens_spelt_in_text_are_text(tokenizer, tmp_path):
    text = "x <|endoftext|> y <|pad|>"
    tokenizer.save_pretrained(tmp_path)
    foreign = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=tokens.END_OF_TEXT)
    for kind in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = kind(text, add_special_tokens=False)["input_ids"]
        assert not {0, 1} & set(ids) and kind.decode(ids) == text
        assert kind(text, split_special_tokens=False)["input_ids"].count(0) == 1
    assert foreign(text)["input_ids"].count(0) == 1  # to itself, but not to what reads documents
    assert tokens.encode(foreign, [text, text]).tolist() == [*ids, 0, *ids, 0]


@pytest.mark.parametrize("word", ["a" * 400_000, "ab" * 200_000, " " * 400_000, "=" * 400_000, "é" * 200_000])
def test_a_long_word_takes_no_time(word):
    begun = time.monotonic()
    tokenizer = tokens.fit_tokenizer([word, "some words"], 600)
    assert tokenizer.decode(tokens.encode(tokenizer, [word], ends=[False]).tolist()) == word
    assert time.monotonic() - begun < 2


def test_words_that_are_not_long_are_cut_as_before(tokenizer):
    text = "def f(x):\n\n        return '----------' * 80  # " + "=" * (tokens.LONGEST_WORD - 1)
    plain = tokenizer._tokenizer.pre_tokenizer[0].pre_tokenize_str(text)
    assert tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text) == plain


def test_long_documents_are_read_in_pieces_that_give_their_tokens(tokenizer, tmp_path):
    text = "".join(f"some words, and {i}\n{'  ' * (i % 3)}lines é\r\n" for i in range(9000))
    for name, content in {"a.txt": text, "b.txt": "short", "c.txt": "x" * 2 * corpus.PIECE}.items():
        (tmp_path / name).write_bytes(content.encode())
    rows = list(corpus.read_documents([(str(path),) for path in sorted(tmp_path.iterdir())], "text"))
    assert [row["ends"] for row in rows].count(True) == 3 and max(len(row["text"]) for row in rows) == corpus.PIECE
    text = text.replace("\r\n", "\n")
    last = [row["ends"] for row in rows].index(True) + 1
    assert "".join(row["text"] for row in rows[:last]) == text
    whole = tokens.encode(tokenizer, [text])
    ends = [row["ends"] for row in rows[:last]]
    assert np.array_equal(tokens.encode(tokenizer, [row["text"] for row in rows[:last]], ends=ends), whole)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_documents_that_were_read_do_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAPPED", 2**24)
    rows = {"text": [chr(97 + i % 26) * corpus.PIECE for i in range(1600)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path)
    documents, most = datasets.load_from_disk(tmp_path), 0  # 105 MB

    def mapped():
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    before, texts = mapped(), []
    for batch in corpus.batches(documents, 16):
        most = max(most, mapped())
        texts += batch["text"]
    assert texts == rows["text"] and most - before < 40e6


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_documents_are_held_out_whole_and_a_single_one_is_cut(fraction):
    rows = [(f"{number}-{piece}", piece == number % 3) for number in range(20) for piece in range(number % 3 + 1)]
    columns = {"text": [text for text, _ in rows], "ends": [end for _, end in rows]}
    parts = corpus.hold_out(datasets.Dataset.from_dict(columns), fraction)
    numbers = [[int(text.split("-")[0]) for text in part["text"]] for part in parts]
    assert all(numbers) and not set(numbers[0]) & set(numbers[1])
    for part, mine in zip(parts, numbers, strict=True):  # the pieces of each document in order
        pieces = [f"{number}-{piece}" for number in dict.fromkeys(mine) for piece in range(number % 3 + 1)]
        assert list(part["text"]) == pieces
    single = datasets.Dataset.from_dict({"text": ["a" * 100, "b" * 100, "c" * 40], "ends": [False, False, True]})
    before, after = ("".join(part["text"]) for part in corpus.hold_out(single, fraction))
    assert before + after == "".join(single["text"]) and len(before) == int(240 * (1 - fraction))


@settings(deadline=None, max_examples=100)
@given(words=st.lists(st.integers(0, 40), min_size=1), seq_len=st.integers(2, 50), batch=st.integers(0, 3))
def test_no_token_is_lost_to_packing(words, seq_len, batch, tokenizer):
    documents = datasets.Dataset.from_dict({"text": [" word" * count for count in words]})
    stream = tokens.encode(tokenizer, [text for text in documents["text"] if text]).tolist()
    read = torch.zeros((), dtype=torch.int64)
    packed = list(corpus.blocks(documents, tokenizer, seq_len, batch, read))
    assert sum(row["tokens"] for row in packed) == len(stream)
    flat = [int(token) for row in packed for token in row["input_ids"]]
    if batch:  # whole batches: all tokens, and the first ones again
        assert len(packed) % batch == 0 and int(read) == len(flat)
        assert flat == np.resize(stream, len(flat)).tolist() and len(flat) - len(stream) in range(batch * seq_len)
    else:
        assert flat == stream[: len(stream) // seq_len * seq_len or len(stream)] and int(read) == len(stream)


@pytest.mark.parametrize("seq_len", [32, 2048])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_short_lines_train_at_any_length_and_every_token_is_accounted_for(seq_len, streaming, tmp_path):
    lines = [LOG.format(i) for i in range(480)]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    words = f"--dataset {tmp_path}/log.jsonl --streaming {streaming} --seq_len {seq_len} --output_dir {tmp_path}/run"
    results = train.main([*RUN, *words.split()])
    tokenizer, counts = AutoTokenizer.from_pretrained(tmp_path / "run"), results["tokens"]
    total = len(tokens.encode(tokenizer, lines))
    assert counts["read"] == counts["train"] + counts["held_out"] + counts["left_over"]
    assert counts["read"] == total if streaming == "false" else counts["read"] >= total
    assert counts["seen"] == 2 * 2 * seq_len and (counts["left_over"] == 0 or streaming == "true")
    assert f"{counts['read']:,} = " in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("documents", [2, 30, 499])
def test_streams_shorter_than_the_held_out_share_train(documents, tmp_path):
    rows = [json.dumps({"text": "some words here " * 40}) for _ in range(documents)]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    words = f"--dataset {tmp_path}/few.jsonl --streaming --dataloader_num_workers 1 --output_dir {tmp_path}/run"
    results = train.main([*RUN, *words.split()])
    assert results["steps"] == 2 and results["tokens"]["train"] == 128


@pytest.mark.parametrize("content, words", {
    '{"text": "some words here"}\n': "--streaming holds out whole documents",
    '{"text": "a b"}\n{"text": "a b"}\n': "do not fill one batch of 2; lower --seq_len or --batch, or add text",
}.items())  # fmt: skip
def test_streams_that_are_too_short_are_refused(content, words, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text(content)
    arguments = [*RUN, "--streaming", "--dataset", str(tmp_path / "few.jsonl"), "--output_dir", str(tmp_path / "run")]
    assert words in refusal(lambda: train.main(arguments), capsys)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_found_broken_in_mid_stream_ends_training_in_one_line(workers, tmp_path):
    rows = [json.dumps({"text": LOG.format(i) * 9}) for i in range(270)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{"]))
    words = f"--dataset {tmp_path}/a.jsonl --streaming --tokenizer_documents 9 --steps 999 --save_strategy no"
    words += f" --dataloader_num_workers {workers} --output_dir {tmp_path}/run --batch 8"
    code, text = forks.run([*RUN, *words.split()])
    assert code == 2 and "{'loss'" in text
    (line,) = (line for line in text.splitlines() if not line.startswith(("{'", "WARNING ")))
    assert f"{tmp_path}/a.jsonl cannot be read: the value that begins in line 271 is broken" in line
