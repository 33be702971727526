"""Speed of reading images from folders and from shards, in one process.

    python benchmarks/loading.py [--source FOLDER|ZIP] [--size 256]

Source images are repeated until there are `--images`. Each round reads every case once in the order of training, so
that other load on the machine affects all cases equally; the median round is reported. `reading` is bytes from the file
system (in its cache); `training` adds decoding and cropping, all of a loader's work before it collates batches.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unilatent.modalities._media.pixels import fit, open_image
from unilatent.modalities.base import Dataset
from unilatent.modalities.image import Image as Images
from unilatent.modalities.image import ImageConfig, ImageData
from unilatent.shards.writing import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="images; default: generated noise on gradients")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["UNILATENT_CACHE"] = f"{place}/cache"
        cases = make(Path(place), options)
        print(f"{options.images} images at {options.size}, one process, median of {options.rounds} rounds\n")
        print("| case | KiB per image | reading images/s | training images/s | relative to the first |")
        print("| --- | --- | --- | --- | --- |")
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for label, (path, dataset) in cases.items():
                raw = raw_reader(path, dataset)
                for task, read in (("reading", raw), ("training", dataset.__getitem__)):
                    started = time.perf_counter()
                    for position in range(options.images):
                        read(dataset.index_at(0, position))
                    seconds.setdefault((label, task), []).append(time.perf_counter() - started)
        first = None
        for label, (path, _) in cases.items():
            rates = [options.images / statistics.median(seconds[label, task]) for task in ("reading", "training")]
            first = first or rates[1]
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / options.images / 1024
            print(f"| {label} | {size:.1f} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[1] / first:.2f} |")


def make(place: Path, options: argparse.Namespace) -> dict[str, tuple[Path, Dataset]]:
    """Write the same images in several forms: label -> (path, training data)."""
    large, cropped = place / "large", place / "cropped"
    originals(large, options, scale=2)
    originals(cropped, options, scale=1)
    encoding = {"size": (options.size, options.size), "format": "jpg", "quality": 95}
    write(Images.raw(large, **encoding), place / "shards", shard_size=100, seed=0, workers=1)
    write(Images.raw(cropped, **encoding), place / "copied", shard_size=100, seed=0, workers=1)
    paths = {f"folder, files of {2 * options.size}": large, "shards of these": place / "shards",
             f"folder, files of {options.size}": cropped, "shards of the same files": place / "copied"}  # fmt: skip
    modality = Images(ImageConfig.parse({"size": options.size, "patch_size": 16}))
    data = {label: modality.splits(ImageData(path=str(path), cache=False)).train for label, path in paths.items()}
    return {label: (path, data[label]) for label, path in paths.items()}


def originals(folder: Path, options: argparse.Namespace, scale: int) -> None:
    """Write JPEG files of `scale` times the size in ten class folders."""
    side = scale * options.size
    source = Images.raw(options.source, None, None, 95) if options.source else None
    for i in range(options.images):
        path = folder / str(i % 10) / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if source:
            name = source.names[i % len(source.names)]
            raw = source.files.read(source.root + name)
            image = fit(open_image(raw, 3, name), side, side)
        else:
            ramp = np.linspace(0, 200, side)[:, None, None] + np.random.default_rng(i).integers(0, 40, (side, side, 3))
            image = Image.fromarray(ramp.astype(np.uint8))
        image.save(path, quality=90)


def raw_reader(path: Path, dataset: Dataset):
    """Return a function that reads a sample's undecoded bytes by index."""
    collection = dataset.collection
    if hasattr(collection, "shards"):
        return collection.shards.read
    return lambda i: collection.source.read(collection.root + collection.names[i])


if __name__ == "__main__":
    main()
