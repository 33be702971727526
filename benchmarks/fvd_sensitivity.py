"""What moves FVD: how far I3D's logits of the same clips move under known changes of the clips or of the protocol.

Clips are pans over the two photographs that come with scikit-learn, so anyone can repeat it. The number is the squared
distance of the mean logits, the first term of FVD; with so few clips there is no second. Two minutes on two cores.

    python benchmarks/fvd_sensitivity.py [--clips 8] [--i3d-weights FILE]
"""

from __future__ import annotations

import argparse
import io
import math

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from unilatent.modalities.video.motion import change, halved, persistence, shuffled, still
from unilatent.nets.i3d import I3D

FRAMES, SIDE = 16, 128


def pans(count: int) -> Tensor:
    """Crops of 256 x 256 pixels that move 6 pixels a frame, averaged down to 128 x 128: (count, 16, 3, 128, 128)."""
    stream = np.random.default_rng(0)
    clips = []
    for i in range(count):
        photograph = load_sample_images().images[i % 2]
        angle = stream.uniform(0, 2 * math.pi)
        step = 6 * np.array([math.sin(angle), math.cos(angle)])
        room = np.array(photograph.shape[:2]) - 256
        lowest, highest = np.minimum(step * (FRAMES - 1), 0), np.maximum(step * (FRAMES - 1), 0)
        start = stream.uniform(-lowest, room - highest)
        places = [(start + step * t).astype(int) for t in range(FRAMES)]
        clips.append(np.stack([photograph[y : y + 256, x : x + 256] for y, x in places]))
    frames = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).flatten(0, 1).float()
    return torch.nn.functional.avg_pool2d(frames, 2).round().to(torch.uint8).view(count, FRAMES, 3, SIDE, SIDE)


def jpeg(clips: Tensor, quality: int) -> Tensor:
    """Every frame through a JPEG file."""
    frames = []
    for frame in clips.flatten(0, 1).permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        frames.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).view_as(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--i3d-weights")
    arguments = parser.parse_args()
    tf1, half_pixel = (I3D.load(arguments.i3d_weights, resize) for resize in ("tf1", "torch"))
    clips = pans(arguments.clips)
    plain = tf1(clips).logits.double()
    at_64 = tf1(clips, 64).logits.double()
    spread = float(plain.var(0).sum())
    print(f"{len(clips)} clips of {FRAMES} x {SIDE} x {SIDE}; trace of the covariance of their logits {spread:.0f}")
    changed = {
        "frames shuffled": (shuffled(clips), None),
        "first frame repeated": (still(clips), None),
        "half resolution": (halved(clips), None),
        "JPEG, quality 75": (jpeg(clips, 75), None),
        "JPEG, quality 95": (jpeg(clips, 95), None),
    }
    print(f"{'':32}{'logits':>8}{'change':>9}{'persistence':>13}")
    moves = f"{100 * float(change(clips).mean()):8.1f}%{float(persistence(clips).mean()):13.2f}"
    print(f"{'the clips themselves':32}{0:8.1f}{moves}")
    for name, (other, side) in changed.items():
        distance = float((tf1(other, side).logits.double().mean(0) - plain.mean(0)).square().sum())
        print(
            f"{name:32}{distance:8.1f}{100 * float(change(other).mean()):8.1f}%{float(persistence(other).mean()):13.2f}"
        )
    rules = {
        "resized by torch's rule": (half_pixel(clips).logits, plain),
        "scored at 64": (at_64, plain),
        "at 64, resized by torch's rule": (half_pixel(clips, 64).logits, at_64),
    }
    for name, (one, other) in rules.items():
        print(f"{name:32}{float((one.double().mean(0) - other.mean(0)).square().sum()):8.1f}")


if __name__ == "__main__":
    main()
