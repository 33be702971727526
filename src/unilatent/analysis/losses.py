"""Training two losses together: whether their gradients agree, the error by noise level, and the course of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from ..files import read_json
from ..maths.streams import Streams
from ..methods.base import LatentModel
from ..runs.journal import read_lines
from ..training.measuring import Measurement
from ..types import Batch, count

LEVELS = tuple(i / 20 for i in range(1, 20))
"""Noise levels t at which the error of clean estimates is measured."""


@dataclass(frozen=True)
class GradientCosine:
    """The cosine between the gradients of two parts of the loss, over the weights that both reach.

    parts: their titles. mean, error: over batches, with the standard error. modules: by the first part of the weights'
    names (the networks). norms: of each part's gradient on those weights.
    """

    parts: tuple[str, str]
    mean: float
    error: float | None
    modules: dict[str, float]
    norms: tuple[float, float]


def gradient_cosines(model: LatentModel, batches: Iterable[Batch], seed: int = 0) -> list[GradientCosine]:
    """Compare the gradients of each pair of parts of the training loss, batch by batch, without changing the model.

    Without dropout, so that the same samples give the same numbers. Empty where all losses are one part.
    """
    found: dict[tuple[str, str], list[tuple[float, dict[str, float], tuple[float, float]]]] = {}
    was_training, done = model.training, 0
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    try:
        model.eval()
        for batch in batches:
            batch = batch.to(model.device, staying=model.conditions.on_cpu)
            streams = Streams(("gradients", seed), range(done, done + count(batch.data)), model.device)
            measured = Measurement(model, gradients=True)
            for part in model.loss(batch, streams):
                with measured.of(part):
                    part.value.backward()
                part.close()
            model.zero_grad(set_to_none=True)
            done += count(batch.data)
            for pair in combinations(measured.gradients, 2):
                a, b = (measured.gradients[title] for title in pair)
                if shared := [name for name in a if name in b]:
                    networks = dict.fromkeys(name.partition(".")[0] for name in shared)
                    by_network = {
                        network: _cosine(a, b, [name for name in shared if name.partition(".")[0] == network])[0]
                        for network in networks
                    }
                    cosine, norms = _cosine(a, b, shared)
                    found.setdefault(pair, []).append((cosine, by_network, norms))
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]
    return [_averaged(pair, rows) for pair, rows in found.items()]


def _cosine(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: Sequence[str]
) -> tuple[float, tuple[float, float]]:  # fmt: skip
    dot = sum(float((a[name].double() * b[name].double()).sum()) for name in names)
    norms = [sum(float(x[name].double().square().sum()) for name in names) ** 0.5 for x in (a, b)]
    return dot / (norms[0] * norms[1]) if min(norms) > 0 else float("nan"), (norms[0], norms[1])


def _averaged(
    pair: tuple[str, str], rows: list[tuple[float, dict[str, float], tuple[float, float]]]
) -> GradientCosine:  # fmt: skip
    cosines = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    error = float(cosines.std()) / len(rows) ** 0.5 if len(rows) > 1 else None
    modules = {key: sum(row[1][key] for row in rows) / len(rows) for key in rows[0][1]}
    norms = tuple(sum(row[2][i] for row in rows) / len(rows) for i in range(2))
    return GradientCosine(pair, float(cosines.mean()), error, modules, (norms[0], norms[1]))


@dataclass(frozen=True)
class ErrorByTime:
    """The relative squared error of clean estimates at noise levels t: mean |z - z_hat|^2 / mean |z - mean z|^2.

    conditional: with the samples' own condition values; None for an unconditional model.
    """

    times: tuple[float, ...]
    unconditional: list[float]
    conditional: list[float] | None


@torch.no_grad()
def error_by_time(model: LatentModel, batches: Iterable[Batch], seed: int = 0) -> ErrorByTime:
    """Denoise held-out latents at each level of LEVELS, with one draw of noise a sample."""
    sums = torch.zeros(2, len(LEVELS), dtype=torch.float64)
    squares, totals, values = 0.0, None, 0.0
    done, conditional = 0, len(model.conditions) > 0
    for batch in batches:
        batch = batch.to(model.device, staying=model.conditions.on_cpu)
        rows = range(done, done + count(batch.data))
        streams = Streams(("levels", seed), rows, model.device)
        layout = model.latent_layout(model.modality.pack(batch.data).layout.to(model.device))
        z = model.encode_clean(batch.data, streams).float()
        eps = model.latent_noise(streams, layout.num_tokens).to(z)
        known = all(argument in batch.values for argument in model.conditions.arguments)
        conditional = conditional and known
        kinds = [model.conditions.null(len(z)), *([model.conditions(batch.values)] if conditional else [])]
        for place, t in enumerate(LEVELS):
            for kind, cond in enumerate(kinds):
                error = layout.blank(model.denoise(model.path.add_noise(z, eps, t), t, cond, layout) - z)
                sums[kind, place] += float(error.double().square().sum())
        real = z.flatten(0, 1) if layout.mask is None else z[layout.mask]
        squares += float(real.double().square().sum())
        total = real.double().sum(0)
        totals = total if totals is None else totals + total
        values += len(real)
        done = rows.stop
    assert totals is not None
    spread = squares - float(totals.square().sum()) / values
    relative = (sums / max(spread, 1e-30)).tolist()
    return ErrorByTime(LEVELS, relative[0], relative[1] if conditional else None)


@dataclass(frozen=True)
class Course:
    """Numbers of a run by step: losses from metrics.jsonl, and numbers of its evaluations."""

    losses: dict[str, tuple[list[int], list[float]]]
    numbers: dict[str, tuple[list[int], list[float]]]


def course(run: Path) -> Course | None:
    """Read the losses and evaluations of a run, whatever was recorded; None if no losses were."""
    losses: dict[str, tuple[list[int], list[float]]] = {}
    path = run / "metrics.jsonl"
    for line in read_lines(path) if path.is_file() else ():
        for key, value in line.items():
            if key.startswith("loss/") and isinstance(value, int | float):
                steps, values = losses.setdefault(key.removeprefix("loss/"), ([], []))
                steps.append(line["step"])
                values.append(value)
    numbers: dict[str, tuple[list[int], list[float]]] = {}
    for file in sorted((run / "eval").glob("step_*.json")):
        content = read_json(file, "remove it; evaluating again writes it anew")
        step = int(file.stem.removeprefix("step_"))
        for number in content.get("numbers", ()):
            steps, values = numbers.setdefault(number["metric"], ([], []))
            steps.append(step)
            values.append(number["value"])
    return Course(losses, numbers) if losses else None
