"""Show which tokens of a text a model routes: one HTML page that holds everything it needs, and a figure for papers.

    python route_map.py FOLDER FILE                          map.html, for any browser
    python route_map.py FOLDER FILE -o page.html --png map.png --tokens 20000

FOLDER is a checkpoint with its tokenizer, such as `train.py` writes; FILE is a text in UTF-8. In a notebook,
`RouteMap.read(model, tokenizer, text)` shows the same page. L layers, T tokens.
"""

import base64
import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers.utils import logging

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parent)]

from hspmn.evaluate import load
from hspmn.results import DEVICES, ROOT, Parser, at_least, check_folder, check_saved, refuse, refusing

UNDERLINES = (None, (":", 1.0), ("--", 1.0), ("-", 1.0), ("-", 2.0))  # of the five levels of a token, as on the page
FIGURES = (".png", ".pdf", ".svg")
ADVANCE = 0.602  # width over size of matplotlib's monospaced font


def packed(array, dtype):
    """Numbers as base64, in little-endian order."""
    return base64.b64encode(array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


@dataclass
class RouteMap:
    """What every router decided on one text.

    title: of the page. text: str. ends_T: int64, characters of `text` up to the end of a token; of the tokens that
    share a character the first has it, and the others end where it does. scores_LT: float32, before the bias.
    routed_LT: bool. targets: share of tokens that each layer is trained to route, 0.0 for one without a router, whose
    scores are 0. biases: added to a layer's scores to decide. rule: how, in a sentence. noise_floor: gates below it
    are 0.
    """

    title: str
    text: str
    ends_T: np.ndarray
    scores_LT: np.ndarray
    routed_LT: np.ndarray
    targets: list[float]
    biases: list[float]
    rule: str
    noise_floor: float

    @classmethod
    @torch.no_grad()
    def read(cls, model, tokenizer, text, tokens=None, chunk_size=8192, title="Route map"):
        """Run an HSPMN `model` in eval mode over the first `tokens` tokens of `text` (None: all), in pieces of
        `chunk_size` tokens with a cache, or at once where the router ranks whole texts ("topk"). Special tokens spelt
        in the text are text. A progress bar comes after five seconds, as in `prefill`.

        Raises ValueError for a model that is training or has no router, a text without tokens, and a tokenizer that
        does not say where its tokens lie.
        """
        if not any(getattr(model.config, "layer_sparsity", ())):
            raise ValueError(f"this model of type {model.config.model_type} has no router; give one that routes")
        if model.training:
            raise ValueError("the model is in training mode, where slots are limited; call model.eval() first")
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer does not say where its tokens lie; give a fast one")
        text = text.encode(errors="replace").decode()  # lone surrogates are no text
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        encoded = tokenizer(text, **options, verbose=False)
        ids = torch.tensor(encoded["input_ids"][:tokens], dtype=torch.long)
        if not len(ids):
            raise ValueError("the text has no tokens; give a longer one")
        ends_T = np.maximum.accumulate([end for _, end in encoded["offset_mapping"][: len(ids)]])
        if len(ids) == len(encoded["input_ids"]):
            ends_T[-1] = len(text)  # what a normalizer dropped behind the last token
        cache, scores, routed = None, [], []
        size = len(ids) if model.config.router_mode == "topk" else chunk_size
        with logging.tqdm(total=len(ids), desc="route map", unit="tok", unit_scale=True, delay=5.0) as bar:
            for piece in ids.to(model.device).split(size):
                outputs = model(piece[None], past_key_values=cache, use_cache=len(ids) > size, logits_to_keep=1)
                cache = outputs.past_key_values
                scores.append(outputs.router_scores[:, 0].float().cpu())
                routed.append(outputs.router_mask[:, 0].cpu())
                bar.update(len(piece))
        routers = [layer.router for layer in model.get_decoder().layers]
        biases = [0.0 if router is None else router.bias.item() for router in routers]
        decided = torch.cat(scores, 1).numpy(), torch.cat(routed, 1).numpy()
        rule = "A token is routed where its score is above the number beside it."
        if model.config.router_mode == "topk":
            rule = "The tokens with the highest scores are routed."
        elif initial := model.config.router_initial_tokens:
            rule += f" The first {initial} are always."
        targets, floor = list(model.config.layer_sparsity), model.config.router_noise_floor
        return cls(title, text[: ends_T[-1]], ends_T, *decided, targets, biases, rule, floor)

    def page(self):
        """The page, as a str: nothing else is read or fetched to show it."""
        wide = np.frombuffer(self.text.encode("utf-32-le"), np.uint32) > 0xFFFF  # two units of a browser's strings
        units = np.r_[0, np.cumsum(1 + wide)]
        layers = []
        for target, bias, scores_T, routed_T in zip(
            self.targets, self.biases, self.scores_LT, self.routed_LT, strict=True
        ):
            layer = {"target": target, "load": float(routed_T.mean())}
            if target:
                bits = np.packbits(routed_T, bitorder="little")
                layer |= {"bias": bias, "scores": packed(scores_T, np.float32), "routed": packed(bits, np.uint8)}
            layers.append(layer)
        data = {
            "title": self.title, "text": self.text, "ends": packed(units[self.ends_T], np.uint32), "layers": layers,
            "load": float(self.routed_LT.mean()), "target": float(np.mean(self.targets)), "rule": self.rule,
            "floor": self.noise_floor,
        }  # fmt: skip
        template = (ROOT / "route_map_page.html").read_text("utf-8")
        return template.replace("{{data}}", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))

    def save(self, path):
        """Write the page to a file."""
        Path(path).write_text(self.page(), "utf-8")

    def _repr_html_(self):
        style = "width: 100%; height: 640px; border: 0"
        return f'<iframe title="Route map" style="{style}" srcdoc="{html.escape(self.page())}"></iframe>'

    def figure(self, begin=0, rows=20, columns=96):
        """A matplotlib figure: shares of routed tokens along the whole text for each routing layer, and below them
        `rows` lines of `columns` characters from token `begin` on, marked as on the page by how many layers routed
        each token. Raises ValueError for a `begin` that is no token."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.font_manager import findfont, get_font
        from matplotlib.patches import Rectangle

        T = len(self.ends_T)
        if not 0 <= begin < T:
            raise ValueError(f"begin must be one of the {T} tokens, got {begin}")
        routing = np.flatnonzero(self.targets)
        most = len(routing)
        width, lane, blues, glyphs = 7.0, 0.14, colormaps["Blues"], get_font(findfont("monospace")).get_charmap()
        size = width * 72 / columns / ADVANCE
        lanes, lines = lane * len(routing), rows * 1.5 * size / 72
        height = lanes + lines + 0.4
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 1 - lanes / height, 1, lanes / height))
        bins = np.linspace(0, T, min(T, 700) + 1).astype(int)
        shares = np.add.reduceat(self.routed_LT[routing], bins[:-1], axis=1) / np.diff(bins)
        axes.imshow(shares, aspect="auto", cmap=blues, vmin=0, vmax=1, extent=(0, T, len(routing), 0))
        names = [f"layer {layer}: {self.routed_LT[layer].mean():.2f}" for layer in routing]
        axes.set_yticks(np.arange(len(routing)) + 0.5, names, fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlabel("token", fontsize=7, labelpad=1)
        axes = figure.add_axes((0, 0, 1, lines / height), xlim=(0, columns), ylim=(rows, 0))
        axes.axis("off")
        levels_T = np.ceil(min(4, most) * self.routed_LT.sum(0) / most).astype(int)
        row = column = 0
        for t in range(begin, T):
            level, piece = levels_T[t], self.text[self.ends_T[t - 1] if t else 0 : self.ends_T[t]]
            for line in piece.expandtabs(4).splitlines(keepends=True):
                ended = line[-1] == "\n"
                shown = "".join(c if ord(c) in glyphs else "□" for c in line.rstrip("\r\n")) + "↵" * ended
                while shown and row < rows:
                    part, shown = shown[: columns - column], shown[columns - column :]
                    if level:
                        box, span = (column, row + 0.05), (column, column + len(part))
                        axes.add_patch(Rectangle(box, len(part), 0.9, facecolor=blues(0.22 * level), linewidth=0))
                        line_style = {"linestyle": UNDERLINES[level][0], "linewidth": UNDERLINES[level][1]}
                        axes.plot(span, [row + 0.92] * 2, color=blues(1.0), solid_capstyle="butt", **line_style)
                    font = {"family": "monospace", "size": size, "color": "white" if level > 2 else "black"}
                    axes.text(column, row + 0.72, part, va="baseline", parse_math=False, **font)
                    column += len(part)
                    if column == columns or (ended and not shown):
                        row, column = row + 1, 0
            if row >= rows:
                break
        return figure


def read_start(path, tokenizer, tokens):
    """The text of a file, or a part of it from its start that has more than `tokens` tokens. Broken bytes become the
    replacement character."""
    size = 8 * tokens
    while True:
        with path.open("rb") as file:
            data = file.read(size)
        text = data.decode(errors="replace")
        if len(data) < size or len(tokenizer(text, verbose=False)["input_ids"]) > tokens + 64:
            return text
        size *= 2


def main(argv=None):
    """Read a text and write its map; returns the exit code."""
    parser = Parser("route_map.py", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="checkpoint with its tokenizer")
    add("file", type=Path, help="text in UTF-8")
    add("-o", "--output", type=Path, default=Path("map.html"), help="the page (default: map.html)")
    add("--png", type=Path, help=f"figure of the start as well; its name ends in one of {' '.join(FIGURES)}")
    add("--tokens", type=at_least(1, most=2**22), default=100_000, help="tokens read from the start of the text")
    add("--device", choices=DEVICES, default=DEVICES[0], help="cuda where there is one")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="weights; bfloat16 on cuda, float32 on cpu")
    args = parser.parse(argv, {})
    check_saved(args.folder, "config.json", "tokenizer.json")
    if not args.file.is_file():
        refuse(f"file {args.file} is no file; give a text")
    if args.png is not None and args.png.suffix not in FIGURES:
        refuse(f"--png {args.png}: the name must end in one of {' '.join(FIGURES)}")
    for flag, path in (("--output", args.output), ("--png", args.png)):
        if path is not None:
            check_folder(flag, path.parent)
            if path.is_dir() or path.exists() and path.samefile(args.file):
                refuse(f"{flag} {path} is {'a folder' if path.is_dir() else 'the text itself'}; name another file")
    logging.disable_progress_bar()  # of the weights
    model, tokenizer = load(args)
    logging.enable_progress_bar()
    with refusing():
        text = read_start(args.file, tokenizer, args.tokens)
        title = f"{args.folder.resolve().name} reads {args.file.name}"
        read = RouteMap.read(model, tokenizer, text, args.tokens, title=title)
        for path in filter(None, (args.output, args.png)):
            path.parent.mkdir(parents=True, exist_ok=True)
        read.save(args.output)
        if args.png is not None:
            read.figure().savefig(args.png, dpi=200, bbox_inches="tight")
    start = "the start of it, " if len(read.text) < len(text) else ""
    print(f"{args.output}: {start}{len(read.ends_T):,} tokens, routed {read.routed_LT.mean():.3f} on average")


if __name__ == "__main__":
    sys.exit(main())
