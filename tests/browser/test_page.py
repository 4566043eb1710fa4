"""A page in Chromium: nothing is fetched, everything fits and can be read.

Skipped where there is no Playwright or no Chromium. With HALVE_SCREENSHOTS=FOLDER the
pictures of a page are left there, for a person to look at before a release.
"""

import os
import re
import shutil
from itertools import combinations
from pathlib import Path

import pytest

from halve.reporting import render
from tests.report_facts import CASES

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
SHOTS = os.environ.get("HALVE_SCREENSHOTS")
SCHEMES = ("light", "dark")
WIDTHS = (360, 900, 1600)
# Contrast by WCAG 2.1 of every piece of text, on what lies behind it.
CONTRAST = """
() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const over = (colour, ground) => {
    context.fillStyle = `rgb(${ground.join(",")})`;
    context.fillRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = element => {
    const above = [];
    for (let e = element; e; e = e.parentElement)
      above.unshift(getComputedStyle(e).backgroundColor);
    return above.reduce((ground, colour) => over(colour, ground), [255, 255, 255]);
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(c => c / 255).map(
      c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.tagName === "title") continue;
    const style = getComputedStyle(element), ground = behind(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(over(ink, ground)), light(ground)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.slice(0, 40)]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, case in CASES.items():
        found[name] = folder / f"{len(found)}.html"
        found[name].write_text(render(case), "utf-8")
    return found


@pytest.fixture
def opened(browser, files):
    """Return a function that opens a case; what it fetches and says is listed."""
    contexts = []

    def open_page(name, scheme="light", width=900):
        context = browser.new_context(
            offline=True,
            color_scheme=scheme,
            viewport={"width": width, "height": 900},
        )
        contexts.append(context)
        page = context.new_page()
        page.seen = []
        page.on("request", lambda request: page.seen.append(request.url))
        page.on("console", lambda message: page.seen.append(message.text))
        page.on("pageerror", lambda error: page.seen.append(str(error)))
        page.goto(files[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_fetched_and_nothing_sticks_out(name, opened, files):
    for scheme in SCHEMES:
        page = opened(name, scheme)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            if SHOTS and name == "everything":
                file = Path(SHOTS) / f"report-{scheme}-{width}.png"
                page.screenshot(path=file, full_page=True)
            overflow = page.evaluate(
                "document.documentElement.scrollWidth - window.innerWidth"
            )
            assert overflow <= 0, (scheme, width)
        assert page.seen == [files[name].as_uri()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_text_can_be_read(scheme, opened):
    page = opened("everything", scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 150
    assert min(contrasts) >= [4.5], min(contrasts)


def test_schemes_differ(opened):
    grounds = {
        opened("everything", scheme).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for scheme in SCHEMES
    }
    assert len(grounds) == 2


NEAR = 5  # pixels of the margins of a figure
LABELS = """
() => [...document.querySelectorAll("svg text")].map(label => {
  const inner = label.getBoundingClientRect(), svg = label.closest("svg");
  const outer = svg.getBoundingClientRect(), style = getComputedStyle(label);
  return {
    text: label.textContent,
    turned: label.hasAttribute("transform"),
    box: [inner.left, inner.top, inner.right, inner.bottom],
    outside: Math.max(outer.left - inner.left, inner.right - outer.right,
      outer.top - inner.top, inner.bottom - outer.bottom),
    size: parseFloat(style.fontSize) * outer.width / svg.viewBox.baseVal.width,
    clipped: getComputedStyle(svg).overflow !== "visible",
  };
})
"""


BOXES = """
() => [...document.querySelectorAll("#figure-size path")].map(part => {
  const box = part.getBoundingClientRect();
  return [box.left, box.top, box.right, box.bottom];
})
"""


def _overlap(a, b):
    return all(a[i] < b[i + 2] - 2 and b[i] < a[i + 2] - 2 for i in (0, 1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["everything", "packed", "96 x 7", "8 experts"])
def test_labels_are_whole_and_can_be_read(name, width, opened):
    page = opened(name, width=width)
    labels, boxes = page.evaluate(LABELS), page.evaluate(BOXES)
    assert labels and boxes
    for label in labels:
        assert not label["clipped"]
        assert label["outside"] < NEAR, label
        assert label["size"] >= 9, label
    level = [label for label in labels if not label["turned"]]
    pairs = [
        (a["text"], b["text"])
        for a, b in combinations(level, 2)
        if _overlap(a["box"], b["box"])
    ]
    assert not pairs
    assert not any(_overlap(label["box"], box) for label in level for box in boxes)


def test_tooltips_are_text(opened):
    page = opened("hostile")
    assert page.evaluate("document.scripts.length") == 0
    title = page.locator("#passage span").first.get_attribute("title")
    assert "<script>" in title


def test_a_page_prints_on_a_few_sheets(opened):
    page = opened("everything")
    pdf = page.pdf(format="A4")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
    page.emulate_media(media="print")
    height = page.evaluate(
        "document.querySelector('details table').getBoundingClientRect().height"
    )
    assert height > 0  # details are open on paper
