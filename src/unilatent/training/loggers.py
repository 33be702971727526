"""Loggers of a run: TensorBoard, Weights & Biases, MLflow, Trackio. metrics.jsonl is written with or without them.

A logger never stops a run: when it fails (no server, a full disk), it is dropped with one warning.

To add a logger, say Aim: write a subclass of `Logger` here and add it to LOGGERS at the end of this file. Import its
library inside `__init__`, so that users of other loggers need not install it. The name in LOGGERS is what users write
in training.loggers, and the extra of pyproject.toml that installs the library.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ..config import ConfigError, flat
from ..runs.crash import first_line

LONGEST = 500
"""Characters of a setting that MLflow takes, in every version."""


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger follows.

    step: the step from which the run starts or resumes. project, name: where the logger files it. config: all settings
    as plain data.
    """

    folder: Path
    step: int
    project: str
    name: str | None
    config: dict[str, Any]


class Logger(ABC):
    """An experiment tracker that follows one run. Any method may raise; the run continues without it."""

    library: ClassVar[str]
    """The package that must be installed."""

    @abstractmethod
    def __init__(self, run: LoggedRun) -> None: ...

    @abstractmethod
    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Log metrics of a step: the keys and values of a line of metrics.jsonl."""

    @abstractmethod
    def image(self, step: int, name: str, file: Path) -> None:
        """Log an image file of a step, under a name such as "samples"."""

    @abstractmethod
    def close(self) -> None:
        """Write what is pending and end."""


class Loggers:
    """The loggers of a run; each is dropped with a warning the first time that it fails."""

    def __init__(self, openers: dict[str, Callable[[], Logger]], warn: Callable[[str, str], None]):
        """openers: name -> what opens the logger. warn: called with the logger's name and the message."""
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

    def image(self, step: int, name: str, file: Path) -> None:
        self._all(lambda logger: logger.image(step, name, file))

    def _all(self, work: Callable[[Logger], None]) -> None:
        for name, logger in list(self.open.items()):
            if not self._try(name, lambda logger=logger: work(logger)):  # type: ignore[misc]
                del self.open[name]
                self._try(name, logger.close)

    def _try(self, name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except Exception as error:
            self.warn(name, f"{name} failed and is dropped ({type(error).__name__}: {first_line(error)})")
            return False
        return True


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError if the library of a logger is not installed."""
    for name in names:
        if importlib.util.find_spec(LOGGERS[name].library) is None:
            raise ConfigError(
                f"training.loggers: {name} is not installed; pip install 'unilatent[{name}]', or leave it out"
            )


def open_logger(name: str, run: LoggedRun) -> Logger:
    """Open the logger with this name of LOGGERS."""
    return LOGGERS[name](run)


class TensorBoard(Logger):
    """Event files in RUN/tensorboard. A resumed run purges what was written after the step that it resumes from."""

    library = "tensorboard"

    def __init__(self, run: LoggedRun):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def image(self, step: int, name: str, file: Path) -> None:
        with Image.open(file) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB(Logger):
    """A Weights & Biases run; a resumed run continues it. Without credentials it is offline, in RUN/wandb.

    WANDB_MODE overrides this. `wandb sync RUN/wandb/offline-*` uploads an offline run.
    """

    library = "wandb"

    def __init__(self, run: LoggedRun):
        import wandb

        self.wandb = wandb
        name = run.name or run.folder.resolve().name
        self.run = wandb.init(
            project=run.project, name=name, id=_stored_id(run.folder / "wandb_id.txt", _new_id), resume="allow",
            dir=str(run.folder), config=run.config, mode=None if "WANDB_MODE" in os.environ else _mode(),
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )  # fmt: skip

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def image(self, step: int, name: str, file: Path) -> None:
        self.run.log({name: self.wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow(Logger):
    """An MLflow run; a resumed run continues it. Without MLFLOW_TRACKING_URI it is offline, in RUN/mlflow.

    `mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db` shows an offline run.
    """

    library = "mlflow"

    def __init__(self, run: LoggedRun):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self.metric, place = Metric, (run.folder / "mlflow").resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            place.mkdir(exist_ok=True)
        self.client = MlflowClient(tracking_uri=uri or f"sqlite:///{place / 'mlflow.db'}")
        self.id = _stored_id(run.folder / "mlflow_id.txt", lambda: self._new(run, None if uri else place.as_uri()))
        self.client.update_run(self.id, status="RUNNING")

    def _new(self, run: LoggedRun, artifacts: str | None) -> str:
        """Create the run with its settings, and return its id."""
        experiment = self.client.get_experiment_by_name(run.project)
        place = experiment.experiment_id if experiment else self.client.create_experiment(run.project, artifacts)
        created = self.client.create_run(place, run_name=run.name or run.folder.resolve().name).info.run_id
        self.client.log_dict(created, run.config, "config.yaml")
        for key, value in flat(run.config).items():
            self.client.log_param(created, key, str(value)[:LONGEST])
        return created

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [self.metric(key, value, now, step) for key, value in numbers.items()])

    def image(self, step: int, name: str, file: Path) -> None:
        self.client.log_artifact(self.id, str(file), name)

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio(Logger):
    """A Trackio run in its database on this machine (TRACKIO_DIR); a resumed run continues it. `trackio show` shows it.

    Nothing is sent anywhere, unless TRACKIO_SPACE_ID names a place.
    """

    library = "trackio"

    def __init__(self, run: LoggedRun):
        import trackio

        self.trackio = trackio
        name = run.name or f"{run.folder.resolve().name}-{_stored_id(run.folder / 'trackio_id.txt', _new_id)}"
        with contextlib.redirect_stdout(sys.stderr):
            self.run = trackio.init(project=run.project, name=name, config=run.config, resume="allow", embed=False)

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def image(self, step: int, name: str, file: Path) -> None:
        self.run.log({name: self.trackio.Image(str(file))}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.run.finish()


def _stored_id(path: Path, new: Callable[[], str]) -> str:
    """The id of a tracker's run, created when the run starts."""
    if not path.is_file():
        path.write_text(new() + "\n")
    return path.read_text().strip()


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _mode() -> Literal["online", "offline"]:
    """ "online" if there are credentials."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
"""Name in training.loggers -> its class."""
