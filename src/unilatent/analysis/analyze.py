"""One model before every question of this package."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import __version__
from ..files import write_json
from ..methods.base import LatentModel
from ..sampling import reconstruct
from ..types import Batch, count, take
from .latents import LatentStatistics, interpolations, latent_statistics
from .plots import draw_latents, draw_levels
from .probes import Probe, probes
from .rates import RateReport, in_batches, rate_report

FORMAT = 1
PAIRS = 6
"""Lines between two samples in interpolation.png."""


@dataclass(frozen=True)
class Analysis:
    """errors: mean over samples of the modality's measures of reconstruction. rate: None where latents have none.
    probes: what is known of samples and can be read off their latents."""

    latents: LatentStatistics
    errors: dict[str, float]
    rate: RateReport | None
    probes: tuple[Probe, ...] = ()

    def warnings(self) -> list[str]:
        """In words: what looks wrong, and what to do."""
        found = self.rate.warnings() if self.rate else []
        if self.latents.std <= 0.01 * self.latents.rms:
            found.append(
                f"collapse: latents of unlike samples differ by {self.latents.std:.3g}, their size is "
                f"{self.latents.rms:.3g}: all samples are nearly one point"
            )
        return found


def analyze(model: LatentModel, data: Batch, *, draws: int = 4, seed: int = 0, batch_size: int = 64) -> Analysis:
    """Of samples that the model was not trained on, at least two."""
    if count(data.data) < 2:
        raise ValueError(f"data: an analysis needs at least 2 samples, got {count(data.data)}; hold out more")
    parts = in_batches(count(data.data), batch_size)
    batches = [Batch(take(data.data, rows), {key: value[rows] for key, value in data.values.items()}) for rows in parts]
    made = reconstruct(model, data.data, seed=seed, batch_size=batch_size)
    errors = model.modality.errors(made, data.data)
    return Analysis(
        latents=latent_statistics(model, batches, seed),
        errors={key: sum(values) / len(values) for key, values in errors.items()},
        rate=rate_report(model, data, draws, seed, batch_size),
        probes=tuple(probes(model, batches, seed)),
    )


def write_analysis(
    model: LatentModel, data: Batch, analysis: Analysis, folder: Path, about: dict[str, Any], seed: int = 0
) -> list[Path]:
    """analysis.json and its pictures; their paths."""
    content = {"format_version": FORMAT, **about, "unilatent": __version__, "warnings": analysis.warnings()}
    write_json(folder / "analysis.json", {**content, **asdict(analysis)})
    paths = [folder / "analysis.json", folder / "latents.png"]
    draw_latents(analysis.latents, folder / "latents.png")
    if analysis.rate is not None and (analysis.rate.latents or analysis.rate.data):
        draw_levels(analysis.rate, folder / "noise_levels.png")
        paths.append(folder / "noise_levels.png")
    rows = interpolations(model, data.data, seed=seed, most=PAIRS)
    if rows:
        model.modality.draw_grid(rows, folder / "interpolation.png")
        paths.append(folder / "interpolation.png")
    return paths


def analysis_table(analysis: Analysis, title: str) -> Table:
    """For the terminal."""
    out = Table("measure", "value", "what it is", title=title, title_justify="left")
    s, rate = analysis.latents, analysis.rate
    out.add_row("latents", f"{s.tokens} x {s.channels}", f"of {s.samples} samples")
    out.add_row("spread over samples", f"{s.std:.4g}", f"root of a channel's mean variance; size {s.rms:.4g}")
    out.add_row("effective rank", f"{s.rank:.3g} of {s.channels}", "directions that samples differ along")
    bits = s.channel_entropy
    out.add_row(
        "entropy of a channel", f"{min(bits):.3g} to {max(bits):.3g}", "bits of a value, in 16ths of their size"
    )
    for key, value in analysis.errors.items():
        out.add_row(f"reconstruction {key}", f"{value:.4g}", "mean over samples")
    for p in analysis.probes:
        said = f"{p.measure} of a linear map to {p.name}; from its own tokens {p.tokens:.3g}, its size {p.size:.3g}"
        out.add_row(f"probe {p.name}", f"{p.latents:.3g}", said)
    if rate is None:
        out.add_row("rate", "none", "this method's latents have no bitrate")
        return out
    for name, cost in rate.bits.items():
        out.add_row(name.replace("_", " "), f"{cost.mean:.4g} ± {cost.error:.2g}", "bound on what the latents tell")
    for name, cost in (rate.base_bits or {}).items():
        out.add_row(f"{name.replace('_', ' ')}, base", f"{cost.mean:.4g} ± {cost.error:.2g}", "under the second stage")
    out.add_row("decoder's loss", f"{rate.decoder.mean:.4g} ± {rate.decoder.error:.2g}", "nats, without loss factor")
    out.add_row("use of the latents", f"{rate.use:.3g} x", "its loss with another sample's latents / with its own")
    return out
