"""Precision: what `auto` is on a machine, what a run and its model record, what computes in it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, Command

import unilatent
from unilatent import devices
from unilatent.cli.running import note_drawback
from unilatent.config import read_yaml
from unilatent.devices import float32_products, resolve_precision, set_float32_products
from unilatent.files import read_json
from unilatent.methods.base import LatentModel
from unilatent.modalities.image.spaces import Pixels
from unilatent.presets import preset, presets
from unilatent.runs import checkpoint as ckpt
from unilatent.training.config import RunConfig
from unilatent.training.trainer import Trainer

WITH, WITHOUT = "avx2 avx512f amx_bf16", "avx2"
Machine = Callable[[str], None]
EVALUATED = ("training.evaluate_samples=20", "training.evaluate_steps=2", "sampling.num_inference_steps=2")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives this machine a processor with these instruction sets."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "CPUINFO", path)
    note_drawback.cache_clear()
    return lambda flags: path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n\n") and None


def digits(*overrides: str) -> RunConfig:
    return preset("digits").override(*QUICK, "training.precision=auto", *overrides)


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was left to choose, on a machine with bf16 instructions; evaluated at its end."""
    folder = tmp_path_factory.mktemp("precision")
    (folder / "cpuinfo").write_text(f"flags : {WITH}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "CPUINFO", folder / "cpuinfo")
        Trainer(digits(*EVALUATED), folder / "run").fit()
    return folder / "run"


# ---- what auto is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "auto"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "measured"),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", "bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", "fp32"),
        ("flags\t\t: fpu avx2\n", "fp32"),
        ("Features\t: fp asimd bf16\n", "measured"),
        ("Features\t: fp asimd sve\n", "fp32"),
        ("processor\t: 0\n", "fp32"),
        (None, "fp32"),
    ],
)
@pytest.mark.parametrize("seconds", [0.25, 2.0])
def test_auto_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, auto: str, seconds: float
) -> None:
    """Some processors with AVX512-BF16 multiply bf16 four times as fast as fp32, others half as fast."""
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "matmul_seconds", lambda device, precisions: {"fp32": 1.0, "bf16": seconds})
    monkeypatch.setattr(devices, "_bf16_factor", devices._bf16_factor.__wrapped__)  # not cached
    if auto == "measured":
        auto = "bf16" if seconds < 1 else "fp32"
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    check_resolution("cpu", auto)


@pytest.mark.parametrize(
    ("capability", "hip", "auto"),
    [((7, 0), None, "fp32"), ((7, 5), None, "fp32"), ((8, 0), None, "bf16"), ((8, 9), None, "bf16"),
     ((10, 0), None, "bf16"), ((7, 0), "6.2", "bf16")],
)  # fmt: skip
def test_auto_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, auto: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    check_resolution("cuda:0", auto)


def check_resolution(device: str, auto: str) -> None:
    assert resolve_precision("auto", device) == auto
    assert resolve_precision("auto", device, trained="bf16") == auto
    assert resolve_precision("auto", device, trained="fp32") == "fp32"
    assert resolve_precision("fp32", device, trained="bf16") == "fp32"
    assert resolve_precision("bf16", device, trained="fp32") == "bf16"


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^--precision: 'fp16' is unknown; use auto, fp32 or bf16$"):
        resolve_precision("fp16", "cpu", field="--precision")
    with pytest.raises(ValueError, match=r"training\.precision"):
        digits("training.precision=fp16")


@pytest.fixture
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_gpus_use_tf32_unless_all_is_to_be_float32(restored: None) -> None:
    def now() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    for precision in ("bf16", "fp32"):
        set_float32_products("cpu", precision)
        assert now() == before
    for precision, want in (("bf16", ("high", True)), ("fp32", ("highest", False))):
        set_float32_products("cuda", precision)
        assert now() == want
        with float32_products():
            assert now() == ("highest", False)
        with float32_products(tf32=True):
            assert now() == ("high", True)
        assert now() == want


# ---- what a run computes in, and records -----------------------------------------------------------------------------


def test_a_run_says_and_stores_what_auto_was(bf16_run: Path) -> None:
    assert ", cpu, bf16 (auto)\n" in (bf16_run / "log.txt").read_text()
    checkpoint = bf16_run / "checkpoints" / "step_00000012"
    assert read_yaml(bf16_run / "config.yaml")["training"]["precision"] == "bf16"
    assert json.loads((bf16_run / "env.json").read_text())["precision"] == "bf16"
    assert json.loads((checkpoint / "state.json").read_text())["training"]["precision"] == "bf16"
    for folder in (bf16_run / "model", checkpoint):
        assert json.loads((folder / "config.json").read_text())["precision"] == "bf16"
        assert unilatent.load(folder, device="cpu").precision == "bf16"
    assert "trained in bf16" in (bf16_run / "model" / "README.md").read_text()


def test_auto_trains_as_the_name_of_what_it_is(tmp_path: Path, machine: Machine, bf16_run: Path) -> None:
    """Bitwise; and the other precision trains other weights."""
    machine(WITHOUT)
    prints = {}
    for name in ("auto", "fp32"):
        Trainer(digits(f"training.precision={name}"), tmp_path / name).fit()
        prints[name] = unilatent.load(tmp_path / name, device="cpu").fingerprint()
    machine(WITH)
    Trainer(digits("training.precision=bf16"), tmp_path / "bf16").fit()
    prints["bf16"] = unilatent.load(tmp_path / "bf16", device="cpu").fingerprint()
    assert prints["auto"] == prints["fp32"] != prints["bf16"]
    assert prints["bf16"] == unilatent.load(bf16_run, device="cpu").fingerprint()


def test_a_run_resumes_in_what_it_had(
    tmp_path: Path, machine: Machine, bf16_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine that emulates it, auto falls back and says so; an explicit name is kept; fp32 stays fp32."""
    shutil.copytree(bf16_run, tmp_path / "copy")
    more, note = digits("training.steps=13"), "note: training.precision: bf16 in the checkpoint's run, fp32 now: auto "
    machine(WITH)
    same = Trainer(more, tmp_path / "copy", resume="auto")
    assert same.precision == "bf16 (auto)" and same.changed == []
    machine(WITHOUT)
    named = Trainer(digits("training.steps=13", "training.precision=bf16"), tmp_path / "copy", resume="auto")
    assert named.precision == "bf16" and named.changed == []
    trainer = Trainer(more, tmp_path / "copy", resume="auto")
    capsys.readouterr()
    trainer.fit()
    err = " ".join(capsys.readouterr().err.split())
    assert err.count(f"{note}gives that here; training.precision=bf16 keeps it") == 1 and "fp32 (auto)" in err, err
    assert unilatent.load(tmp_path / "copy", device="cpu").precision == "fp32"
    machine(WITH)
    back = Trainer(digits("training.steps=14"), tmp_path / "copy", resume="auto")
    assert back.precision == "fp32 (auto)" and back.changed == []


def test_a_checkpoint_without_a_precision_resumes(tmp_path: Path, machine: Machine, bf16_run: Path) -> None:
    machine(WITH)
    shutil.copytree(bf16_run, tmp_path / "copy")
    checkpoint = tmp_path / "copy" / "checkpoints" / "step_00000012"
    facts = json.loads((checkpoint / "state.json").read_text())
    del facts["training"]["precision"]
    (checkpoint / "state.json").write_text(json.dumps(facts))
    manifest = json.loads((checkpoint / ckpt.MANIFEST).read_text())
    manifest["files"]["state.json"] = ckpt.describe(checkpoint / "state.json")
    (checkpoint / ckpt.MANIFEST).write_text(ckpt._manifest(12, manifest["files"]))
    trainer = Trainer(digits("training.steps=13"), tmp_path / "copy", resume="auto")
    assert trainer.precision == "bf16 (auto)" and trainer.changed == []


def test_presets_leave_large_networks_to_the_machine() -> None:
    """Small ones are no faster in bf16, and their published numbers are those of float32."""
    named = {name for name in presets() if preset(name).training.precision != "auto"}
    assert all(preset(name).training.precision == "fp32" for name in named)
    assert not [name for name in named if name.startswith(("imagenet", "text256")) or name.endswith("unite-s")]
    assert {"digits", "digits-ul"} <= named


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_carries_what_it_ran_in(tmp_path: Path, machine: Machine, bf16_run: Path, cli: Command) -> None:
    """The run's own numbers are those of `unilatent evaluate`, which computes in bf16 by itself, and not of float32."""
    machine(WITH)
    of_run = bf16_run / "eval" / "step_00000012.json"
    files = {"bf16": of_run}
    for name, option in (("auto", ()), ("fp32", ("--precision", "fp32"))):
        done = cli("evaluate", bf16_run, "--num", 20, "--num-reference", 20_000, *option, "--out", tmp_path / name)
        assert done.code == 0 and "note" not in done.err, done.err
        (files[name],) = (tmp_path / name).glob("*.json")
    values, precisions = {}, {}
    for name, path in files.items():
        numbers = json.loads(path.read_text())["numbers"]
        values[name] = {number["key"]: number["value"] for number in numbers}
        precisions[name] = {number["protocol"]["precision"] for number in numbers}
    assert precisions == {"bf16": {"bf16"}, "auto": {"bf16"}, "fp32": {"fp32"}}
    assert values["bf16"].keys() == values["auto"].keys() == values["fp32"].keys()
    assert values["auto"] == pytest.approx(values["bf16"], rel=1e-5)
    (psnr,) = (key for key in values["bf16"] if key.startswith("psnr"))
    assert values["fp32"][psnr] != values["bf16"][psnr]
    refused = cli("evaluate", "--compare", of_run, files["fp32"])
    assert (
        refused.code == 2 and "not comparable: precision is 'bf16' in A and 'fp32' in B; evaluate both" in refused.err
    )
    assert cli("evaluate", "--compare", of_run, files["auto"]).code == 0


def test_numbers_without_a_precision_were_float32(tmp_path: Path, bf16_run: Path, cli: Command) -> None:
    content = read_json(bf16_run / "eval" / "step_00000012.json", "")
    for name in ("old", "fp32"):
        for number in content["numbers"]:
            number["protocol"].pop("precision", None)
            if name == "fp32":
                number["protocol"]["precision"] = "fp32"
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    done = cli("evaluate", "--compare", tmp_path / "old.json", tmp_path / "fp32.json")
    assert done.code == 0 and "equal" in done.out


def test_features_are_computed_in_float32(
    tmp_path: Path, machine: Machine, bf16_run: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of samples and reconstructions as of real data: what computes them is no part of the model."""
    machine(WITH)
    seen = []
    extract = Pixels.__call__

    def spied(self: Pixels, data: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision(), data.dtype))
        return extract(self, data)

    monkeypatch.setattr(Pixels, "__call__", spied)
    done = cli("evaluate", bf16_run, "--num", 20, "--num-held-out", 20, "--steps", 1, "--out", tmp_path / "out")
    assert done.code == 0 and len(seen) >= 3 and set(seen) == {(False, "highest", torch.float32)}, seen


# ---- sampling, encoding and decoding ---------------------------------------------------------------------------------


def made(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as arrays:
        return arrays["arr_0"] if "arr_0" in arrays else arrays[arrays.files[0]]


def test_commands_compute_in_what_the_model_was_trained_in(
    tmp_path: Path, machine: Machine, bf16_run: Path, cli: Command
) -> None:
    asked = ("sample", bf16_run, "--num", 4, "--steps", 2)
    machine(WITH)
    for name in ("auto", "bf16", "fp32"):
        done = cli(*asked, "--precision", name, "--out", tmp_path / name)
        assert done.code == 0 and "note" not in done.err
    default = cli(*asked, "--out", tmp_path / "default")
    assert default.code == 0
    machine(WITHOUT)
    emulating = cli(*asked, "--out", tmp_path / "emulating")
    note = (
        "note: the model was trained in bf16, but this CPU has no bf16 instructions: computing in fp32 (--precision "
        "bf16 computes in bf16 all the same)\n"
    )
    assert emulating.code == 0 and emulating.err.count(note) == 1 and emulating.err.count("note") == 1
    recorded = {
        folder.name: json.loads((folder / "sampling.json").read_text())["precision"]
        for folder in tmp_path.iterdir() if folder.is_dir()
    }  # fmt: skip
    assert recorded == {"auto": "bf16", "default": "bf16", "bf16": "bf16", "fp32": "fp32", "emulating": "fp32"}
    assert np.array_equal(made(tmp_path / "default"), made(tmp_path / "bf16"))
    assert np.array_equal(made(tmp_path / "auto"), made(tmp_path / "bf16"))
    assert np.array_equal(made(tmp_path / "emulating"), made(tmp_path / "fp32"))


def test_a_model_without_a_precision_computes_in_float32(
    tmp_path: Path, machine: Machine, bf16_run: Path, cli: Command
) -> None:
    machine(WITH)
    shutil.copytree(bf16_run / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["precision"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = cli("sample", tmp_path / "model", "--num", 2, "--steps", 1, "--out", tmp_path / "out")
    assert done.code == 0 and json.loads((tmp_path / "out" / "sampling.json").read_text())["precision"] == "fp32"
    config["precision"] = "fp8"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    refused = cli("sample", tmp_path / "model", "--num", 2, "--steps", 1, "--out", tmp_path / "none")
    assert refused.code == 2 and "precision: 'fp8' is unknown; use fp32 or bf16" in refused.err


def test_latents_record_what_they_were_encoded_in(
    tmp_path: Path, machine: Machine, bf16_run: Path, cli: Command
) -> None:
    machine(WITH)
    cli("sample", bf16_run, "--num", 4, "--steps", 1, "--out", tmp_path / "images")
    source = tmp_path / "images"
    (source / "grid.png").unlink()
    for name, option in (("auto", ()), ("fp32", ("--precision", "fp32"))):
        done = cli("encode", bf16_run, source, *option, "--out", tmp_path / name)
        assert done.code == 0, done.err
        index = json.loads((tmp_path / name / "index.json").read_text())
        assert index["precision"] == ("bf16" if name == "auto" else "fp32")
    refused = cli("encode", bf16_run, source, "--precision", "fp32", "--out", tmp_path / "auto")
    assert refused.code == 2 and "another precision" in refused.err


@pytest.fixture
def model(bf16_run: Path) -> LatentModel:
    return unilatent.load(bf16_run, device="cpu")


def test_in_python_too(machine: Machine, model: LatentModel) -> None:
    """By default, with a name, inside autocast, and with weights of another type."""
    data = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    machine(WITH)
    verbs: list[Callable[..., torch.Tensor]] = [
        lambda m, **p: unilatent.sample(m, 3, num_inference_steps=2, **p),
        lambda m, **p: unilatent.reconstruct(m, data, **p),
        lambda m, **p: unilatent.encode(m, data, **p),
        lambda m, **p: unilatent.decode(m, latents, **p),
    ]
    latents = unilatent.encode(model, data, precision="fp32")
    for verb in verbs:
        in_bf16, exact = (verb(model, precision=name) for name in ("bf16", "fp32"))
        assert not torch.equal(in_bf16, exact) and torch.equal(verb(model), in_bf16)
        assert in_bf16.dtype == exact.dtype == torch.float32 and (in_bf16 - exact).abs().max() < 0.5
        machine(WITHOUT)
        assert torch.equal(verb(model), exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(verb(model), in_bf16) and torch.equal(verb(model, precision="fp32"), exact)
        machine(WITH)
    double = model.double()
    for verb in verbs:
        assert (verb(double) - verb(double, precision="fp32")).abs().max() == 0


@pytest.mark.parametrize("command", ["sample", "reconstruct", "encode", "decode", "evaluate", "analyze", "search"])
def test_every_command_takes_auto(cli: Command, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(cli(command, "--help").out.split())
    assert "auto: what the model was trained in, but bf16 only where the hardware multiplies it" in text
    assert "[default: auto]" in text
