"""Given parts on the command line: a model trained on them continues clips and paints holes, and is evaluated on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image

import unilatent
from unilatent.evaluation.contents import draw_completions
from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.evaluation.reference import splits_of
from unilatent.modalities._media.similarity import masked_psnr
from unilatent.modalities.video import Video

TINY = (
    "training.steps=6", "training.sample_every=3", "training.evaluate_samples=0", "training.checkpoint_every=3",
    "training.log_every=3", "training.batch_size=8", "training.num_samples=6", "data.num_samples=300",
    "data.held_out=40", "method.generative_encoder.width=32", "method.generative_encoder.depth=2",
    "method.decoder.width=32", "method.decoder.mlp_width=64", "sampling.num_inference_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def bouncing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on clips of which parts are given."""
    from unilatent.cli import main

    folder = tmp_path_factory.mktemp("runs") / "bouncing"
    with pytest.raises(SystemExit) as stop:
        main(["train", "bouncing-unite", *TINY, "--out", str(folder)])
    assert stop.value.code == 0
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, bouncing: Path) -> Path:
    """A clip of 20 frames in a lossless file."""
    video = unilatent.load(bouncing).modality
    assert isinstance(video, Video)
    data = torch.rand(1, 20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    [path] = video.write(data, tmp_path_factory.mktemp("clips"))
    return path


def samples(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


def frames_of(path: Path, count: int) -> np.ndarray:
    with Image.open(path) as image:
        shown = []
        for number in range(count):
            image.seek(number)
            shown.append(np.asarray(image.convert("L")))
    return np.stack(shown)[..., None]


def test_a_run_draws_what_is_given_made_and_true(bouncing: Path):
    for step in (3, 6):
        for suffix in (".png", ".webp"):
            assert (bouncing / "given" / f"step_{step:08d}{suffix}").is_file()
    assert json.loads((bouncing / "model" / "config.json").read_text())["given"] == {"kinds": None, "nothing": 0.5}


def test_clips_are_continued_from_a_file(bouncing: Path, clip: Path, tmp_path: Path, cli: Command):
    code, _, err = cli("sample", bouncing, "--given", clip, "--frames", 5, "--num", 4, "--out", tmp_path / "a")
    assert code == 0, err
    made, true = samples(tmp_path / "a"), frames_of(clip, 20)
    assert made.shape == (4, 16, 16, 16, 1) and (made[:, :5] == true[:5]).all()
    assert not (made[0, 5:] == made[1, 5:]).all(), "four continuations of one clip differ"
    assert len(list((tmp_path / "a").glob("0*.webp"))) == 4 and (tmp_path / "a" / "grid.webp").is_file()
    record = json.loads((tmp_path / "a" / "sampling.json").read_text())
    assert record["given"] == str(clip) and record["frames"] == 5
    assert "note: no condition is given, so samples have values in turn: 0, 1, 2, ..." in " ".join(err.split())
    _, _, err = cli(
        "sample", bouncing, "--given", clip, "--frames", 5, "--num", 1, "--label", 3, "--out", tmp_path / "b"
    )
    assert "no condition is given" not in err


def test_long_clips_are_made_in_windows(bouncing: Path, clip: Path, tmp_path: Path, cli: Command):
    """Of 16 frames each, and 4 given: 16, 28, 40 frames; the last window is cut."""
    arguments = ("--frames", 4, "--length", 33, "--num", 2)
    code, _, err = cli("sample", bouncing, "--given", clip, *arguments, "--out", tmp_path / "long")
    assert code == 0, err
    code, _, err = cli("sample", bouncing, "--given", clip, "--frames", 4, "--num", 2, "--out", tmp_path / "short")
    assert code == 0, err
    long, short = samples(tmp_path / "long"), samples(tmp_path / "short")
    assert long.shape[:2] == (2, 33) and (long[:, :16] == short).all()
    assert not (long[:, 16:28] == long[:, 4:16]).all()
    code, _, err = cli("sample", bouncing, "--frames", 4, "--length", 20, "--num", 1, "--out", tmp_path / "own")
    assert code == 0 and samples(tmp_path / "own").shape[1] == 20, err


def test_a_hole_is_painted(bouncing: Path, clip: Path, tmp_path: Path, cli: Command):
    white = np.zeros((16, 16), np.uint8)
    white[4:12, 2:9] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    arguments = ("--given", clip, "--mask", tmp_path / "mask.png", "--num", 1)
    code, _, err = cli("sample", bouncing, *arguments, "--out", tmp_path / "out")
    assert code == 0, err
    made, true = samples(tmp_path / "out")[0], frames_of(clip, 16)
    kept = made == true
    assert kept[:, white == 0].all() and not kept[:, white == 255].all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--frames", 5), "--frames: 5, but nothing is given; add --given FILE"),
        (("--mask", "m.png"), "--mask: m.png, but nothing is given"),
        (("--given", "CLIP", "--frames", 16), "--frames: 16, but clips have 16 frames"),
        (("--given", "CLIP", "--frames", 5, "--length", 8), "length: 8 is shorter than a clip"),
        (("--given", "CLIP", "--length", 30), "overlap (--frames): not set"),
        (("--given", "absent.mp4", "--frames", 5), "absent.mp4"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_written(
    bouncing: Path, clip: Path, tmp_path: Path, cli: Command, arguments: tuple, words: str
):
    texts = [str(clip) if argument == "CLIP" else argument for argument in arguments]
    code, _, err = cli("sample", bouncing, *texts, "--num", 1, "--out", tmp_path / "out")
    assert code == 2 and words in err.replace("\n", " "), err
    assert not (tmp_path / "out").exists()


def test_a_model_of_whole_samples_is_given_nothing(run_folder: Path, tmp_path: Path, cli: Command):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "a.png")
    arguments = ("--given", tmp_path / "a.png", "--mask", tmp_path / "a.png")
    code, _, err = cli("sample", run_folder, *arguments, "--num", 1, "--out", tmp_path / "out")
    assert code == 2 and "given: this model was trained on whole samples only" in err.replace("\n", " ")


def test_a_report_shows_what_was_given_made_and_true(bouncing: Path, tmp_path: Path, cli: Command):
    arguments = ("--given-frames", 5, "--num", 20, "--metrics", "rest_psnr", "--out", tmp_path / "eval")
    code, _, err = cli("evaluate", bouncing, *arguments, "--report", tmp_path / "report.html")
    assert code == 0, err
    page = " ".join((tmp_path / "report.html").read_text().split())
    words = "the first 16 of 20 completed held-out samples, seed 0; from top to bottom what is given, the result and"
    assert f"Uncurated: {words} the truth." in page


def test_completions_that_are_drawn_are_those_that_are_evaluated(
    bouncing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = unilatent.load(bouncing)
    modality = type(model.modality)(model.modality.config.model_copy(update={"given_frames": 5}))
    splits = splits_of(model.modality, bouncing, None)
    request = EvaluationRequest(num_samples=20, batch_size=8, metrics=("rest_psnr",))
    evaluator = Evaluator(model, splits, tmp_path / "records", request, modality=modality)
    drawn: list[list[torch.Tensor]] = []

    def draw(self: Video, rows: list[torch.Tensor], path: Path, *_: object, **__: object) -> None:
        drawn.append(list(rows))
        path.write_bytes(b"")

    monkeypatch.setattr(Video, "draw_grid", draw)
    grid = draw_completions(evaluator)
    given, made, true = drawn[-1]
    assert len(grid.images) == len(made) == 8, "of the first batch"
    assert torch.equal(made[:, :5], true[:, :5]) and not torch.equal(made[:, 5:], true[:, 5:])
    assert torch.equal(given[:, 5:], true[:, 4:5].expand(-1, 11, -1, -1, -1)), "the last given frame is repeated"
    whole = torch.cat([completed.made.data for completed in evaluator.completed(range(20))])
    assert torch.equal(made, whole[:8])


def test_an_evaluation_continues_held_out_clips(bouncing: Path, tmp_path: Path, cli: Command):
    metrics = ("--metrics", "rest_psnr,path_distance,lawful,motion_change", "--num-samples", 40)
    code, _, err = cli("evaluate", bouncing, "--given-frames", 5, *metrics, "--out", tmp_path / "eval")
    assert code == 0, err
    (path,) = (tmp_path / "eval").glob("*.json")
    found = {number["metric"]: number for number in json.loads(path.read_text())["numbers"]}
    assert set(found) == {"rest_psnr", "path_distance", "lawful", "motion_change"}
    # the control is a function of the data alone: the mean over 40 held-out clips of their last given frame repeated
    video = unilatent.load(bouncing).modality
    assert isinstance(video, Video)
    held_out = splits_of(video, bouncing, None).held_out
    data = video.collate([held_out[i][0] for i in range(40)])
    mask = torch.ones(40, 16, 1, 16, 16, dtype=torch.bool)
    mask[:, :5] = False
    still = torch.cat([data[:, :5], data[:, 4:5].expand(-1, 11, -1, -1, -1)], dim=1)
    want = float(masked_psnr(still, data, mask).double().mean())
    assert found["rest_psnr"]["beside"]["last frame repeated"] == pytest.approx(want, abs=1e-4)
    assert found["path_distance"]["beside"]["last frame repeated"] > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--given-frames", 16), "given_frames: 16 of 16 leave no frame to make"),
        (("--given-frames", 5, "--labels", 3), "labels: completed samples have the values of the held-out ones"),
        (("--given-frames", 5, "--given-context", "blurred"), "given_context"),
    ],
)
def test_evaluations_that_have_no_meaning_are_refused(
    bouncing: Path, tmp_path: Path, cli: Command, arguments: tuple, words: str
):
    code, _, err = cli("evaluate", bouncing, *arguments, "--metrics", "rest_psnr", "--out", tmp_path / "eval")
    assert code == 2 and words in err.replace("\n", " "), err


def test_more_samples_than_there_are_clips_to_complete_are_said(bouncing: Path, tmp_path: Path):
    model = unilatent.load(bouncing)
    video = Video(model.config.modality.model_copy(update={"given_frames": 5}))
    splits = splits_of(video, bouncing, None)
    there = len(splits.held_out)

    def notes(num: int) -> list[str]:
        request = EvaluationRequest(metrics=("rest_psnr",), num_samples=num)
        return Evaluator(model, splits, tmp_path, request, modality=video).notes

    assert notes(there) == [] and not list(tmp_path.iterdir())
    assert notes(there + 1) == [
        f"{there + 1:,} samples asked for, but only {there:,} samples held out to be completed, each once"
    ]


def test_the_context_that_metrics_see_depends_on_no_batch(bouncing: Path, tmp_path: Path, cli: Command):
    """Decoded context is that of the clip's own reconstruction, whatever its batch."""
    numbers = []
    for size in (2, 5):
        out = tmp_path / str(size)
        arguments = ("--given-frames", 5, "--given-context", "decoded", "--metrics", "motion_change,rest_psnr")
        code, _, err = cli("evaluate", bouncing, *arguments, "--num-samples", 10, "--batch-size", size, "--out", out)
        assert code == 0, err
        (path,) = out.glob("*.json")
        numbers.append([number["value"] for number in json.loads(path.read_text())["numbers"]])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
