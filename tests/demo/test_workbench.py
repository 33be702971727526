"""What the page does, without a page: for every modality, within limits, and with errors that name a field."""

from __future__ import annotations

import re
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from building import batch_of, first_tokenizer, model_of
from PIL import Image

import unilatent
from unilatent.controls import Control
from unilatent.demo import markup, workbench
from unilatent.demo.jobs import Jobs, StopFlag
from unilatent.demo.workbench import Asked, Drawing, DrawnMap, Film, News, Workbench, next_size
from unilatent.methods.base import LatentModel
from unilatent.registry import available
from unilatent.signals import Stopped
from unilatent.types import take

every_modality = pytest.mark.parametrize("name", available("modalities"))
QUICK = {"steps": 2, "num": 3}


def bench_of(name: str, folder: Path, **changes: Any) -> Workbench:
    return Workbench(model_of(name, first_tokenizer(), awake=True, **changes).eval(), name, folder)


def told(work: Any) -> list[Any]:
    """Everything that a job tells."""
    news: list[Any] = []
    work(StopFlag(), news.append)
    return news


def sampled(bench: Workbench, **asked: Any) -> Drawing:
    news = told(lambda stop, tell: bench.sample(Asked(**{**QUICK, **asked}), stop, tell))
    assert news[-1].ended and news[-1].drawing is not None
    return news[-1].drawing


def only_inside(html: str) -> None:
    """No reference to anything outside a document."""
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']""", html)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", html)


# ---- every modality --------------------------------------------------------------------------------------------------


@every_modality
def test_every_modality_is_sampled_reconstructed_and_mapped(name: str, tmp_path: Path):
    bench = bench_of(name, tmp_path)
    drawing = sampled(bench)
    assert len(drawing.pictures) == len(drawing.captions) == len(drawing.files) == 3
    for path in drawing.pictures:
        with Image.open(path) as picture:
            assert picture.format in ("PNG", "WEBP") and min(picture.size) >= 8
    assert drawing.archive is not None
    with zipfile.ZipFile(drawing.archive) as archive:
        assert {path.name for path in drawing.files} <= {Path(one).name for one in archive.namelist()}

    (own, *_) = bench.model.modality.write(batch_of(name, 1).data, tmp_path / "own")
    pairs = bench.reconstruct(own)
    assert len(pairs.originals) == len(pairs.made) == 1 and re.search(r"\w+ [\d.e+-]+", pairs.errors[0])

    film = bench.denoise(Asked(**QUICK), 1, StopFlag(), lambda news: None)
    assert film is not None and film.captions[0] == "t = 1.000" and len(film.captions) > 1

    drawn = bench.draw_map(Asked(**QUICK), 4, StopFlag(), lambda news: None)
    assert drawn is not None and drawn.map.points.shape == (4, 2) and len(drawn.pictures) == 4
    x, y = drawn.map.points[2].tolist()
    decoded = bench.decode_at(drawn, x, y)
    assert decoded.captions[0].startswith("nearest: #2")
    for html in (markup.grid(drawing, markup.embedded, 4), markup.pairs(pairs, markup.embedded), markup.player(film),
                 markup.scatter(drawn, markup.embedded, True), markup.figures(decoded, markup.embedded)):  # fmt: skip
        only_inside(html)
    turned = bench.model.modality.viewer(batch_of(name, 2).data)
    assert all((viewer is None) == (turned is None) for viewer in (drawing.viewer, pairs.viewer, film.viewer))


@every_modality
def test_the_samples_are_those_of_the_library(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bit by bit, in one batch as there."""
    monkeypatch.setattr(workbench, "FEWEST", 6)
    bench = bench_of(name, tmp_path)
    drawing = sampled(bench, num=6, seed=5)
    expected = unilatent.sample(bench.model, num=6, seed=5, num_inference_steps=2)
    written = bench.model.modality.write(expected, tmp_path / "expected")
    assert [path.read_bytes() for path in drawing.files] == [path.read_bytes() for path in written]


@every_modality
def test_what_lies_between_two_samples(name: str, tmp_path: Path):
    bench = bench_of(name, tmp_path)
    data = take(batch_of(name, 1).data, slice(0, 1))
    (path, *_) = bench.model.modality.write(data, tmp_path / "files")
    film = bench.interpolate(path, path)
    assert film.captions[:2] == ["first", "0 %"] and film.captions[-2:] == ["100 %", "second"]
    with pytest.raises(ValueError, match="file: none given"):
        bench.interpolate(path, None)


@every_modality
def test_controls_offer_what_the_model_takes(name: str, tmp_path: Path):
    """Every choice and every example can be sampled; nothing entered is the model's own way."""
    bench = bench_of(name, tmp_path)
    arguments = [*bench.model.conditions.arguments, *bench.model.modality.layout_arguments]
    assert set(arguments) <= set(bench.controls)
    for argument, control in bench.controls.items():
        assert control.title and (control.hint or control.choices)
        for entered in [[choice] for choice in control.choices[:3]] + list(control.examples[:2]):
            settings = bench.settings(Asked(entered={argument: entered}))
            assert settings[argument] is not None
            if argument in bench.model.conditions.arguments:
                bench.model.conditions.parse(1, {argument: settings[argument]})
    assert not any(bench.settings(Asked(entered=dict.fromkeys(bench.controls)))[argument] for argument in arguments)


# ---- growing, stopping, limits ---------------------------------------------------------------------------------------


@pytest.fixture
def bench(model: LatentModel, tmp_path: Path) -> Workbench:
    return Workbench(model, "digits", tmp_path / "shown")


def test_a_grid_fills_as_it_is_sampled(bench: Workbench):
    news = told(lambda stop, tell: bench.sample(Asked(num=12, steps=2, entered={"labels": ["3", "7"]}), stop, tell))
    counts = [len(one.drawing.pictures) for one in news if one.drawing is not None]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == 12 and len(set(counts)) >= 3
    assert news[-1].drawing.captions == ["3", "7"] * 6 and all(one.drawing.total == 12 for one in news if one.drawing)
    part = next(one.drawing for one in news if one.drawing is not None and one.drawing.pictures)
    html = markup.grid(part, str, 10)
    assert html.count("data-index") == 4 and html.count("waiting") == 12 - 4


def test_a_stop_acts_between_two_steps(bench: Workbench):
    """The samples of earlier batches stay, and the model is left as it was."""
    stop, news = StopFlag(), []

    def tell(one: News) -> None:
        news.append(one)
        if one.drawing is not None and len(one.drawing.pictures):
            stop.set()

    bench.sample(Asked(num=100, steps=2), stop, tell)
    assert news[-1].ended and news[-1].line.startswith("stopped: 4 of 100 samples")
    assert len(news[-1].drawing.pictures) == 4 and news[-1].drawing.archive is not None
    assert bench.denoise(Asked(), 0, stop, news.append) is None
    assert bench.draw_map(Asked(), 10, stop, news.append) is None
    assert len(sampled(bench).pictures) == 3


def test_the_decoder_stops_between_its_steps_too(tmp_path: Path):
    name = next(name for name in available("methods") if model_of("image", name).stepped_decoder is not None)
    bench = Workbench(model_of("image", name, awake=True).eval(), "x", tmp_path)
    if not bench.model.generates:
        pytest.skip("its samples are those of a second stage")
    stop, calls = StopFlag(), []
    decoder = bench.model.stepped_decoder

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            stop.set()

    handle = decoder.register_forward_hook(count)
    news: list[News] = []
    bench.sample(Asked(num=2, steps=1), stop, news.append)
    handle.remove()
    assert len(calls) == 2 and news[-1].line.startswith("stopped: 0 of 2")


@pytest.mark.parametrize(("asked", "words"), [
    ({"num": 0}, "samples: 0"), ({"num": 101}, "samples: 101 is out of range; give 1 to 100"),
    ({"num": 2.5}, "samples: 2.5 is not a whole number"), ({"num": None}, "samples: empty"),
    ({"seed": -1}, "seed: -1"), ({"steps": 10**9}, "steps: 1000000000 is out of range"),
    ({"solver": "x"}, "solver"), ({"guidance_scale": "a"}, "guidance: 'a' is not a number"),
    ({"guidance_scale": -2}, "guidance_scale"), ({"interval": (0.8, 0.2)}, "guidance_interval"),
    ({"interval": (float("nan"), 1)}, "guidance interval: nan"),
    ({"entered": {"labels": ["11"]}}, "labels: 11 is out of range"),
    ({"entered": {"labels": ["<b>"]}}, "labels: '<b>'"),
    ({"num": 1, "entered": {"labels": ["1", "2"]}}, "labels"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(bench: Workbench, asked: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        told(lambda stop, tell: bench.sample(Asked(**{**QUICK, **asked}), stop, tell))


def test_the_last_news_has_every_warning_once(tmp_path: Path):
    bench = bench_of("molecule", tmp_path)
    news = told(lambda stop, tell: bench.sample(Asked(num=9, steps=1, entered={"num_atoms": "1"}), stop, tell))
    assert len([text for text in news[-1].warnings if "num_atoms: no training system has 1 atoms" in text]) == 1
    assert all(one.warnings == news[-1].warnings[: len(one.warnings)] for one in news)


def test_batches_of_a_grid_take_a_second_or_two():
    assert next_size(4, 0.1) == 16 and next_size(16, 0.1) == 64 and next_size(64, 0.1) == 64
    assert next_size(32, 8.0) == 8 and next_size(8, 100.0) == 4 and next_size(4, 600.0) == 1 and next_size(1, 1.0) == 4


def test_older_results_are_removed(bench: Workbench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workbench, "KEPT", 3)
    monkeypatch.setattr(workbench, "KEPT_SECONDS", -1)
    folders = []
    for _ in range(6):
        folders.append(bench._new_folder())
        time.sleep(0.01)
    assert [folder.is_dir() for folder in folders] == [False, False, True, True, True, True]


# ---- files of users --------------------------------------------------------------------------------------------------


def test_own_pictures_are_reconstructed_with_their_psnr(bench: Workbench, tmp_path: Path):
    data = batch_of("image", 1).data
    pixels = (data[0, 0].numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "own <b>.png")
    pairs = bench.reconstruct(tmp_path / "own <b>.png", seed=1)
    expected = unilatent.reconstruct(bench.model, torch.from_numpy(pixels)[None, None] / 255, seed=1)
    psnr = bench.model.modality.errors(expected, torch.from_numpy(pixels)[None, None] / 255)["psnr"][0]
    assert f"PSNR {psnr:.4g}" in pairs.errors[0] and pairs.names == ["own <b>.png"]
    html = markup.pairs(pairs, str)
    assert "own &lt;b&gt;.png" in html and "<b>own" in html and "own <b>" not in html


@pytest.mark.parametrize(("name", "content"), [
    ("x.png", b"\x89PNG\r\n\x1a\nnothing"), ("x.png", b""), ("x.txt", b"hello"), ("x.zip", b"PK\x03\x04"), ("x", b"\0"),
])  # fmt: skip
def test_files_that_are_none_are_refused_by_their_name(bench: Workbench, tmp_path: Path, name: str, content: bytes):
    path = tmp_path / "a" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        bench.reconstruct(path)
    assert str(tmp_path) not in str(caught.value), "where it lies on the server is nobody's business"


def test_of_many_samples_the_first_ones_are_used(bench: Workbench, tmp_path: Path):
    bench.model.modality.write(batch_of("image", 12).data, tmp_path / "many")
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for path in sorted((tmp_path / "many").iterdir()):
            archive.write(path, path.name)
    pairs = bench.reconstruct(tmp_path / "many.zip")
    assert len(pairs.names) == workbench.MOST_UPLOADED == 8 and "first 8" in pairs.note


@pytest.mark.parametrize("name", ["image", "video"])
def test_given_parts_are_completed(name: str, tmp_path: Path):
    bench = bench_of(name, tmp_path / "shown", given=True)
    assert bench.is_completing
    data = batch_of(name, 1).data
    (source, *_) = bench.model.modality.write(data, tmp_path / "files")
    mask = None
    if bench.model.modality.given_frames_most is None:
        mask = tmp_path / "mask.png"
        height, width = data.shape[-2:]
        Image.fromarray(np.repeat([[0, 255]], height, 0).repeat(width // 2, 1).astype(np.uint8)).save(mask)
    frames = None if mask else 1
    news = told(lambda stop, tell: bench.complete(Asked(**QUICK), source, mask, frames, stop, tell))
    assert news[-1].drawing.captions[0] == "given" and news[-1].drawing.captions[-1] == "the file"
    assert len(news[-1].drawing.pictures) == 1 + 3 + 1
    with pytest.raises(ValueError, match="file: none given"):
        told(lambda stop, tell: bench.complete(Asked(**QUICK), None, mask, frames, stop, tell))


# ---- maps, jobs ------------------------------------------------------------------------------------------------------


def test_a_place_on_the_map_is_where_it_is_drawn(bench: Workbench):
    drawn = bench.draw_map(Asked(steps=2), 20, StopFlag(), lambda news: None)
    assert isinstance(drawn, DrawnMap) and len(drawn.group_names) == 10 and drawn.groups[:3] == [0, 1, 2]
    html = markup.scatter(drawn, str)
    left, top, scale = (float(re.search(rf'data-{key}="([^"]+)"', html)[1]) for key in ("left", "top", "scale"))
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', html)
    places = torch.tensor([[left + scale * float(u), top - scale * float(v)] for u, v in circles])
    torch.testing.assert_close(places, drawn.map.points.float(), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="x: nan"):
        bench.decode_at(drawn, float("nan"), 0.0)


def test_jobs_wait_for_each_other_and_tell_the_newest():
    jobs, order = Jobs(), []

    def job(number: int) -> Any:
        def run(tell: Any) -> None:
            order.append(("begin", number))
            for i in range(50):
                tell((number, i))
                time.sleep(0.002)
            order.append(("end", number))

        return run

    followed = [jobs.follow(job(number), StopFlag()) for number in range(2)]
    first = [next(one) for one in followed]  # a job is handed in when it is first asked for news
    last = [([begun, *one])[-1] for begun, one in zip(first, followed, strict=True)]
    assert last == [(0, 49), (1, 49)]
    assert order == [("begin", 0), ("end", 0), ("begin", 1), ("end", 1)]


def test_a_follower_that_goes_away_ends_its_job():
    jobs, stop, ended = Jobs(), StopFlag(), []

    def run(tell: Any) -> None:
        try:
            for i in range(10_000):
                tell(i)
                time.sleep(0.01)
                stop.check()
        except Stopped:
            ended.append(i)
            raise

    followed = jobs.follow(run, stop)
    next(followed)
    followed.close()
    jobs.run(lambda: None)
    assert stop.is_set and ended and ended[0] < 9_999


def test_errors_of_a_job_reach_its_follower():
    def run(tell: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(Jobs().follow(run, StopFlag()))


def test_what_is_entered_becomes_a_value():
    assert Control("x").value("  4-6 ") == "4-6" and Control("x").value("") is None and Control("x").value(None) is None
    assert Control("x", choices=("a",)).value(["a"]) == ["a"] and Control("x", choices=("a",)).value([]) is None
    assert Control("x", lines=True).value("a, b\n\n c ") == ["a, b", "c"]


def test_a_player_shows_its_moments(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    film = Film([tmp_path / "a.png"], ["</script><b>"], None, "")
    html = markup.player(film)
    only_inside(html)
    assert "&lt;/script&gt;&lt;b&gt;" not in html and "\\u003c/script>\\u003cb>" in html.replace("&gt;", ">")
