"""Unified Latents on the embedded digits: sweep of the loss factor, and the ablations of Tables 5 and 6.

    python benchmarks/unified_latents.py --out runs/ul-sweep    # joint stages of `digits-ul`, 3 minutes each

Bits, PSNR and the decoder's use of z_0 are measured on held-out digits; the Frechet distance is of digits sampled with
the prior of the joint stage, without a second stage. The same command resumes: finished runs are not repeated. Writes
table.md and rate_distortion.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import unilatent
from unilatent.batches import load_all
from unilatent.maths.coding import rates
from unilatent.maths.frechet import frechet_distance_of
from unilatent.maths.streams import Streams
from unilatent.modalities._media.similarity import psnr
from unilatent.presets import preset
from unilatent.sampling import reconstruct, sample
from unilatent.training.config import RunConfig
from unilatent.training.trainer import Trainer

FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)
SEEDS = {4.0: (0, 1), 8.0: (0, 1)}
"""Seeds by loss factor; (0,) for all others."""
ABLATIONS = {
    "A, no gradient from the prior": ("method.prior_gradient=false", "method.latent_channels=8"),
    "B, logsnr_0 = 10": ("method.latent_logsnr=10",),
    "D, learned variance at logsnr_0 = 10": ("method.learned_variance=true", "method.latent_logsnr=10"),
    "normal prior": ("method.prior=normal",),
    "decoder in one pass": ("method.decoder_loss=mse", "method.loss_factor=24"),
}
AFTERWARDS = "diffusion decoder on the latents of the decoder in one pass"


def run(out: Path, *overrides: str) -> Path:
    """Train a joint stage unless it is finished; return its folder."""
    if not (out / "model").is_dir():
        Trainer(joint_stage().override(*overrides), out, resume="auto").fit()
    return out


def joint_stage() -> RunConfig:
    first = preset("digits-ul").first
    assert first is not None
    return first


def cached_measurements(folder: Path) -> dict[str, float]:
    """Return the result of `measure`, cached in the run folder."""
    path = folder / "judged.json"
    if not path.is_file():
        path.write_text(json.dumps(measure(folder)))
    return dict(json.loads(path.read_text()))


@torch.no_grad()
def measure(folder: Path) -> dict[str, float]:
    """Measure held-out bits, PSNR, the ratio of decoder losses (another digit's z_0 / the true one), and the Frechet
    distance of samples."""
    model: Any = unilatent.load(folder, device="cpu")
    held_out = load_all(model.modality.splits(joint_stage().data).held_out, model.modality)
    tokens = model._tokens(held_out.data)
    nats, true, shuffled = [], [], []
    for draw in range(8):
        draws = model.draw(Streams(("judge", draw), range(len(held_out.data))), tokens)
        z, log_std, layout = model._encoded(tokens)
        z = model._sampled(z, log_std, draws.encoder_noise)
        rate = model.rate_nats(z, held_out, layout, draws)
        nats.append(rate if log_std is None else rate + model.variance_nats(log_std, layout))
        true.append(model.decoder_nats(z, tokens, draws))
        shuffled.append(model.decoder_nats(z.roll(1, 0), tokens, draws))
    reconstructions = reconstruct(model, held_out.data, batch_size=120)
    samples = sample(model, 500, batch_size=250)
    bits = rates(torch.stack(nats).mean(), **model.modality.units(tokens.layout))
    return {
        **{name: float(value) for name, value in bits.items()},
        "psnr": float(psnr(reconstructions, held_out.data).mean()),
        "shuffled / true": float(torch.stack(shuffled).mean() / torch.stack(true).mean()),
        "distance": frechet_distance_of(samples.flatten(1), held_out.data.flatten(1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ul-sweep"))
    out = parser.parse_args().out
    swept: dict[float, list[dict[str, float]]] = {}
    for factor in FACTORS:
        seeds = SEEDS.get(factor, (0,))
        folders = [run(out / f"lf{factor:g}-{s}", f"method.loss_factor={factor}", f"seed={s}") for s in seeds]
        swept[factor] = [cached_measurements(folder) for folder in folders]
    rows = [
        (f"loss factor {factor:g}, seed {s}", numbers)
        for factor, of_seeds in swept.items()
        for s, numbers in enumerate(of_seeds)
    ]
    for name, overrides in ABLATIONS.items():
        folder = run(out / name.partition(",")[0].replace(" ", "-"), *overrides)
        rows.append((name, cached_measurements(folder)))
    rows.append((AFTERWARDS, cached_measurements(run(out / "afterwards", f"method.encoder_run={folder}"))))
    lines = ["| run | bits per pixel | PSNR, dB | decoder loss, shuffled z_0 / true | distance of samples |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, numbers in rows:
        lines.append(
            f"| {name} | {numbers['bits_per_pixel']:.3f} | {numbers['psnr']:.1f} | {numbers['shuffled / true']:.1f} | "
            f"{numbers['distance']:.3f} |"
        )
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    plot(swept, out / "rate_distortion.png")


def plot(swept: dict[float, list[dict[str, float]]], path: Path) -> None:
    """Plot PSNR and distance against bits: a curve through the means over seeds, a dot per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "psnr", "PSNR, dB"), (right, "distance", "Frechet distance of samples (pixels)")):
        bits = [[numbers["bits_per_pixel"] for numbers in of_seeds] for of_seeds in swept.values()]
        values = [[numbers[key] for numbers in of_seeds] for of_seeds in swept.values()]
        means = [(sum(x) / len(x), sum(y) / len(y)) for x, y in zip(bits, values, strict=True)]
        axes.plot(*zip(*means, strict=True))
        axes.scatter([x for row in bits for x in row], [y for row in values for y in row], s=14)
        for factor, at in zip(swept, means, strict=True):
            axes.annotate(f"{factor:g}", at, textcoords="offset points", xytext=(6, 4))
        axes.set_xlabel("bits per pixel (labels: loss factor)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
