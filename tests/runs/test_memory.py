"""The memory estimate equals the memory that a step needs; what happens when there is less."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import QUICK, Command
from test_processes import environment
from test_training import assert_same, digits, state

from unilatent.batches import collate
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.presets import preset
from unilatent.runs import checkpoint as ckpt
from unilatent.training import memory
from unilatent.training.config import RunConfig, TrainingConfig
from unilatent.training.memory import estimate, held_in_step
from unilatent.training.trainer import Trainer
from unilatent.types import Batch

CPU = torch.device("cpu")


class Step(NamedTuple):
    model: LatentModel
    training: TrainingConfig
    batch: Batch
    streams: Streams


def step_of(trainer: Trainer, size: int) -> Step:
    """A real micro-batch of a run."""
    train = trainer.splits.train
    batch = collate([train[i] for i in range(size)], trainer.model.modality)
    return Step(trainer.model, trainer.training, batch, Streams(("memory",), range(size)))


def allocated(step: Step) -> int:
    """Peak bytes of torch's allocator in a step, as its profiler records them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for part in step.model.loss(step.batch, step.streams):
            part.value.backward()
            part.close()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("override", ["seed=0", "training.activation_checkpointing=true", "method.num_latents=null"])
def test_the_estimate_is_what_a_step_holds(tmp_path: Path, override: str) -> None:
    """Fake tensors compared with real ones, storage by storage, and with the allocator."""
    trainer = Trainer(digits(override), tmp_path / "run")
    step = step_of(trainer, 16)
    activations = trainer.memory.activations
    assert activations is not None and activations == held_in_step(*step)[0]
    assert activations == pytest.approx(allocated(step), rel=0.05)


def test_weights_ema_and_optimizer_state_are_counted_to_the_byte(tmp_path: Path) -> None:
    trainer = Trainer(digits("training.steps=1"), tmp_path / "run")
    needed = trainer.memory
    trainer.fit()
    assert needed.weights == sum(p.nbytes for p in trainer.model.state_dict().values())
    assert needed.average == sum(w.nbytes for w in trainer.state.ema.weights.values())
    state_bytes = sum(value.nbytes for value in trainer.state.optimizers.state().values() if value.ndim)
    assert needed.optimizer == state_bytes == trainer.state.optimizers.state_bytes


def example_of(config: RunConfig) -> tuple[RunConfig, Batch]:
    config = config.model_copy(update={"conditions": config.example().conditions})
    modality = config.modality
    image = torch.zeros(2, modality.channels, modality.height, modality.width)
    return config, Batch(image, {"labels": torch.zeros(2, dtype=torch.long)})


def test_activations_are_linear_in_the_micro_batch() -> None:
    sizes = (8, 16, 32)
    activations = []
    for size in sizes:
        config, example = example_of(preset("digits").override(f"training.micro_batch_size={size}"))
        activations.append(estimate(config, example, CPU).activations)
    assert activations[2] - activations[1] == pytest.approx(2 * (activations[1] - activations[0]), rel=0.02)


@pytest.mark.slow
def test_the_largest_published_model_is_estimated_without_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """763 M parameters and their activations are never allocated."""
    config, example = example_of(
        preset("imagenet256-unite-xl").override(
            "modality.perceptual_weight=0", "training.log_gradients=false", "training.micro_batch_size=64"
        )
    )
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    needed = estimate(config, example, CPU)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30 < needed.total / 50
    assert needed.weights == pytest.approx(4 * 762.78e6, rel=0.01)
    assert needed.gradients == pytest.approx(needed.weights, rel=0.01)


def test_the_reported_micro_batch_fits_and_twice_as_many_samples_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimated(size: int | str) -> memory.Memory:
        return estimate(*example_of(preset("digits").override(f"training.micro_batch_size={size}")), CPU)

    monkeypatch.setattr(memory, "free_memory", lambda device: 20 * 2**20)
    needed = estimated("null")
    largest = needed.fitting
    assert not needed.fits and largest
    assert f"the largest training.micro_batch_size that fits is {largest} (" in needed.warning()
    assert estimated(largest).fits and estimated(largest).warning() == "" and not estimated(2 * largest).fits
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    assert "not even one sample" in estimated("null").warning()


def test_a_dry_run_reports_needed_and_free_memory(cli: Command, tmp_path: Path) -> None:
    done = cli("train", "digits", *QUICK, "--dry-run", "--out", tmp_path / "run")
    (line,) = [line for line in done.out.splitlines() if line.startswith("memory")]
    for words in (
        "about",
        "weights and gradients",
        "optimizer",
        "EMA weights",
        "activations of micro-batches of 16",
        "free",
    ):
        assert words in line


def test_f32_out_of_memory_names_the_way_out_and_keeps_the_checkpoint(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._one_step

    def starved(trainer: Trainer, micro: list) -> dict:
        if trainer.step == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore about it")
        return original(trainer, micro)

    monkeypatch.setattr(Trainer, "_one_step", starved)
    run = tmp_path / "run"
    done = cli("train", "digits", *QUICK, "--out", run)
    assert done.code == 1
    assert "error: out of memory after step 6 on cpu with micro-batches of 16: resume with " in done.err
    assert "training.micro_batch_size=8" in done.err and "the checkpoint of step 4 is intact" in done.err
    (report,) = (run / "crash").iterdir()
    assert "OutOfMemoryError" in report.read_text()
    ckpt.verify(run / "checkpoints" / "step_00000004")
    monkeypatch.undo()
    again = cli("train", "digits", *QUICK, "training.micro_batch_size=8", "--resume", "auto", "--out", run)
    assert again.code == 0 and state(run, 12)


HUNGRY = """
import resource, sys
from unilatent.cli import main
from unilatent.training.trainer import Trainer
original = Trainer._one_step
def limited(trainer, micro):
    if trainer.step == 6:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, resource.RLIM_INFINITY))
    return original(trainer, micro)
Trainer._one_step = limited
main(sys.argv[1:])
"""


@pytest.mark.faults
def test_f32_the_same_when_the_kernel_says_no(tmp_path: Path) -> None:
    """A real limit on the address space: whatever torch raises on a CPU is understood."""
    run = tmp_path / "run"
    settings = (*QUICK, "training.batch_size=256")
    done = subprocess.run(
        [sys.executable, "-c", HUNGRY, "train", "digits", *settings, "--out", str(run)],
        env=environment(MALLOC_MMAP_THRESHOLD_="65536"),  # freed tensors go back: none is made from what is left over
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert "error: out of memory after step 6" in done.stderr, done.stderr[-2000:]
    assert "training.micro_batch_size=128" in done.stderr
    ckpt.verify(run / "checkpoints" / "step_00000004")


def test_gradient_norms_of_parts_change_no_bit_of_training(tmp_path: Path) -> None:
    for name in ("true", "false"):
        settings = (f"training.log_gradients={name}", "training.micro_batch_size=6", "training.log_every=3")
        Trainer(digits(*settings), tmp_path / name).fit()
    assert_same(state(tmp_path / "true", 12), state(tmp_path / "false", 12))
