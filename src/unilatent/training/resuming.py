"""Which checkpoint a run resumes from, and whether that belongs to this run. Nothing is written here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..config import ConfigError, flat, read_yaml
from ..files import check_writable, expanded, read_json
from ..listings import LISTING
from ..modalities.base import Modality, Splits
from ..model_config import follow
from ..model_folder import CONFIG, WEIGHTS
from ..outputs import refuse_foreign
from ..plain_text import count_of
from ..processes import Processes
from ..runs import checkpoint as ckpt
from ..runs import lock
from .config import RunConfig, TrainingConfig

LIKE = "a folder like RUN/checkpoints/step_00001000"


def find_checkpoint(out: Path, resume: str | None, processes: Processes, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that a Trainer's `resume` names, the same in all processes; None to start from scratch.

    The first process, which also holds the run's lock, searches for all. ConfigError says why there is none.
    """
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
    check_writable(out)
    folder = out / "checkpoints"
    lock.refuse_second(out)
    _refuse_files_of_others(out)
    if resume is None:
        if (out / "config.yaml").exists():
            raise ConfigError(f"--out {out}: holds a run already; add --resume auto, or choose another folder")
        return None
    if resume != "auto":
        chosen = expanded(resume)
        _refuse_no_checkpoint(chosen)
        ckpt.verify(chosen)
        is_own = chosen.resolve().parent == folder.resolve()
        if (out / "config.yaml").exists() and not is_own:
            raise ConfigError(f"--out {out}: holds another run; choose another --out to resume from {resume}")
        return chosen
    ckpt.restore(folder)
    checkpoint, skipped = ckpt.newest(folder)
    for line in skipped:
        say(f"skipped: {line}")
    if checkpoint is None and skipped:
        raise ConfigError(f"--resume auto: no valid checkpoint is left in {folder}; start again in another folder")
    return checkpoint


def _refuse_no_checkpoint(chosen: Path) -> None:
    """ConfigError says what is given in place of a checkpoint: a run, its checkpoints, a model, a file, or something
    else. A checkpoint that is missing or damaged passes: `verify` names its fault."""
    given = f"--resume {chosen}"
    if chosen.is_file():
        folder = f"; give its folder, {chosen.parent}" if ckpt.is_checkpoint(chosen.parent) else f"; give {LIKE}"
        raise ConfigError(f"{given}: is a file, a checkpoint is a folder{folder}")
    if not chosen.is_dir() or ckpt.is_checkpoint(chosen) or chosen.name.startswith("step_"):
        return
    if (chosen / "checkpoints").is_dir() or (chosen / "config.yaml").is_file():
        raise ConfigError(f"{given}: is a run folder, not a checkpoint; {_ways_from(chosen)}")
    if chosen.name == "checkpoints":
        raise ConfigError(f"{given}: is a folder of checkpoints, not one of them; {_ways_from(chosen.parent)}")
    if (chosen / CONFIG).is_file() or (chosen / WEIGHTS).is_file():
        of_run = (chosen.parent / "checkpoints").is_dir()
        ways = _ways_from(chosen.parent) if of_run else f"give {LIKE} of the run that made it"
        raise ConfigError(f"{given}: is a model without the optimiser state that training continues with; {ways}")
    raise ConfigError(f"{given}: neither a checkpoint nor a run; give {LIKE}")


def _ways_from(run: Path) -> str:
    """How to continue a run, and how to start another one from it."""
    newest = ckpt.newest_complete(run / "checkpoints")
    if newest is None:
        return "it has no checkpoint yet; train it again in another folder"
    done = int(newest.name[5:])
    finished = f" with more training.steps than its {done:,}, since it is finished" if (run / "model").is_dir() else ""
    return f"to continue that run: --out {run} --resume auto{finished}; to start another run from it: --resume {newest}"


def refuse_fewer_steps(checkpoint: Path, done: int, steps: int, training: TrainingConfig) -> None:
    """ConfigError if a checkpoint has more steps than the run is to have; it names the model that is there."""
    if done <= steps:
        return
    field = f"training.steps: {steps:,}"
    if training.epochs is not None:
        field = f"training.epochs: {training.epochs:g}, which {'is' if steps == 1 else 'are'} {count_of(steps, 'step')}"
    run = checkpoint.parent.parent
    is_last = ckpt.newest_complete(checkpoint.parent) == checkpoint and (run / "model").is_dir()
    raise ConfigError(
        f"{field}, but {checkpoint} has {count_of(done, 'step')}: nothing is left to train; its model is in "
        f"{run / 'model' if is_last else checkpoint}. To train on, give more than {done:,} steps; to train again with "
        "fewer, choose another --out without --resume"
    )


CHANGEABLE = ("optimizer", "schedule", "gradient_clip", "ema_decay", "non_finite", "precision")
"""Settings of training that may change when a run resumes, and change where it goes."""


def changed_settings(checkpoint: Path, training: TrainingConfig, automatic: bool) -> list[str]:
    """Return a line for each setting in `CHANGEABLE` that differs from that of the run which wrote the checkpoint.

    automatic: whether the precision is not the user's choice.
    """
    stored, lines = _stored_settings(checkpoint), []
    for name in CHANGEABLE:
        new, old = (tree.get(name, MISSING) for tree in (training.plain(), stored))
        sub = isinstance(new, dict) and isinstance(old, dict)
        pairs = {f"{name}.{key}": (new[key], old.get(key, MISSING)) for key in new} if sub else {name: (new, old)}
        lines += [
            f"training.{field}: {_shown(then)} in the checkpoint's run, {_shown(now)} now"
            for field, (now, then) in pairs.items()
            if then is not MISSING and now != then
        ]
    if automatic:
        kept = f"auto gives that here; training.precision={stored.get('precision')} keeps it"
        lines = [f"{line}: {kept}" if line.startswith("training.precision:") else line for line in lines]
    return lines


def stored_precision(checkpoint: Path) -> str | None:
    """Return what the run that wrote a checkpoint computed in, "fp32" or "bf16"; None if it does not say."""
    stored = _stored_settings(checkpoint).get("precision")
    return stored if stored in ("fp32", "bf16") else None


def _stored_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings of training of the run that wrote a checkpoint; of an earlier version, what its folder has."""
    stored = read_json(checkpoint / "state.json", "use an older checkpoint").get("training")
    return stored if isinstance(stored, dict) else _settings_of(checkpoint.parent.parent / "config.yaml")


AT_THE_END = re.compile(
    r"sampling\..+|training\.(evaluate_(samples|metrics|reference)|best|sample_every|num_samples|precision|device|"
    r"threads|loggers|wandb_\w+)"
)
"""Settings that what is done after the last step depends on."""
UNCOMPARED = ("training.steps", "training.epochs", "preset", "method.tokenizer")
"""Settings that may be written in several ways."""


def settings_without_effect(run: Path, config: RunConfig) -> list[str]:
    """Return a line for each setting that differs from those of a complete run, whose config.yaml stays."""
    try:
        stored = flat(read_yaml(run / "config.yaml"))
    except ConfigError:  # there is none, or it is damaged
        return []
    return [
        f"{key}: {_shown(stored[key])} in the run, {_shown(value)} now: "
        + (
            "used from now on, config.yaml keeps the first" if AT_THE_END.fullmatch(key) else
            "no effect, since the run is complete; to train with it, choose another --out, or give more training.steps"
        )
        for key, value in flat(config.plain()).items()
        if key in stored and stored[key] != value and key not in UNCOMPARED
    ]  # fmt: skip


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()
"""In place of the value of a setting that is not there."""


def _settings_of(config: Path) -> dict[str, Any]:
    """The settings of training in a run's config.yaml; empty if it cannot be read."""
    try:
        training = read_yaml(config).get("training")
    except ConfigError:
        return {}
    return training if isinstance(training, dict) else {}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


WRITTEN = ("config.yaml", "env.json", "metrics.jsonl", "alarms.jsonl", "model", "best", "eval", "ema",
           "samples", "recon", "checkpoints", LISTING)  # fmt: skip
"""What a run replaces or removes in its folder."""


def _refuse_files_of_others(out: Path) -> None:
    """ValueError if a folder that holds no run has files of others, first of all those that a run would replace."""
    if _is_run(out):
        return
    found = [
        name for name in WRITTEN
        if (path := out / name).is_file() or any(inside.is_file() for inside in path.rglob("*"))
    ]  # fmt: skip
    if found:
        raise ConfigError(
            f"--out {out}: holds {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}, which no run wrote there; "
            "choose another folder, or move them away"
        )
    first = out / "tokenizer"  # the first of two stages
    # Of these only devices and empty folders are left.
    own = (*WRITTEN, lock.LOCK, *(["tokenizer"] if _is_run(first) else []))
    refuse_foreign(out, "a run", lambda name: name.partition("/")[0] in own)


def _is_run(out: Path) -> bool:
    """Whether a folder has a checkpoint of a run, or its configuration next to what only a run writes: people keep
    configurations of their own in folders."""
    if any((path / ckpt.MANIFEST).is_file() for path in ckpt.published(out / "checkpoints")):
        return True
    if not any((out / name).is_file() for name in ("env.json", lock.LOCK)):
        return False
    try:
        return {"modality", "method", "data", "training"} <= read_yaml(out / "config.yaml").keys()
    except ConfigError:
        return False


def keep_stored(
    checkpoint: Path, modality: Modality, config: RunConfig, splits: Splits, processes: Processes
) -> RunConfig:  # fmt: skip
    """Return the configuration, and renumber the data, with what the checkpoint stores where data determine it or leave
    a choice: the statistics of the modality, and the order of classes. The first process reads it for all.

    modality: that of the configuration before the data completed it. A model keeps what it began with, so that changed
    data are told as such, and may be used.
    """
    model = processes.from_main(lambda: read_json(checkpoint / "config.json", "use an older checkpoint"))
    stored = facts if isinstance(facts := model.get("conditions"), dict) else {}
    kept = {
        name: condition.keeping(facts) if isinstance(facts := stored.get(name), dict) else condition
        for name, condition in config.conditions.items()
    }
    follow(kept, splits)
    facts = model.get("modality")
    fitted = config.modality if not isinstance(facts, dict) else modality.keeping(config.modality, facts)
    return config.model_copy(update={"conditions": kept, "modality": fitted})


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
        before = (state.get("training") or {}).get("latents")
        if before != training.latents:
            raise ConfigError(
                f"training.latents: {training.latents!r}, but the checkpoint has {before!r}; keep it, "
                "or start a new run"
            )
        if difference := _changed_selection(checkpoint, config):
            key, new, old = difference
            raise ConfigError(
                f"{key}: {new!r}, but the run had {old!r}, and other samples are trained on; keep it, start a new run, "
                "or resume with --allow-data-change"
            )
        raise ConfigError(
            f"data: {fingerprint!r}, but the checkpoint has {stored!r}: samples were added, removed or changed. "
            "Restore them, start a new run, or resume with --allow-data-change"
        )
    return stored != fingerprint


def _changed_selection(checkpoint: Path, config: RunConfig) -> tuple[str, Any, Any] | None:
    """Return the first setting of the data that is not as in the run's folder, and may select other samples."""
    try:
        before = read_yaml(checkpoint.parent.parent / "config.yaml").get("data")
    except ConfigError:
        return None
    if not isinstance(before, dict):
        return None
    found = differences(config.plain()["data"], before, "data")
    return next((each for each in found if each[0] != "data.cache" and MISSING not in each[1:]), None)


def _refuse_other_model(checkpoint: Path, config: RunConfig) -> None:
    stored = read_json(checkpoint / "config.json", "use an older checkpoint")
    for field in ("modality", "conditions", "method"):
        if difference := first_difference(config.model().plain()[field], stored.get(field), field):
            key, new, old = difference
            raise ConfigError(f"{key}: {new!r}, but the checkpoint has {old!r}; keep it, or start a new run")


def refuse_other_settings(
    config: RunConfig, folder: Path, counts: Callable[[str], bool], prefix: str = ""
) -> None:  # fmt: skip
    """ConfigError names the first setting in which the run of a folder was trained otherwise than `config`.

    counts: whether a difference in a setting, by its dotted key, counts. Settings that are null here do not, since they
    are found when training starts. prefix: of the key in the message.
    """
    trained = type(config).parse(read_yaml(folder / "config.yaml"))
    for key, new, old in differences(config.resolved().plain(), trained.plain()):
        if counts(key) and not (new is None and "." in key):  # of a whole part, null means none
            raise ConfigError(
                f"{prefix}{key}: {new!r}, but {folder} was trained with {old!r}; keep it, choose another --out, or "
                "delete that folder"
            )


def differences(new: Any, old: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key and both values of each difference between two plain trees; MISSING where one has none."""
    if isinstance(new, dict) and isinstance(old, dict):
        for sub in [*new, *(sub for sub in old if sub not in new)]:
            yield from differences(new.get(sub, MISSING), old.get(sub, MISSING), f"{key}.{sub}" if key else sub)
    elif new != old:
        yield key, new, old


def first_difference(new: Any, old: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Return the first of `differences`, None if the trees are equal."""
    return next(differences(new, old, key), None)
