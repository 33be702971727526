"""The report of an evaluation is self-contained and uncurated, and shows every number with its cautions."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import unilatent
from unilatent.cli import main
from unilatent.evaluation import report as report_module
from unilatent.evaluation.contents import MOST_POINTS, _thinned, command, draw_samples, find_searches
from unilatent.evaluation.evaluate import EvaluatedMetric, Evaluation, EvaluationRequest, Evaluator
from unilatent.evaluation.protocol import Protocol
from unilatent.evaluation.reference import splits_of
from unilatent.evaluation.report import write_report
from unilatent.evaluation.search import Search, SettingValue, grid
from unilatent.evaluation.table import ARROWS, HEADLINES, format_number, table
from unilatent.modalities.base import Row
from unilatent.runs.curves import Panel

HOSTILE = ("<script>alert(1)<", "\"><img src=x onerror=alert(2)>'", "a|b [red]`*")
SEED = 3
SETTINGS = {"solver": "heun", "num_inference_steps": 2, "guidance_scale": 1.5}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Made(NamedTuple):
    evaluator: Evaluator
    evaluation: Evaluation
    run: Path
    page: Path


class Reader(HTMLParser):
    """Parse a page as a browser would: tags, texts and table rows."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[str] = []
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "tr"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.inside:
            self.rows[-1] += f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run of a few steps on classes with hostile names: its evaluation, searches and report."""
    folder = tmp_path_factory.mktemp("report")
    draw = np.random.default_rng(0)
    for name in HOSTILE:
        (folder / "images" / name).mkdir(parents=True)
        for i in range(30):
            image = draw.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(image).save(folder / "images" / name / f"{i}.png")
    run = folder / "run"
    with pytest.raises(SystemExit) as stop:
        main(["train", "digits", f"data.path={folder / 'images'}", "conditions.class_label.num_classes=null",
              "training.steps=6", "training.log_every=2", "training.batch_size=8", "training.sample_every=0",
              "training.evaluate_samples=0", "data.held_out=20", "--out", str(run)])  # fmt: skip
    assert stop.value.code == 0
    model = unilatent.load(str(run))
    request = EvaluationRequest(num_samples=70, seed=SEED, batch_size=30, metrics=("psnr", "frechet_pixels"))
    evaluator = Evaluator(model, splits_of(model.modality, run, None), run / "eval" / "records", request, **SETTINGS)
    evaluation = evaluator.run()
    search(run / "eval", model.fingerprint(), "guidance_scale", [2.0, 1.0, 1.5])
    search(run / "eval", model.fingerprint(), "guidance_interval", [(0.1, 1.0), (0.0, 0.9), (0.1, 0.9)])
    page = folder / "out" / "report.html"
    written = write_report(page, evaluator, evaluation, f"run {HOSTILE[0]}", source=str(run))
    assert written == [page.with_suffix(".md"), page]
    return Made(evaluator, evaluation, run, page)


def search(folder: Path, fingerprint: str, over: str, values: list[SettingValue]) -> None:
    """Write the file of a search over these values."""

    def evaluate(at: SettingValue) -> tuple[EvaluatedMetric, dict[str, Any]]:
        sampling = {"solver": "<b>", "num_inference_steps": 2, "guidance_scale": 2.0, "guidance_interval": (0.0, 1.0)}
        protocol = Protocol(
            track="generation", num_samples=70, reference="training data", reference_data="d", num_reference=90,
            preprocessing="adm", resolution=(8, 8, 1), space="inception", sampling={**sampling, over: at},
        )  # fmt: skip
        value = 5 - (sum(at) if isinstance(at, tuple) else at)
        return EvaluatedMetric(Row("fid", "FID", value, "", "lower"), protocol), {}

    grid(Search(over, "fid", {"fingerprint": fingerprint}, folder, evaluate, say=lambda line: None), values)


@pytest.fixture(scope="module")
def reader(made: Made) -> Reader:
    return Reader(made.page.read_text(encoding="utf-8"))


def test_nothing_outside_the_page(reader: Reader):
    for tag, attributes in reader.tags:
        for name, target in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert target and target.startswith(("data:image/png;base64,", "#")), (tag, name, target)
    assert not reader.all("script") and not reader.all("link") and not reader.all("iframe")
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in reader.all("meta"))
    assert "url(http" not in "".join(reader.texts) and "@import" not in "".join(reader.texts)


def test_links_inside_the_page_lead_somewhere(reader: Reader):
    ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    links = [attributes["href"] for attributes in reader.all("a")]
    assert links and {str(link)[1:] for link in links} <= ids


def test_hostile_names_stay_text(reader: Reader, made: Made):
    text = " ".join(reader.texts)
    for name in HOSTILE:
        assert name in text
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert {tag for tag, _ in reader.tags} & {"script", "b"} == set()
    alts = [image["alt"] for image in reader.all("img")]
    assert any(HOSTILE[1] in str(alt) for alt in alts)


def test_grids_hold_the_first_of_the_judged_samples(made: Made, reader: Reader):
    images = [base64.b64decode(str(image["src"]).split(",")[1]) for image in reader.all("img")]
    assert len(images) == 64 + 16
    samples, pixels = made.evaluation.evidence.samples, made.evaluation.evidence.held_out
    assert samples is not None and pixels is not None
    kept = samples["pixels"][:64].reshape(64, 8, 8)
    drawn = torch.stack([cell(png) for png in images[:64]])
    assert torch.equal(drawn, kept) and not torch.equal(drawn[1:], kept[:-1])
    originals = torch.stack([cell(png) for png in images[64:]])
    assert torch.equal(originals, pixels["pixels"][:16].reshape(16, 8, 8))
    text = " ".join(reader.texts)
    assert f"the first 64 of 70 evaluated samples, seed {SEED}" in text


def cell(png: bytes) -> torch.Tensor:
    """Return the grey values (8, 8) of the top image of a grid with gaps of 2 and a magnification of 4."""
    grid = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    return torch.from_numpy(grid[2:34:4, 2:34:4].copy())


def test_captions_are_what_was_asked_for(made: Made):
    grid = draw_samples(made.evaluator)
    names = made.evaluator.model.conditions.all[0].config.class_names
    assert [image.caption for image in grid.images] == [names[i % 3] for i in range(64)]
    assert [image.place for image in grid.images] == list(range(64))


def test_no_number_without_its_caution(made: Made, reader: Reader):
    console = Console(file=io.StringIO(), width=80)
    console.print(table(made.evaluation.numbers, "run"))
    terminal = console.file.getvalue()
    card = made.page.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert made.evaluation.numbers
    for measured in made.evaluation.numbers:
        cautions = measured.protocol.cautions()
        shown = format_number(measured.row.value)
        rows = [row for row in reader.rows if f" {measured.row.name} " in row and shown in row]
        assert len(rows) == 1 and measured.key in rows[0]
        assert f"n = {measured.protocol.num_samples}" in rows[0]
        lines = [line for line in card if line.startswith(f"| {ARROWS[measured.row.better]} {measured.row.name} |")]
        assert len(lines) == 1 and shown in lines[0] and measured.key in lines[0]
        for caution in cautions:
            assert all(f"⚠ {caution}" in shown for shown in (rows[0], lines[0], terminal)), "readable without colours"
    assert any(f"[{i}] " in terminal for i in (1, 2)), "each row says which lines below it belong to it"
    assert any(measured.protocol.cautions() for measured in made.evaluation.numbers)


def test_every_protocol_is_there_in_full(made: Made, reader: Reader):
    text = "".join(reader.texts)
    for measured in made.evaluation.numbers:
        assert json.dumps(measured.protocol.plain(), indent=2, ensure_ascii=False) in text
    assert len(reader.all("details")) == len({str(m.protocol) for m in made.evaluation.numbers}) + 2, "a search each"


def test_curves_of_the_run_and_of_the_search(reader: Reader, made: Made):
    labels = [str(drawing["aria-label"]) for drawing in reader.all("svg")]
    assert "loss, total" in labels and "latents: spread over samples" in labels
    assert "gradient norm, before clipping" in labels and "fid over guidance scale" in labels
    rows = [row for row in reader.rows if "fid70/adm/<b>" in row]
    assert len(rows) == 6 and all("n = 70" in row and "reference n = 90" in row for row in rows)
    assert "fid over guidance interval" in labels and sum(row.strip().startswith("0.1 1") for row in rows) == 1
    page = made.page.read_text(encoding="utf-8")
    assert "currentColor" in page and "#010203" not in page


def test_a_search_that_cannot_be_drawn_is_named(tmp_path: Path):
    point = {"over": "x", "metric": "fid", "points": [{"x": 1, "value": 2, "key": "k"}], "cautions": []}
    for name, content in {
        "search-a.json": point, "search-b.json": {**point, "fingerprint": "other"}, "search-c.json": {"points": [3]},
        "search-d.json": {**point, "points": "no"}, "search-e.json": {**point, "points": []},
        "search-g.json": {**point, "points": [{"x": [1, 2, 3], "value": 2, "key": "k"}]},
    }.items():  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "search-f.json").write_text('{"metr')
    notes: list[str] = []
    assert [search.points[0].value for search in find_searches(tmp_path, "mine", notes)] == [2.0]
    assert [note.split()[0] for note in notes] == [f"search-{x}.json" for x in "bcdfg"]
    assert "another model" in notes[0]


def test_markdown_with_its_images(made: Made, tmp_path: Path):
    files = write_report(tmp_path / "card.md", made.evaluator, made.evaluation, HOSTILE[2], source=str(made.run))
    text = (tmp_path / "card.md").read_text()
    linked = re.findall(r"\]\(([^)]+)\)", text)
    assert linked == ["card-samples.png", "card-reconstructions.png", "card-curves.png"]
    assert {path.name for path in files} == {*linked, "card.md"} == {path.name for path in tmp_path.iterdir()}
    for name in linked:
        Image.open(tmp_path / name).verify()
    assert r"a\|b \[red\]\`\*" in text and "<script" not in text


def evaluate(out: Path, *words: object) -> list[str]:
    """Evaluate into `out`, and return the arguments of the command line in its report."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--out", str(out), "--report", str(out / "card.md")])
    assert stop.value.code == 0
    line = re.findall(r"^unilatent (.*)$", (out / "card.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    return shlex.split(line)


def numbers_in(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("evaluation-*.json")
    return json.loads(path.read_text())["numbers"]


def test_the_command_makes_the_same_numbers(made: Made, tmp_path: Path):
    card = made.page.with_suffix(".md").read_text(encoding="utf-8")
    words = re.findall(r"^unilatent (evaluate .*)$", card, re.MULTILINE)[0].split()
    evaluate(tmp_path, *words)
    again = {n["key"]: n["value"] for n in numbers_in(tmp_path)}
    assert again == pytest.approx({m.key: m.row.value for m in made.evaluation.numbers}, rel=1e-4)


def test_the_command_holds_every_option_that_decides_a_number(made: Made, tmp_path: Path):
    """The command of a report gives the same numbers and protocols, with data, reference and samples from files."""
    draw = np.random.default_rng(1)
    for name, count in (("data", 6), ("the reference", 9), ("made", 7)):
        np.savez(tmp_path / f"{name}.npz", arr_0=draw.integers(0, 256, (count, 8, 8, 1), np.uint8))
    model, reference = made.run / "model", tmp_path / "the reference.npz"
    given = ("evaluate", model, "--data", tmp_path / "data.npz", "--reference", reference)
    lines = {
        "new": (*given, "--num", 5, "--num-held-out", 4, "--steps", 2, "--guidance-scale", 2.5, "--labels", "0,2",
                "--guidance-norm", "guidance_first", "--metrics", "psnr,frechet_classifier"),
        "made": (*given, "--samples", tmp_path / "made.npz"),
    }  # fmt: skip
    for name, words in lines.items():
        line = evaluate(tmp_path / name / "first", *words)
        again = evaluate(tmp_path / name / "again", *line)
        assert line == again and numbers_in(tmp_path / name / "first") == numbers_in(tmp_path / name / "again"), line
    assert not list((tmp_path / "made" / "first").glob("card-samples.png")), "samples that were not the judged ones"


def test_the_command_names_files_with_weights(made: Made):
    evaluator = Evaluator(
        made.evaluator.model, made.evaluator.splits, made.evaluator.folder, made.evaluator.request,
        sources={"--inception-weights": "my weights.pth", "--lpips-weights": None}, **SETTINGS,
    )  # fmt: skip
    assert "--inception-weights 'my weights.pth'" in command(evaluator, "run") and "lpips" not in command(evaluator, "")


def test_another_suffix_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path / "no-such-run"), "--report", "report.pdf"])
    assert stop.value.code == 2
    assert "--report: 'report.pdf'" in capsys.readouterr().err


def test_written_whole_or_not_at_all(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.html"
    path.write_text("the old one")

    def fail(*_: object) -> str:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(report_module, "page", fail)
        with pytest.raises(RuntimeError):
            write_report(path, made.evaluator, made.evaluation, "x")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(RuntimeError):
            write_report(path, made.evaluator, made.evaluation, "x")
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_table_fits_a_terminal_and_takes_names_as_they_are(made: Made):
    for width in (60, 80):
        console = Console(file=io.StringIO(), width=width)
        console.print(table(made.evaluation.numbers, HOSTILE[2]))
        text = console.file.getvalue()
        assert HOSTILE[2] in text and max(map(len, text.splitlines())) <= width
        for measured in made.evaluation.numbers[:HEADLINES]:
            assert format_number(measured.row.value) in text and ARROWS[measured.row.better] in text
        assert "[1] reconstruction: n = 20 against 20" in text and "generation: n = 70" in text
        words = " ".join(text.split())
        assert words.count("fp32") == words.count("seed ") == 1, "what all share is there once"


def test_the_table_has_a_dozen_rows_and_counts_the_others(made: Made):
    few = made.evaluation.numbers[0]
    many = [replace(few, row=replace(few.row, name=f"number {i}", headline=i != 3)) for i in range(20)]
    console = Console(file=io.StringIO(), width=80)
    console.print(table(many, "run"))
    text = console.file.getvalue()
    shown = [i for i in range(20) if f"number {i} " in text]
    assert shown == [i for i in range(HEADLINES + 1) if i != 3] and "8 more numbers are in the JSON file: " in text


def test_long_curves_keep_their_peaks():
    steps, values = list(range(50_000)), [1.0] * 50_000
    values[33_333], values[12_345] = 99.0, -7.0
    thin = _thinned(Panel("loss", {"loss": (steps, values)})).points["loss"]
    assert len(thin[0]) <= MOST_POINTS and thin[0] == sorted(thin[0])
    assert (33_333, 99.0) in zip(*thin, strict=True) and (12_345, -7.0) in zip(*thin, strict=True)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize("width", [1180, 500])
def test_a_browser_without_network_shows_grids_and_curves(made: Made, tmp_path: Path, width: int):
    """Orange of the curves and grey of the noisy images are on the screen; without curves and images they are not."""
    bare = tmp_path / "bare.html"
    text = made.page.read_text(encoding="utf-8")
    bare.write_text(re.sub(r"<svg.*?</svg>|<img[^>]*>", "", text, flags=re.DOTALL), encoding="utf-8")
    shown, missing = (screen(page, width, tmp_path) for page in (made.page, bare))
    assert shown[0] > missing[0] + 100, "no curves"
    assert shown[1] > missing[1] + 80 * 30 * 30, "no grids"


def screen(page: Path, width: int, folder: Path) -> tuple[int, int]:
    """Count the orange pixels, and those of a middle grey."""
    shot = folder / "shot.png"
    subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={folder / 'profile'}", f"--window-size={width},5000", f"--screenshot={shot}",
         page.as_uri()],
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    red, blue = pixels[..., 0], pixels[..., 2]
    spread, most = pixels.max(-1) - pixels.min(-1), pixels.max(-1)
    return int(((red > 200) & (red - blue > 100)).sum()), int(((spread < 4) & (most > 40) & (most < 200)).sum())
