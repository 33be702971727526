"""Evaluations that are interrupted, killed and restarted with another number of processes; degenerate sets."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image
from test_evaluate import by_metric, kept, numbers
from test_processes import TORCHRUN, environment, port
from test_training import digits

import unilatent
from unilatent.evaluation.evaluate import Evaluation, EvaluationRequest, Evaluator, Interrupted
from unilatent.evaluation.protocol import Protocol
from unilatent.evaluation.reference import find_reference, splits_of
from unilatent.maths.streams import generator
from unilatent.modalities.base import Evidence
from unilatent.modalities.image.fidelity import FrechetInceptionDistance, KernelInceptionDistance, ManifoldMetrics
from unilatent.modalities.image.metrics import PixelMetrics
from unilatent.modalities.image.spaces import Pixels
from unilatent.processes import Processes
from unilatent.records import MemoryRows, Statistics, open_records
from unilatent.training.trainer import Trainer

COUNT = 400
"""Samples, in seven chunks."""


@pytest.fixture(scope="module")
def model(run_folder: Path) -> Any:
    return unilatent.load(run_folder, device="cpu")


def evaluator(model: Any, run: Path, folder: Path, batch_size: int = 32, **options: Any) -> Evaluator:
    request = EvaluationRequest(num_samples=COUNT, num_reference=300, num_held_out=70, batch_size=batch_size)
    return Evaluator(
        model, splits_of(model.modality, run, None), folder, request, num_inference_steps=1, solver="euler", **options
    )


def rows(evaluation: Evaluation) -> dict[str, float]:
    return {measured.row.key: measured.row.value for measured in evaluation.numbers}


@pytest.fixture(scope="module")
def whole(model: Any, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted evaluation: its records/, and numbers.json."""
    folder = tmp_path_factory.mktemp("whole")
    found = evaluator(model, run_folder, folder / "records").run()
    (folder / "numbers.json").write_text(json.dumps(rows(found)))
    return folder


def assert_whole(folder: Path, whole: Path) -> None:
    for what in ("samples", "reconstructions"):
        own, other = kept(folder, what), kept(whole, what)
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own), what


def test_f38_stopped_at_five_random_batches_it_ends_as_if_never_stopped(
    model: Any, run_folder: Path, tmp_path: Path, whole: Path
) -> None:
    """Each start resumes from the finished chunks; samples and numbers equal those of an uninterrupted evaluation."""
    chance, stops = random.Random(5), 0
    for allowed in [*(chance.randint(4, 7) for _ in range(5)), 10**9]:
        asked = partial(next, count())
        try:
            stop = partial(lambda asked, allowed: asked() >= allowed, asked, allowed)
            found = evaluator(model, run_folder, tmp_path / "records", stop=stop).run()
            break
        except Interrupted:
            stops += 1
    assert stops == 5, "the limits above must interrupt it"
    assert rows(found) == json.loads((whole / "numbers.json").read_text())
    assert_whole(tmp_path, whole)


class DiedError(Exception): ...


class Share(Processes):
    """One of three processes, which dies at the synchronisation after its share of the samples."""

    def __init__(self, rank: int):
        self.rank, self.world, self.is_main, self.heartbeat = rank, 3, rank == 0, None
        self.device, self.meetings = torch.device("cpu"), 0

    def from_main(self, work: Callable[[], Any]) -> Any:
        return work()

    share = from_main

    def highest(self, number: int) -> int:
        self.meetings += 1
        if self.meetings == 5:  # two spaces of two real sets come before
            raise DiedError
        return number


def test_f38_another_number_of_processes_completes_what_one_began(
    model: Any, run_folder: Path, tmp_path: Path, whole: Path
) -> None:
    """Two of three processes write their chunks and die; a single process writes the rest."""
    shutil.copytree(whole / "records", tmp_path / "records")
    (samples,) = (tmp_path / "records").glob("samples-*")
    shutil.rmtree(samples)
    for rank in (0, 1):
        with pytest.raises(DiedError):
            evaluator(model, run_folder, tmp_path / "records", processes=Share(rank)).run()
    assert len(list(samples.glob("*.safetensors"))) == 5, "of nine: three of the first, two of what is left then"
    found = evaluator(model, run_folder, tmp_path / "records").run()
    assert rows(found) == json.loads((whole / "numbers.json").read_text())
    assert_whole(tmp_path, whole)


ARGUMENTS = ("--num-samples", COUNT, "--num-reference", 300, "--num-held-out", 70, "--batch-size", 32, "--steps", 1,
             "--solver", "euler", "--device", "cpu")  # fmt: skip


def command(run: Path, out: Path, processes: int = 1) -> list[str]:
    launcher = TORCHRUN[:1] if processes == 1 else [
        *TORCHRUN, "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(port())
    ]  # fmt: skip
    return [*launcher, "-m", "unilatent", "evaluate", str(run), *map(str, ARGUMENTS), "--out", str(out)]


@pytest.mark.faults
def test_f38_killed_in_two_processes_it_is_completed_by_one(run_folder: Path, tmp_path: Path, whole: Path) -> None:
    """SIGKILL at the chunk of sample 300; then one process completes it; a third start has nothing left to do."""
    fault = environment(UNILATENT_FAULT="evaluate.piece:kill::300")
    done = subprocess.run(command(run_folder, tmp_path, 2), env=fault, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and not list(tmp_path.glob("*.json"))
    assert 0 < len(list((tmp_path / "records").glob("samples-*/*.safetensors"))) < 8
    for _ in range(2):
        done = subprocess.run(command(run_folder, tmp_path), env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        values = {key: one["value"] for key, one in by_metric(numbers(tmp_path)).items()}
        assert values == json.loads((whole / "numbers.json").read_text())
    assert_whole(tmp_path, whole)


@pytest.mark.faults
def test_f08_sigterm_ends_an_evaluation_within_a_batch(run_folder: Path, tmp_path: Path, whole: Path) -> None:
    """An evaluation of a hundred thousand samples: exit code 143, and no result file."""
    line = [*command(run_folder, tmp_path), "--num-samples", "100000", "--steps", "50"]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 90
    while not list((tmp_path / "records").glob("samples-*/*.safetensors")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped: samples are unfinished, completed shards are stored" in err, err
    assert time.monotonic() - asked < 20 and not list(tmp_path.glob("*.json"))


def test_f08_a_signal_during_an_evaluation_while_training_saves_and_leaves(tmp_path: Path) -> None:
    """In the final evaluation; the resumed run evaluates, and nothing is lost."""
    settings = ("training.evaluate_samples=200", "training.steps=2")
    trainer = Trainer(digits(*settings), tmp_path / "run")
    calls = iter(range(3))

    def stop_soon(*_: object) -> str:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unilatent.records.reach", stop_soon)
        trainer.fit()
    assert trainer.stop.received == signal.SIGTERM and not (tmp_path / "run" / "eval" / "step_00000002.json").exists()
    again = Trainer(digits(*settings), tmp_path / "run", resume="auto")
    again.fit()
    assert len(json.loads((tmp_path / "run" / "eval" / "step_00000002.json").read_text())["numbers"]) == 11


# ---- sets that are no fair ones ------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator("test", seed))


def test_f37_identical_sets_are_at_distance_0_and_constant_ones_are_finite() -> None:
    """FID, KID, precision and recall of a set against itself, and of one image a hundred times."""
    some = MemoryRows({"pool": noise(100, 64), "spatial": noise(100, 32, seed=1)})
    for row in FrechetInceptionDistance()(Evidence(some, None, some)):
        assert 0 <= row.value < 1e-6
    found = {row.key: row.value for row in ManifoldMetrics()(Evidence(some, None, some))}
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    one = MemoryRows({"pool": noise(1, 64).expand(100, 64), "spatial": noise(1, 32).expand(100, 32)})
    for pair in ((one, one), (some, one), (one, some)):
        for metric in (FrechetInceptionDistance(), KernelInceptionDistance(), ManifoldMetrics()):
            for row in metric(Evidence(pair[0], None, pair[1])):
                assert np.isfinite(row.value), row
        if pair[0] is pair[1]:
            assert FrechetInceptionDistance()(Evidence(one, None, one))[0].value < 1e-6
    flat = MemoryRows({**Pixels()(torch.full((20, 1, 8, 8), 0.5)), "labels": torch.arange(20) % 2})
    assert all(np.isfinite(row.value) for row in PixelMetrics()(Evidence(flat, flat, flat)))


def test_f37_too_few_samples_have_no_distance() -> None:
    """At least two are needed; below ten thousand, the number has a caution."""
    some, one = MemoryRows({"pool": noise(9, 8)}), MemoryRows({"pool": noise(1, 8)})
    for metric in (FrechetInceptionDistance(), KernelInceptionDistance(), ManifoldMetrics()):
        assert metric(Evidence(some, None, one)) == []
    two = MemoryRows({"pool": noise(2, 8)})
    assert [row.key for row in FrechetInceptionDistance()(Evidence(some, None, two))] == ["fid"]


def test_f37_samples_that_are_not_numbers_are_refused(
    model: Any, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that diverged has no FID, and its samples leave no records."""
    monkeypatch.setattr(type(model), "decode", lambda self, *_, **__: torch.full((32, 1, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="NaN or infinity in 32 of 32; the model that generated them diverged"):
        evaluator(model, run_folder, tmp_path / "records").run()
    assert not list((tmp_path / "records").glob("samples-*/*.safetensors"))


def test_f37_references_of_other_dimensions_are_refused_by_name(model: Any, tmp_path: Path) -> None:
    """Another D, a wrong covariance shape, values that are not finite, and unequal D in the distance itself."""
    for arrays, words in (
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, r"mu \(64,\) and sigma \(64, 64\), not a mean \(2048,\)"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)[:5]}, r"sigma \(5, 2048\), not a mean"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "are not finite numbers"),
        ({"mu": np.zeros(2048)}, "has mu; give mu and sigma, or arr_0"),
        ({"arr_0": np.zeros((3, 16, 16, 1), np.uint8)}, "holds images of 16 x 16 x 1, not 8 x 8 x 1"),
        ({"arr_0": np.zeros((3, 8, 8, 1))}, r"arr_0 is float64 \(3, 8, 8, 1\), not uint8"),
        ({"provenance": np.array("{}"), "mu": np.zeros(2048), "sigma": np.eye(2048)}, "its provenance is damaged"),
    ):  # fmt: skip
        np.savez(tmp_path / "ref.npz", **arrays)
        with pytest.raises(ValueError, match=words) as refused:
            find_reference(model.modality, str(tmp_path / "ref.npz"))
        assert str(tmp_path / "ref.npz") in str(refused.value)
    statistics = Statistics({"pool": (torch.zeros(9).double(), torch.eye(9).double())})
    with pytest.raises(ValueError, match="both need the same D, got 9 and 8"):
        FrechetInceptionDistance()(Evidence(statistics, None, MemoryRows({"pool": noise(20, 8)})))


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped", "objects"])
def test_f37_a_corrupt_reference_is_refused_in_one_line(
    cli: Command, run_folder: Path, tmp_path: Path, damage: str
) -> None:
    """Nothing is unpickled."""
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    content = path.read_bytes()
    if damage == "objects":
        np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(2048))
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 255
        path.write_bytes({"empty": b"", "cut": content[:5000], "text": b"<html>", "flipped": bytes(flipped)}[damage])
    refused = cli("evaluate", run_folder, "--num", 2, "--reference", path, "--out", tmp_path / "out")
    assert refused.code == 2 and f"--reference {path}: cannot be read as plain arrays" in refused.err, refused
    assert refused.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_f37_images_are_rounded_not_truncated(model: Any, run_folder: Path, tmp_path: Path) -> None:
    """Metrics use images rounded to the nearest of 256 levels, as saved, both generated and real."""
    found = evaluator(model, run_folder, tmp_path / "records").run()
    real = splits_of(model.modality, run_folder, None).train
    exact = 255 * torch.stack([real[i * len(real) // 300][0] for i in range(300)]).flatten(1)
    assert torch.equal(found.evidence.train["pixels"], exact.round().to(torch.uint8))
    assert (exact.round() != exact.floor()).any(), "the test must be able to tell"
    made = unilatent.sample(model, num=COUNT, num_inference_steps=1, solver="euler", batch_size=32)
    assert torch.equal(found.evidence.samples["pixels"], (made * 255).round().to(torch.uint8).flatten(1))


def test_f37_jpeg_samples_are_refused(cli: Command, tmp_path: Path) -> None:
    """By suffix, and files named .png by their content; the message has the reason."""
    rng = np.random.default_rng(0)
    for name, kind, words in (("a.jpg", "JPEG", "a.jpg is a JPG file"), ("a.png", "JPEG", "holds a JPEG image")):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        (tmp_path / "set").mkdir()
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "set" / name, format=kind)
        refused = cli(
            "evaluate", "--samples", tmp_path / "set", "--reference", "digits", "--out", tmp_path / "out",
            "--metrics", "frechet_pixels",
        )  # fmt: skip
        assert refused.code == 2 and words in refused.err and "which changes pixels" in refused.err, refused
        assert refused.err.count("\n") == 1


def test_f37_a_reference_of_another_preparation_is_said_wherever_the_number_is(model: Any) -> None:
    """Statistics with unknown preprocessing, another crop, another size."""
    base = {"track": "generation", "num_samples": 50_000, "reference": "ref.npz", "reference_data": "0",
            "num_reference": 50_000, "preprocessing": "adm centre crop, 8 bits", "resolution": (8, 8, 1),
            "space": "inception", "sampling": model.config.sampling.plain()}  # fmt: skip
    known = {"reference_preprocessing": "adm centre crop, 8 bits", "reference_resolution": (8, 8, 1)}
    assert Protocol(**base, **known).cautions() == []
    assert Protocol(**base).cautions() == ["reference preprocessing unknown"]
    other = Protocol(**base, reference_preprocessing="squashed", reference_resolution=(16, 16, 1)).cautions()
    assert other == ["reference preprocessed differently (squashed)", "reference of another size (16 x 16 x 1)"]
    few = Protocol(**{**base, "num_samples": 1000, "num_reference": 500}, **known).cautions()
    assert few == ["n = 1,000", "reference n = 500"]


def test_damaged_records_are_named(model: Any, run_folder: Path, tmp_path: Path) -> None:
    evaluator(model, run_folder, tmp_path / "records").run()
    (piece, *_) = sorted((tmp_path / "records").glob("samples-*/*.safetensors"))
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{piece.name}: damaged .*; delete the folder"):
        evaluator(model, run_folder, tmp_path / "records").run()
    (tmp_path / "other").mkdir()
    open_records(tmp_path / "other", 5, {"seed": 1})
    with pytest.raises(ValueError, match="contains records with another seed"):
        open_records(tmp_path / "other", 5, {"seed": 2})
