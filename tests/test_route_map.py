"""route_map.py: the page holds the text and what the model returned, whatever the text; bad input is one line."""

import base64
import json
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hspmn import route_map
from hspmn.tokens import fit_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "def f(x):\r\n\treturn '</script><!--<script>&amp;{{data}}' # é 🎉🎉 日本 \0 \u202eabc <|endoftext|>\n\n" * 4


class Page(HTMLParser):
    """The data block of a page, the document of a frame, and every address that a page names."""

    def __init__(self, page):
        super().__init__()
        self.reads, self.data, self.frame, self.addresses = False, "", None, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.reads = tag == "script" and attributes.get("id") == "data"
        self.frame = attributes.get("srcdoc", self.frame)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]

    def handle_data(self, data):
        self.data += data if self.reads else ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A saved model of layers that route and one that does not, with a tokenizer of little more than bytes."""
    folder, tokenizer = tmp_path_factory.mktemp("saved") / "model", fit_tokenizer(["def return"], 270)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


@torch.no_grad()
def test_a_page_holds_the_text_and_what_the_model_returned(loaded):
    model, tokenizer = loaded
    whole = route_map.RouteMap.read(model, tokenizer, TEXT, chunk_size=50, title="</title>")
    page = Page(whole.page())
    data = json.loads(page.data)
    assert data["text"] == TEXT and data["title"] == "</title>" and page.addresses == ["data:,"]
    ids = tokenizer(TEXT)["input_ids"]
    outputs, ends = model(torch.tensor([ids]), use_cache=False), unpacked(data["ends"], "<u4")
    units, characters = TEXT.encode("utf-16-le"), 0
    for token, begin, end in zip(ids, [0, *ends], ends, strict=False):
        piece = units[2 * begin : 2 * end].decode("utf-16-le")  # an error for half of a character
        if "\ufffd" not in (alone := tokenizer.decode(token)):
            assert piece == alone
        characters += len(piece)
    assert characters == len(TEXT) and len(ends) == len(ids)
    for number, (layer, target) in enumerate(zip(data["layers"], model.config.layer_sparsity, strict=True)):
        assert layer["target"] == target and ("scores" in layer) == (target > 0)
        if target:
            scores, routed = outputs.router_scores[number, 0].numpy(), outputs.router_mask[number, 0].numpy()
            np.testing.assert_allclose(unpacked(layer["scores"], "<f4"), scores, rtol=1e-4, atol=1e-5)
            bits = np.unpackbits(unpacked(layer["routed"], "u1"), count=len(ids), bitorder="little")
            assert np.array_equal(bits, routed) and layer["load"] == pytest.approx(routed.mean())
            assert layer["bias"] == model.model.layers[number].router.bias.item()


def test_a_notebook_shows_the_page_and_a_paper_the_shares(loaded, tmp_path):
    read = route_map.RouteMap.read(*loaded, TEXT, tokens=90)
    assert Page(read._repr_html_()).frame == read.page()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # glyphs that a font lacks
        figure = read.figure(rows=4)
        figure.savefig(tmp_path / "map.png")
    assert np.array_equal(figure.axes[0].images[0].get_array(), read.routed_LT[[0, 2]])
    lines = "".join(text.get_text() for text in figure.axes[1].texts)
    assert lines.startswith("def f(x):↵    return") and "□" in lines
    assert len(figure.axes[1].patches) == len(figure.axes[1].lines) > 0
    with pytest.raises(ValueError, match="begin must be one of the 90 tokens, got 90"):
        read.figure(begin=90)


def test_what_cannot_be_read_in_pieces_or_at_all(loaded):
    model, tokenizer = loaded
    assert route_map.RouteMap.read(model, tokenizer, "a\ud800b").text == "a?b"
    with pytest.raises(ValueError, match="no tokens"):
        route_map.RouteMap.read(model, tokenizer, "")
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        route_map.RouteMap.read(model.train(), tokenizer, TEXT)
    model.eval().config.router_mode = "topk"
    routed_LT = route_map.RouteMap.read(model, tokenizer, TEXT, tokens=100, chunk_size=8).routed_LT
    assert routed_LT.sum(1).tolist() == [40, 0, 50]  # ranked at once
    model.config.sparsity_k = [0.0] * 3
    with pytest.raises(ValueError, match="no router"):
        route_map.RouteMap.read(model, tokenizer, TEXT)


def test_the_command_reads_the_start_of_a_file_with_broken_bytes(folder, tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"\xff\xf0\x9f" + TEXT.encode() * 90 + b"\xc3")
    words = [folder, tmp_path / "text", "-o", tmp_path / "new" / "map.html", "--tokens", "300"]
    assert not route_map.main([*map(str, words), "--png", str(tmp_path / "map.pdf"), "--device", "cpu"])
    data = json.loads(Page((tmp_path / "new" / "map.html").read_text("utf-8")).data)
    assert ("\ufffd\ufffd" + TEXT * 90).startswith(data["text"]) and len(unpacked(data["ends"], "<u4")) == 300
    assert data["title"] == "model reads text" and (tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")
    assert "the start of it, 300 tokens" in capsys.readouterr().out


REFUSED = {
    "folder": ("{tmp} {text}", "holds no config.json"),
    "file": ("{folder} {tmp}/none", "none is no file"),
    "empty": ("{folder} {tmp}/empty", "no tokens"),
    "tokens": ("{folder} {text} --tokens 0", "--tokens: must be at least 1"),
    "itself": ("{folder} {text} -o {text}", "is the text itself"),
    "output": ("{folder} {text} -o {tmp}", "is a folder"),
    "parent": ("{folder} {text} --png {text}/map.png", "is a file; name a folder"),
    "form": ("{folder} {text} -o {tmp}/map.html --png {tmp}/map.doc", "--png {tmp}/map.doc: "),
}


@pytest.mark.parametrize("words, reason", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, words, reason, capsys):
    (tmp_path / "text").write_bytes(TEXT.encode())
    (tmp_path / "empty").touch()
    words = words.format(folder=folder, tmp=tmp_path, text=tmp_path / "text").split()
    with pytest.raises(SystemExit) as ended:
        route_map.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and reason.format(tmp=tmp_path) in line
    assert (tmp_path / "text").read_bytes() == TEXT.encode() and not list(tmp_path.glob("map.*"))
