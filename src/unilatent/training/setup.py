"""What happens before the first step: checks, the model, and the run folder."""

from __future__ import annotations

import contextlib
import math
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..batches import Example, micro_batches, try_samples
from ..config import ConfigError
from ..devices import bf16_drawback
from ..files import expanded, write_json, write_text
from ..maths.streams import seed_of
from ..methods.base import LatentModel
from ..modalities.base import Dataset, Modality, Splits, Stream
from ..model_config import follow
from ..nets.layers import Repeated
from ..processes import Processes
from ..registry import find
from ..runs import checkpoint as ckpt
from ..runs import lock
from ..runs.journal import trim
from ..runs.snapshots import trim_snapshots
from ..sharding import shard, shards_of
from ..stored_latents import StoredLatents, read_header
from ..version import __version__
from .config import RunConfig, TrainingConfig
from .schedule import unreachable

UNTRAINED = 0.02
"""Share of untrained weights in the averaged ones at the end of a run, from which on it is pointed out."""
LOOKED_AT = 2000
"""Samples whose condition values are looked at before a run, without reading the samples."""
COMPILED_FROM = 100_000_000
"""Trainable parameters from which training.compile=auto compiles."""
GRAPHS = 64
"""Graphs that blocks of one class may have; torch's own limit is 8, and the levels of a U-ViT need more."""
EXAMPLES = 8
"""Samples that are read before anything is written."""


def count_samples(splits: Splits, training: TrainingConfig) -> float:
    """Training samples per epoch; infinite for a stream of unknown length, where nothing is given in epochs.

    ConfigError if there are none.
    """
    train = splits.train
    in_steps = training.epochs is None and training.schedule.unit == "steps"
    samples = math.inf if in_steps and isinstance(train, Stream) and train.size is None else len(train)
    if not samples:
        raise ConfigError("data.held_out: leaves nothing to train on; hold out fewer, e.g. data.held_out=0")
    return samples


def completed(config: RunConfig, splits: Splits, processes: Processes) -> RunConfig:
    """Fill in what the data and the method's other runs determine; the first process reads these for all."""
    if not processes.is_main:
        follow(config.conditions, splits)  # as `with_data` does
    return processes.from_main(lambda: config.with_data(splits).with_sources())


def check_processes(training: TrainingConfig, world: int) -> None:
    """ConfigError unless every process has samples in each step, and as many micro-batches as the others if sharded,
    over processes that can be divided so.

    Processes with different numbers of micro-batches would wait for each other's blocks for ever.
    """
    if training.batch_size < world:
        raise ConfigError(
            f"training.batch_size: {training.batch_size} is less than the {world} processes; "
            "it counts the samples of all of them together"
        )
    shards_of(training.shard, world)
    passes = {
        len(list(micro_batches(range(1), training.batch_size, training.micro_batch_size, rank, world)))
        for rank in range(world)
    }
    if training.shard and len(passes) > 1:
        raise ConfigError(
            f"training.batch_size: {training.batch_size} gives the {world} processes {min(passes)} to {max(passes)} "
            f"micro-batches, training.shard needs as many in each; make it a multiple of {world}: "
            f"training.batch_size={-(-training.batch_size // world) * world}"
        )


def check_latents(config: RunConfig) -> None:
    """ConfigError if `training.latents` is set and the run cannot be trained on stored latents."""
    if config.training.latents is None:
        return
    if not find("methods", config.method.name).trains_on_latents:
        raise ConfigError(
            f"training.latents: set, but {config.method.name} trains its own encoder, whose latents change; leave it "
            "out"
        )
    if config.given is not None:
        raise ConfigError("training.latents: set, but given parts are encoded in each step; leave it or given out")


def training_set(config: RunConfig, splits: Splits, modality: Modality, processes: Processes) -> Dataset:
    """Return what the steps of a run read: the training samples, or stored latents of them (`training.latents`).

    The first process checks the latents; ConfigError in all says why they are not those of this run.
    """
    check_latents(config)
    if config.training.latents is None:
        return splits.train
    folder, precision = expanded(config.training.latents), config.training.precision
    header = processes.from_main(lambda: read_header(folder, splits.train, modality, precision))
    return StoredLatents(folder, header, splits.train)


def read_examples(config: RunConfig, train: Dataset, modality: Modality, processes: Processes) -> list[Example]:
    """Read the run's first samples, in the first process, and the weights of its losses; missing data or weights fail
    here, before the run folder is created. Other processes return no sample."""
    modality.prepare(processes.device, processes)
    count, all_usable = min(config.training.batch_size, EXAMPLES), not config.training.bad_samples
    examples: list[Example] = []
    processes.on_main(lambda: examples.extend(try_samples(train, config.seed, count, all_usable)))
    return examples


def build_model(config: RunConfig, resumes: bool, sources: Any, processes: Processes, sharded: bool) -> LatentModel:
    """The model to train, initialised from the seed, the same in every process.

    resumes: whether a checkpoint's weights are loaded later, by `TrainingState.load`.
    sources: the method's configuration as the user gave it, which names other runs that weights are read from, by the
    first process. Then activation checkpointing, compilation and sharding are set up; none of them changes a name or a
    weight.
    """
    torch.manual_seed(seed_of("init", config.seed))
    model = LatentModel.build(config.model()).to(processes.device)
    model.conditions.prepare(processes)
    if not resumes:
        processes.on_main(lambda: model.load_sources(sources))
        processes.same_weights(model)
    for module in model.modules():
        if isinstance(module, Repeated):
            module.recompute = config.training.activation_checkpointing
    if compiles(config.training, model):
        compile_networks(model)
    if sharded:
        t = config.training
        shard(model, processes.device, t.shard, t.precision, processes.timeout)
    return model


def compiles(training: TrainingConfig, model: LatentModel) -> bool:
    """Whether a run compiles this model's networks."""
    if isinstance(training.compile, bool):
        return training.compile
    return model.device.type == "cuda" and model.num_trainable >= COMPILED_FROM and find_spec("triton") is not None


def compile_networks(model: LatentModel, backend: str = "inductor") -> None:
    """Compile the repeated blocks, each as one graph without breaks, and the networks of the loss.

    Blocks of one class share their graphs: one for each width, grid and presence of a mask. What else changes between
    steps, such as the number of samples or tokens, costs one more graph, in which it is a variable.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, Repeated):
            module.compile(fullgraph=True, backend=backend)
    model.modality.compiles_losses = True


def open_run_folder(out: Path, step: int, config: RunConfig, env: dict[str, Any], trains: bool = True) -> None:
    """Take the run folder's lock, write configuration and environment, and drop what later steps wrote.

    trains: whether steps are left; else a configuration that is there stays, which is that of the steps that were done.
    """
    for sub in ("samples", "recon", "checkpoints"):
        (out / sub).mkdir(parents=True, exist_ok=True)
    lock.take(out)
    ckpt.clean(out / "checkpoints", step)
    if trains or not (out / "config.yaml").is_file():
        write_text(out / "config.yaml", config.to_yaml())
        write_json(out / "env.json", env)
    for path in (out / "metrics.jsonl", out / "alarms.jsonl", *out.glob("bad_samples.rank*.jsonl")):
        trim(path, step)
    trim_snapshots(out, step)
    for path in (out / "eval").glob("step_*.json"):
        if path.stem[5:].isdigit() and int(path.stem[5:]) > step:
            path.unlink()


def environment(device: torch.device, processes: int, precision: str) -> dict[str, Any]:
    """Versions, platform, device, precision and command of a run."""
    import numpy
    import safetensors

    info: dict[str, Any] = {
        "unilatent": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "numpy": numpy.__version__, "safetensors": safetensors.__version__, "platform": platform.platform(),
        "device": str(device), "precision": precision, "threads": torch.get_num_threads(), "processes": processes,
        "command": sys.argv,
    }  # fmt: skip
    with contextlib.suppress(Exception):
        if device.type == "cuda":
            info["gpu"] = torch.cuda.get_device_name(device)
    return info


def notes(
    config: RunConfig, splits: Splits, model: LatentModel, steps: int, samples: float, world: int
) -> list[str]:  # fmt: skip
    """What somebody who starts this run should know, one line each."""
    t, facts = config.training, splits.train.facts
    lines = [
        f"{argument}, for instance: {'; '.join(names[:3])}" if fact == "examples" else
        f"{argument}: {len(names)} found in the data: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}"
        for argument, known in facts.items()
        for fact, names in known.items()
        if isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    ]  # fmt: skip
    lines += [
        f"note: {argument}: the data have them, but no condition of this model reads them"
        for argument in facts
        if argument not in model.conditions.arguments
    ]
    lines += [f"note: {line}" for line in splits.train.notes]
    for condition in model.conditions.all:
        values = splits.train.some_values(condition.argument, LOOKED_AT)
        lines += [f"note: {line}" for line in condition.remarks(values)]
    lines += [f"note: {line}" for line in unreachable(t.schedule, steps, samples / t.batch_size)]
    if t.ema_decay and 1 / (1 - t.ema_decay) > steps:
        lines.append(f"note: training.ema_decay {t.ema_decay} averages over more steps than the run has")
    elif (untrained := t.ema_decay**steps) > UNTRAINED:
        shorter = 1 - float(f"{10 / steps:.1g}")
        lines.append(
            f"note: training.ema_decay {t.ema_decay}: after {steps:,} steps {untrained:.0%} of the average are "
            f"untrained weights, which shows as noise; shorter: training.ema_decay={shorter:g}"
        )
    if t.best is not None and not (t.evaluate_samples and (t.evaluate_metrics or len(splits.held_out))):
        lines.append(
            "note: training.best does nothing without training.evaluate_samples and, unless training.evaluate_metrics "
            "names what is measured, data.held_out"
        )
    if t.evaluate_samples and t.evaluate_every > steps:
        lines.append(
            f"note: training.evaluate_every {t.evaluate_every:,} is more than the run's {steps:,} steps: it is "
            "evaluated at its end only"
        )
    if t.batch_size > samples:
        lines.append(f"note: training.batch_size {t.batch_size} is more than the {amount(samples)} training samples")
    if t.shard and world == 1:
        lines.append("note: training.shard does nothing in a single process; start several with torchrun")
    return lines


def slow(training: TrainingConfig, model: LatentModel) -> list[str]:
    """What makes a run slower than its user may expect, one line each."""
    lines = []
    if training.precision == "bf16" and (drawback := bf16_drawback(model.device)):
        lines.append(f"training.precision=bf16: {drawback}")
    if compiles(training, model):
        blocks = sum(isinstance(module, Repeated) for module in model.modules())
        lines.append(
            f"training.compile={str(training.compile).lower()}: the first step compiles {blocks} blocks, which takes "
            "minutes without any other output; training.compile=false starts at once"
        )
    return lines


def amount(samples: float) -> str:
    """A number of samples, in words."""
    return f"{samples:,}" if math.isfinite(samples) else "uncounted"
