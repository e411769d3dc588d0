"""The page of a report in a real browser: it opens from a file, draws, sorts, and reports no error."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import jaxq
import screenshot
from zoo import model


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    entry = model("lhs_weight")
    policy = {"layers/0": jaxq.Scheme(weight=jaxq.int4(), act=jaxq.uint8()), "*": None}
    with jax.numpy_rank_promotion("raise"):
        report = jaxq.report(entry.fn, policy, progress=False)(entry.params, [entry.args])
    return report.to_html(tmp_path_factory.mktemp("page") / "report.html")


class _Addresses(HTMLParser):
    """Collects what a page would fetch, and counts what is opened and closed."""

    def __init__(self):
        super().__init__()
        self.addresses, self.depth = [], 0

    def handle_starttag(self, tag, attributes):
        self.depth += tag not in ("meta", "link")
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]

    def handle_endtag(self, tag):
        self.depth -= 1


def test_a_page_fetches_nothing_and_is_whole(page):
    text = page.read_text()
    parser = _Addresses()
    parser.feed(text)
    assert parser.depth == 0
    assert all(a.startswith(("#", "data:")) for a in parser.addresses)
    assert not re.search(r"@import|url\(|fetch\(|https?://", text)
    assert "layers/1" in text and "by policy" in text and "Left in float: 1" in text


@pytest.mark.browser
def test_a_browser_draws_it_without_an_error(page, tmp_path):
    done = screenshot.run(page, "--dump-dom", "--virtual-time-budget=2000")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<svg") >= 4 and "Quantization report" in done.stdout
    for width in (1120, 390):
        picture = screenshot.screenshot(page, tmp_path / f"{width}.png", width, 900)
        pixels = np.asarray(Image.open(picture).convert("RGB"), np.int32)
        assert pixels.shape == (900, width, 3)
        blue = (pixels[..., 2] > 180) & (pixels[..., 0] < 120)  # the accent of bars and lines
        assert blue.sum() > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.browser
def test_a_click_sorts_and_an_error_would_be_seen(page, tmp_path):
    text = page.read_text()
    clicked = tmp_path / "clicked.html"
    clicked.write_text(
        text.replace(
            "</body>", "<script>for (let n = 0; n < 2; n++) document.querySelectorAll('th')[0].click()</script></body>"
        )
    )
    dom = screenshot.run(clicked, "--dump-dom", "--virtual-time-budget=2000").stdout
    body = dom[dom.index("<tbody>") :]
    assert 'aria-sort="descending"' in dom and body.index("layers/1") < body.index("layers/0")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("</body>", "<script>console.error('seen'); missing()</script></body>"))
    assert "CONSOLE" in screenshot.run(broken, "--dump-dom", "--virtual-time-budget=2000").stderr
