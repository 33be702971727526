"""What `unilatent finetune-decoder` changed: held-out reconstructions of two models beside the originals.

    python benchmarks/sharpened.py RUN SHARPENED [--num 600] [--out sharpened.png]

- PSNR.
- High frequencies: mean power of images in the upper half of the frequencies, relative to the originals'.
- Sliced Wasserstein distance (Karras et al. 2018, arXiv 1710.10196, Sec. 5): between 7 x 7 patches of the originals and
  of the reconstructions, at each level of a Laplacian pyramid, each normalised by mean and standard deviation of the
  originals' channels; 512 random directions, times 1,000. No network takes part. Beside it: the distance of originals
  from other originals, the smallest that can be expected.
- Whether clean latents are equal to the bit.

RUN needs its data (data.held_out). Images are spread evenly over the held-out and the training set. The picture has
originals above both reconstructions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import unilatent
from unilatent.batches import spread_evenly
from unilatent.evaluation.reference import splits_of
from unilatent.modalities.base import Dataset, Modality
from unilatent.sampling import encode, reconstruct

PATCH, DIRECTIONS, PATCHES = 7, 512, 16


def blurred(x: Tensor) -> Tensor:
    """Half the size of images (B, C, H, W)."""
    return F.avg_pool2d(x, 2)


def pyramid(x: Tensor, smallest: int = 16) -> list[Tensor]:
    """Levels of a Laplacian pyramid, finest first; the last one is the smallest image itself."""
    levels = []
    while x.shape[-1] >= 2 * smallest:
        small = blurred(x)
        levels.append(x - F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False))
        x = small
    return [*levels, x]


def patches(x: Tensor, seed: int) -> Tensor:
    """PATCHES random patches of each image: (B PATCHES, C, PATCH, PATCH), of the same places for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    limit = x.shape[-1] - PATCH + 1
    places = torch.randint(limit, (len(x), PATCHES, 2), generator=generator)
    return torch.stack(
        [x[i, :, a : a + PATCH, b : b + PATCH] for i in range(len(x)) for a, b in places[i].tolist()]
    )  # fmt: skip


def sliced_wasserstein(real: Tensor, made: Tensor, seed: int = 0) -> list[float]:
    """Distance of two sets of as many images (B, C, H, W) at each level of their pyramids, times 1,000."""
    found = []
    for a, b in zip(pyramid(real), pyramid(made), strict=True):
        one, two = patches(a, seed), patches(b, seed + 1)
        mean, std = one.mean((0, 2, 3), keepdim=True), one.std((0, 2, 3), keepdim=True)
        one, two = (((p - mean) / std).flatten(1) for p in (one, two))
        directions = torch.randn(one.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(seed))
        directions = F.normalize(directions, dim=0)
        x, y = ((p @ directions).sort(dim=0).values for p in (one, two))
        found.append(1000 * float((x - y).abs().mean()))
    return found


def high_frequencies(x: Tensor) -> float:
    """Mean power of images (B, C, H, W) at radial frequencies above half of the highest along an axis."""
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    f = torch.fft.fftfreq(x.shape[-1])
    radius = (f[:, None].square() + f[None].square()).sqrt()
    return float(power[radius > 0.25].mean())


def images_of(dataset: Dataset, modality: Modality, count: int) -> Tensor:
    """Images (count, C, H, W) that are spread evenly over a data set: the first ones may be of one class."""
    return modality.collate([image for (image, _), _ in spread_evenly(dataset, range(count), count)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("sharpened", type=Path)
    parser.add_argument("--num", type=int, default=600)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    models = [unilatent.load(path, device="cpu") for path in (arguments.run, arguments.sharpened)]
    modality = models[0].modality
    splits = splits_of(modality, arguments.run, None)
    assert splits is not None
    assert splits.held_out is not None
    number = min(arguments.num, len(splits.held_out))
    data, other = (images_of(part, modality, number) for part in (splits.held_out, splits.train))
    equal = torch.equal(*(encode(model, data) for model in models))
    made = [reconstruct(model, data) for model in models]
    print(f"{number} held-out images; latents {'are equal to the bit' if equal else 'DIFFER'}")
    wasserstein = [sliced_wasserstein(data, x) for x in (other, *made)]
    sizes = " and ".join(str(level.shape[-1]) for level in pyramid(data))
    columns = ("", "PSNR, dB", "high frequencies, % of real", f"sliced Wasserstein at {sizes} pixels")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, x, distances in zip(
        ("other real images", "before", "sharpened"), (other, *made), wasserstein, strict=True
    ):  # fmt: skip
        errors = "" if x is other else f"{sum(modality.errors(x, data)['psnr']) / number:.2f}"
        power = 100 * high_frequencies(x) / high_frequencies(data)
        print(f"| {name} | {errors} | {power:.1f} | {', '.join(f'{d:.1f}' for d in distances)} |")
    if arguments.out:
        shown = torch.linspace(0, number - 1, min(10, number)).long()
        modality.draw_grid([x[shown] for x in (data, *made)], arguments.out)
        print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
