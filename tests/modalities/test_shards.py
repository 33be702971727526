"""Tar shards: the same images as the folder, sample order, damage that is named, nothing written outside."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from test_image_data import encoded, everything, noise, splits, tree

from unilatent.batches import loader, micro_batches
from unilatent.modalities._media import shards as media_shards
from unilatent.modalities.base import BadSample
from unilatent.modalities.image import Image, ImageConfig
from unilatent.modalities.image.data import KIND
from unilatent.modalities.image.storing import Encoding, ImagesToStore
from unilatent.shards import index as indexing
from unilatent.shards import places
from unilatent.shards.order import Order
from unilatent.shards.places import expand
from unilatent.shards.writing import BAD, keys, verify, write

PNG = Encoding((8, 8), "png", 95)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test."""
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    for variable in ("UNILATENT_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tree(tmp_path / "folder", each=10)


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """Twenty images of two classes in seven shards."""
    out = tmp_path / "shards"
    write(ImagesToStore(folder, PNG), out, shard_size=3, seed=0, workers=1)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tar(path: Path, *members: tuple[str, bytes], **fields) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, raw in members:
            add(archive, name, raw, **fields)
    return path


def add(archive: tarfile.TarFile, name: str, raw: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(raw)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(raw))


def image(seed: int = 0) -> bytes:
    return encoded(noise(8, 8, 3, seed=seed))


def sample(key: str, label: int = 0, seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image(seed)), (f"{key}.cls", str(label).encode())]


def outcomes(path: Path | str) -> dict[str, str]:
    """Key -> "" or the error, for each sample as training reads it."""
    view = splits(path).train
    errors = {}
    for i in range(len(view)):
        key = view.shards.key(i) or str(i)
        try:
            view[i]
            errors[key] = ""
        except BadSample as error:
            errors[key] = str(error)
    return errors


def verified(path: Path | str) -> dict[str, list[str]]:
    """Shard -> its faults, as `data verify` prints them."""
    shards, manifest = places.find(str(path), "shards")
    labelled = bool(manifest and manifest.class_names)
    return {
        shard.name: faults
        for shard, faults in verify(shards, labelled, frozenset(media_shards.suffixes_in_shards(KIND)))
    }


# ---- round trip ----------------------------------------------------------------------------------------------------


def test_shards_have_the_images_and_classes_of_the_folder(folder: Path, shards: Path):
    plain, packed = splits(folder).train, splits(shards).train
    assert packed.facts == plain.facts == {"labels": {"class_names": ("cat", "dog")}}
    by_name = {plain.collection.names[i].removesuffix(".png"): plain[i] for i in range(len(plain))}
    assert {packed.shards.key(i) for i in range(20)} == by_name.keys()
    for i in range(20):
        pixels, values = packed[i]
        expected, labels = by_name[packed.shards.key(i)]
        assert torch.equal(pixels, expected) and values == labels
    assert verified(shards) == {f"shard-{i:06d}.tar": [] for i in range(7)}


def test_webdataset_reads_these_shards_and_its_shards_are_read_here(shards: Path, tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = {s["__key__"]: (s["png"], s["cls"]) for s in webdataset.WebDataset(paths, shardshuffle=False)}
    ours = media_shards.open_shards(str(shards), "x", KIND)
    assert theirs == {ours.key(i): (ours.read(i), str(ours.label(i)).encode()) for i in range(20)}

    with webdataset.ShardWriter(str(tmp_path / "their-%04d.tar"), maxcount=8, verbose=0) as writer:
        for key, (raw, label) in theirs.items():
            writer.write({"__key__": key, "png": raw, "cls": int(label)})
    foreign = splits(str(tmp_path / "their-{0000..0002}.tar")).train
    assert foreign.facts == {"labels": {"class_names": ("0", "1")}}
    again = {foreign.shards.key(i): (foreign.shards.read(i), foreign.shards.label(i)) for i in range(len(foreign))}
    assert again == {key: (raw, int(label)) for key, (raw, label) in theirs.items()}


def test_labels_may_be_in_json_or_absent(tmp_path: Path):
    rows = [(f"{i}.{s}", raw) for i in range(3) for s, raw in (("png", image(i)), ("json", b'{"label": %d}' % i))]
    view = splits(tar(tmp_path / "json.tar", *rows)).train
    assert [view[i][1] for i in range(3)] == [{"labels": i} for i in range(3)]
    bare = splits(tar(tmp_path / "bare.tar", ("a.png", image()), ("b.PNG", image(1)))).train
    assert bare.facts == {} and [bare[i][1] for i in range(2)] == [{}, {}]


def test_held_out_images_do_not_depend_on_the_shards(folder: Path, tmp_path: Path):
    held = []
    for size in (3, 7):
        write(ImagesToStore(folder, PNG), tmp_path / str(size), shard_size=size, seed=size, workers=1)
        both = splits(tmp_path / str(size), held_out=6)
        held.append({both.held_out.shards.key(i) for i in both.held_out.numbers})
        assert len(both.train) == 14 and not set(both.train.numbers) & set(both.held_out.numbers)
        assert Counter(values["labels"] for values in everything(both.held_out)[1]) == {0: 3, 1: 3}
        assert {both.train.index_at(0, p) for p in range(14)} == set(range(14))
    assert held[0] == held[1]


def test_the_fingerprint_depends_on_the_samples(folder: Path, shards: Path, tmp_path: Path):
    one = splits(shards).train.fingerprint
    assert splits(shards).train.fingerprint == one != splits(shards, held_out=2).train.fingerprint
    (shards / "shards.json").unlink()
    bare = splits(shards).train.fingerprint
    assert bare == splits(shards).train.fingerprint != one
    tar(shards / "shard-000000.tar", *sample("new"))
    assert splits(shards).train.fingerprint != bare


def test_read_returns_all_samples_in_order(shards: Path):
    modality = Image(ImageConfig.parse({"size": 8, "patch_size": 2}))
    batches = list(modality.read(shards, 8))
    assert [len(data) for data, _ in batches] == [8, 8, 4]
    view = splits(shards).train
    assert torch.equal(torch.cat([data for data, _ in batches]), everything(view)[0])
    assert [key for _, names in batches for key in names] == [view.shards.key(i) for i in range(20)]


def test_keys_are_unique_and_end_at_their_first_dot():
    names = ["a/b.c.png", "a/b_c.png", "a/x.png", "a/x.jpg", "n.1/x.png", "é/ü.png", "x" * 300 + ".png"]
    unique = keys(names)
    assert unique[:6] == ["a/b_c", "a/b_c~2", "a/x", "a/x~2", "n.1/x", "é/ü"] and len(unique[6]) == 200
    assert all(indexing.KEY.fullmatch(f"{key}.png")[1] == key for key in unique)


# ---- order ---------------------------------------------------------------------------------------------------------

COUNTS = [7, 1, 0, 30, 12, 5, 9, 20, 3, 11]


@pytest.mark.parametrize(("lanes", "window"), [(1, 5), (4, 6), (8, 1000), (64, 2)])
def test_each_epoch_has_each_sample_once_in_its_own_order(lanes: int, window: int):
    order = Order(COUNTS, lanes, window)
    n = sum(COUNTS)
    epochs = [[order.at(3, e * n + p) for p in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [order.at(4, p) for p in range(n)]
    again = Order(COUNTS, lanes, window)
    backwards = [again.at(3, p) for p in reversed(range(3 * n))][::-1]
    assert backwards == [sample for epoch in epochs for sample in epoch]


def test_neighbours_in_a_lane_are_near_on_disk_and_well_shuffled():
    order = Order([100] * 64, lanes=16, window=50)
    lane = [order.at(0, 5 + 16 * step) for step in range(400)]
    assert len({sample // 100 for sample in lane[:50]}) == 1  # one window, one shard
    assert len({sample // 100 for sample in lane}) == 4  # a lane is 400 samples: four whole shards
    assert abs(np.corrcoef(lane[:50], range(50))[0, 1]) < 0.4 and lane[:50] != sorted(lane[:50])


def test_processes_read_different_shards_in_one_global_order():
    order = Order([50] * 32, lanes=8)
    size, batch = 32 * 50, 16
    steps = range(size // batch)

    def positions(rank: int, world: int) -> list[int]:
        return [p for batch_positions in micro_batches(steps, batch, None, rank, world) for p in batch_positions]

    whole = [order.at(7, p) for p in positions(0, 1)]
    for world in (2, 4):
        ranks = [[order.at(7, p) for p in positions(rank, world)] for rank in range(world)]
        together = [ranks[i % world][i // world] for i in range(size)]
        assert together == whole  # interleaved
        touched = [{sample // 50 for sample in rank} for rank in ranks]
        assert [len(shards) for shards in touched] == [32 // world] * world  # here lanes end at shard boundaries
        assert sum(len(shards) for shards in touched) == len(set.union(*touched))


def test_resuming_within_a_shard_equals_an_uninterrupted_run(shards: Path):
    dataset = splits(shards, held_out=3).train
    modality = Image(ImageConfig.parse({"size": 8, "patch_size": 2}))

    def batches(first: int, workers: int = 0) -> list:
        positions = list(micro_batches(range(first, 9), 4, None))
        return [batch for batch, _ in loader(dataset, modality, positions, seed=5, workers=workers)]

    whole = batches(0)
    for first, workers in ((1, 0), (5, 0), (0, 2), (4, 1)):
        for a, b in zip(whole[first:], batches(first, workers), strict=True):
            assert torch.equal(a.data, b.data) and torch.equal(a.values["labels"], b.values["labels"])
    assert len({tuple(batch.data.flatten().tolist()) for batch in whole}) == 9


def test_concurrent_reads_share_no_file_position(shards: Path):
    """Many threads at once, a copy for another process, and fewer open files than shards."""
    found = media_shards.open_shards(str(shards), "x", KIND)
    found._files.limit = found._indices.limit = 2
    expected = [found.read(i) for i in range(20)]
    assert len(found._files.cached) == len(found._indices.cached) == 2
    seen: list[bool] = []

    def reader(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(20):
            seen.append(found.read(int(i)) == expected[i])

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(seen) == 160 and all(seen)
    copy = pickle.loads(pickle.dumps(found))
    assert [copy.read(i) for i in range(20)] == expected


# ---- F19: malicious tars -------------------------------------------------------------------------------------------


def attack(path: Path) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, raw in sample("good"):
            add(archive, name, raw)
        add(archive, "../outside.png", image())
        add(archive, "/tmp/absolute.png", image())
        add(archive, "a/../../up.png", image())
        add(archive, "soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "hard.png", type=tarfile.LNKTYPE, linkname="good.png")
        add(archive, "device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(archive, "pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "link", type=tarfile.SYMTYPE, linkname="..")
        add(archive, "huge.png", image())
        for name, raw in sample("last"):
            add(archive, name, raw)
    return path


@pytest.mark.parametrize("manifest", [False, True])
def test_f19_members_that_lead_out_of_the_folder_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: bool
):
    monkeypatch.setattr(indexing, "LARGEST", 10_000)
    place = tmp_path / "in" / "deep"
    place.mkdir(parents=True)
    path = attack(place / "attack.tar")
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:  # give huge.png a large size in its header
        header = archive.getmember("huge.png").offset
    member = tarfile.TarInfo("huge.png")
    member.size = 20_000
    raw[header : header + 512] = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(raw[: header + 512] + bytes(20_480) + raw[header + 1024 :])
    if manifest:
        facts = {"name": path.name, "bytes": path.stat().st_size, "sha256": "0" * 64, "count": 10}
        (place / "shards.json").write_text(places.Manifest(10, ("one",), {}, (facts,)).text())
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    found = outcomes(place)
    assert [key for key, fault in found.items() if not fault] == ["good", "last"]
    words = {
        "../outside": "leads out", "/tmp/absolute": "absolute path", "a/../../up": "leads out",
        "soft": "a link to /etc/passwd", "hard": "a link to good.png", "device": "neither a file",
        "pipe": "neither a file", "huge": "20,000 bytes, more than 10,000",
    }  # fmt: skip
    for key, word in words.items():
        assert word in found[key] and key in found[key] and "refused" in found[key], found[key]
    (faults,) = verified(place).values()
    assert any(fault.startswith("link: a link to ..") for fault in faults)
    assert all(any(fault.startswith(f"{key}.png: ") for fault in faults) for key in words)
    after = sorted(str(p) for p in tmp_path.rglob("*") if "cache" not in p.parts)
    assert after == before and not Path("/tmp/absolute.png").exists()


def test_f19_a_sparse_member_is_not_expanded(tmp_path: Path):
    """A gigabyte of zeros in one block, in the old GNU format."""
    member = tarfile.TarInfo("sparse.png")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % 2**30
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    good = tar(tmp_path / "good.tar", *sample("good")).read_bytes()
    (tmp_path / "sparse.tar").write_bytes(bytes(header) + bytes(512) + good)
    found = outcomes(tmp_path / "sparse.tar")
    assert found["good"] == "" and "a sparse file, refused" in found["sparse"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_f19_headers_that_would_fill_memory_stop_reading(tmp_path: Path, kind: bytes):
    good = tar(tmp_path / "x.tar", *sample("good")).read_bytes()
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 2**40
    place = good.rstrip(b"\0")
    place += bytes(-len(place) % 512)
    (tmp_path / "x.tar").write_bytes(place + member.tobuf(tarfile.GNU_FORMAT) + good)
    assert outcomes(tmp_path / "x.tar") == {"good": ""}
    assert "a header of 1,099,511,627,776 bytes" in verified(tmp_path / "x.tar")["x.tar"][0]


def test_f20_pickles_are_never_opened(tmp_path: Path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    bomb = pickle.dumps(Bomb())
    names = [f"a.{suffix}" for suffix in ("pkl", "pyd", "pickle", "pt", "pth", "npy", "x.npz")]
    path = tar(tmp_path / "x.tar", *sample("a"), *((name, bomb) for name in names), ("b.pkl", bomb))
    assert outcomes(path) == {"a": ""}
    assert [fault.partition(":")[0] for fault in verified(path)["x.tar"]] == [*names, "b.pkl"]
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists()  # loading it would have run the code


# ---- F20: damage ---------------------------------------------------------------------------------------------------


def one_shard(folder: Path, out: Path) -> Path:
    write(ImagesToStore(folder, PNG), out, shard_size=100, seed=None, workers=1)
    return out / "shard-000000.tar"


def test_f20_truncated_within_a_member(folder: Path, tmp_path: Path):
    path = one_shard(folder, tmp_path / "one")
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[2 * 15 + 1].offset_data + 100  # in the sixteenth image
    path.write_bytes(path.read_bytes()[:cut])
    found = outcomes(tmp_path / "one")
    bad = [fault for fault in found.values() if fault]
    assert len(found) == 20 and len(bad) == 5
    assert "dog/5.png: cut short, 100 of" in bad[0] and str(path) in bad[0]
    assert all("missing, the shard contains only 16 samples" in fault and str(path) in fault for fault in bad[1:])
    (faults,) = verified(tmp_path / "one").values()
    words = ("SHA-256 is", f"{cut:,} bytes, the manifest says", "16 samples, the manifest says 20", "cut short")
    assert all(any(word in fault for fault in faults) for word in words)
    (tmp_path / "one" / "shards.json").unlink()
    assert [bool(fault) for fault in outcomes(path).values()] == [False] * 15 + [True]


def test_f20_truncated_at_the_boundary_of_a_member(folder: Path, tmp_path: Path):
    """Python's own reader accepts such a file as complete."""
    path = one_shard(folder, tmp_path / "one")
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[2 * 15].offset
    path.write_bytes(path.read_bytes()[:cut])
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 30
    bad = [fault for fault in outcomes(tmp_path / "one").values() if fault]
    assert len(bad) == 5 and all("missing, the shard contains only 15 samples" in fault for fault in bad)
    (tmp_path / "one" / "shards.json").unlink()
    assert "no end-of-archive mark" in verified(path)[path.name][0]


def test_f20_a_damaged_header_loses_the_following_samples_with_an_error(folder: Path, tmp_path: Path):
    path = one_shard(folder, tmp_path / "one")
    with tarfile.open(path) as archive:
        at = archive.getmembers()[10].offset
    raw = bytearray(path.read_bytes())
    raw[at + 150] ^= 1
    path.write_bytes(raw)
    bad = [fault for fault in outcomes(tmp_path / "one").values() if fault]
    assert len(bad) == 15 and f"damaged header at byte {at:,}" in bad[0]


def test_f20_missing_members_and_duplicate_keys(tmp_path: Path):
    lone = ("lone.png", image(7))
    path = tar(
        tmp_path / "x.tar", *sample("a", 1), lone, ("only.cls", b"1"), *sample("twice"), *sample("twice", 1),
        ("odd.png", image()), ("odd.cls", b"cat"), ("README.md", b"x"), ("note.json", b"{}"), *sample("z"),
    )  # fmt: skip
    found = outcomes(path)
    assert {key for key, fault in found.items() if not fault} == {"a", "z"}
    assert "no class (" in found["lone"] and "no data beside its class" in found["only"]
    assert "appears more than once" in found["twice"] and "'cat' is no class number" in found["odd"]
    assert len(splits(path).train) == 7 and "README" not in found and "note" not in found
    assert all(str(path) in fault for fault in found.values() if fault)
    held = splits(path, held_out=1)
    assert held.held_out[0][1]["labels"] in (0, 1)  # never a sample with a missing member


def test_f20_an_undecodable_image_is_a_bad_sample(tmp_path: Path):
    path = tar(tmp_path / "x.tar", *sample("a"), ("b.png", image()[:60]), ("b.cls", b"0"), ("c.png", b""))
    found = outcomes(path)
    assert found["a"] == "" and "cannot be decoded" in found["b"] and "b" in found["b"] and found["c"]


def test_files_that_are_not_tars_are_refused_immediately(tmp_path: Path, shards: Path):
    for name, raw in (("empty.tar", b""), ("text.tar", b"hello" * 1000), ("html.tar", b"<html>")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=f"{name}: it contains no samples"):
            splits(tmp_path / name)
    with pytest.raises(ValueError, match=r"data.path: .*gone-3.tar does not exist"):
        splits(tmp_path / "gone-{3..5}.tar")
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000002.tar does not exist; copy the shards again"):
        splits(shards)


@pytest.mark.parametrize("name", ["../evil.tar", "/etc/evil.tar", "a/b.tar", ".tar", "evil"])
def test_a_manifest_cannot_name_files_elsewhere(shards: Path, name: str):
    facts = {"name": name, "bytes": 1, "sha256": "0" * 64, "count": 1}
    (shards / "shards.json").write_text(places.Manifest(1, ("a",), {}, (facts,)).text())
    with pytest.raises(ValueError, match=r"shards.json: damaged"):
        splits(shards)


def test_a_damaged_manifest_is_refused(shards: Path):
    path = shards / "shards.json"
    text = path.read_text()
    for changed in (text.replace('"cat"', '"cot"'), text[:-20], "", text.replace('"count": 3', '"count": 4', 1)):
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"shards.json: damaged"):
            splits(shards)
    path.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="update unilatent"):
        splits(shards)


@pytest.mark.parametrize("seed", range(20))
def test_verify_finds_every_flipped_bit(shards: Path, seed: int):
    rng = np.random.default_rng(seed)
    path = shards / f"shard-{rng.integers(7):06d}.tar"
    raw = bytearray(path.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)
    found = verified(shards)
    assert "SHA-256 is" in found.pop(path.name)[0] and not any(found.values())


# ---- writing -------------------------------------------------------------------------------------------------------


def test_one_and_two_workers_write_the_same_bytes(folder: Path, shards: Path, tmp_path: Path):
    (folder / "cat" / "bad.png").write_bytes(b"no image")
    one = write(ImagesToStore(folder, PNG), tmp_path / "one", shard_size=3, seed=1, workers=1)
    two = write(ImagesToStore(folder, PNG), tmp_path / "two", shard_size=3, seed=1, workers=2)
    assert one == two and (one.total, one.shards, one.bad, one.reused) == (20, 7, 1, 0)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != contents(shards)
    assert set(contents(tmp_path / "one")) == {*(f"shard-{i:06d}.tar" for i in range(7)), "shards.json", BAD}
    (line,) = (tmp_path / "one" / BAD).read_text().splitlines()
    assert json.loads(line)["sample"] == "cat/bad.png" and "unknown image format" in json.loads(line)["reason"]


@pytest.mark.parametrize("after", [0, 7, 19])
def test_an_interrupted_call_resumes(folder: Path, shards: Path, tmp_path: Path, after: int):
    class Interrupted(ImagesToStore):
        left = after

        def encode(self, number: int) -> tuple[str, bytes]:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().encode(number)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(Interrupted(folder, PNG), out, shard_size=3, seed=0, workers=1)
    (out / "shard-000005.tar.tmp-1").write_bytes(b"left by a killed process")
    if after == 7:  # a finished shard that was damaged is written again
        path = out / "shard-000001.tar"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    done = write(ImagesToStore(folder, PNG), out, shard_size=3, seed=0, workers=1)
    assert done.reused == {0: 0, 7: 1, 19: 6}[after]
    assert contents(out) == contents(shards)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert write(ImagesToStore(folder, PNG), out, shard_size=3, seed=0, workers=1).reused == 7
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_folder_with_other_shards_is_not_changed(folder: Path, shards: Path, tmp_path: Path):
    before = contents(shards)
    other = Encoding((4, 4), "png", 95)
    with pytest.raises(ValueError, match="contains shards of other images or settings; choose another --out"):
        write(ImagesToStore(folder, other), shards, shard_size=3, seed=0, workers=1)
    (shards / "shards.json").unlink()
    with pytest.raises(ValueError, match="choose another --out"):
        write(ImagesToStore(folder, other), shards, shard_size=3, seed=0, workers=1)
    assert contents(shards).items() <= before.items()


def test_images_are_cropped_as_in_training_and_copied_if_unchanged(tmp_path: Path):
    (tmp_path / "in").mkdir()
    files = {"big": encoded(noise(40, 31, 3)), "exact": encoded(noise(8, 8, 3)), "grey": encoded(noise(9, 9))}
    files["jpeg"] = encoded(noise(8, 8, 3), "JPEG", quality=80)
    for name, raw in files.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(raw)
    stored = ImagesToStore(tmp_path / "in", PNG)
    encodings = {stored.names[i]: stored.encode(i) for i in range(4)}
    plain = everything(splits(tmp_path / "in").train)[0]
    for i, name in enumerate(stored.names):
        pixels = np.asarray(PIL.open(io.BytesIO(encodings[name][1])).convert("RGB")) / 255
        assert np.abs(pixels.transpose(2, 0, 1) - plain[i].numpy()).max() < 1e-6, name
    assert encodings["exact.png"][1] == files["exact"] and encodings["big.png"][1] != files["big"]
    assert PIL.open(io.BytesIO(encodings["grey.png"][1])).mode == "L"
    jpg = ImagesToStore(tmp_path / "in", Encoding((8, 8), "jpg", 95))
    assert jpg.encode(stored.names.index("jpeg.png")) == ("jpg", files["jpeg"])
    whole = ImagesToStore(tmp_path / "in", Encoding(None, "webp", 90))
    assert PIL.open(io.BytesIO(whole.encode(stored.names.index("big.png"))[1])).size == (31, 40)


# ---- places --------------------------------------------------------------------------------------------------------


def test_patterns():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,yy}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "yy-0.tar", "yy-1.tar"]
    assert expand("plain.tar") == ["plain.tar"]
    for pattern in ("{5..1}.tar", "{0..99999999}.tar"):
        with pytest.raises(ValueError, match="is not a range of shards"):
            expand(pattern)


@pytest.mark.parametrize(
    "path", ["pipe:touch {}", "pipe:touch {}; cat x.tar", "PIPE:touch {}", "ftp://host/{}.tar", "file:///{}.tar"]
)
def test_only_known_url_schemes_are_opened_and_never_a_shell(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "system", pytest.fail)
    monkeypatch.setattr("subprocess.Popen", pytest.fail)
    with pytest.raises(ValueError, match=r"data\.path: .* (runs a shell command|has an unknown URL scheme)"):
        splits(path.format(tmp_path / "canary"))
    assert not (tmp_path / "canary").exists()


def test_folders_with_images_and_tars_are_folders_of_images(folder: Path, tmp_path: Path):
    tar(folder / "backup.tar", *sample("a"))
    assert len(splits(folder).train) == 20
    (tmp_path / "flat").mkdir()
    tar(tmp_path / "flat" / "x.tar", *sample("a"))
    (tmp_path / "flat" / "README.md").write_text("x")
    assert len(splits(tmp_path / "flat").train) == 1


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, list[str]]]:
    """A local server of the shards, and the list of requested files."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            requests.append(self.path.rpartition("/")[2])

    handler = functools.partial(Handler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        threading.Thread(target=functools.partial(service.serve_forever, 0.02), daemon=True).start()
        yield f"http://127.0.0.1:{service.server_address[1]}", requests
        service.shutdown()


def test_shards_at_a_url_are_downloaded_once_when_needed(server: tuple[str, list[str]], shards: Path, cache: Path):
    url, requests = server
    local = everything(splits(shards).train)
    far = splits(url + "/").train
    assert requests == ["shards.json"] and len(far) == 20
    far[0]
    assert requests == ["shards.json", "shard-000000.tar"]
    there = everything(far)
    assert torch.equal(there[0], local[0]) and there[1] == local[1]
    assert sorted(requests[1:]) == [f"shard-{i:06d}.tar" for i in range(7)]
    again = everything(splits(url).train)
    assert torch.equal(again[0], local[0]) and requests[8:] == ["shards.json"]
    assert not list(cache.rglob("*.part"))


def test_a_pattern_at_a_url_needs_no_manifest(server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch):
    url, requests = server
    far = splits(f"{url}/shard-{{000000..000006}}.tar", held_out=4)
    assert (len(far.train), len(far.held_out)) == (16, 4) and len(requests) == 7
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    assert len(splits(f"{url}/shard-{{000000..000006}}.tar").train) == 20  # everything is in the cache
    with pytest.raises(ValueError, match="UNILATENT_OFFLINE=1 forbids"):
        splits(f"{url}/shard-000007.tar")


def test_downloads_without_the_manifests_hash_are_discarded(server: tuple[str, list[str]], shards: Path, cache: Path):
    url, _ = server
    path = shards / "shard-000003.tar"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    far = splits(url).train
    with pytest.raises(ValueError, match=r"shard-000003.tar: the download was discarded, its SHA-256 is") as caught:
        far[9]
    assert not isinstance(caught.value, BadSample)
    assert not [p for p in cache.rglob("*shard-000003*") if not p.name.endswith(".lock")]
    path.write_bytes(good)
    assert far[9][0].shape == (3, 8, 8)


def test_interrupted_downloads_are_retried(server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, cache: Path):
    url, _ = server
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    gone = splits(f"{url}/shard-000000.tar").train
    assert len(gone) == 3 and pauses == []
    with pytest.raises(ValueError, match=r"shard-000009.tar: download failed \(HTTP Error 404"):
        splits(f"{url}/shard-000009.tar")
    assert pauses == []  # retrying would not help
    whole = places._from_web
    broken = iter([True, True, False])

    def breaking(address: str) -> Iterator[bytes]:
        chunks = list(whole(address))
        yield chunks[0][:100]
        if next(broken):
            raise ConnectionResetError("peer went away")
        yield chunks[0][100:]

    monkeypatch.setattr(places, "_from_web", breaking)
    assert len(splits(f"{url}/shard-000001.tar").train) == 3 and pauses == [1, 2]


def test_a_response_shorter_than_announced_is_refused(server: tuple[str, list[str]], shards: Path, monkeypatch):
    """urllib reports no error if a response ends early."""
    url, _ = server
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(places, "ATTEMPTS", 2)
    size = (shards / "shard-000000.tar").stat().st_size

    class Short(io.BytesIO):
        headers = {"Content-Length": str(size)}  # noqa: RUF012

    monkeypatch.setattr(places, "urlopen", lambda *_, **__: Short(b"x" * (size - 1)))
    with pytest.raises(ValueError, match=rf"broke off after {size - 1:,} of {size:,} bytes"):
        splits(f"{url}/shard-000000.tar")


def test_other_stores_are_read_through_their_clients(shards: Path, monkeypatch: pytest.MonkeyPatch):
    """With a client (here one in memory) a store is read like any other; without its package it is an error."""
    import fsspec

    monkeypatch.setitem(places.SCHEMES, "memory", "fsspec")
    for path in shards.iterdir():
        with fsspec.open(f"memory://bucket/set/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    far, near = splits("memory://bucket/set").train, splits(shards).train
    assert all(torch.equal(far[i][0], near[i][0]) for i in range(20))
    monkeypatch.setattr(fsspec, "open", lambda *_: (_ for _ in ()).throw(ImportError("Install s3fs")))
    with pytest.raises(ValueError, match=r"s3://bucket/set/shards.json: needs s3fs; pip install 'unilatent\[data\]'"):
        splits("s3://bucket/set")


# ---- cached indices ------------------------------------------------------------------------------------------------


def test_indices_are_cached_until_the_file_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = tar(tmp_path / "x.tar", *sample("a"), *sample("b"))
    assert len(splits(path).train) == 2
    (cached,) = (cache / "shards" / "index").iterdir()
    monkeypatch.setattr(indexing, "_scan", pytest.fail)
    assert len(splits(path).train) == 2
    monkeypatch.undo()
    monkeypatch.setenv("UNILATENT_CACHE", str(cache))
    cached.write_text("{")
    assert len(splits(path).train) == 2  # a damaged index is created again
    tar(path, *sample("a"), *sample("b"), *sample("c"), *sample("d"), *sample("e"))
    os.utime(path, (1, 1))
    assert len(splits(path).train) == 5
