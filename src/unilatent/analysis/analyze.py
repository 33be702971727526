"""Analyse one model: latent statistics, reconstruction errors, rates and probes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import write_json
from ..methods.base import LatentModel
from ..sampling import computing, reconstruct
from ..types import Batch, count, take
from ..version import __version__
from .latents import LatentStatistics, interpolations, latent_statistics
from .plots import draw_latents, draw_levels
from .probes import Probe, probes
from .rates import RateReport, in_batches, rate_report

FORMAT = 1
PAIRS = 6
"""Number of interpolations in interpolation.png."""


@dataclass(frozen=True)
class Analysis:
    """The analysis of a model on held-out samples.

    errors: means over samples of `Modality.errors` of reconstructions. rate: None if the latents have no rate. probes:
    how well known properties of samples can be predicted from their latents.
    """

    latents: LatentStatistics
    errors: dict[str, float]
    rate: RateReport | None
    probes: tuple[Probe, ...] = ()

    def warnings(self) -> list[str]:
        """Return warnings: what looks wrong, and what to do."""
        warnings = self.rate.warnings() if self.rate else []
        if self.latents.std <= 0.01 * self.latents.rms:
            warnings.append(
                f"collapse: latents of different samples differ by {self.latents.std:.3g}, their RMS is "
                f"{self.latents.rms:.3g}: all samples are nearly one point"
            )
        return warnings


def analyze(
    model: LatentModel, data: Batch, *, draws: int = 4, seed: int = 0, batch_size: int = 64, precision: str = "auto"
) -> Analysis:
    """Analyse a model on samples that it was not trained on, at least two; precision as for `sample`."""
    if count(data.data) < 2:
        raise ValueError(f"data: an analysis needs at least 2 samples, got {count(data.data)}; hold out more")
    parts = in_batches(count(data.data), batch_size)
    batches = [Batch(take(data.data, rows), {key: value[rows] for key, value in data.values.items()}) for rows in parts]
    reconstructions = reconstruct(model, data.data, seed=seed, batch_size=batch_size, precision=precision)
    errors = model.modality.errors(reconstructions, data.data)
    with computing(model, precision):
        return Analysis(
            latents=latent_statistics(model, batches, seed),
            errors={key: sum(values) / len(values) for key, values in errors.items()},
            rate=rate_report(model, data, draws, seed, batch_size),
            probes=tuple(probes(model, batches, seed)),
        )


def write_analysis(
    model: LatentModel, data: Batch, analysis: Analysis, folder: Path, about: dict[str, Any], seed: int = 0,
    precision: str = "auto",
) -> list[Path]:  # fmt: skip
    """Write analysis.json and its images; return their paths. precision: of interpolations, as for `sample`."""
    content = {"format_version": FORMAT, **about, "unilatent": __version__, "warnings": analysis.warnings()}
    write_json(folder / "analysis.json", {**content, **asdict(analysis)})
    paths = [folder / "analysis.json", folder / "latents.png"]
    draw_latents(analysis.latents, folder / "latents.png")
    if analysis.rate is not None and (analysis.rate.latents or analysis.rate.data):
        draw_levels(analysis.rate, folder / "noise_levels.png")
        paths.append(folder / "noise_levels.png")
    with computing(model, precision):
        rows = interpolations(model, data.data, seed=seed, most=PAIRS)
    if rows:
        model.modality.draw_grid(rows, folder / "interpolation.png")
        paths.append(folder / "interpolation.png")
    return paths


def analysis_table(analysis: Analysis, title: str) -> Table:
    """Return a table for the terminal."""
    out = Table("metric", "value", "meaning", title=title, title_justify="left")
    s, rate = analysis.latents, analysis.rate
    out.add_row("latents", f"{s.tokens} x {s.channels}", f"of {s.samples} samples")
    out.add_row(
        "spread over samples", f"{s.std:.4g}", f"root of the mean variance of a channel; RMS of the latents {s.rms:.4g}"
    )
    out.add_row("effective rank", f"{s.rank:.3g} of {s.channels}", "number of directions in which samples differ")
    bits = s.channel_entropy
    out.add_row(
        "entropy of a channel", f"{min(bits):.3g} to {max(bits):.3g}", "bits per value, in bins of 1/16 of the RMS"
    )
    for key, value in analysis.errors.items():
        out.add_row(f"reconstruction {key}", f"{value:.4g}", "mean over samples")
    for p in analysis.probes:
        meaning = f"{p.measure} of a linear probe; from the tokens {p.tokens:.3g}, from the size {p.size:.3g}"
        out.add_row(f"probe {p.name}", f"{p.latents:.3g}", meaning)
    if rate is None:
        out.add_row("rate", "none", "this method's latents have no bitrate")
        return out
    for name, cost in rate.bits.items():
        out.add_row(
            name.replace("_", " "),
            str(cost),
            "upper bound on the information in the latents",
        )
    for name, cost in (rate.base_bits or {}).items():
        out.add_row(f"{name.replace('_', ' ')}, base", str(cost), "under the second stage's prior")
    out.add_row("decoder's loss", str(rate.decoder), "nats, without the loss factor")
    out.add_row(
        "use of the latents", f"{rate.use:.3g} x", "decoder's loss with another sample's latents / with the right ones"
    )
    return out
