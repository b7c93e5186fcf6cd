"""The page of route_map.py in a browser: it opens without an error, soon, and answers mouse and keyboard."""

import shutil
import time

import numpy as np
import pytest
from hspmn.route_map import RouteMap

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, such as Debian's package chromium")
TOKENS, TARGETS = 100_000, [0.0, 0.2, 0.0, 0.0, 0.2, 0.2]
START = ["def", " 🎉", "", "", "(", "日本", "</script>", "\0", "\u202e", "\n", "\n", "\t"]


@pytest.fixture(scope="module")
def read():
    """A map of 100,000 tokens, some of them parts of characters, as a model of six layers might have read them."""
    rng = np.random.default_rng(0)
    words = ["def ", "return", " x", "(", ")", "\n", " value", "    ", "é", " 🎉"]
    pieces = START + [words[i] for i in rng.integers(len(words), size=TOKENS - len(START))]
    scores = rng.normal(size=(len(TARGETS), TOKENS)).astype(np.float32) * (np.array(TARGETS)[:, None] > 0)
    ends = np.cumsum([len(piece) for piece in pieces])
    return RouteMap("a model", "".join(pieces), ends, scores, scores > 0.8, TARGETS, [-0.8] * 6, "A rule.", 0.05)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 800, "light"), (390, 800, "dark")], ids=["desktop", "narrow and dark"])
def page(request, browser):
    """A blank page that may neither complain nor load anything from a network."""
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
    yield page
    context.close()
    assert wrong == []


def figures(frame, layer):
    """Score and gate that the panel shows for a layer, and whether it says routed."""
    line = frame.locator("tr", has=frame.locator(f'[data-layer="{layer}"]'))
    score, gate = (line.locator(f".{name}").inner_text().replace("−", "-") for name in ("score", "gate"))
    return float(score), float(gate), "yes" in line.locator(".gate").get_attribute("class")


def expected(read, layer, token):
    score, near = float(read.scores_LT[layer, token]), {"abs": 6e-4}
    return pytest.approx(score, **near), pytest.approx(1 / (1 + np.exp(-score)), **near), read.routed_LT[layer, token]


def test_a_page_of_100_000_tokens_opens_soon_and_answers(read, page, tmp_path):
    read.save(tmp_path / "map.html")
    begin = time.perf_counter()
    page.goto((tmp_path / "map.html").as_uri())
    page.locator("#rows .now").wait_for()
    took = time.perf_counter() - begin
    print(f"opened in {took:.2f} s")
    assert took < 10  # under 3 s where nothing else runs
    assert page.evaluate("document.querySelectorAll('*').length") < 5000
    assert page.locator("tbody").inner_text().count("reflexive only") == 2

    page.locator('[data-t="4"]').hover()
    for layer in (1, 4, 5):
        assert figures(page, layer) == expected(read, layer, 4)
    page.locator('[data-layer="4"]').click()
    assert page.locator('[aria-pressed="true"]').get_attribute("data-layer") == "4"
    marked = page.locator("#rows .t").evaluate_all("all => all.map(x => [+x.dataset.t, !x.classList.contains('l0')])")
    assert len(marked) > 99 and all(routed == read.routed_LT[4, token] for token, routed in marked)

    page.locator('[data-t="0"]').click()
    last = TOKENS - 1
    for key, token in ("ArrowRight", 1), ("End", last), ("ArrowLeft", last - 1), ("Home", 0), ("ArrowDown", 10):
        page.keyboard.press(key)
        assert page.locator("#rows .now").first.get_attribute("data-t") == str(token), key
        assert figures(page, 5) == expected(read, 5, token)
    page.keyboard.press("n")
    routed = 11 + int(read.routed_LT[4, 11:].argmax())
    assert f"Token {routed} of" in page.locator("#said").inner_text()
    for key, layer in {"]": "5", "[": "4", "1": "1", "a": "all"}.items():
        page.keyboard.press(key)
        assert page.locator('[aria-pressed="true"]').get_attribute("data-layer") == layer, key

    strip = page.locator("#strip").bounding_box()
    page.mouse.click(strip["x"] + strip["width"] / 2, strip["y"] + strip["height"] / 2)
    token = page.locator("#rows .now").first
    assert abs(int(token.get_attribute("data-t")) - TOKENS / 2) < TOKENS / strip["width"] and token.is_visible()


def test_a_notebook_shows_it_and_no_text_is_code(read, page):
    page.set_content(f"<div>{read._repr_html_()}</div>")
    frame = page.frame_locator("iframe")
    frame.locator("#rows .now").wait_for()
    shown = [frame.locator(f'[data-t="{token}"]').first.inner_text() for token in range(len(START))]
    assert shown == ["def", " 🎉", "·", "·", "(", "日本", "</script>", "␀", "␦", "↵", "↵", "\t"]
