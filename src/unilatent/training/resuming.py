"""Which checkpoint a run goes on from, and whether it is one of this run at all. Nothing is written here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..files import read_json
from . import checkpoint as ckpt
from . import lock
from .config import RunConfig
from .processes import Processes


def find_checkpoint(out: Path, resume: str | None, processes: Processes, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that a Trainer's `resume` means, one for all processes; ConfigError says why there can be none.

    The first process looks for all, and alone looks at the lock: it is the one that holds it.
    """
    check_writable(out)
    found = processes.from_main(lambda: _choose(out, resume, say))
    if found is None:
        return None
    seen = processes.gather(ckpt.identity(found))
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise ConfigError(
                f"--resume {found}: process {rank} sees {other}, the first process {seen[0]}; all must see one "
                "run folder, give --out on a file system that they share"
            )
    return found


def _choose(out: Path, resume: str | None, say: Callable[[str], None]) -> Path | None:
    folder = out / "checkpoints"
    lock.refuse_second(out)
    if resume is None:
        if (out / "config.yaml").exists():
            raise ConfigError(f"--out {out}: holds a run already; add --resume auto, or choose another folder")
        return None
    if resume != "auto":
        ckpt.verify(Path(resume))
        own = Path(resume).resolve().parent == folder.resolve()
        if (out / "config.yaml").exists() and not own:
            raise ConfigError(f"--out {out}: holds another run; choose another --out to go on from {resume}")
        return Path(resume)
    ckpt.restore(folder)
    found, passed = ckpt.newest(folder)
    for line in passed:
        say(f"passed over: {line}")
    if found is None and passed:
        raise ConfigError(f"--resume auto: no sound checkpoint is left in {folder}; start anew in another folder")
    return found


def refuse_other_run(checkpoint: Path, config: RunConfig, fingerprint: str, allow_data_change: bool) -> bool:
    """ConfigError names the field in which a checkpoint is of another model, seed, batch size or data.

    Returns whether the data changed, where that is allowed. fingerprint: of the training samples as they are now.
    """
    _refuse_other_model(checkpoint, config)
    state = {"ema_profiles": [], **read_json(checkpoint / "state.json", "use an older checkpoint")}
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise ConfigError(f"{checkpoint / 'state.json'}: step is {step!r:.40}; use an older checkpoint")
    training = config.training
    own = {
        "seed": config.seed,
        "training.batch_size": training.batch_size,
        "training.optimizer.muon": training.optimizer.muon,
        "training.ema_profiles": list(training.ema_profiles),
    }
    for field, value in own.items():
        was = state.get(field.rpartition(".")[2])
        if was != value:
            raise ConfigError(f"{field}: {value!r}, but the checkpoint was made with {was!r}; keep it, or start anew")
    was = state.get("data")
    if was != fingerprint and not allow_data_change:
        raise ConfigError(
            f"data: {fingerprint!r}, but the checkpoint was made with {was!r}: samples were added, removed or "
            "changed. Put them back, start anew, or go on with --allow-data-change"
        )
    return was != fingerprint


def _refuse_other_model(checkpoint: Path, config: RunConfig) -> None:
    was = read_json(checkpoint / "config.json", "use an older checkpoint")
    for field in ("modality", "conditions", "method"):
        if found := first_difference(config.model().plain()[field], was.get(field), field):
            key, new, old = found
            raise ConfigError(f"{key}: {new!r}, but the checkpoint was made with {old!r}; keep it, or start anew")


def first_difference(new: Any, old: Any, key: str) -> tuple[str, Any, Any] | None:
    """Dotted key and both values of the first place where two plain trees differ."""
    if isinstance(new, dict) and isinstance(old, dict):
        for sub in new.keys() | old.keys():
            if found := first_difference(new.get(sub), old.get(sub), f"{key}.{sub}"):
                return found
        return None
    return None if new == old else (key, new, old)


def check_writable(folder: Path) -> None:
    """ConfigError unless files can be made in the folder, or in the nearest one above it that exists."""
    place = folder
    while not place.exists():
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "not a folder")
        tempfile.TemporaryFile(dir=place).close()  # its own name in every process
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None
