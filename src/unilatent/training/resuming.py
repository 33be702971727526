"""Which checkpoint a run resumes from, and whether that belongs to this run. Nothing is written here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..files import read_json
from ..processes import Processes
from ..runs import checkpoint as ckpt
from ..runs import lock
from .config import RunConfig


def find_checkpoint(out: Path, resume: str | None, processes: Processes, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that a Trainer's `resume` names, the same in all processes; None to start from scratch.

    The first process, which also holds the run's lock, searches for all. ConfigError says why there is none.
    """
    check_writable(out)
    checkpoint = processes.from_main(lambda: _choose(out, resume, say))
    if checkpoint is None:
        return None
    identities = processes.gather(ckpt.identity(checkpoint))
    for rank, identity in enumerate(identities):
        if identity != identities[0]:
            raise ConfigError(
                f"--resume {checkpoint}: process {rank} finds {identity}, the first process {identities[0]}; all must "
                "read the same run folder, give --out on a file system that they share"
            )
    return checkpoint


def _choose(out: Path, resume: str | None, say: Callable[[str], None]) -> Path | None:
    folder = out / "checkpoints"
    lock.refuse_second(out)
    if resume is None:
        if (out / "config.yaml").exists():
            raise ConfigError(f"--out {out}: holds a run already; add --resume auto, or choose another folder")
        return None
    if resume != "auto":
        ckpt.verify(Path(resume))
        is_own = Path(resume).resolve().parent == folder.resolve()
        if (out / "config.yaml").exists() and not is_own:
            raise ConfigError(f"--out {out}: holds another run; choose another --out to resume from {resume}")
        return Path(resume)
    ckpt.restore(folder)
    checkpoint, skipped = ckpt.newest(folder)
    for line in skipped:
        say(f"skipped: {line}")
    if checkpoint is None and skipped:
        raise ConfigError(f"--resume auto: no valid checkpoint is left in {folder}; start again in another folder")
    return checkpoint


def refuse_other_run(checkpoint: Path, config: RunConfig, fingerprint: str, allow_data_change: bool) -> bool:
    """ConfigError names the field in which a checkpoint differs from the run: model, seed, batch size or data.

    Returns whether the data changed, if that is allowed. fingerprint: of the current training samples.
    """
    _refuse_other_model(checkpoint, config)
    state = {"ema_profiles": [], **read_json(checkpoint / "state.json", "use an older checkpoint")}
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise ConfigError(f"{checkpoint / 'state.json'}: step is {step!r:.40}; use an older checkpoint")
    training = config.training
    current = {
        "seed": config.seed,
        "training.batch_size": training.batch_size,
        "training.optimizer.muon": training.optimizer.muon,
        "training.ema_profiles": list(training.ema_profiles),
    }
    for field, value in current.items():
        stored = state.get(field.rpartition(".")[2])
        if stored != value:
            raise ConfigError(f"{field}: {value!r}, but the checkpoint has {stored!r}; keep it, or start a new run")
    stored = state.get("data")
    if stored != fingerprint and not allow_data_change:
        raise ConfigError(
            f"data: {fingerprint!r}, but the checkpoint has {stored!r}: samples were added, removed or changed. "
            "Restore them, start a new run, or resume with --allow-data-change"
        )
    return stored != fingerprint


def _refuse_other_model(checkpoint: Path, config: RunConfig) -> None:
    stored = read_json(checkpoint / "config.json", "use an older checkpoint")
    for field in ("modality", "conditions", "method"):
        if difference := first_difference(config.model().plain()[field], stored.get(field), field):
            key, new, old = difference
            raise ConfigError(f"{key}: {new!r}, but the checkpoint has {old!r}; keep it, or start a new run")


def first_difference(new: Any, old: Any, key: str) -> tuple[str, Any, Any] | None:
    """Return the dotted key and both values of the first difference between two plain trees, None if they are equal."""
    if isinstance(new, dict) and isinstance(old, dict):
        for sub in new.keys() | old.keys():
            if difference := first_difference(new.get(sub), old.get(sub), f"{key}.{sub}"):
                return difference
        return None
    return None if new == old else (key, new, old)


def check_writable(folder: Path) -> None:
    """ConfigError unless files can be created in the folder, or in the nearest parent that exists."""
    place = folder
    while not place.exists():
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "not a folder")
        tempfile.TemporaryFile(dir=place).close()  # every process uses another name
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None
