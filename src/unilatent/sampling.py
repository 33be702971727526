"""Sample, reconstruct, encode and decode with any model, through `encode`, `decode` and `denoise` alone."""

from __future__ import annotations

import difflib
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .conditions.base import NEGATIVE
from .config import ConfigError
from .devices import autocast, resolve_precision
from .maths import times
from .maths.guidance import Denoise, classifier_free
from .maths.solvers import ending_clean, find_solver, restarting
from .maths.streams import Streams, seed_of
from .methods.base import LatentModel
from .model_config import SamplingConfig
from .registry import available, find
from .types import Conditioning, Given, Layout, count, move, refuse_unused, take

Watch = Callable[[float, Tensor], None]
"""Called after each evaluation of the denoiser with its time t and clean estimate (B, K, D), on the model's device."""


@dataclass(frozen=True)
class SampleBatch:
    """Samples `start` to `start + B` of a request: their data, condition values and latents (B, K, D).

    evaluations: network evaluations per sample, of the denoiser and of a diffusion decoder. layout: of the data tokens,
    on the CPU; of longer samples than the model's own, that of the first window.
    """

    start: int
    data: Any
    values: dict[str, Tensor]
    latents: Tensor
    evaluations: float
    layout: Layout

    @property
    def count(self) -> int:
        """B."""
        return len(self.latents)


def sample(
    model: LatentModel, num: int = 16, *, seed: int = 0, batch_size: int = 64, precision: str = "auto",
    progress: Callable[[int], None] | None = None, given: Given | None = None, length: int | None = None,
    overlap: int | None = None, watch: Watch | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """Return `num` new samples in the modality's format (images: (num, C, H, W) in [0, 1]), on the CPU.

    precision: "fp32", "bf16" (autocast inside the networks), or "auto": what the model was trained in, or fp32 where
        the hardware does not multiply bf16; autocast that is on already stays on.
    progress: called after each batch with its number of samples.
    given: parts of at most `num` samples, fewer are cycled, which the model completes: a mask says where data are given
        (images: (B, 1, H, W)), and samples have them unchanged. For a model that was trained with given parts.
    length, overlap: for samples longer than the model's own, in frames: windows are made one after the other, each of
        which is given the last `overlap` of what is there.
    watch: called after each evaluation of the denoiser with its time and its clean estimate of the batch's latents. An
        exception that it raises ends the sampling.
    settings:
        condition values by keyword (`labels=[3]`), at most `num`, fewer are cycled; default: spread evenly over all;
        negative conditions of guidance (`negative_prompts="..."`); default: no condition;
        any field of SamplingConfig (`num_inference_steps`, `guidance_scale`, ...); default: the model's own setting;
        for systems of atoms `num_atoms`, a number or a range; default: drawn from the sizes of training systems.

    Sample i is a function of (model, seed, i, its condition): neither `num` nor `batch_size` changes it. Of a model in
    another type (`model.half()`, `dtype=torch.bfloat16`), samples are float32 all the same.
    ValueError names a keyword that is none, and the nearest one.
    """
    batches = sample_batches(
        model, num, seed=seed, batch_size=batch_size, precision=precision, progress=progress, all_used=True,
        given=given, length=length, overlap=overlap, watch=watch, **settings,
    )  # fmt: skip
    parts = list(batches)
    return model.modality.join([part.data for part in parts])


@torch.no_grad()
def sample_batches(
    model: LatentModel, num: int, *, seed: int = 0, batch_size: int = 64, start: int = 0, stop: int | None = None,
    precision: str = "auto", progress: Callable[[int], None] | None = None, all_used: bool = False,
    to: torch.device | str = "cpu", given: Given | None = None, length: int | None = None,
    overlap: int | None = None, watch: Watch | None = None, **settings: Any,
) -> Iterator[SampleBatch]:  # fmt: skip
    """Yield samples as `sample` does, in batches from sample `start` up to `stop` (None: `num`).

    all_used: refuse more condition values than samples; else the first ones are used. to: where the data are returned;
    everything else is on the CPU.
    Memory does not grow with `num`.
    """
    _check_weights(model)
    num, start = checked_int("num", num, 1), checked_int("start", start, 0)
    batch_size, seed = checked_int("batch_size", batch_size, 1), checked_int("seed", seed, 0)
    sampling, arguments = split_settings(model.config.sampling, settings)
    layout_arguments = {key: arguments.pop(key) for key in list(arguments) if key in model.modality.layout_arguments}
    _refuse_unknown(model, [key for key, value in arguments.items() if value is not None])
    given = check_given(model, given, num)
    if length is not None:
        refuse_given(model)
        model.modality.check_length(length, overlap)
    all_values = model.conditions.parse(num, arguments, all_used)
    all_layout_values = model.modality.parse_layout(num, layout_arguments)
    stop = num if stop is None else min(stop, num)
    for first in range(start, stop, batch_size):
        rows = range(first, min(first + batch_size, stop))
        part = None if given is None else given.rows(torch.arange(rows.start, rows.stop) % len(given))
        at = slice(rows.start, rows.stop)
        values, layout_values = take(all_values, at), take(all_layout_values, at)
        batch = sample_rows(model, rows, values, sampling, seed, precision, to, part, layout_values, watch)
        if length is not None:
            batch = _lengthened(model, batch, sampling, seed, precision, to, length, overlap, watch)
        yield batch
        if progress:
            progress(len(rows))


@torch.no_grad()
def sample_rows(
    model: LatentModel, rows: range, values: dict[str, Tensor], sampling: SamplingConfig, seed: int, precision: str,
    to: torch.device | str = "cpu", given: Given | None = None, layout_values: dict[str, Tensor] | None = None,
    watch: Watch | None = None,
) -> SampleBatch:  # fmt: skip
    """Return samples number `rows` of a seed with these condition values, in one batch; values of no condition of the
    model are left out.

    given: parts of each of them. layout_values: what `Modality.parse_layout` returned for them. watch: as for `sample`.
    """
    known_to_model = {key for name in model.conditions.arguments for key in (name, NEGATIVE + name)}
    values = move({key: value for key, value in values.items() if key in known_to_model}, model.device)
    layout_values = move(layout_values or {}, model.device)
    part = None if given is None else given.to(model.device)
    streams, encoded = (Streams((key, seed), rows, model.device) for key in ("sample", "given"))
    layout = model.modality.sample_layout(streams, {**values, **layout_values}).to(model.device)
    with computing(model, precision), decoder_rows(model) as decoded:
        known = model.known_latents(part, encoded)
        latents, evaluations = sample_latents(model, values, layout, streams, sampling, known, watch)
        data = model.decode(latents, layout, seed=seed, start=rows.start, settings=sampling, given=part)
    evaluations += decoded["rows"] / len(latents)
    return SampleBatch(rows.start, move(data, to), move(values, "cpu"), latents.cpu(), evaluations, layout.to("cpu"))


def _lengthened(
    model: LatentModel, batch: SampleBatch, sampling: SamplingConfig, seed: int, precision: str,
    to: torch.device | str, length: int, overlap: int | None, watch: Watch | None = None,
) -> SampleBatch:  # fmt: skip
    """Return samples of this length, which begin with those of the batch."""
    assert overlap is not None
    rows, evaluations = range(batch.start, batch.start + batch.count), batch.evaluations

    def complete(given: Given, window: int) -> Any:
        nonlocal evaluations
        known = check_given(model, given, batch.count)
        seed_of_window = seed_of("window", seed, window)
        more = sample_rows(model, rows, batch.values, sampling, seed_of_window, precision, to, known, watch=watch)
        evaluations += more.evaluations
        return more.data

    data = model.modality.lengthen(batch.data, length, overlap, complete)
    return replace(batch, data=data, evaluations=evaluations)


def check_given(model: LatentModel, given: Given | None, num: int) -> Given | None:
    """ValueError unless these parts can be given to the model, and a sample uses each."""
    if given is None:
        return None
    refuse_given(model)
    refuse_unused("given", len(given), num)
    return model.modality.check_given(given)


def refuse_given(model: LatentModel | None) -> None:
    """ValueError if the model cannot be given parts of samples, or there is none."""
    if model is None or model.config.given is None:
        raise ValueError(
            "given: this model was trained on whole samples only; train one with `unilatent train ... given={}`"
        )


def computing(model: LatentModel, precision: str) -> AbstractContextManager[object]:
    """Return the context that a model computes in; precision as for `sample`.

    With "auto", a model whose weights were loaded in another type than float32 computes in that type.
    """
    if precision == "auto" and (model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)):
        return nullcontext()
    return autocast(model.device, resolve_precision(precision, model.device, model.precision))


def sample_latents(
    model: LatentModel, values: dict[str, Tensor], layout: Layout, streams: Streams, settings: SamplingConfig,
    known: Tensor | None = None, watch: Watch | None = None,
) -> tuple[Tensor, float]:  # fmt: skip
    """Integrate latents (B, K, D) from each stream's noise; zeros at padding. Also return the evaluations of the
    denoiser per sample.

    layout: of the data tokens. known: `LatentModel.known_latents` of what is given of the samples. watch: as for
    `sample`; its estimates are zeros at padding too.
    """
    latent_layout = model.latent_layout(layout)
    n = len(streams)
    cond = (model.conditions(values) if values else model.conditions.null(n)).given(known)
    null = model.conditions.null(n, values).given(known)
    evaluated = Counter[str]()
    denoise = guided_denoiser(model, cond, null, latent_layout, settings, evaluated)
    denoise = denoise if watch is None else _watched(denoise, watch, latent_layout)
    grid = times.grid(settings.num_inference_steps, settings.time_shift)

    def noise() -> Tensor:
        return model.latent_noise(streams, latent_layout.num_tokens).to(model.device)

    solver = find_solver(settings.solver)
    if settings.restarts:
        solver = restarting(solver, settings.restarts, settings.restart_interval)
    solver = ending_clean(solver) if settings.denoise_to_zero else solver
    latents = solver(denoise, noise(), grid, model.path, noise)
    return latent_layout.blank(latents), evaluated["rows"] / n


def _watched(denoise: Denoise, watch: Watch, layout: Layout) -> Denoise:
    """Return the denoiser, whose estimates `watch` sees."""

    def watched(z: Tensor, t: float) -> Tensor:
        estimate = denoise(z, t)
        watch(t, layout.blank(estimate))
        return estimate

    return watched


def guided_denoiser(
    model: LatentModel, cond: Conditioning, null: Conditioning, layout: Layout, settings: SamplingConfig,
    evaluated: Counter[str],
) -> Denoise:  # fmt: skip
    """Return denoise(z, t) with classifier-free guidance away from `null`.

    evaluated: `rows` counts the rows that pass through the network.
    """
    raw_first = settings.guidance_norm == "guidance_first"
    n = len(cond)
    layouts = {n: layout, 2 * n: layout.repeat(2)}

    def denoise(z: Tensor, t: float, cond: Conditioning) -> Tensor:
        evaluated["rows"] += len(z)
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
    """Count, as `rows`, the rows that pass through a diffusion decoder inside this context."""
    evaluated = Counter[str]()

    def count_rows(_: nn.Module, arguments: tuple[Any, ...], __: object) -> None:
        evaluated["rows"] += len(arguments[0])

    decoder = model.stepped_decoder
    hook = decoder.register_forward_hook(count_rows) if decoder is not None else None
    try:
        yield evaluated
    finally:
        if hook is not None:
            hook.remove()


@torch.no_grad()
def reconstruct(
    model: LatentModel, data: Any, *, seed: int = 0, batch_size: int = 64, start: int = 0,
    precision: str = "auto", decoder_solver: str | None = None, decoder_steps: int | None = None,
) -> Any:  # fmt: skip
    """Encode and decode data with its own layout; float32 on the CPU, whatever type the model has.

    start: index of the first sample, which its noise depends on. precision: as for `sample`.
    decoder_solver, decoder_steps: of a diffusion decoder; None takes the model's own.
    """
    _check_weights(model)
    data, seed = model.modality.check(data), checked_int("seed", seed, 0)
    settings = _decoder_settings(model, decoder_solver, decoder_steps)
    parts = []
    for first in range(0, count(data), checked_int("batch_size", batch_size, 1)):
        batch = take(data, slice(first, first + batch_size))
        with computing(model, precision):
            latents = model.encode(batch, seed=seed, start=start + first)
            layout = model.modality.pack(batch).layout
            decoded = model.decode(latents, layout, seed=seed, start=start + first, settings=settings)
        parts.append(move(decoded, "cpu"))
    return model.modality.join(parts)


def encode(
    model: LatentModel, data: Any, *, seed: int = 0, batch_size: int = 64, precision: str = "auto"
) -> Tensor:  # fmt: skip
    """Encode data to latents (B, K, D) in batches; float32 on the CPU, whatever type the model has.

    precision: as for `sample`.
    """
    _check_weights(model)
    data, seed = model.modality.check(data), checked_int("seed", seed, 0)
    starts = range(0, count(data), checked_int("batch_size", batch_size, 1))
    with computing(model, precision):
        parts = [model.encode(take(data, slice(i, i + batch_size)), seed=seed, start=i).cpu() for i in starts]
    return torch.cat(parts)


def decode(
    model: LatentModel, latents: Tensor, *, seed: int = 0, batch_size: int = 64, precision: str = "auto",
    decoder_solver: str | None = None, decoder_steps: int | None = None,
) -> Any:  # fmt: skip
    """Decode latents (B, K, D) to data in batches; float32 on the CPU, whatever type the model has.

    precision and decoder settings as in `reconstruct`.
    """
    _check_weights(model)
    settings = _decoder_settings(model, decoder_solver, decoder_steps)
    seed, size = checked_int("seed", seed, 0), checked_int("batch_size", batch_size, 1)
    if not isinstance(latents, Tensor) or not latents.ndim or not len(latents):
        return model.decode(latents, seed=seed)  # raises the error that names the fault
    starts = range(0, len(latents), size)
    with computing(model, precision):
        parts = [
            move(model.decode(latents[i : i + size], seed=seed, start=i, settings=settings), "cpu") for i in starts
        ]
    return model.modality.join(parts)


OTHER_NAMES = {
    "n": "num", "num_samples": "num", "num_images": "num", "num_images_per_prompt": "num", "count": "num",
    "steps": "num_inference_steps", "num_steps": "num_inference_steps", "sampling_steps": "num_inference_steps",
    "guidance": "guidance_scale", "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "scale": "guidance_scale",
    "interval": "guidance_interval", "sampler": "solver", "scheduler": "solver", "generator": "seed",
    "label": "labels", "classes": "labels", "class_labels": "labels", "y": "labels",
    "prompt": "prompts", "captions": "prompts", "negative_prompt": "negative_prompts",
    "property": "properties", "atoms": "num_atoms", "shift": "time_shift", "num_restarts": "restarts",
}  # fmt: skip
"""Keywords of other libraries and of the command line -> ours."""


def _refuse_unknown(model: LatentModel, keywords: list[str]) -> None:
    """ValueError names a keyword of `sample` that is none, and the nearest one; others are left to
    `Conditions.parse`."""
    of_conditions = {find("conditions", name).argument for name in available("conditions")}
    of_conditions |= {NEGATIVE + name for name in of_conditions}
    own = set(model.conditions.arguments)
    names = [
        "num", "seed", "batch_size", *SamplingConfig.model_fields, *model.modality.layout_arguments, *sorted(own),
        *(NEGATIVE + name for name in sorted(own)),
    ]  # fmt: skip
    for key in keywords:
        if key in names or key in of_conditions:
            continue
        close = [OTHER_NAMES[key]] if key in OTHER_NAMES else difflib.get_close_matches(key, names, 1)
        if close and close[0] in names:
            raise ValueError(f"{key}: is no keyword of sample; did you mean {close[0]}?")


def _check_weights(model: LatentModel) -> None:
    """ValueError unless the model has weights, of a type that networks compute in."""
    assert model.dtype
    if model.device.type == "meta":
        raise ValueError("model: it is on the meta device, where it has no weights; load it again")


def _decoder_settings(model: LatentModel, solver: str | None, steps: int | None) -> SamplingConfig:
    return split_settings(model.config.sampling, {"decoder_solver": solver, "decoder_steps": steps})[0]


def checked_int(name: str, value: Any, least: int) -> int:
    """Return an integer of at least `least` as Python's int (numpy's would seed other streams); ValueError names it."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r} is not a whole number; give {least} or more") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}: {value} must be at least {least}")
    return number


def split_settings(defaults: SamplingConfig, settings: dict[str, Any]) -> tuple[SamplingConfig, dict[str, Any]]:
    """Separate sampling settings (None takes the default) from all other keywords."""
    fields = SamplingConfig.model_fields
    sampling = {key: value for key, value in settings.items() if key in fields and value is not None}
    others = {key: value for key, value in settings.items() if key not in fields}
    try:
        return SamplingConfig.parse({**defaults.plain(), **sampling}), others
    except ConfigError as error:
        raise ValueError(str(error)) from None
