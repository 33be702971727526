"""TensorBoard and Weights & Biases, for those who want them. metrics.jsonl is written with or without.

A logger is a guest: whatever goes wrong in it (its server is away, the disk is full) costs one warning and the logger,
never the run.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ..config import ConfigError
from .crash import first_line


class Logger(Protocol):
    """Somewhere that numbers and pictures go."""

    def numbers(self, step: int, numbers: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, file: Path) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told about a run: its folder, the step it goes on from, where to file it, its settings."""

    folder: Path
    step: int
    project: str
    name: str | None
    config: dict[str, Any]


class Loggers:
    """All of a run's, each dropped with a warning the first time that it fails."""

    def __init__(self, openers: dict[str, Callable[[], Logger]], warn: Callable[[str, str], None]):
        self.warn = warn
        self.open: dict[str, Logger] = {}
        for name, opener in openers.items():
            self._try(name, lambda name=name, opener=opener: self.open.update({name: opener()}))  # type: ignore[misc]

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *exception: object) -> None:
        for name, logger in self.open.items():
            self._try(name, logger.close)

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        self._all(lambda logger: logger.numbers(step, numbers))

    def picture(self, step: int, name: str, file: Path) -> None:
        self._all(lambda logger: logger.picture(step, name, file))

    def _all(self, work: Callable[[Logger], None]) -> None:
        for name, logger in list(self.open.items()):
            if not self._try(name, lambda logger=logger: work(logger)):  # type: ignore[misc]
                del self.open[name]
                self._try(name, logger.close)

    def _try(self, name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except Exception as error:
            self.warn(name, f"{name} failed and is left out from here ({type(error).__name__}: {first_line(error)})")
            return False
        return True


def check_loggers(names: Sequence[str]) -> None:
    """ConfigError unless every one's library is installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.loggers: {name} is not installed; pip install 'unilatent[{name}]', or leave it out"
            )


def open_logger(name: str, run: LoggedRun) -> Logger:
    """A logger by the name that configurations know it by."""
    return TensorBoard(run) if name == "tensorboard" else WandB(run)


class TensorBoard:
    """Event files under RUN/tensorboard; what an abandoned continuation wrote beyond the resumed step is purged."""

    def __init__(self, run: LoggedRun):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def picture(self, step: int, name: str, file: Path) -> None:
        with Image.open(file) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A Weights & Biases run, the same one when resumed; offline under RUN/wandb unless somebody is logged in.

    WANDB_MODE, if set, decides. An offline run is uploaded with `wandb sync RUN/wandb/offline-*`.
    """

    def __init__(self, run: LoggedRun):
        import wandb

        self.wandb = wandb
        name = run.name or run.folder.resolve().name
        self.run = wandb.init(
            project=run.project, name=name, id=_stored_id(run.folder / "wandb_id.txt"), resume="allow",
            dir=str(run.folder), config=run.config, mode=None if "WANDB_MODE" in os.environ else _mode(),
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )  # fmt: skip

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def picture(self, step: int, name: str, file: Path) -> None:
        self.run.log({name: self.wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        self.run.finish()


def _stored_id(path: Path) -> str:
    """The run's id, made once."""
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()


def _mode() -> Literal["online", "offline"]:
    """ "online" where there are credentials."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"
