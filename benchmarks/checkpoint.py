"""What a checkpoint costs: how long training stands still, how long writing takes, the manifest, and resuming.

python benchmarks/checkpoint.py                       about 80 M parameters, 1 GB on disk
python benchmarks/checkpoint.py --width 256 --steps 4
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from unilatent.presets import preset
from unilatent.runs import checkpoint as ckpt
from unilatent.training.config import RunConfig
from unilatent.training.step_batches import StepBatches
from unilatent.training.trainer import Trainer

QUIET = Console(quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=10, help="steps of either run, fresh and resumed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fresh = make(options.width, run)
        one = Stepper(fresh)
        one.step()
        size = saving(fresh, one)
        checkpoint = ckpt.published(run / "checkpoints")[-1]
        started = time.perf_counter()
        ckpt.verify(checkpoint)
        print(f"verified in {time.perf_counter() - started:.2f} s")
        resumed = make(options.width, Path(folder) / "other", resume=str(checkpoint))
        compare(one, Stepper(resumed), options.steps)
        print(f"{fresh.model.num_trainable / 1e6:.1f} M parameters, {size:.2f} GB a checkpoint")


def make(width: int, out: Path, resume: str | None = None) -> Trainer:
    config: RunConfig = preset("digits").override(
        f"method.generative_encoder.width={width}", "method.generative_encoder.depth=6",
        "method.generative_encoder.heads=12" if width % 12 == 0 else "method.generative_encoder.heads=4",
        f"method.decoder.width={width}", "method.decoder.depth=2", f"method.decoder.mlp_width={4 * width}",
        "training.batch_size=4", "training.steps=1000", "training.optimizer.muon=false",
    )  # fmt: skip
    trainer = Trainer(config, out, resume=resume, console=QUIET)
    trainer._open_folder()
    return trainer


class Stepper:
    """The trainer's own step, one at a time."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.data = trainer._data()  # kept, since it ends with this object
        self.micro = self.data.__enter__()

    def step(self) -> float:
        """Seconds."""
        trainer = self.trainer
        started = time.perf_counter()
        trainer._one_step(StepBatches(self.micro, trainer._micro_batches_per_step))
        trainer.state.advance()
        return time.perf_counter() - started


def saving(trainer: Trainer, stepper: Stepper) -> float:
    """Prints times of three saves, the first of which has to find its memory; GB on disk."""
    alone = statistics.median(stepper.step() for _ in range(5))
    seconds = {"manifest": 0.0, "cpu": 0.0}

    def timed(work: Callable[[Path], dict]) -> Callable[[Path], dict]:
        def run(path: Path) -> dict:
            started, cpu = time.perf_counter(), time.thread_time()
            try:
                return work(path)
            finally:
                seconds["manifest"] += time.perf_counter() - started
                seconds["cpu"] += time.thread_time() - cpu

        return run

    ckpt.describe = timed(ckpt.describe)
    print(
        "| save | training stands still s | written after s | "
        "manifest s/GB | of it CPU | step meanwhile s | step alone s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    size = 0.0
    for number in range(1, 4):
        os.sync()
        seconds.update(manifest=0.0, cpu=0.0)
        started = time.perf_counter()
        trainer.checkpoints.save()
        blocked = time.perf_counter() - started
        thread = trainer.checkpoints.writer._thread
        assert thread is not None
        beside = []
        while thread.is_alive():
            beside.append(stepper.step())
        trainer.checkpoints.wait()
        written = time.perf_counter() - started - blocked
        files = ckpt.published(trainer.out / "checkpoints")[-1].iterdir()
        size = sum(path.stat().st_size for path in files) / 1e9
        print(
            f"| {number} | {blocked:.2f} | {written:.2f} | {seconds['manifest'] / size:.2f} | "
            f"{seconds['cpu'] / size:.2f} | {statistics.median(beside):.2f} | {alone:.2f} |"
        )
    trainer.checkpoints.config = trainer.config.override("training.background_saving=false")
    for _ in range(2):
        stepper.step()
        os.sync()
        seconds.update(manifest=0.0, cpu=0.0)
        started = time.perf_counter()
        trainer.checkpoints.save()
        print(
            f"in the foreground: training stands still {time.perf_counter() - started:.2f} s, "
            f"manifest {seconds['manifest'] / size:.2f} s/GB, of it CPU {seconds['cpu'] / size:.2f}"
        )
    return size


def compare(fresh: Stepper, resumed: Stepper, steps: int) -> None:
    """Steps of a run that was never interrupted and of one that was resumed, by turns."""
    times = [(fresh.step(), resumed.step()) for _ in range(steps + 1)][1:]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"step: never interrupted {a:.3f} s, resumed {b:.3f} s ({100 * (b / a - 1):+.1f} %), medians of {steps}")


if __name__ == "__main__":
    main()
