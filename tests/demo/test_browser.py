"""`unilatent demo` in a real browser: Chromium, headless, driven by Playwright.

Skipped, with the reason, where Gradio, Playwright or the browser is not installed. UNILATENT_SCREENSHOTS=FOLDER keeps
the screenshots.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from building import batch_of, first_tokenizer, model_of
from page_process import serving
from PIL import Image

from unilatent.evaluation.page import _viewer
from unilatent.methods.base import LatentModel

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if BROWSER else ["chromium"])
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-extensions"]  # fmt: skip
PATIENCE = 240_000
"""Milliseconds that anything may take on a machine that does other things too."""
OURS = ("127.0.0.1", "localhost")


class Visitor:
    """A window of the browser, and everything it asked for and complained about."""

    def __init__(self, page: Any):
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, address: str) -> None:
        self.page.goto(address, timeout=PATIENCE)
        self.page.locator("#sample-start").wait_for()

    def cells(self) -> list[str]:
        """The captions of the samples that are shown."""
        return self.page.locator("#sample-grid .cell[data-index]").all_inner_texts()

    def sample(self, num: int) -> list[str]:
        """Press Sample, wait until as many are there, and return their captions."""
        number = self.page.get_by_label("number input for Samples").first
        number.fill(str(num))
        number.press("Enter")
        self.page.locator("#sample-start").click()
        self.page.wait_for_function(
            "n => document.querySelector('#sample-line').innerText.startsWith(`${n} sample`)", arg=num
        )
        return self.cells()

    def choose(self, *classes: str) -> None:
        """Choose classes in place of those that are chosen."""
        field = self.page.locator("#control-labels input").first
        while (chosen := self.page.locator("#control-labels .token-remove")).count() > 0:
            chosen.first.click()
        for name in classes:
            field.click()
            self.page.get_by_role("option", name=name, exact=True).click()
        field.press("Escape")

    def go_to(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def message(self) -> str:
        """The text of the newest message, which is then closed."""
        toast = self.page.locator(".toast-body").first
        toast.wait_for()
        text = toast.inner_text()
        toast.locator("button").first.click()
        return text

    def click_last(self, film: Any, caption: str) -> None:
        """Show a film's last moment. The page shows the film anew when its job ends, which may be after a click."""
        for _ in range(50):
            film.locator("#strip button").last.click()
            if film.locator("#at").inner_text().startswith(caption):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(film.locator("#at").inner_text())

    def keep(self, name: str) -> None:
        if folder := os.environ.get("UNILATENT_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(1500)
            self.page.screenshot(path=f"{folder}/{name}.png", full_page=True)

    @property
    def foreign(self) -> list[str]:
        """What it asked of other machines."""
        return [url for url in self.requests if urlsplit(url).scheme not in ("data", "blob", "about")
                and urlsplit(url).hostname not in OURS]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    profile = tmp_path_factory.mktemp("profile")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=BROWSER, args=FLAGS, headless=True, timeout=PATIENCE, bypass_csp=True,
            viewport={"width": 1280, "height": 860},
        )  # fmt: skip
        yield context
        context.close()


@pytest.fixture(scope="module")
def address(run_folder: Path) -> Iterator[str]:
    with serving(run_folder) as (address, _):
        yield address


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[[], Visitor]]:
    """Opens the page in new windows. None of them may ask another machine for anything, nor meet an error in it: even
    where the page's own policy, which would forbid that, is switched off (`bypass_csp`)."""
    visitors: list[Visitor] = []

    def open_page() -> Visitor:
        visitors.append(Visitor(browser.new_page()))
        visitors[-1].open(address)
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.page.close()
        assert visitor.foreign == [], visitor.foreign
        assert len(visitor.requests) > 5, "requests are not seen"
        assert [text for text in visitor.complaints if "favicon" not in text] == []


def test_load_sample_change_the_label_and_sample_again(visit: Callable[[], Visitor]):
    me = visit()
    me.keep("page")
    assert me.sample(20) == [str(i % 10) for i in range(20)]
    me.keep("samples")
    sources = me.page.locator("#sample-grid img")
    me.page.wait_for_function(
        "[...document.querySelectorAll('#sample-grid img')].every(one => one.complete && one.naturalWidth === 8)"
    )
    first = sources.first.get_attribute("src")
    me.choose("7", "3")
    assert me.sample(8) == ["7", "3"] * 4
    assert sources.first.get_attribute("src") != first
    assert me.page.get_by_role("button", name="Download").is_visible()


def test_a_seed_repeats_its_samples(visit: Callable[[], Visitor]):
    me = visit()

    def pixels() -> list[str]:
        me.sample(4)
        return me.page.evaluate(
            """async () => Promise.all([...document.querySelectorAll("#sample-grid img")].map(async (image) =>
            btoa(String.fromCharCode(...new Uint8Array(await (await fetch(image.src)).arrayBuffer())))))"""
        )

    first = pixels()
    assert len(set(first)) == 4 and pixels() == first
    me.page.get_by_role("button", name="other seed").click()
    me.page.wait_for_function("document.querySelector('#seed input').value !== '0'")
    assert pixels() != first


def test_an_uploaded_picture_is_reconstructed_and_a_bad_one_is_a_message(visit: Callable[[], Visitor], tmp_path: Path):
    digit = (batch_of("image", 1).data[0, 0].numpy() * 255).round().astype("uint8")
    Image.fromarray(digit).save(tmp_path / "own.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    me = visit()
    me.go_to("Reconstruct")
    field = me.page.locator("#reconstruct-file input[type=file]")
    field.set_input_files(tmp_path / "own.png")
    me.page.locator("#reconstruct-shown .pair img").nth(1).wait_for()
    assert re.search(r"own\.png.*PSNR \d+", me.page.locator("#reconstruct-shown figcaption").inner_text())
    me.keep("reconstructed")
    me.page.locator("#reconstruct-file").get_by_role("button", name=re.compile("Clear|Remove")).click()
    me.page.locator("#reconstruct-file input[type=file]").set_input_files(tmp_path / "bad.png")
    text = me.message()
    assert "bad.png" in text and str(tmp_path) not in text and "Traceback" not in text
    me.keep("refused")
    me.complaints.clear()  # the broken picture itself, which the browser cannot show either


def test_stop_keeps_what_there_is(visit: Callable[[], Visitor]):
    me = visit()
    number = me.page.get_by_label("number input for Steps").first
    number.fill("200")
    number.press("Enter")
    samples = me.page.get_by_label("number input for Samples").first
    samples.fill("100")
    samples.press("Enter")
    me.page.locator("#sample-start").click()
    me.page.wait_for_function("document.querySelectorAll('#sample-grid .cell[data-index]').length > 0")
    me.page.locator("#sample-stop").click()
    me.page.wait_for_function("document.querySelector('#sample-line').innerText.startsWith('stopped')")
    shown = len(me.cells())
    assert 0 < shown < 100 and f"stopped: {shown} of 100" in me.page.locator("#sample-line").inner_text()
    number.fill("2")
    number.press("Enter")
    assert len(me.sample(4)) == 4


def test_two_users_at_once(visit: Callable[[], Visitor]):
    """Each gets what they asked for."""
    a, b = visit(), visit()
    for one, name in ((a, "1"), (b, "8")):
        one.choose(name)
        number = one.page.get_by_label("number input for Samples").first
        number.fill("12")
        number.press("Enter")
    for one in (a, b):
        one.page.locator("#sample-start").click()
    for one, name in ((a, "1"), (b, "8")):
        one.page.wait_for_function("document.querySelector('#sample-line').innerText.startsWith('12 samples')")
        assert one.cells() == [name] * 12


def test_watch_interpolate_and_map(visit: Callable[[], Visitor]):
    me = visit()
    me.sample(10)
    me.page.locator("#sample-grid .cell").nth(2).click()
    me.page.wait_for_function("document.querySelector('#sample-line').innerText.includes('#2')")
    me.page.locator("#sample-grid .cell").nth(6).click()
    me.page.wait_for_function("document.querySelector('#sample-line').innerText.includes('#6')")
    me.go_to("Denoise")
    me.page.locator("#watch-start").click()
    film = me.page.frame_locator("#denoise-shown iframe")
    film.locator("#strip button").first.wait_for()
    assert "#6" in me.page.locator("#denoise-line").inner_text()
    me.click_last(film, "t = 0.")
    me.keep("denoised")
    me.go_to("Interpolate")
    me.page.locator("#interpolate-start").click()
    between = me.page.frame_locator("#interpolate-shown iframe")
    me.click_last(between, "second")
    me.keep("interpolated")
    me.go_to("Latent map")
    me.page.locator("#draw-map-start").click()
    me.page.locator("#map-shown svg circle").nth(99).wait_for()
    me.page.locator("#map-shown svg").click(position={"x": 150, "y": 150})
    me.page.locator("#map-decoded figure").nth(1).wait_for()
    assert "nearest: #" in me.page.locator("#map-decoded").inner_text()
    me.keep("map")


# ---- the viewer of atoms ---------------------------------------------------------------------------------------------


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Callable[[str], Visitor]]:
    """Opens a document of ours from the disk."""
    visitors: list[Visitor] = []

    def open_page(html: str) -> Visitor:
        path = tmp_path / f"{len(visitors)}.html"
        path.write_text(html, encoding="utf-8")
        visitors.append(Visitor(browser.new_page()))
        visitors[-1].page.goto(path.as_uri())
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.page.close()
        assert [url for url in visitor.requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
        assert visitor.complaints == []


def drawn(page: Any, number: int = 0) -> list[int]:
    """The pixels of a canvas."""
    return page.evaluate(
        "n => { const c = document.querySelectorAll('canvas')[n];"
        " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }", number,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["molecule", "crystal", "joint"])
def test_atoms_are_drawn_turned_and_measured(shown: Callable[[str], Visitor], name: str):
    model: LatentModel = model_of(name, first_tokenizer())
    page = shown(model.modality.viewer(batch_of(name, 3).data, ["a", "b", "<i>c</i>"], "Title")).page
    page.wait_for_function("document.querySelectorAll('canvas').length === 3")
    assert page.locator("i").count() == 0 and "<i>c</i>" in page.locator("figcaption").nth(2).inner_text()
    before = drawn(page)
    assert sum(value > 0 for value in before[3::4]) > 500, "nothing is drawn"
    canvas = page.locator("canvas").first
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    turned = drawn(page)
    assert turned != before
    page.get_by_role("button", name="reset").click()
    assert drawn(page) == before
    atoms = page.evaluate("views[0].atoms.map(({ x, y, depth, i, r }) => [x, y, depth, i, r])")
    free = [
        a for a in atoms if all((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 > (a[4] + b[4]) ** 2 for b in atoms if b != a)
    ]
    ratio = page.evaluate("devicePixelRatio")
    for x, y, *_ in free[:2]:
        canvas.click(position={"x": x / ratio, "y": y / ratio})
    positions = page.evaluate("scenes[0].positions")
    a, b = (torch.tensor(positions[int(atom[3])]) for atom in free[:2])
    measured = re.search(r"([\d.]+) Å", page.locator("output").first.inner_text())
    assert measured is not None and abs(float(measured[1]) - float((a - b).norm())) < 2e-3


def test_a_report_holds_the_viewer(shown: Callable[[str], Visitor]):
    """In a frame without rights, under the report's policy, which allows its script and nothing from elsewhere."""
    from unilatent.evaluation.contents import SampleGrid
    from unilatent.evaluation.page import WITH_VIEWER

    viewer = model_of("molecule", first_tokenizer()).modality.viewer(batch_of("molecule", 2).data)
    inside = _viewer(SampleGrid([], b"", 1, "", viewer))
    page = shown(f'<meta http-equiv="Content-Security-Policy" content="{WITH_VIEWER}">{inside}').page
    page.locator("summary").click()
    frame = page.frame_locator("iframe")
    frame.locator("canvas").first.wait_for()
    frame.locator("canvas").first.click()
    frame.locator("canvas").first.press("ArrowLeft")
    assert frame.locator("figcaption").count() == 2
