"""What the dials of Unified Latents do: loss factors and the ablations of Tables 5 and 6, on the embedded digits.

    python benchmarks/unified_latents.py --out runs/ul-sweep    # joint stages of `digits-ul`, 3 minutes each

Bits, PSNR and the decoder's use of z_0 are of held-out digits; the distance is of digits sampled through the prior of
the joint stage, without a second one. Finished runs are kept: the same line goes on. Writes table.md and
rate_distortion.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import unilatent
from unilatent.maths.coding import rates
from unilatent.maths.frechet import frechet_distance_of
from unilatent.maths.streams import Streams
from unilatent.modalities.image.metrics import psnr
from unilatent.presets import preset
from unilatent.sampling import reconstruct, sample
from unilatent.training.batches import whole
from unilatent.training.trainer import Trainer

FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)
SEEDS = {4.0: (0, 1), 8.0: (0, 1)}
"""Of the other factors: 0."""
ABLATIONS = {
    "A, no gradient from the prior": ("method.prior_gradient=false", "method.latent_channels=8"),
    "B, logsnr_0 = 10": ("method.latent_logsnr=10",),
    "D, learned variance at logsnr_0 = 10": ("method.learned_variance=true", "method.latent_logsnr=10"),
    "normal prior": ("method.prior=normal",),
    "decoder in one pass": ("method.decoder_loss=mse", "method.loss_factor=24"),
}
AFTERWARDS = "diffusion decoder on the latents of the decoder in one pass"


def run(out: Path, *overrides: str) -> Path:
    """A finished joint stage."""
    first = preset("digits-ul").first
    assert first is not None
    config = first.override(*overrides)
    if not (out / "model").is_dir():
        Trainer(config, out, resume="auto").fit()
    return out


def judge(folder: Path) -> dict[str, float]:
    """What `judged` finds, kept beside the run."""
    path = folder / "judged.json"
    if not path.is_file():
        path.write_text(json.dumps(judged(folder)))
    return dict(json.loads(path.read_text()))


@torch.no_grad()
def judged(folder: Path) -> dict[str, float]:
    """Held-out bits, PSNR, decoder nats with the true and with another digit's z_0, and the samples' distance."""
    model: Any = unilatent.load(folder, device="cpu")
    data = preset("digits-ul").first
    assert data is not None
    held_out = whole(model.modality.splits(data.data).held_out, model.modality)
    tokens = model._tokens(held_out.data)
    nats, true, shuffled = [], [], []
    for draw in range(8):
        draws = model.draw(Streams(("judge", draw, i) for i in range(len(held_out.data))), tokens)
        z, log_std, layout = model._encoded(tokens)
        z = model._sampled(z, log_std, draws.encoder_noise)
        own = model.rate_nats(z, held_out, layout, draws)
        nats.append(own if log_std is None else own + model.variance_nats(log_std, layout))
        true.append(model.decoder_nats(z, tokens, draws))
        shuffled.append(model.decoder_nats(z.roll(1, 0), tokens, draws))
    again = reconstruct(model, held_out.data, batch_size=120)
    made = sample(model, 500, batch_size=250)
    bits = rates(torch.stack(nats).mean(), **model.modality.units)
    return {
        **{name: float(value) for name, value in bits.items()},
        "psnr": float(psnr(again, held_out.data).mean()),
        "shuffled / true": float(torch.stack(shuffled).mean() / torch.stack(true).mean()),
        "distance": frechet_distance_of(made.flatten(1), held_out.data.flatten(1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ul-sweep"))
    out = parser.parse_args().out
    swept: dict[float, list[dict[str, float]]] = {}
    for factor in FACTORS:
        seeds = SEEDS.get(factor, (0,))
        folders = [run(out / f"lf{factor:g}-{s}", f"method.loss_factor={factor}", f"seed={s}") for s in seeds]
        swept[factor] = [judge(folder) for folder in folders]
    rows = [
        (f"loss factor {factor:g}, seed {s}", found) for factor, all in swept.items() for s, found in enumerate(all)
    ]
    for name, overrides in ABLATIONS.items():
        folder = run(out / name.partition(",")[0].replace(" ", "-"), *overrides)
        rows.append((name, judge(folder)))
    rows.append((AFTERWARDS, judge(run(out / "afterwards", f"method.encoder_run={folder}"))))
    lines = ["| run | bits a pixel | PSNR, dB | decoder loss, shuffled z_0 / true | distance of samples |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, found in rows:
        lines.append(
            f"| {name} | {found['bits_per_pixel']:.3f} | {found['psnr']:.1f} | {found['shuffled / true']:.1f} | "
            f"{found['distance']:.3f} |"
        )
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    plot(swept, out / "rate_distortion.png")


def plot(swept: dict[float, list[dict[str, float]]], path: Path) -> None:
    """PSNR and the samples' distance against bits; a curve through the seeds' means, a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "psnr", "PSNR, dB"), (right, "distance", "Frechet distance of samples (pixels)")):
        bits = [[found["bits_per_pixel"] for found in seeds] for seeds in swept.values()]
        values = [[found[key] for found in seeds] for seeds in swept.values()]
        means = [(sum(x) / len(x), sum(y) / len(y)) for x, y in zip(bits, values, strict=True)]
        axes.plot(*zip(*means, strict=True))
        axes.scatter([x for row in bits for x in row], [y for row in values for y in row], s=14)
        for factor, at in zip(swept, means, strict=True):
            axes.annotate(f"{factor:g}", at, textcoords="offset points", xytext=(6, 4))
        axes.set_xlabel("bits a pixel (numbers: loss factor)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
