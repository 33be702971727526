"""New samples and reconstructions from any model, through its verbs alone."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError
from .maths import times
from .maths.guidance import Denoise, classifier_free
from .maths.solvers import find_solver
from .maths.streams import Streams
from .methods.base import LatentModel, SamplingConfig
from .types import Conditioning, Layout, count, move, take

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Samples:
    """Samples `start` to `start + B` of a request: their data, condition values and latents (B, K, D).

    evaluations: how often the denoiser looked at each of them, and a decoder that takes steps.
    """

    start: int
    data: Any
    values: dict[str, Tensor]
    latents: Tensor
    evaluations: float

    @property
    def count(self) -> int:
        """B."""
        return len(self.latents)


def sample(
    model: LatentModel, num: int = 16, *, seed: int = 0, batch_size: int = 64, progress: Progress | None = None,
    **settings: Any,
) -> Any:  # fmt: skip
    """`num` new samples as data of the modality (pictures: (num, C, H, W) in [0, 1]), on the CPU.

    settings: condition values under their own keywords (`labels=[3]`, cycled up to `num`; left out: spread evenly over
    all there are), what guidance leads away from (`negative_prompts="..."`; left out: no condition), and any field of
    SamplingConfig (`solver`, `num_inference_steps`, `guidance_scale`, `guidance_interval`, `guidance_norm`,
    `time_shift`); what is left out is the model's own setting. Of systems of atoms also `num_atoms`, a number or a
    range, in place of drawing it as training systems have it.
    Sample i is a function of (model, seed, i, its condition): neither `num` nor `batch_size` changes it.
    """
    parts = list(sample_batches(model, num, seed=seed, batch_size=batch_size, progress=progress, **settings))
    return model.modality.join([part.data for part in parts])


@torch.no_grad()
def sample_batches(
    model: LatentModel, num: int, *, seed: int = 0, batch_size: int = 64, start: int = 0, stop: int | None = None,
    progress: Progress | None = None, **settings: Any,
) -> Iterator[Samples]:  # fmt: skip
    """The same, batch by batch from sample `start` up to `stop` (None: `num`); memory does not grow with `num`."""
    num, batch_size, start = whole("num", num, 1), whole("batch_size", batch_size, 1), whole("start", start, 0)
    seed = whole("seed", seed, 0)
    chosen, given = split_settings(model.config.sampling, settings)
    of_layout = {key: given.pop(key) for key in list(given) if key in model.modality.layout_arguments}
    values = model.conditions.parse(num, given)
    layouts = model.modality.parse_layout(num, of_layout)
    stop = num if stop is None else min(stop, num)
    for first in range(start, stop, batch_size):
        rows = range(first, min(first + batch_size, stop))
        own = {key: value[rows.start : rows.stop].to(model.device) for key, value in values.items()}
        streams = Streams(("sample", seed, i) for i in rows)
        asked = {key: value[rows.start : rows.stop].to(model.device) for key, value in layouts.items()}
        layout = model.modality.sample_layout(streams, {**own, **asked}).to(model.device)
        latents, evaluations = sample_latents(model, own, layout, streams, chosen)
        with decoder_rows(model) as decoded:
            data = move(model.decode(latents, layout, seed=seed, start=first, settings=chosen), "cpu")
        evaluations += decoded["rows"] / len(latents)
        yield Samples(first, data, move(own, "cpu"), latents.cpu(), evaluations)
        if progress:
            progress(len(rows))


def sample_latents(
    model: LatentModel, values: dict[str, Tensor], layout: Layout, streams: Streams, settings: SamplingConfig
) -> tuple[Tensor, float]:
    """Latents (B, K, D) integrated from each stream's noise, zeros at padding, and how often the denoiser looked at
    each of them.

    layout: of the data tokens.
    """
    latent_layout = model.latent_layout(layout)
    n = len(streams)
    cond = model.conditions(values) if values else model.conditions.null(n)
    seen = Counter[str]()
    null = model.conditions.null(n, values)
    denoise = guided_denoiser(model, cond, null, latent_layout, settings, seen)
    grid = times.grid(settings.num_inference_steps, settings.time_shift)

    def noise() -> Tensor:
        """Drawn for the largest K, so that padding moves none of it."""
        drawn = streams.normal(model.max_latents, model.latent_channels)
        return drawn[:, : latent_layout.num_tokens].to(model.device)

    latents = find_solver(settings.solver)(denoise, noise(), grid, model.path, noise)
    return latent_layout.blank(latents), seen["rows"] / n


def guided_denoiser(
    model: LatentModel, cond: Conditioning, null: Conditioning, layout: Layout, settings: SamplingConfig,
    seen: Counter[str],
) -> Denoise:  # fmt: skip
    """denoise(z, t) under the settings' guidance, away from `null`; `seen` counts the rows that went through the
    network."""
    raw_first = settings.guidance_norm == "guidance_first"
    n = len(cond)
    layouts = {n: layout, 2 * n: layout.repeat(2)}

    def denoise(z: Tensor, t: float, cond: Conditioning) -> Tensor:
        seen["rows"] += len(z)
        return model.denoise(z, t, cond, layouts[len(z)], finish=not raw_first)

    return classifier_free(
        denoise,
        cond,
        null,
        settings.guidance_scale if len(model.conditions) else 1.0,
        settings.guidance_interval,
        model.finish_latents if raw_first else None,
    )


@contextmanager
def decoder_rows(model: LatentModel) -> Iterator[Counter[str]]:
    """Counts, as `rows`, how many samples a decoder that takes steps was asked about meanwhile."""
    seen = Counter[str]()

    def count_rows(_: nn.Module, arguments: tuple[Any, ...], __: object) -> None:
        seen["rows"] += len(arguments[0])

    decoder = model.stepped_decoder
    hook = decoder.register_forward_hook(count_rows) if decoder is not None else None
    try:
        yield seen
    finally:
        if hook is not None:
            hook.remove()


@torch.no_grad()
def reconstruct(
    model: LatentModel, data: Any, *, seed: int = 0, batch_size: int = 64, start: int = 0,
    decoder_solver: str | None = None, decoder_steps: int | None = None,
) -> Any:  # fmt: skip
    """Data through `encode` and `decode` in its own layout, on the CPU; `start` is the index of its first sample.

    decoder_solver, decoder_steps: of a decoder that takes steps; None is the model's own.
    """
    data, parts, seed = model.modality.check(data), [], whole("seed", seed, 0)
    own = {"decoder_solver": decoder_solver, "decoder_steps": decoder_steps}
    chosen, _ = split_settings(model.config.sampling, own)
    for first in range(0, count(data), whole("batch_size", batch_size, 1)):
        batch = take(data, slice(first, first + batch_size))
        latents = model.encode(batch, seed=seed, start=start + first)
        layout = model.modality.pack(batch).layout
        made = model.decode(latents, layout, seed=seed, start=start + first, settings=chosen)
        parts.append(move(made, "cpu"))
    return model.modality.join(parts)


def encode(model: LatentModel, data: Any, *, seed: int = 0, batch_size: int = 64) -> Tensor:
    """Data to latents (B, K, D) in batches, on the CPU."""
    data, seed = model.modality.check(data), whole("seed", seed, 0)
    parts = range(0, count(data), whole("batch_size", batch_size, 1))
    return torch.cat([model.encode(take(data, slice(i, i + batch_size)), seed=seed, start=i).cpu() for i in parts])


def decode(
    model: LatentModel, latents: Tensor, *, seed: int = 0, batch_size: int = 64, decoder_solver: str | None = None,
    decoder_steps: int | None = None,
) -> Any:  # fmt: skip
    """Latents (B, K, D) to data in batches, on the CPU; the decoder's settings as in `reconstruct`."""
    own = {"decoder_solver": decoder_solver, "decoder_steps": decoder_steps}
    chosen, _ = split_settings(model.config.sampling, own)
    seed, size = whole("seed", seed, 0), whole("batch_size", batch_size, 1)
    if not isinstance(latents, Tensor) or not latents.ndim or not len(latents):
        return model.decode(latents, seed=seed)  # which says what is wrong with them
    parts = range(0, len(latents), size)
    made = (model.decode(latents[i : i + size], seed=seed, start=i, settings=chosen) for i in parts)
    return model.modality.join([move(part, "cpu") for part in made])


def whole(name: str, value: Any, least: int) -> int:
    """A whole number from `least` up; numpy's count, which would otherwise seed other streams. ValueError names it."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r} is not a whole number; give {least} or more") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}: {value} must be at least {least}")
    return number


def split_settings(defaults: SamplingConfig, settings: dict[str, Any]) -> tuple[SamplingConfig, dict[str, Any]]:
    """Sampling settings over their defaults (None leaves the default), and what else was given."""
    fields = SamplingConfig.model_fields
    own = {key: value for key, value in settings.items() if key in fields and value is not None}
    rest = {key: value for key, value in settings.items() if key not in fields}
    try:
        return SamplingConfig.parse({**defaults.plain(), **own}), rest
    except ConfigError as error:
        raise ValueError(str(error)) from None
