"""Images from files: decoding compared with known pixels, folders and archives, splits, invalid input."""

from __future__ import annotations

import io
import pickle
import re
import shutil
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from sklearn.datasets import load_digits

from unilatent.config import ConfigError
from unilatent.modalities._media.collection import held_out_indices
from unilatent.modalities._media.pixels import Frame, decode, fit
from unilatent.modalities.image import Image, ImageConfig, ImageData
from unilatent.modalities.image.digits import DIGITS


def make(**fields) -> Image:
    return Image(ImageConfig.parse({"size": 8, "patch_size": 2} | fields))


def splits(path: Path | str, held_out: int = 0, modality: Image | None = None, **fields):
    config = ImageData.parse({"path": str(path), "held_out": held_out} | fields)
    return (modality or make()).splits(config)


def encoded(array: np.ndarray, format: str = "PNG", **options) -> bytes:
    return saved(PIL.fromarray(array), format, **options)


def saved(image: PIL.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tree(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 4) -> Path:
    """Class folders of different 10 x 12 images."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(encoded(noise(10, 12, 3, seed=100 * c + i)))
    return root


def zipped(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):  # the archive's order must not matter
            archive.write(path, path.relative_to(folder))
    return file


def everything(dataset) -> tuple[torch.Tensor, list]:
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([image for image, _ in items]), [values for _, values in items]


# ---- decoding ------------------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_unchanged():
    array = noise(8, 6, 3)
    assert (decode(encoded(array), Frame(8, 6, 3, 2), "x").numpy() == array.transpose(2, 0, 1)).all()


def test_halving_averages_exactly():
    """16 x 16 to 4 x 4 is two halvings with a box filter: the mean of 4 x 4 blocks (here of multiples of 16)."""
    array = noise(16, 16) // 16 * 16
    blocks = array.reshape(4, 4, 4, 4).astype(float).mean((1, 3))
    assert (np.asarray(fit(PIL.fromarray(array), 4, 4)) == blocks).all()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 8), (8, 4)])
def test_crop_keeps_a_ramp_and_its_centre(height, width):
    """Averaging, bicubic resizing and cutting the centre keep a linear ramp, evaluated at the pixels' centres."""
    row = np.arange(48, dtype=np.uint8)[None].repeat(20, 0) * 5
    out = np.asarray(fit(PIL.fromarray(row), height, width)).astype(float)
    assert out.shape == (height, width)
    step = 1 / max(height / 20, width / 48)  # source pixels per target pixel
    want = 5 * (23.5 + (np.arange(width) - (width - 1) / 2) * step)
    inner = slice(1, -1) if width == 8 and height == 4 else slice(None)  # where the crop reaches the ends of the ramp
    assert np.abs(out - want)[:, inner].max() <= 5 * 0.5 * step  # rounding moves the crop by at most half a pixel
    assert np.allclose(np.diff(out[:, inner]), 5 * step, atol=0.1 * 5 * step)


def test_crop_cuts_the_longer_side_at_its_centre():
    array = noise(8, 14)
    assert (np.asarray(fit(PIL.fromarray(array), 8, 8)) == array[:, 3:11]).all()
    assert (np.asarray(fit(PIL.fromarray(array.T), 8, 8)) == array.T[3:11]).all()


def test_smaller_images_are_enlarged():
    assert (np.asarray(fit(PIL.fromarray(np.full((3, 5), 77, np.uint8)), 16, 16)) == 77).all()


def test_camera_rotation_is_applied():
    array = np.zeros((8, 6, 3), np.uint8)
    array[0, :, 0] = 255
    exif = PIL.Exif()
    exif[0x0112] = 6  # the image must be rotated by 90 degrees clockwise
    turned = decode(encoded(array, exif=exif), Frame(6, 8, 3, 2), "x").numpy()
    assert (turned == np.rot90(array, -1).transpose(2, 0, 1)).all()
    assert turned[0, :, -1].min() == 255


def test_cmyk_becomes_rgb():
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[:, :4, 0] = 255  # cyan on the left, white on the right
    pixels = decode(saved(PIL.fromarray(ink, "CMYK"), "TIFF"), Frame(8, 8, 3, 2), "x")
    assert pixels[:, 0, 0].tolist() == [0, 255, 255] and pixels[:, 0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    levels = np.array([[0, 257, 32896], [65535, 128, 129]], np.uint16).repeat(4, 0).repeat(4, 1)
    for channels in (1, 3):
        pixels = decode(encoded(levels, kind), Frame(8, 12, channels, 2), "x")
        assert pixels.shape[0] == channels
        assert pixels[-1, ::4, ::4].tolist() == [[0, 1, 128], [255, 0, 1]]


def test_float_pixels_are_refused():
    with pytest.raises(ValueError, match=r"image x: cannot be decoded .*neither 8 nor 16-bit"):
        decode(encoded(np.zeros((8, 8), np.float32), "TIFF"), Frame(8, 8, 3, 2), "x")


def transparent(mode: str) -> bytes:
    """Left half an opaque (10, 20, 30) grey-ish colour, right half transparent."""
    colour = PIL.new("RGBA", (8, 8), (10, 20, 30, 255))
    colour.paste((10, 20, 30, 0), (4, 0, 8, 8))
    if mode == "P":
        palette = PIL.new("P", (8, 8), 0)
        palette.putpalette([10, 20, 30, 200, 0, 0])
        palette.paste(1, (4, 0, 8, 8))
        return saved(palette, transparency=1)
    return saved(colour.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode):
    pixels = decode(transparent(mode), Frame(8, 8, 3, 2), "x")
    left = [18, 18, 18] if mode == "LA" else [10, 20, 30]  # 0.299 * 10 + 0.587 * 20 + 0.114 * 30 = 18.15
    assert pixels[:, 0, 0].tolist() == left and pixels[:, 0, -1].tolist() == [255, 255, 255]


def test_grey_and_colour_are_converted():
    grey = noise(8, 8)
    assert (decode(encoded(grey), Frame(8, 8, 3, 2), "x").numpy() == grey).all()
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert decode(encoded(red), Frame(8, 8, 1, 2), "x").unique().tolist() == [76]  # 0.299 * 255


@pytest.mark.parametrize("raw", [b"", b"<html>not found</html>", encoded(noise(64, 64, 3))[:2000]])
def test_damaged_images_are_named(raw):
    with pytest.raises(ValueError, match=r"image a/b\.png: cannot be decoded \(.+\); remove it") as error:
        decode(raw, Frame(8, 8, 3, 2), "a/b.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 1), (50, 3), (3, 50)])
def test_images_smaller_than_a_patch_are_named(shape):
    with pytest.raises(ValueError, match=rf"image thin: {shape[0]} x {shape[1]} .* smaller than a patch \(4\)"):
        decode(encoded(noise(*shape)), Frame(8, 8, 3, 4), "thin")


# ---- the built-in digits -------------------------------------------------------------------------------------------


def test_digits_are_exact():
    train, held_out = (part for part in vars(splits(DIGITS, 100, make(channels=1))).values())
    assert len(train) == 1697 and len(held_out) == 100
    assert train.facts == held_out.facts == {"labels": {"class_names": tuple("0123456789")}}
    digits = load_digits()
    at = train.indices[123]
    image, values = train[123]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32
    assert torch.equal(image[0], torch.tensor(digits.images[at] / 16, dtype=torch.float32))
    assert values == {"labels": int(digits.target[at])}


def test_digits_have_the_requested_size_and_channels():
    image, _ = splits(DIGITS, 0, make(size=[16, 24])).train[0]
    assert image.shape == (3, 16, 24) and image.min() >= 0 and image.max() <= 1
    assert torch.equal(image[0], image[2])


# ---- folders and archives ------------------------------------------------------------------------------------------


def test_a_folder_and_its_zip_are_the_same_data(tmp_path):
    folder = tree(tmp_path / "set", each=6)
    a, b = splits(folder, 4), splits(zipped(folder, tmp_path / "set.zip"), 4)
    for left, right in ((a.train, b.train), (a.held_out, b.held_out)):
        assert torch.equal(everything(left)[0], everything(right)[0]) and everything(left)[1] == everything(right)[1]
        assert left.facts == right.facts == {"labels": {"class_names": ("cat", "dog")}}
    assert [values["labels"] for values in everything(a.train)[1]] == [0] * 4 + [1] * 4


def test_a_folder_above_the_classes_changes_nothing(tmp_path):
    folder = tree(tmp_path / "plain")
    shutil.copytree(folder, tmp_path / "above" / "data" / "train")
    plain, above = splits(folder, 2), splits(tmp_path / "above", 2)
    in_zip = splits(zipped(tmp_path / "above", tmp_path / "above.zip"), 2)
    for other in (above, in_zip):
        assert other.train.indices == plain.train.indices and other.train.facts == plain.train.facts
        assert torch.equal(everything(other.train)[0], everything(plain.train)[0])
    assert above.train.fingerprint == plain.train.fingerprint


def test_nested_images_belong_to_their_class_and_other_files_are_ignored(tmp_path):
    folder = tree(tmp_path / "set", each=1)
    (folder / "cat" / "kittens" / "old").mkdir(parents=True)
    (folder / "cat" / "kittens" / "old" / "x.PNG").write_bytes(encoded(noise(8, 8)))
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.md").write_text("no image")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "x.png").write_bytes(b"")
    (folder / "dog" / "._0.png").write_bytes(b"resource fork")
    train = splits(folder).train
    assert train.facts["labels"]["class_names"] == ("cat", "dog")
    assert [values["labels"] for values in everything(train)[1]] == [0, 0, 1]


def test_linked_class_folders_are_followed_and_loops_are_not(tmp_path):
    folder = tree(tmp_path / "set")
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(folder / name, target_is_directory=True)
    (folder / "cat" / "again").symlink_to(folder, target_is_directory=True)
    assert len(splits(folder).train) == len(splits(tmp_path / "linked").train) == 8


def test_images_without_classes_have_no_labels(tmp_path):
    folder = tree(tmp_path / "set", classes=("only",))
    train = splits(folder / "only", 1).train
    assert train.facts == {} and len(train) == 3 and train[0][1] == {}


def test_few_decoded_images_are_cached(tmp_path):
    folder = tree(tmp_path / "set")
    cached, uncached = splits(folder).train, splits(folder, cache=False).train
    first = everything(cached)[0]
    assert torch.equal(first, everything(uncached)[0])
    shutil.rmtree(folder / "cat")
    assert torch.equal(everything(cached)[0], first)
    with pytest.raises(ValueError, match="No such file"):
        uncached[0]


def test_samples_are_copies(tmp_path):
    """Changing an image in place must not change the cached one."""
    for data in (splits(tree(tmp_path / "set")).train, splits(DIGITS).train):
        before = data[0][0].clone()
        data[0][0].zero_()
        assert torch.equal(data[0][0], before) and before.any()


@pytest.mark.parametrize("workers", [1, 2])
def test_archives_are_read_correctly_by_worker_processes(tmp_path, workers):
    file = zipped(tree(tmp_path / "set", each=20), tmp_path / "set.zip")
    train = splits(file, cache=False).train
    want = everything(train)[0]  # the archive is open in the parent when workers are forked
    loader = torch.utils.data.DataLoader(train, batch_size=3, num_workers=workers)
    assert torch.equal(torch.cat([image for image, _ in loader]), want)
    assert torch.equal(everything(pickle.loads(pickle.dumps(train)))[0], want)


# ---- held-out samples ----------------------------------------------------------------------------------------------


def test_held_out_samples_are_disjoint_balanced_and_deterministic():
    a, b = splits(DIGITS, 200), splits(DIGITS, 200)
    assert a.held_out.indices == b.held_out.indices and set(a.held_out.indices).isdisjoint(a.train.indices)
    assert sorted([*a.train.indices, *a.held_out.indices]) == list(range(1797))
    counts = Counter(a.held_out[i][1]["labels"] for i in range(200))
    assert set(counts.values()) == {20} and len(counts) == 10


def test_smaller_held_out_sets_are_subsets_of_larger_ones():
    names, labels = [str(i) for i in range(200)], [i % 7 for i in range(200)]
    sets = [set(held_out_indices(names, labels, count)) for count in (0, 5, 14, 60, 199)]
    assert all(small < large for small, large in pairwise(sets))
    assert [len(held_out) for held_out in sets] == [0, 5, 14, 60, 199]


def test_added_samples_move_few_between_the_splits():
    names = [f"class/{i}.png" for i in range(1000)]
    before = {names[i] for i in held_out_indices(names, [0] * 1000, 100)}
    more = sorted([*names, *(f"class/new{i}.png" for i in range(100))])
    after = {more[i] for i in held_out_indices(more, [0] * 1100, 100)}
    assert len(before & after) >= 80  # about 9 of 100 are replaced by new ones
    assert not (after - before) & set(names)  # no old sample leaves the training set


def test_no_class_loses_all_its_training_samples_while_others_have_some():
    names, labels = [str(i) for i in range(24)], [0, 0, 1, 1] + [2] * 20
    out = held_out_indices(names, labels, 15)
    assert Counter(labels[i] for i in out) == {0: 1, 1: 1, 2: 13}


def test_fingerprints_change_with_samples_sizes_and_splits(tmp_path):
    folder = tree(tmp_path / "set")
    base = splits(folder, 2)
    prints = [base.train.fingerprint, base.held_out.fingerprint, splits(folder).train.fingerprint]
    prints.append(splits(folder, 2, make(size=4)).train.fingerprint)
    prints += [splits(DIGITS).train.fingerprint, splits(zipped(folder, tmp_path / "a.zip")).train.fingerprint]
    assert splits(folder, 2).train.fingerprint == prints[0]
    (folder / "cat" / "0.png").write_bytes(encoded(noise(10, 12, 3)) + b"longer")
    prints.append(splits(folder).train.fingerprint)
    (folder / "cat" / "0.png").rename(folder / "cat" / "9.png")
    prints.append(splits(folder).train.fingerprint)
    assert len(set(prints)) == len(prints)


# ---- invalid input -------------------------------------------------------------------------------------------------


def refused(path: Path, *words: str, held_out: int = 0) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        splits(path, held_out)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and ";" in message


def test_paths_without_data(tmp_path):
    refused(tmp_path / "nowhere", "data.path", "nowhere does not exist", "folder or .zip")
    (tmp_path / "file.txt").write_text("x")
    refused(tmp_path / "file.txt", "data.path", "neither a folder nor a .zip")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "data.path", "empty holds no images", ".png", ".jpg")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.md", "x")
    refused(tmp_path / "empty.zip", "data.path", "empty.zip holds no images")


def test_broken_archives(tmp_path):
    whole = zipped(tree(tmp_path / "set"), tmp_path / "set.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.zip", "data.path", "cut.zip is not a complete zip archive", "again")
    damaged = bytearray(whole)
    start = whole.index(b"\x89PNG")
    damaged[start + 60 : start + 80] = bytes(20)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"image \w+/\d\.png in .*damaged\.zip: cannot be unpacked"):
        everything(splits(tmp_path / "damaged.zip").train)


def test_unreadable_images_are_named_with_their_archive(tmp_path):
    folder = tree(tmp_path / "set")
    (folder / "dog" / "0.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"image .*set/dog/0\.png: cannot be decoded"):
        everything(splits(folder).train)
    with pytest.raises(ValueError, match=r"image dog/0\.png in .*set\.zip: cannot be decoded"):
        everything(splits(zipped(folder, tmp_path / "set.zip")).train)


def test_ambiguous_folders(tmp_path):
    folder = tree(tmp_path / "mixed")
    (folder / "loose.png").write_bytes(encoded(noise(8, 8)))
    refused(folder, "data.path", "1 images (loose.png", "next to its class folders")
    tree(tmp_path / "both" / "train"), tree(tmp_path / "both" / "val")
    refused(tmp_path / "both", "data.path", "train, val", "not classes")


def test_too_many_held_out_samples(tmp_path):
    folder = tree(tmp_path / "set")
    refused(folder, "data.held_out: 8", "only 8 samples", held_out=8)
    assert len(splits(folder, 7).train) == 1
    with pytest.raises(ConfigError, match="held_out"):
        splits(folder, -1)


# ---- reading for reconstruction ------------------------------------------------------------------------------------


def test_read_accepts_folders_archives_and_single_files(tmp_path):
    folder = tree(tmp_path / "set")
    (folder / "loose.jpg").write_bytes(encoded(noise(9, 9, 3), "JPEG"))
    batches = list(make().read(folder, 4))
    assert [len(batch) for batch, _ in batches] == [4, 4, 1] and batches[0][0].shape == (4, 3, 8, 8)
    names = [name for _, batch_names in batches for name in batch_names]
    assert names == [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(4)] + ["loose.jpg"]
    ((all_of_zip, zip_names),) = make().read(zipped(folder, tmp_path / "set.zip"), 100)
    assert torch.equal(all_of_zip, torch.cat([batch for batch, _ in batches])) and zip_names == names
    ((one, one_name),) = make().read(folder / "dog" / "1.png", 4)
    assert torch.equal(one[0], all_of_zip[5]) and one_name == ["1.png"]


def test_read_is_lazy_but_checks_the_path_immediately(tmp_path):
    with pytest.raises(ValueError, match=r"input: .* does not exist"):
        make().read(tmp_path / "nowhere", 1)
    with pytest.raises(ValueError, match=r"input: .* holds no images"):
        make().read(tmp_path, 1)
    folder = tree(tmp_path / "set", classes=("cat",))
    (folder / "cat" / "3.png").write_bytes(b"junk")
    batches = make().read(folder, 3)
    assert len(next(batches)[0]) == 3
    with pytest.raises(ValueError, match=r"3\.png: cannot be decoded"):
        next(batches)
