"""Analyse one model: statistics of latents, errors, rates, probes, and what its two passes have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import write_json
from ..methods.base import LatentModel
from ..sampling import computing, reconstruct
from ..types import Batch, count, take
from ..version import __version__
from .alignment import Alignment, alignment
from .compression import Compression, LatentBits, compression, latent_bits
from .decoding import Sensitivity, nearest_latents, sensitivity, trajectory
from .latents import LatentStatistics, interpolations, latent_statistics
from .layers import LayerAccuracy, layer_accuracy
from .losses import Course, ErrorByTime, GradientCosine, course, error_by_time, gradient_cosines
from .plots import (
    draw_alignment,
    draw_compression,
    draw_course,
    draw_errors_by_time,
    draw_latents,
    draw_layers,
    draw_levels,
    draw_sensitivity,
    draw_trajectory,
)
from .probes import Probe, probes
from .rates import RateReport, in_batches, rate_report

FORMAT = 2
PAIRS = 6
"""Number of interpolations in interpolation.png, of queries in nearest.png, and of samples in trajectory.png."""
GRADIENT_BATCHES = 4
"""Batches over which gradients are compared."""
BASIC = ("latents", "reconstruction", "rate")
PARTS = (*BASIC, "alignment", "compression", "layers", "trajectory", "losses")
"""Names of what can be analysed."""


@dataclass(frozen=True)
class Analysis:
    """The analysis of a model on held-out samples; what was not asked for, or does not exist, is None or empty.

    errors: means over samples of `Modality.errors` of reconstructions. rate: None if the latents have no rate. probes:
    how well known properties of samples can be predicted from their latents. alignment, layers: None if the model's
    passes have no blocks to compare (`LatentModel.passes`).
    """

    latents: LatentStatistics | None = None
    errors: dict[str, float] | None = None
    rate: RateReport | None = None
    probes: tuple[Probe, ...] = ()
    sensitivity: Sensitivity | None = None
    alignment: Alignment | None = None
    compression: Compression | None = None
    layers: LayerAccuracy | None = None
    gradients: tuple[GradientCosine, ...] = ()
    error_by_time: ErrorByTime | None = None
    course: Course | None = None

    def warnings(self) -> list[str]:
        """Return warnings: what looks wrong, and what to do."""
        warnings = self.rate.warnings() if self.rate else []
        if self.latents is not None and self.latents.std <= 0.01 * self.latents.rms:
            warnings.append(
                f"collapse: latents of different samples differ by {self.latents.std:.3g}, their RMS is "
                f"{self.latents.rms:.3g}: all samples are nearly one point"
            )
        return warnings


def check_parts(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of parts in the order of PARTS; ValueError names one that is unknown."""
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise ValueError(f"--only: {unknown[0] if unknown else 'nothing'!r} is unknown; use {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in names)


def analyze(
    model: LatentModel, data: Batch, *, draws: int = 4, seed: int = 0, batch_size: int = 64, precision: str = "auto",
    only: Sequence[str] = PARTS, run: Path | None = None, progress: Callable[[str], object] = lambda part: None,
) -> Analysis:  # fmt: skip
    """Analyse a model on samples that it was not trained on, at least two; precision as for `sample`.

    only: names from PARTS. run: the run whose records are read for "losses"; None: they are left out. progress: called
    with the name of each part before it is computed.
    """
    if count(data.data) < 2:
        raise ValueError(f"data: an analysis needs at least 2 samples, got {count(data.data)}; hold out more")
    only = check_parts(only)
    parts = in_batches(count(data.data), batch_size, least=4)
    batches = [Batch(take(data.data, rows), {key: value[rows] for key, value in data.values.items()}) for rows in parts]
    found: dict[str, Any] = {}
    if "reconstruction" in only:
        progress("reconstruction")
        reconstructions = reconstruct(model, data.data, seed=seed, batch_size=batch_size, precision=precision)
        errors = model.modality.errors(reconstructions, data.data)
        found["errors"] = {key: sum(values) / len(values) for key, values in errors.items()}
    with computing(model, precision):
        if "reconstruction" in only:
            found["sensitivity"] = sensitivity(model, data.data, seed, batch_size)
        if "latents" in only:
            progress("latents")
            found["latents"] = latent_statistics(model, batches, seed)
            found["probes"] = tuple(probes(model, batches, seed))
        if "rate" in only:
            progress("rate")
            found["rate"] = rate_report(model, data, draws, seed, batch_size)
        if "alignment" in only and count(data.data) >= 4:
            progress("alignment")
            found["alignment"] = alignment(model, batches, seed)
        if "compression" in only:
            progress("compression")
            rate = found.get("rate") or rate_report(model, data, draws, seed, batch_size)
            bits = latent_bits(model, batches, rate, seed)
            found["compression"] = replace(compression(model, seed), latents=bits)
        if "layers" in only:
            progress("layers")
            found["layers"] = layer_accuracy(model, batches, seed)
        if "losses" in only:
            progress("losses")
            found["error_by_time"] = error_by_time(model, batches, seed)
            found["gradients"] = tuple(gradient_cosines(model, batches[:GRADIENT_BATCHES], seed))
            found["course"] = None if run is None else course(run)
    return Analysis(**found)


def write_analysis(
    model: LatentModel, data: Batch, analysis: Analysis, folder: Path, about: dict[str, Any], seed: int = 0,
    precision: str = "auto", only: Sequence[str] = PARTS, batch_size: int = 64,
) -> list[Path]:  # fmt: skip
    """Write analysis.json and its images; return their paths. precision: of decoded latents, as for `sample`."""
    paths = [folder / "analysis.json"]

    def draw(name: str, drawing: Callable[[Path], object]) -> None:
        paths.append(folder / name)
        drawing(paths[-1])

    if (latents := analysis.latents) is not None:
        draw("latents.png", lambda path: draw_latents(latents, path))
    if (rate := analysis.rate) is not None and (rate.latents or rate.data):
        draw("noise_levels.png", lambda path: draw_levels(rate, path))
    if (noised := analysis.sensitivity) is not None:
        draw("sensitivity.png", lambda path: draw_sensitivity(noised, path))
    if (aligned := analysis.alignment) is not None:
        draw("alignment.png", lambda path: draw_alignment(aligned, path))
    if (weights := analysis.compression) is not None:
        draw("compression.png", lambda path: draw_compression(weights, path))
    if (layers := analysis.layers) is not None:
        draw("layers.png", lambda path: draw_layers(layers, path))
    if (errors := analysis.error_by_time) is not None:
        draw("losses.png", lambda path: draw_errors_by_time(errors, analysis.gradients, path))
    if (past := analysis.course) is not None:
        draw("course.png", lambda path: draw_course(past, path))
    settled = None
    with computing(model, precision):
        if "latents" in only:
            if rows := interpolations(model, data.data, seed=seed, most=PAIRS):
                draw("interpolation.png", lambda path: model.modality.draw_grid(rows, path))
            if nearest := nearest_latents(model, data, PAIRS, seed, batch_size):
                draw("nearest.png", lambda path: model.modality.draw_grid(nearest, path))
        if "trajectory" in only and model.generates:
            settled, columns = trajectory(model, PAIRS, seed)
            lines = [[take(column, slice(i, i + 1)) for column in columns] for i in range(PAIRS)]
            grid = [model.modality.join(line) for line in lines]
            draw("trajectory.png", lambda path: model.modality.draw_grid(grid, path))
            draw("trajectory_curve.png", lambda path: draw_trajectory(settled, path))
    content = {"format_version": FORMAT, **about, "unilatent": __version__, "warnings": analysis.warnings()}
    numbers = {**asdict(analysis), "trajectory": None if settled is None else asdict(settled)}
    write_json(folder / "analysis.json", {**content, **numbers})
    return paths


def absent_parts(model: LatentModel, analysis: Analysis, only: Sequence[str]) -> list[str]:
    """Return the parts that were asked for and do not exist for this model or these samples."""
    there = {"alignment": analysis.alignment is not None, "layers": analysis.layers is not None,
             "trajectory": model.generates}  # fmt: skip
    absent = [part for part in only if not there.get(part, True)]
    return [*absent, "gradients"] if "losses" in only and not analysis.gradients else absent


def analysis_table(analysis: Analysis, title: str, absent: Sequence[str] = ()) -> Table:
    """Return a table for the terminal; absent: see `absent_parts`."""
    out = Table("metric", "value", "meaning", title=title, title_justify="left")
    if (s := analysis.latents) is not None:
        out.add_row("latents", f"{s.tokens} x {s.channels}", f"of {s.samples} samples")
        out.add_row(
            "spread over samples",
            f"{s.std:.4g}",
            f"root of the mean variance of a channel; RMS of the latents {s.rms:.4g}",
        )
        out.add_row("effective rank", f"{s.rank:.3g} of {s.channels}", "number of directions in which samples differ")
        bits = s.channel_entropy
        out.add_row(
            "entropy of a channel",
            f"{min(bits):.3g} to {max(bits):.3g}",
            "bits per value, in bins of 1/16 of the RMS",
        )
    for key, value in (analysis.errors or {}).items():
        out.add_row(f"reconstruction {key}", f"{value:.4g}", "mean over samples")
    for p in analysis.probes:
        meaning = f"{p.measure} of a linear probe; from the tokens {p.tokens:.3g}, from the size {p.size:.3g}"
        out.add_row(f"probe {p.name}", f"{p.latents:.3g}", meaning)
    _add_rate(out, analysis)
    _add_passes(out, analysis)
    for part in absent:
        out.add_row(part, "none", NONE[part])
    return out


NONE = {
    "alignment": "the two passes of this model have no blocks in common, or there are fewer than 4 samples",
    "layers": "no classes, fewer than 50 samples, or passes without blocks in common",
    "trajectory": "this model draws no samples: train its second stage",
    "gradients": "no two parts of this model's loss have gradients of their own on the same weights",
}
"""Why a part may be absent."""


def _add_rate(out: Table, analysis: Analysis) -> None:
    rate = analysis.rate
    if rate is None:
        if analysis.latents is not None:
            out.add_row("rate", "none", "this method's latents have no bitrate")
        return
    for name, cost in rate.bits.items():
        out.add_row(name.replace("_", " "), str(cost), "upper bound on the information in the latents")
    for name, cost in (rate.base_bits or {}).items():
        out.add_row(f"{name.replace('_', ' ')}, base", str(cost), "under the second stage's prior")
    out.add_row("decoder's loss", str(rate.decoder), "nats, without the loss factor")
    out.add_row(
        "use of the latents", f"{rate.use:.3g} x", "decoder's loss with another sample's latents / with the right ones"
    )


def _add_bits(out: Table, bits: LatentBits | str) -> None:
    if isinstance(bits, str):
        out.add_row("bits of the latents", "none", bits)
        return
    noise = f"through the noise at t = {bits.time:g}, the most that the decoder was trained with"
    finer = [f"{found:.4g} at t = {t:g}" for t, found in zip(bits.times, bits.by_time, strict=True) if t < bits.time]
    noise += f"; a sample: {', '.join(finer)}" if finer else ""
    a_sample = f"{bits.gaussian['bits_per_sample']:.4g} a sample"
    each = f"{bits.gaussian['bits_per_latent_dimension']:.3g} per latent dimension"
    out.add_row("bits of the latents, at most", a_sample, f"{each}; by their covariance, {noise}")
    if bits.prior is not None:
        each = f"{bits.prior['bits_per_latent_dimension']} per latent dimension"
        a_sample = f"{bits.prior['bits_per_sample']} a sample"
        out.add_row("bits of the latents, under the prior", a_sample, f"{each}; the bound that its prior gives")


def _add_passes(out: Table, analysis: Analysis) -> None:
    if (a := analysis.alignment) is not None:
        weights = "the same weights" if a.shared else "separate weights"
        for t, value, near in zip(a.levels, a.mean_cka, a.cknna, strict=True):
            meaning = f"tokenise and denoise pass, mean over blocks, {weights}; CKNNA {sum(near) / len(near):.3f}"
            out.add_row(f"alignment (CKA) at t = {t:g}", f"{value:.3f}", meaning)
    if (c := analysis.compression) is not None:
        meaning = (
            f"by the entropy of each tensor's values; as initialised {c.total(c.initial):.3g} MB, as normal numbers "
            f"{c.total(c.gaussian):.3g} MB"
        )
        out.add_row("weights", f"{c.total(c.trained):.3g} MB", meaning)
        if c.latents is not None:
            _add_bits(out, c.latents)
    if (acc := analysis.layers) is not None:
        for kind, values in acc.linear.items():
            best = max(range(len(values)), key=values.__getitem__)
            knn = f"k nearest {max(acc.knn[kind]):.1%}"
            meaning = f"linear probe of {acc.name}, best block {best} of {len(values)}; {knn}"
            out.add_row(f"{kind} pass knows", f"{values[best]:.1%}", meaning)
    for g in analysis.gradients:
        error = "" if g.error is None else f" +- {g.error:.3f}"
        meaning = f"cosine of the gradients on shared weights; norms {g.norms[0]:.3g} and {g.norms[1]:.3g}"
        out.add_row(f"{g.parts[0]} and {g.parts[1]}", f"{g.mean:.3f}{error}", meaning)
