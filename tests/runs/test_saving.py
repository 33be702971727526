"""Checkpoints that are written while training continues, and work that ends between batches after a stop signal."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import assert_same, digits, state

from unilatent.runs import checkpoint as ckpt
from unilatent.training.saving import BackgroundWriter, HostCopies
from unilatent.training.trainer import Trainer

Watch = Callable[[int, bool], None]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch):
    """Call `watch(step, begun)` in the writing thread, before and after each checkpoint."""

    def install(watch: Watch) -> None:
        original = ckpt.save

        def save(folder: Path, step: int, write: Callable[[Path], None], keep: int, needed: int) -> Path:
            watch(step, True)
            try:
                return original(folder, step, write, keep, needed)
            finally:
                watch(step, False)

        monkeypatch.setattr(ckpt, "save", save)

    return install


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, run_folder: Path, watched) -> None:
    """The checkpoint holds the state of its own step, three steps ago."""
    trainer = Trainer(digits(), tmp_path / "run")
    three_later = threading.Event()
    original = trainer._one_step

    def step(micro: list) -> dict:
        logs = original(micro)
        if trainer.step == 6:
            three_later.set()
        return logs

    trainer._one_step = step  # type: ignore[method-assign]
    seen: list[bool] = []
    watched(lambda number, begun: seen.append(three_later.wait(60)) if number == 4 and begun else None)
    trainer.fit()
    assert seen == [True]
    for number in (4, 8, 12):
        assert_same(state(tmp_path / "run", number), state(run_folder, number))


def test_one_checkpoint_is_written_at_a_time_and_none_is_left_out(tmp_path: Path, watched) -> None:
    running, most, done = [], [], []
    lock = threading.Lock()

    def watch(number: int, begun: bool) -> None:
        with lock:
            (running.append if begun else running.remove)(number)
            most.append(len(running))
            done.extend([] if begun else [number])

    watched(watch)
    Trainer(digits("training.checkpoint_every=1", "training.keep_checkpoints=20"), tmp_path / "run").fit()
    assert max(most) == 1 and done == list(range(1, 13))
    assert len(ckpt.published(tmp_path / "run" / "checkpoints")) == 12


def test_a_failed_write_ends_the_run_before_the_next_one(tmp_path: Path, watched) -> None:
    def full(number: int, begun: bool) -> None:
        if number == 8 and begun:
            raise OSError(28, "checkpoint of step 8 not written")

    watched(full)
    trainer = Trainer(digits(), tmp_path / "run")
    with pytest.raises(OSError, match="step 8 not written"):
        trainer.fit()
    assert 8 <= trainer.step <= 12 and not (tmp_path / "run" / "model").exists()
    assert [p.name for p in ckpt.published(tmp_path / "run" / "checkpoints")] == ["step_00000004"]


def test_a_failed_write_is_reported_along_with_another_error(tmp_path: Path, watched) -> None:
    trainer = Trainer(digits("training.checkpoint_every=5"), tmp_path / "run")
    raised = threading.Event()
    original = trainer._one_step

    def step(micro: list) -> dict:
        if trainer.step == 6:
            raised.set()
            raise RuntimeError("the step failed")
        return original(micro)

    def full(number: int, begun: bool) -> None:
        if begun:
            raised.wait(60)
            raise OSError(28, "no room")

    trainer._one_step = step  # type: ignore[method-assign]
    watched(full)
    with pytest.raises(RuntimeError, match="the step failed") as failure:
        trainer.fit()
    assert any("no room" in note for note in failure.value.__notes__)


def test_foreground_saving_writes_the_same(tmp_path: Path, run_folder: Path, watched) -> None:
    threads = set()
    watched(lambda number, begun: threads.add(threading.current_thread()))
    Trainer(digits("training.background_saving=false"), tmp_path / "run").fit()
    assert threads == {threading.main_thread()}
    for name in ("model", "ema", "optimizer"):
        a, b = (run / "checkpoints/step_00000012" / f"{name}.safetensors" for run in (tmp_path / "run", run_folder))
        assert a.read_bytes() == b.read_bytes()


def test_a_copy_does_not_change_with_its_source() -> None:
    copies = HostCopies()
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2).T}
    first = copies.take(weights, keep=True)
    weights["a"] += 1
    assert first["a"].tolist() == [0, 1, 2] and torch.equal(first["b"], weights["b"])
    again = copies.take(weights, keep=True)
    assert again["a"].tolist() == [1, 2, 3] and again["a"].data_ptr() == first["a"].data_ptr()
    assert copies.take({"a": torch.ones(5)}, keep=True)["a"].shape == (5,)
    assert copies.take(weights, keep=False) == {}


def test_an_error_is_raised_once() -> None:
    saving = BackgroundWriter()
    saving.wait()

    def fail() -> None:
        raise ValueError("lost")

    saving.start(fail)
    with pytest.raises(ValueError, match="lost"):
        saving.wait()
    assert not saving.failed and saving.settle() is None


def test_f08_a_running_save_completes_after_a_stop(tmp_path: Path, run_folder: Path, watched) -> None:
    """SIGTERM comes while step 8 is being written, which takes half a second more."""

    def hold(number: int, begun: bool) -> None:
        if number == 8 and begun:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    watched(hold)
    trainer = Trainer(digits(), tmp_path / "run")
    trainer.fit()
    assert trainer.step < 12
    ckpt.verify(tmp_path / "run" / "checkpoints" / "step_00000008")
    ckpt.verify(tmp_path / "run" / "checkpoints" / f"step_{trainer.step:08d}")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp-*"))
    Trainer(digits(), tmp_path / "run", resume="auto").fit()
    assert_same(state(tmp_path / "run", 12), state(run_folder, 12))


def interrupt_sampling(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """SIGTERM within the first batch of samples; the sizes of the batches decoded."""
    sizes: list[int] = []
    original = type(trainer.model).decode

    def decode(model: object, latents: torch.Tensor, *rest: object, **more: object) -> object:
        if not sizes:
            os.kill(os.getpid(), signal.SIGTERM)
        sizes.append(len(latents))
        return original(model, latents, *rest, **more)

    monkeypatch.setattr(type(trainer.model), "decode", decode)
    return sizes


def test_f08_a_stop_during_sampling_acts_within_one_batch(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.sample_every=6", "training.num_samples=200", "sampling.num_inference_steps=2")
    trainer = Trainer(digits(*settings), tmp_path / "run")
    sizes = interrupt_sampling(trainer, monkeypatch)
    trainer.fit()
    assert sizes == [64] and trainer.step == 6
    ckpt.verify(tmp_path / "run" / "checkpoints" / "step_00000006")
    assert "SIGTERM: saved step 6" in (tmp_path / "run" / "log.txt").read_text()
    monkeypatch.undo()
    Trainer(digits(), tmp_path / "run", resume="auto").fit()
    assert_same(state(tmp_path / "run", 12), state(run_folder, 12))


def test_f08_a_stop_during_judging_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = digits("training.steps=2", "training.evaluate_samples=600", "sampling.num_inference_steps=2")
    trainer = Trainer(settings, tmp_path / "run")
    sizes = interrupt_sampling(trainer, monkeypatch)
    assert trainer.fit() == tmp_path / "run"
    assert len(sizes) == 1 and not list((tmp_path / "run" / "eval").glob("*.json"))
    monkeypatch.undo()
    assert Trainer(settings, tmp_path / "run", resume="auto").fit() == tmp_path / "run" / "model"
    report = json.loads((tmp_path / "run" / "eval" / "step_00000002.json").read_text())
    assert 600 in {number["protocol"]["num_samples"] for number in report["numbers"]}
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")
