"""Malicious files, and files that are not what their names say, at every place that reads a file.

Each pickle here would leave a canary when it is loaded. To put a new entry point under test, add a line to
`ENTRY_POINTS`: what it is called with, given a hostile file. Contents are refused in one line that names the file.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import QUICK, Command
from PIL import Image
from safetensors.torch import load_file, save_file
from test_processes import environment

import unilatent
from unilatent import model_folder
from unilatent.importers.unite_official import is_unsafe
from unilatent.methods.base import LatentModel
from unilatent.model_folder import assemble, read_config
from unilatent.runs import checkpoint as ckpt


class Trap:
    """Unpickled, makes the file `canary`."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


def as_pickle(trap: Trap) -> bytes:
    return pickle.dumps({"model": {"w": trap}, "ema": {"w": trap}}, protocol=2)


def as_torch_zip(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"w": trap}, "ema": {"w": trap}}, file)
    return file.getvalue()


def as_torch_legacy(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"w": trap}, "ema": {"w": trap}}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_object_array(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.savez(file, arr_0=np.array([trap], dtype=object), mu=np.array([trap], dtype=object))
    return file.getvalue()


PAYLOADS = {
    "pickle": as_pickle,
    "torch": as_torch_zip,
    "torch legacy": as_torch_legacy,
    "object array": as_object_array,
}


def test_the_traps_are_armed(tmp_path: Path) -> None:
    """Each payload really makes its canary in a reader that trusts it."""
    readers: dict[str, Callable[[io.BytesIO], Any]] = {
        "pickle": pickle.load,
        "torch": lambda file: torch.load(file, weights_only=False),
        "torch legacy": lambda file: torch.load(file, weights_only=False),
        "object array": lambda file: np.load(file, allow_pickle=True)["arr_0"],
    }
    for name, make in PAYLOADS.items():
        canary = tmp_path / name.replace(" ", "_")
        readers[name](io.BytesIO(make(Trap(canary))))
        assert canary.exists(), name


class Ground(NamedTuple):
    """Where a hostile file is planted. file(name): the payload under that name; run: a finished run of twelve steps."""

    cli: Command
    run: Path
    folder: Path
    payload: bytes

    def file(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.payload)
        return path

    def model(self, name: str = model_folder.WEIGHTS) -> Path:
        """A model folder in which the file of that name is the payload."""
        shutil.copytree(self.run / "model", self.folder / "model")
        self.file(f"model/{name}")
        return self.folder / "model"

    def checkpoint(self, name: str) -> Path:
        """A checkpoint in which the file of that name is the payload, and whose manifest vouches for it."""
        copy = self.folder / "step_00000012"
        shutil.copytree(self.run / "checkpoints" / "step_00000012", copy)
        self.file(f"step_00000012/{name}")
        if name != ckpt.MANIFEST:
            sign(copy)
        return copy

    def command(self, *arguments: object) -> str:
        """The one line with which a command refuses."""
        outcome = self.cli(*arguments)
        assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
        return outcome.err

    def call(self, function: Callable[..., object], *arguments: object) -> str:
        with pytest.raises(ValueError) as refused:
            function(*arguments)
        return str(refused.value)

    def train(self, *arguments: object) -> str:
        return self.command("train", "digits", *QUICK, *arguments, "--out", self.folder / "out")


def sign(checkpoint: Path) -> None:
    """A correct manifest for whatever is in the folder now."""
    files = {p.name: ckpt.describe(p) for p in sorted(checkpoint.iterdir()) if p.is_file() and p.name != ckpt.MANIFEST}
    (checkpoint / ckpt.MANIFEST).write_text(ckpt._manifest(12, files))


def latents_of(g: Ground) -> Path:
    """A folder of latents whose only shard is the payload."""
    model = unilatent.load(g.run, device="cpu")
    index = {"model": model.fingerprint(), "seed": 0, "precision": "fp32", "shard_size": 4, "names": ["a"] * 4,
             "shards": ["latents_00000.safetensors"]}  # fmt: skip
    g.file("latents/latents_00000.safetensors")
    (g.folder / "latents" / "index.json").write_text(json.dumps(index))
    return g.folder / "latents"


def images_of(g: Ground) -> Path:
    """Two classes whose only images are the payload."""
    g.file("data/a/x.png")
    return g.file("data/b/x.png").parents[1]


PERCEPTUAL = ("modality.size=32", "modality.channels=3", "modality.perceptual_weight=1")
MADE_SAFE = "safetensors"
ENTRY_POINTS: dict[str, tuple[Callable[[Ground], str], str]] = {
    "load a file": (lambda g: g.call(unilatent.load, g.file("model.pt")), "never unpickled"),
    "load a model folder": (lambda g: g.call(unilatent.load, g.model()), MADE_SAFE),
    "load a config.json": (lambda g: g.call(unilatent.load, g.model("config.json")), "not JSON text"),
    "from_pretrained": (lambda g: g.call(unilatent.UNITE.from_pretrained, g.model()), MADE_SAFE),
    "from_pretrained config": (lambda g: g.call(unilatent.UNITE.from_pretrained, g.model("config.json")), "not JSON"),
    **{f"load a checkpoint's {name}": (lambda g, n=name: g.call(unilatent.load, g.checkpoint(n)), word)
       for name, word in (("model.safetensors", MADE_SAFE), ("ema.safetensors", MADE_SAFE), ("config.json", "not JSON"),
                          ("MANIFEST.json", "use an older checkpoint"))},
    **{f"resume from {name}": (lambda g, n=name: g.train("--resume", g.checkpoint(n)), word)
       for name, word in (("model.safetensors", MADE_SAFE), ("ema.safetensors", MADE_SAFE),
                          ("optimizer.safetensors", MADE_SAFE), ("state.json", "use an older checkpoint"),
                          ("config.json", "use an older checkpoint"))},
    **{f"convert {name}": (lambda g, n=name: g.command("convert", g.file(n), "--out", g.folder / "out"), "")
       for name in ("x.pt", "x.ckpt", "x.bin", "x.pth", "x.npz")},
    "sample": (lambda g: g.command("sample", g.model(), "--out", g.folder / "out"), MADE_SAFE),
    "encode a model": (lambda g: g.command("encode", g.model(), g.folder, "--out", g.folder.parent / "out"), MADE_SAFE),
    "encode data": (lambda g: g.command("encode", g.run, g.file("x.npz"), "--out", g.folder / "out"), ""),
    "decode latents": (lambda g: g.command("decode", g.run, latents_of(g), "--out", g.folder / "out"), MADE_SAFE),
    "decode a model": (lambda g: g.command("decode", g.model(), g.folder, "--out", g.folder.parent / "out"), MADE_SAFE),
    "reconstruct data": (lambda g: g.command("reconstruct", g.run, g.file("x.png"), "--out", g.folder / "out"), "save"),
    "reconstruct arrays": (lambda g: g.command("reconstruct", g.run, g.file("x.npz"), "--out", g.folder / "out"),
                           "save it with numpy.savez"),
    "data.path arrays": (lambda g: g.train(f"data.path={g.file('x.npz')}"), "save it with numpy.savez"),
    "evaluate --reference": (lambda g: g.command("evaluate", g.run, "--num", 2, "--reference", g.file("ref.npz"),
                                                 "--out", g.folder / "out"), "--reference"),
    "evaluate --samples": (lambda g: g.command("evaluate", g.run, "--samples", g.file("x.npz"),
                                               "--out", g.folder / "out"), "save it with numpy.savez"),
    "evaluate --samples alone": (lambda g: g.command("evaluate", "--samples", g.file("x.npz"), "--reference", "digits",
                                                     "--out", g.folder / "out"), "save it with numpy.savez"),
    "evaluate --compare": (lambda g: g.command("evaluate", "--compare", g.file("a.json"), g.file("b.json")), ""),
    "evaluate --inception-weights": (
        lambda g: g.command("evaluate", g.run, "--num", 2, "--metrics", "fid", "--inception-weights",
                            g.file("inception.pth"), "--out", g.folder / "out"), "takes a local file"),
    "reference": (lambda g: g.command("reference", g.file("x.npz"), "--size", "8", "--out", g.folder / "out.npz"),
                  "save it with numpy.savez"),
    "configuration file": (lambda g: g.command("train", g.file("run.yaml"), "--out", g.folder / "out"), "plain YAML"),
    "data.path": (lambda g: g.train(f"data.path={g.file('data.zip')}"), "data.path"),
    "an image of data.path": (lambda g: g.train(f"data.path={images_of(g)}", "data.held_out=0"), "remove it"),
    "perceptual weights": (lambda g: g.train(*PERCEPTUAL, f"modality.perceptual_weights={g.file('vgg.pth')}"),
                           "takes a local file"),
}  # fmt: skip
"""What an entry point is -> how it is called with a payload, and a word of the way out that it must name."""


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_f16_no_entry_point_unpickles(cli: Command, run_folder: Path, tmp_path: Path, entry: str, payload: str) -> None:
    """A pickle that leaves a canary, as four kinds of file, at every place that takes a file."""
    canary = tmp_path / "canary"
    folder = tmp_path / "planted"
    folder.mkdir()
    call, word = ENTRY_POINTS[entry]
    message = call(Ground(cli, run_folder, folder, PAYLOADS[payload](Trap(canary))))
    assert not canary.exists()
    assert str(folder) in message and word in message, message
    assert not (folder / "out").exists(), "nothing is written before input is known to be good"


def test_f16_pickles_lying_about_are_not_touched(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """Optimizer pickles, DCP's .metadata and the like beside the files of a model and of a checkpoint."""
    canary, payload = tmp_path / "canary", as_pickle(Trap(tmp_path / "canary"))
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    for folder in (copy / "model", *ckpt.published(copy / "checkpoints")):
        for name in (".metadata", "__0_0.distcp", "optimizer.bin", "pytorch_model.bin", "rng_state.pth", "model.pt"):
            (folder / name).write_bytes(payload)
        if folder.name != "model":
            sign(folder)
    assert unilatent.load(copy, device="cpu").fingerprint() == unilatent.load(run_folder, device="cpu").fingerprint()
    unilatent.UNITE.from_pretrained(copy / "model")
    unilatent.load(copy / "checkpoints" / "step_00000008", device="cpu")
    assert cli("train", "digits", *QUICK, "--resume", "auto", "--out", copy).code == 0
    assert not canary.exists()


def test_f16_a_hub_model_is_two_files_of_its_repository(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the configuration, the weights and the record are requested, by `load` and by `from_pretrained`."""
    requests: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        requests.append(options)
        return str(run_folder / "model")

    monkeypatch.setattr(model_folder, "snapshot_download", snapshot)
    unilatent.load("somebody/model", device="cpu", revision="v1")
    unilatent.UNITE.from_pretrained("somebody/model", revision="v1")
    for options in requests:
        assert options["allow_patterns"] == ["config.json", "model.safetensors", "record.json"]
        assert options["revision"] == "v1"
    assert len(requests) == 2


@pytest.mark.parametrize("version", ["2.9.1", "2.6.0+cu124", "1.13.0", "2.9.0a0"])
def test_f16_torch_with_a_known_hole_is_known(version: str) -> None:
    """CVE-2026-24747: warned of before a .pt file is read."""
    assert is_unsafe(version)


def test_f16_torch_without_it_is_not() -> None:
    assert not any(map(is_unsafe, ("2.10.0", "2.13.0+cpu", "3.0.1", torch.__version__)))


def pt(path: Path, ema: dict[Any, Any]) -> Path:
    torch.save({"ema": ema, "model": ema}, path)
    return path


def unite_like(**changed: Any) -> dict[str, Any]:
    """The tensors of a checkpoint whose sizes are read off first; far from all."""
    shapes = {
        "patch_embed.patch_embeddings.projection.weight": (64, 3, 8, 8), "latent_tokens": (1, 16, 64),
        "decoder.decoder_embed.weight": (64, 64), "encoder.y_embedder.embedding_table.weight": (12, 64),
        "encoder.up_sample.weight": (64, 16), "encoder.blocks.0.attn.q_norm.weight": (16,),
        "encoder.in_context_posemb": (1, 4, 64), "decoder.decoder_layers.0.ffn_up.weight": (256, 64),
    }  # fmt: skip
    return {**{key: torch.zeros(shape) for key, shape in shapes.items()}, **changed}


CRAFTED: dict[str, tuple[dict[Any, Any], str]] = {
    "values that are no tensors": ({"w": 3}, "not a plain tensor"),
    "keys that are no text": ({3: torch.zeros(1)}, "not a plain tensor"),
    "sparse tensors": ({"w": torch.zeros(2, 2).to_sparse()}, "not a plain tensor"),
    "one number for a billion": ({"latent_tokens": torch.zeros(1).expand(1, 10**9, 64)}, "not in the file"),
    "no keys": ({}, "missing; is it a UNITE checkpoint?"),
    "a shape of other axes": (unite_like(latent_tokens=torch.zeros(3)), r"expected 3 axes"),
    "an empty shape": (unite_like(latent_tokens=torch.zeros(1, 0, 64)), r"expected 3 axes"),
    "a block that is no number": ({**unite_like(), "encoder.blocks.x.w": torch.zeros(1)}, "found 0, x"),
    "a billionth block": ({**unite_like(), "encoder.blocks.999999999.w": torch.zeros(1)}, "is it a UNITE"),
    "a block far beyond": ({**unite_like(), "encoder.blocks.90000.norm1.weight": torch.zeros(1)}, "far more tensors"),
    "no such width": (unite_like(**{"decoder.decoder_embed.weight": torch.zeros(65, 64)}), "not a published size"),
    "heads of no width": (unite_like(**{"encoder.blocks.0.attn.q_norm.weight": torch.zeros(100)}), "no UNITE model"),
    "a strange key": ({**unite_like(), "teacher.weight": torch.zeros(1)}, "not a tensor of a UNITE checkpoint"),
    "most of them missing": ({**unite_like(), "encoder.blocks.4.w": torch.zeros(1)}, "does not fit this model: lacks"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_f18_crafted_pt_files_are_refused(cli: Command, tmp_path: Path, case: str) -> None:
    """Tensors and plain containers alone, but of no UNITE model, given to `convert`."""
    content, words = CRAFTED[case]
    path = pt(tmp_path / "x.pt", content)
    refused = cli("convert", path, "--out", tmp_path / "out")
    assert refused.code == 2 and refused.err.count("\n") == 1, refused
    assert str(path) in refused.err and words in refused.err and not (tmp_path / "out").exists(), refused.err


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02}", b"PK\x03\x04", b"<html>", b"\x80\x02K\x01K\x02\x86q."])
def test_f16_damaged_pt_files_are_named(cli: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    refused = cli("convert", tmp_path / "x.pt", "--out", tmp_path / "out")
    assert refused.code == 2 and "x.pt: " in refused.err and refused.err.count("\n") == 1, refused


def test_f19_a_compressed_pt_file_is_not_unpacked(cli: Command, tmp_path: Path) -> None:
    """A .pt archive of less than a megabyte that unpacks to 64."""
    good, bad = pt(tmp_path / "good.pt", {"w": torch.zeros(4)}), tmp_path / "bad.pt"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for name in source.namelist():
            with target.open(name, "w", force_zip64=True) as member:
                member.write(source.read(name))
                if name.endswith("data/0"):
                    for _ in range(64):
                        member.write(bytes(2**20))
    assert bad.stat().st_size < 2**20
    refused = cli("convert", bad, "--out", tmp_path / "out")
    assert refused.code == 2 and "bad.pt: unpacks to 0.06 GiB" in refused.err, refused


# ---- configurations ------------------------------------------------------------------------------------------------

HOSTILE_YAML = {
    "a python tag": ("preset: digits\nseed: !!python/object/apply:os.system ['touch {canary}']\n", "plain YAML"),
    "a python name": ("preset: digits\nmethod: !!python/name:os.system\n", "plain YAML"),
    "a target": ("preset: digits\nmethod:\n  _target_: os.system\n  command: touch {canary}\n", "unknown field"),
    "a target for all": ("preset: digits\n_target_: os.system\n_args_: ['touch {canary}']\n", "unknown field"),
    "a path for a name": ("preset: digits\nmethod:\n  name: ../../x\n", "'../../x' is unknown"),
    "a module for a name": ("preset: digits\nmodality:\n  name: os.path\n", "'os.path' is unknown"),
    "a URL for a name": ("preset: digits\nmodality:\n  name: file:///etc/passwd\n", "is unknown"),
    "the interface for a name": ("preset: digits\nmethod:\n  name: base\n", "'base' is unknown"),
    "a list for a name": ("preset: digits\nmethod:\n  name: [unite]\n", "is unknown"),
    "a condition elsewhere": ("preset: digits\nconditions:\n  ../x: {{}}\n", "'../x' is unknown"),
    "a path for a preset": ("preset: ../../x\n", "modality"),
    "aliases of aliases": (
        "preset: digits\nseed: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefghi", "bcdefghij", strict=True)),
        "unknown field",
    ),
    "aliases of aliases in a field": (
        "preset: digits\ndata: {{held_out: [&a [1,1,1,1,1,1,1,1,1]"
        + "".join(f", &{n} [{', '.join(['*' + p] * 9)}]" for p, n in zip("abcdefghi", "bcdefghij", strict=True))
        + "]}}\n",
        "held_out",
    ),
    "endless depth": ("seed: " + "[" * 1500, "config file"),
    "a list": ("- os.system\n", "not a mapping"),
    "bytes": ("\x00\x01", "plain YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_f17_configuration_files_run_nothing(cli: Command, tmp_path: Path, case: str) -> None:
    """Python tags, import paths, paths and URLs as names, aliases without end: refused by the field or the file."""
    text, words = HOSTILE_YAML[case]
    canary = tmp_path / "canary"
    (tmp_path / "run.yaml").write_text(text.format(canary=canary))
    refused = cli("train", tmp_path / "run.yaml", "--out", tmp_path / "out")
    assert refused.code == 2 and refused.err.count("\n") == 1 and len(refused.err) < 1000, refused
    assert words in refused.err and not canary.exists() and not (tmp_path / "out").exists(), refused.err


OVERRIDES = {
    "method._target_=os.system": "method._target_: unknown field",
    "_target_=os.system": "_target_: unknown field",
    "method.name=../../x": "'../../x' is unknown",
    "modality.name=os.path": "'os.path' is unknown",
    "modality.name=file:///etc/passwd": "is unknown",
    "method=!!python/object/apply:os.getpid []": "is not a YAML value",
    "seed=" + "[" * 1500: "is not a YAML value",
    "conditions.os.path={}": "conditions.os.path: unknown field 'os'",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=[key[:30] for key in OVERRIDES])
def test_f17_overrides_name_nothing_outside(cli: Command, tmp_path: Path, override: str) -> None:
    refused = cli("train", "digits", override, "--out", tmp_path / "out")
    assert refused.code == 2 and OVERRIDES[override] in refused.err and refused.err.count("\n") == 1, refused


HOSTILE_JSON: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "a target": (lambda c: json.dumps({**c, "_target_": "os.system"}), "_target_: unknown field"),
    "a nested target": (lambda c: json.dumps({**c, "method": {**c["method"], "_target_": "x.y"}}), "unknown field"),
    "a path for a name": (lambda c: json.dumps({**c, "method": {**c["method"], "name": "../../x"}}), "is unknown"),
    "endless depth": (lambda c: "[" * 100_000, "not JSON text"),
    "a list": (lambda c: "[1]", "not named fields"),
    "another format": (lambda c: json.dumps({**c, "format_version": 99}), "format_version 99"),
    "a list for the format": (lambda c: json.dumps({**c, "format_version": [1]}), "format_version"),
    "nothing": (lambda c: "{}", "format_version"),
    "an endless network": (lambda c: resized(c, depth=10**9), "far more tensors"),
    "a network of 10 TB": (lambda c: resized(c, width=2**20), "has other shapes"),
    "a network beyond numbers": (lambda c: resized(c, width=2**62), "no model can be built"),
    "heads that do not fit": (lambda c: resized(c, heads=3), "width 64 is not divisible by heads 3"),
}  # fmt: skip


def resized(config: dict[str, Any], **sizes: int) -> str:
    encoder = {**config["method"]["generative_encoder"], **sizes}
    return json.dumps({**config, "method": {**config["method"], "generative_encoder": encoder}})


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_f17_configurations_of_models_are_data(run_folder: Path, tmp_path: Path, case: str) -> None:
    """config.json with import paths, paths, other formats and sizes without end: one line with the file's name."""
    make, words = HOSTILE_JSON[case]
    copy = tmp_path / "model"
    shutil.copytree(run_folder / "model", copy)
    (copy / "config.json").write_text(make(json.loads((copy / "config.json").read_text())))
    for load in (unilatent.load, unilatent.UNITE.from_pretrained):
        with pytest.raises(ValueError) as refused:
            load(copy)
        message = str(refused.value)
        assert str(copy) in message and words in message and "\n" not in message and len(message) < 1000, message


@pytest.mark.parametrize(
    "name", ["../x", "a/..", "../../etc/passwd", "a b/c", "a/b/../c", "file:///etc/passwd", "a/b;c"]
)
def test_f17_hub_names_are_names(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused = cli("sample", name, "--out", tmp_path / "out")
    assert refused.code == 2 and f"{name}: no such folder" in refused.err and refused.err.count("\n") == 1, refused


def test_f17_links_are_followed_and_show_nothing(run_folder: Path, tmp_path: Path) -> None:
    """A link in a folder is its owner's (the hub's cache consists of them); what it points at is data like any file,
    and none of it reaches a message. Devices and pipes are no files."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "model.safetensors"):
        (linked / name).symlink_to(run_folder / "model" / name)
    assert unilatent.load(linked, device="cpu").fingerprint() == unilatent.load(run_folder, device="cpu").fingerprint()
    secret = tmp_path / "secret"
    secret.write_text("SECRET-7")
    os.mkfifo(tmp_path / "pipe")
    for name, target in [(n, t) for n in ("config.json", "model.safetensors") for t in
                         (secret, Path("/dev/zero"), tmp_path / "pipe", tmp_path / "nowhere", tmp_path)]:  # fmt: skip
        other = tmp_path / "other"
        shutil.copytree(linked, other, symlinks=True)
        (other / name).unlink()
        (other / name).symlink_to(target)
        with pytest.raises(ValueError, match="other") as refused:
            unilatent.load(other)
        assert "SECRET-7" not in str(refused.value)
        shutil.rmtree(other)


INDEXES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON text"),
    "a list": ([], "not named fields"),
    "a field missing": ({"seed": None}, "seed is None"),
    "a shard elsewhere": ({"shards": ["../../model/model.safetensors"]}, "not the name of a shard"),
    "a shard at the root": ({"shards": ["/etc/passwd"]}, "not the name of a shard"),
    "a shard that is missing": ({"shards": ["latents_00000.safetensors", "latents_00001.safetensors"]}, "missing"),
    "a shard that holds no latents": ({"shards": ["latents_00002.safetensors"]}, "holds no latents"),
    "a shard of other latents": ({"shards": ["latents_00003.safetensors"]}, "expected shape (B, 4, 16), got (4, 5, 6)"),
    "NaN latents": ({"shards": ["latents_00004.safetensors"]}, "expected finite values"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_f17_f18_indexes_of_latents_point_at_latents(cli: Command, run_folder: Path, tmp_path: Path, case: str) -> None:
    change, words = INDEXES[case]
    folder = latents_of(Ground(cli, run_folder, tmp_path, b""))
    for number, (key, value) in enumerate([("latents", torch.zeros(4, 4, 16)), ("x", torch.zeros(1)),
                                           ("x", torch.zeros(1)), ("latents", torch.zeros(4, 5, 6)),
                                           ("latents", torch.full((4, 4, 16), torch.nan))]):  # fmt: skip
        save_file({key: value}, folder / f"latents_{number:05d}.safetensors")
    (folder / "latents_00001.safetensors").unlink()
    index = folder / "index.json"
    content = change if not isinstance(change, dict) else {**json.loads(index.read_text()), **change}
    index.write_text(content if isinstance(content, str) else json.dumps(content))
    refused = cli("decode", run_folder, folder, "--out", tmp_path / "out")
    assert refused.code == 2 and words in refused.err and refused.err.count("\n") == 1, refused


STATES = {"step": [-1, "4", None, 1.5, True], "seed": [None, "0"], "batch_size": [None], "data": [None, 3]}


@pytest.mark.parametrize("field", STATES)
def test_f18_a_vouched_for_state_is_still_checked(cli: Command, run_folder: Path, tmp_path: Path, field: str) -> None:
    """A state.json whose manifest is right and whose fields are not."""
    copy = tmp_path / "step_00000012"
    shutil.copytree(run_folder / "checkpoints" / "step_00000012", copy)
    state = json.loads((copy / "state.json").read_text())
    for value in STATES[field]:
        (copy / "state.json").write_text(json.dumps({**state, field: value}))
        sign(copy)
        refused = cli("train", "digits", *QUICK, "--resume", copy, "--out", tmp_path / "out")
        assert refused.code == 2 and field in refused.err and refused.err.count("\n") == 1, (value, refused)


def test_f18_vouched_for_weights_are_still_checked(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """NaN, lost and foreign tensors in each file of a checkpoint, under a right manifest: refused on resume."""
    source = run_folder / "checkpoints" / "step_00000012"
    for name in ("model", "ema", "optimizer"):
        good = load_file(source / f"{name}.safetensors")
        key = next(key for key, value in good.items() if value.ndim == 2 and value.is_floating_point())
        harms = {"is not finite" if name != "optimizer" else "not finite": {**good, key: good[key] * torch.nan},
                 "(1, 1)": {**good, key: torch.zeros(1, 1)}, "stranger": {**good, "stranger|x": torch.zeros(1)},
                 "int32": {**good, key: good[key].int()}}  # fmt: skip
        if name != "optimizer":
            harms["lacks"] = {k: v for k, v in good.items() if k != key}
        for words, tensors in harms.items():
            copy = tmp_path / "step_00000012"
            shutil.copytree(source, copy)
            save_file(tensors, copy / f"{name}.safetensors")
            sign(copy)
            refused = cli("train", "digits", *QUICK, "--resume", copy, "--out", tmp_path / "out")
            assert refused.code == 2 and f"{name}.safetensors" in refused.err and words in refused.err, refused
            shutil.rmtree(copy)


# ---- weights -------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys, time
import unilatent
unilatent.load(sys.argv[1], device="cpu")
for folder in sys.argv[2:]:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        unilatent.load(folder, device="cpu")
        message = "LOADED"
    except ValueError as error:
        message = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([message, time.process_time() - started, grown]))
"""


def header(table: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


F32 = {"dtype": "F32", "shape": [1]}
RAW = {
    "a header of 2^40 bytes": header({}, length=2**40),
    "a header of 2^63 bytes": header({}, length=2**63),
    "a header that is no JSON": header(b"x" * 100),
    "a header of endless depth": header(b"[" * 100_000),
    "nothing": b"",
    "seven bytes": b"1234567",
    "offsets that overlap": header(
        {name: {**F32, "data_offsets": [start, start + 4]} for name, start in (("a", 0), ("b", 2))}, bytes(6)
    ),
    "offsets too short": header(one("F32", [4], 0, 4), bytes(4)),
    "offsets beyond the end": header(one("F32", [4], 0, 16), bytes(4)),
    "offsets that run backwards": header(one("F32", [4], 16, 0), bytes(16)),
    "an unknown type": header(one("F99", [4], 0, 16), bytes(16)),
    "10 GB declared": header(one("F32", [2_500_000_000], 0, 10_000_000_000), bytes(64)),
    "a shape that overflows": header(one("F32", [2**32, 2**32], 0, 16), bytes(16)),
    "a negative shape": header(one("F32", [-4], 0, 16), bytes(16)),
    "text behind the end": header(one("F32", [4], 0, 16), bytes(16) + b"more"),
}  # fmt: skip
"""Contents of a model.safetensors that no writer makes."""


def changed(good: dict[str, torch.Tensor]) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """Well-formed files that are not this model's, and what names the difference."""
    key = "decoder.out.weight"
    less = {k: v for k, v in good.items() if k != key}
    poisoned = good[key].clone()
    poisoned.view(-1)[3] = torch.nan
    return {
        "whole numbers for floats": ({**good, key: good[key].int()}, f"has other types: {key} torch.int32"),
        "complex numbers": ({**good, key: good[key].to(torch.complex64)}, f"has other types: {key} torch.complex64"),
        "another shape": ({**good, key: torch.zeros(3, 3)}, f"has other shapes: {key} (3, 3) instead of"),
        "no number at all": ({**good, key: torch.zeros(0)}, f"has other shapes: {key} (0,)"),
        "a key more": ({**good, "teacher.weight": torch.zeros(3)}, "has unknown teacher.weight"),
        "a key less": (less, f"lacks {key}"),
        "a key renamed": ({**less, "decoder.gone": good[key]}, f"lacks {key}; has unknown decoder.gone"),
        "no keys": ({}, "lacks conditions.class_label.table.weight, "),
        "NaN": ({**good, key: poisoned}, f"{key} is not finite"),
        "infinity": ({**good, key: good[key] + torch.inf}, f"{key} is not finite"),
        "infinity as float32": ({**good, key: good[key].double() + 1e300}, f"{key} is not finite"),
    }


def test_f18_crafted_weights_cost_nothing_and_are_explained(run_folder: Path, tmp_path: Path) -> None:
    """26 crafted model.safetensors: one line naming the file, under a second of work and 200 MB of memory each."""
    good = load_file(run_folder / "model" / "model.safetensors")
    folders, words = [], []

    def plant(name: str, expected: str) -> Path:
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        shutil.copy(run_folder / "model" / "config.json", folder)
        folders.append(folder)
        words.append(expected)
        return folder / "model.safetensors"

    for name, content in RAW.items():
        plant(name, "damaged or not a safetensors file").write_bytes(content)
    whole = (run_folder / "model" / "model.safetensors").read_bytes()
    plant("cut in half", "damaged or not a safetensors file").write_bytes(whole[: len(whole) // 2])
    for name, (tensors, expected) in changed(good).items():
        save_file(tensors, plant(name, expected))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run_folder), *map(str, folders)],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, expected, line in zip(folders, words, done.stdout.splitlines(), strict=True):
        message, seconds, grown = json.loads(line)
        assert f"{folder}/model.safetensors: " in message and expected in message, message
        assert "\n" not in message and len(message) < 1000
        assert seconds < 1 and grown < 200, (folder.name, seconds, grown)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_f18_other_widths_of_floats_are_taken(run_folder: Path, dtype: torch.dtype) -> None:
    """The counterpart: what differs in precision alone fits."""
    good = load_file(run_folder / "model" / "model.safetensors")
    narrow = {key: value.to(dtype) for key, value in good.items()}
    model = assemble(read_config(run_folder / "model"), LatentModel, narrow, "here")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, narrow[key].to(value.dtype), rtol=0, atol=0)


# ---- archives of data ----------------------------------------------------------------------------------------------


def image() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_f19_a_zip_writes_nothing_outside(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """Members named ../x, /x and as links: read in place, never written anywhere."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "data.zip", "w") as archive:
        for name in ("../escaped.png", "../../escaped.png", f"{tmp_path}/escaped.png", "one/good.png", "two/good.png"):
            archive.writestr(name, image())
        link = zipfile.ZipInfo("one/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    done = cli("reconstruct", run_folder, place / "data.zip", "--num", 1, "--out", tmp_path / "out")
    assert done.code in (0, 2) and (done.code == 0 or done.err.count("\n") == 1), done
    assert not list(tmp_path.rglob("*escaped*"))
    left_out = cli("encode", run_folder, place / "data.zip", "--out", tmp_path / "latents")
    assert left_out.code == 0 and "one/link.png" in left_out.err and "root:" not in left_out.err, left_out
    assert "3 latents" in left_out.out


def test_f19_a_zip_bomb_is_not_unpacked(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """Two megabytes that unpack to 300: refused by the declared size."""
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("one/a.png", "two/a.png"):
            with archive.open(name, "w", force_zip64=True) as member:
                for _ in range(300 if name.startswith("one") else 1):
                    member.write(bytes(2**20))
    assert bomb.stat().st_size < 2**21
    for verb in (("reconstruct", run_folder, bomb), ("encode", run_folder, bomb),
                 ("train", "digits", *QUICK, f"data.path={bomb}", "data.held_out=0")):  # fmt: skip
        refused = cli(*verb, "--out", tmp_path / "out")
        assert refused.code == 2 and not (tmp_path / "out").exists(), refused
        if verb[0] != "train":  # training reads its first samples, and meets the other one first or this one
            assert f"one/a.png in {bomb}: unpacks to 300 MiB, more than 256" in refused.err, refused


def test_f19_a_zip_that_lies_about_its_sizes_is_damaged(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    liar = tmp_path / "liar.zip"
    with zipfile.ZipFile(liar, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one/a.png", bytes(2**24))
    content = liar.read_bytes().replace((2**24).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    liar.write_bytes(content)
    refused = cli("reconstruct", run_folder, liar, "--out", tmp_path / "out")
    assert refused.code == 2 and "one/a.png" in refused.err and "cannot be unpacked" in refused.err, refused
