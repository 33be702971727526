"""`unilatent evaluate` on a run of twelve steps: its numbers depend only on the request, and numbers under different
protocols are not ranked."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import QUICK, Command
from PIL import Image
from safetensors.torch import load_file
from test_processes import TORCHRUN, environment, port
from test_training import digits

import unilatent
from unilatent import faults
from unilatent.cli import main
from unilatent.evaluation import evaluate
from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.evaluation.reference import splits_of
from unilatent.modalities.base import BadSample, Dataset, Splits
from unilatent.outputs import RECORD
from unilatent.training import monitoring
from unilatent.training.trainer import Trainer

FAST = ("--num-samples", 150, "--steps", 2, "--num-held-out", 70, "--num-reference", 300)
KEYS = {"psnr", "l1", "judge_accuracy", "recognised", "spread", "frechet_pixels", "nearest", "identical_pairs",
        "frechet_classifier", "classified", "frechet_ratio"}  # fmt: skip


def numbers(folder: Path) -> dict[str, Any]:
    """Read the only evaluation in a folder."""
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def kept(folder: Path, what: str) -> dict[str, torch.Tensor]:
    """Read all rows of the only set with this name."""
    (records,) = (folder / "records").glob(f"{what}-*")
    pieces = [load_file(path) for path in sorted(records.glob("*.safetensors"))]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def by_metric(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {number["metric"]: number for number in content["numbers"]}


@pytest.fixture(scope="module")
def evaluated(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one evaluation, in batches of 64."""
    out = tmp_path_factory.mktemp("evaluated")
    evaluate_in(out, run_folder)
    return out


def evaluate_in(out: Path, run: Path, *more: object, processes: int = 1) -> None:
    arguments = [str(a) for a in ("evaluate", run, *FAST, *more, "--device", "cpu", "--out", out)]
    if processes == 1:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
        return
    rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(port())]
    launcher = [*TORCHRUN, "--nproc-per-node", str(processes), *rendezvous]
    done = subprocess.run(
        [*launcher, "-m", "unilatent", *arguments], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_prints_distances_accuracy_and_psnr_and_stores_how_they_were_made(
    cli: Command, run_folder: Path, tmp_path: Path
) -> None:
    done = cli("evaluate", run_folder, *FAST, "--out", tmp_path)
    assert done.code == 0, done.err
    for word in ("Frechet distance", "perceptron agrees", "PSNR", "n = 150", "reference n = 300"):
        assert word in done.out, done.out
    found = by_metric(numbers(tmp_path))
    assert found.keys() == KEYS
    distance = found["frechet_classifier"]
    assert distance["key"] == "frechet_classifier150/adm/heun-2/cfg1" and len(distance["protocol"]["weights"]) == 64
    assert distance["protocol"]["num_samples"] == 150 and distance["protocol"]["nfe"] == 3
    assert distance["protocol"]["balance"] == {"labels": {"values": 10, "smallest": 15, "largest": 15, "of": 10}}
    assert distance["value"] > distance["beside"]["held-out real"] > 0
    assert found["psnr"]["protocol"]["num_samples"] == 70 and 0 < found["psnr"]["value"] < 20
    ratio = found["frechet_ratio"]
    assert "real 1; mean of pixels" in " ".join(done.out.split()) and ratio["parts"].keys() == {"pixels", "classifier"}
    assert ratio["value"] == pytest.approx(sum(ratio["parts"].values()) / 2) and ratio["value"] > 2
    assert ratio["key"] == "frechet_ratio70/adm/heun-2/cfg1"  # of as many samples as there are held-out digits
    assert ratio["protocol"]["space"] == "pixels, classifier" and ratio["protocol"]["num_reference"] == 300
    held_out = splits_of(unilatent.load(run_folder).modality, run_folder, None).held_out.fingerprint
    assert ratio["protocol"]["relative_to"] == f"held-out data {held_out[:12]}"


def test_an_evaluation_that_was_edited_is_not_replaced(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    line = ("evaluate", run_folder, "--num", 40, "--steps", 1, "--metrics", "frechet_pixels", "--out", tmp_path)
    for _ in range(2):
        assert cli(*line).code == 0
    [path] = tmp_path.glob("evaluation-*.json")
    edited = path.read_text().replace('"seconds"', '"note": "mine", "seconds"')
    path.write_text(edited)
    refused = cli(*line)
    assert refused.code == 2 and "`unilatent evaluate` did not write it, or it was changed since" in refused.err
    assert path.read_text() == edited
    (tmp_path / RECORD).unlink()
    assert cli(*line).code == 0, "earlier versions kept no record"
    assert "mine" not in path.read_text()


def test_the_numbers_are_those_of_the_python_surface(run_folder: Path, evaluated: Path) -> None:
    """PSNR computed directly from the same held-out digits; samples equal those of `sample`."""
    model = unilatent.load(run_folder, device="cpu")
    held_out = splits_of(model.modality, run_folder, None).held_out
    size = len(held_out)
    real = torch.stack([held_out[i * size // 70][0] for i in range(70)])
    error = (unilatent.reconstruct(model, real) - real).square().mean((1, 2, 3))
    found = by_metric(numbers(evaluated))["psnr"]["value"]
    assert found == pytest.approx(float((-10 * error.log10()).mean()), abs=1e-4)
    made = unilatent.sample(model, num=150, num_inference_steps=2, seed=0)
    pixels = kept(evaluated, "samples")["pixels"].float() / 255
    assert (pixels - made.flatten(1)).abs().max() <= 0.51 / 255


def test_twice_is_the_same_apart_from_seconds(run_folder: Path, evaluated: Path, tmp_path: Path) -> None:
    evaluate_in(tmp_path, run_folder)
    first, second = (numbers(folder) for folder in (evaluated, tmp_path))
    assert first.pop("seconds") > 0 and second.pop("seconds") > 0
    assert first == second


@pytest.mark.parametrize(
    "settings", [(1, 1), (7, 1), (64, 2), pytest.param((7, 2), marks=pytest.mark.faults)],
    ids=lambda settings: f"batch {settings[0]}, {settings[1]} processes",
)  # fmt: skip
def test_neither_batches_nor_processes_change_a_sample(
    run_folder: Path, evaluated: Path, tmp_path: Path, settings: tuple[int, int]
) -> None:
    """Up to one of 256 levels per pixel, where rounding differs between batch sizes."""
    batch, processes = settings
    evaluate_in(tmp_path, run_folder, "--batch-size", batch, processes=processes)
    for what in ("samples", "reconstructions"):
        own, other = kept(evaluated, what), kept(tmp_path, what)
        assert own.keys() == other.keys()
        for name, rows in own.items():
            tolerance = {"pixels": 1, "psnr": 1e-4, "l1": 1e-6, "hidden": 2e-2, "probabilities": 1e-2}.get(name, 0)
            assert float((rows.double() - other[name].double()).abs().max()) <= tolerance, name
        if "pixels" in own:
            assert float((own["pixels"] != other["pixels"]).double().mean()) < 1e-3
    a, b = (numbers(folder) for folder in (evaluated, tmp_path))
    values = [{key: one["value"] for key, one in by_metric(content).items()} for content in (a, b)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    if batch == 64:
        assert a["numbers"] == b["numbers"]


def test_a_metric_alone_needs_no_others(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    for keys, sets in (("psnr", {"reconstructions"}), ("classified", {"real", "samples"})):
        out = tmp_path / keys
        done = cli("evaluate", run_folder, *FAST, "--metrics", keys, "--out", out)
        assert done.code == 0, done.err
        assert by_metric(numbers(out)).keys() == {keys}
        assert sets <= {path.name.split("-")[0] for path in (out / "records").iterdir()} <= sets | {"real"}


def test_what_the_data_cannot_show_is_said(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    done = cli("evaluate", run_folder, "--num", 0, "--metrics", "psnr,spread", "--out", tmp_path / "a")
    assert done.code == 0 and "not measured, the data do not allow it: spread" in done.err
    done = cli("evaluate", run_folder, "--num", 0, "--metrics", "spread", "--out", tmp_path / "b")
    assert done.code == 2 and "--metrics: spread cannot be measured on these data" in done.err


REFUSED = [
    (("--metrics", "fyd"), "metrics: 'fyd' is unknown here; did you mean 'fid'?; use one of psnr"),
    (("--steps", "2", "--solver", "rk4"), "solver: 'rk4' cannot be used"),
    (("--labels", "0-12"), "labels: 12 is out of range"),
    (("--data", "/nowhere"), "data.path: /nowhere does not exist"),
    (("--reference", "/nowhere.npz"), "--reference /nowhere.npz: cannot be read as plain arrays"),
    (("--samples", "/nowhere"), "--samples: /nowhere does not exist"),
    (("--precision", "fp8"), "--precision: 'fp8' is unknown"),
    (("--metrics", "fid", "--inception-weights", "/nowhere.pth"), "--inception-weights PATH takes a local file"),
    (("--metrics", "lpips", "--lpips-weights", "/nowhere.pth"), "--lpips-weights PATH"),
    (("--metrics", "fdr", "--inception-weights", "/nowhere.pth"), "--inception-weights PATH takes a local file"),
    (("--metrics", "fd_dinov2", "--dinov2", "/nowhere"), "the feature extractor dinov2"),
    (("--i3d-weights", "/nowhere.pth"), "--i3d-weights: samples of this model have no such metric; leave it out"),
    (("--given-frames", "2"), "--given-frames: samples of this model have no such metric; leave it out"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_evaluate_refuses(
    cli: Command, run_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = cli("evaluate", run_folder, "--num", 2, *arguments, "--out", tmp_path / "out")
    assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1, refused
    assert not (tmp_path / "out").exists()


def test_without_a_model_it_says_what_to_give(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    assert "MODEL: missing" in cli("evaluate").err
    done = cli("evaluate", run_folder / "model", "--out", tmp_path)
    assert done.code == 2 and "give --reference or --data" in done.err


# ---- labels where a number could mislead ---------------------------------------------------------------------------


def test_unbalanced_labels_are_said_wherever_the_number_is(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    done = cli("evaluate", run_folder, *FAST, "--metrics", "frechet_classifier", "--labels", "3", "--out", tmp_path)
    assert done.code == 0 and "labels not evenly sampled" in " ".join(done.out.replace("│", " ").split())
    found = by_metric(numbers(tmp_path))["frechet_classifier"]
    assert found["cautions"] == ["n = 150", "reference n = 300", "labels not evenly sampled"]


class Holed(Dataset):
    """A data set of which every fifth sample cannot be used."""

    def __init__(self, whole: Dataset, every: int = 5):
        self.whole, self.every, self.facts = whole, every, whole.facts

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Any:
        if index % self.every == 0:
            raise BadSample(f"image {index}: cannot be decoded")
        return self.whole[index]

    @property
    def fingerprint(self) -> str:
        return f"holed {self.every} {self.whole.fingerprint}"


def test_f35_bad_real_samples_are_replaced_and_counted(run_folder: Path, tmp_path: Path) -> None:
    """In an evaluation, the next usable sample replaces a bad one, whatever the batches; the protocol counts them."""
    model = unilatent.load(run_folder, device="cpu")
    splits = splits_of(model.modality, run_folder, None)
    holed = Splits(Holed(splits.train), Holed(splits.held_out))
    found = []
    for size in (7, 64):
        request = EvaluationRequest(num_samples=20, num_reference=100, num_held_out=50, batch_size=size)
        evaluation = Evaluator(model, holed, tmp_path / str(size), request, num_inference_steps=1).run()
        found.append(evaluation)
    for evaluation in found:
        distance, error = evaluation.find("frechet_classifier"), evaluation.find("psnr")
        chosen = [i * len(splits.train) // 100 for i in range(100)]
        assert distance.protocol.replaced == sum(i % 5 == 0 for i in chosen) > 5
        cautions = "; ".join(distance.protocol.cautions())
        assert f"{distance.protocol.replaced} unusable real samples were replaced" in cautions
        assert error.protocol.replaced > 0 and len(evaluation.evidence.held_out) == 50
    assert torch.equal(found[0].evidence.train["pixels"], found[1].evidence.train["pixels"])
    with pytest.raises(ValueError, match="16 samples in a row cannot be used, the last is: image 15"):
        Evaluator(model, Splits(Holed(splits.train, 1), splits.held_out), tmp_path / "none", EvaluationRequest()).run()


# ---- comparing -----------------------------------------------------------------------------------------------------


def changed(source: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = numbers(source)
    for number in content["numbers"]:
        change(number)
    to.write_text(json.dumps(content))
    return to


UNLIKE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "num_samples": ("num_samples is 150 in A and 151 in B", lambda p: p.update(num_samples=151)),
    "solver": ("sampling.solver is 'heun' in A and 'euler' in B", lambda p: p["sampling"].update(solver="euler")),
    "steps": (
        "sampling.num_inference_steps is 2 in A and 50 in B",
        lambda p: p["sampling"].update(num_inference_steps=50),
    ),
    "guidance": (
        "sampling.guidance_scale is 1.0 in A and 4.0 in B",
        lambda p: p["sampling"].update(guidance_scale=4.0),
    ),
    "preprocessing": ("preprocessing is 'adm centre", lambda p: p.update(preprocessing="squashed")),
    "reference": ("reference is 'training data' in A and 'val' in B", lambda p: p.update(reference="val")),
    "reference_data": ("reference_data is ", lambda p: p.update(reference_data="0" * 64)),
    "weights": ("weights is ", lambda p: p.update(weights="0" * 64)),
    "resolution": ("resolution is ", lambda p: p.update(resolution=[16, 16, 1])),
    "precision": ("precision is 'fp32' in A and 'bf16' in B", lambda p: p.update(precision="bf16")),
    "balance": ("balance.labels.smallest is 15 in A and 0 in B", lambda p: p["balance"]["labels"].update(smallest=0)),
}


@pytest.mark.parametrize("field", UNLIKE)
def test_unlike_numbers_are_not_ranked(cli: Command, evaluated: Path, tmp_path: Path, field: str) -> None:
    message, change = UNLIKE[field]

    def only(number: dict[str, Any]) -> None:
        if number["metric"] == "frechet_classifier":
            change(number["protocol"])
        else:
            number["protocol"].update(num_samples=7)

    (a,) = evaluated.glob("*.json")
    refused = cli("evaluate", "--compare", a, changed(evaluated, tmp_path / "b.json", only))
    assert refused.code == 2 and refused.err.startswith("error: compare: "), refused
    (one,) = (n for n in numbers(evaluated)["numbers"] if n["metric"] == "frechet_classifier")
    for number, name in ((one, "a.json"), (json.loads(json.dumps(one)), "b.json")):
        if name == "b.json":
            change(number["protocol"])
        (tmp_path / name).write_text(json.dumps({"format_version": 1, "numbers": [number]}))
    refused = cli("evaluate", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert refused.code == 2 and f"frechet_classifier: not comparable: {message}" in refused.err, refused.err


def test_like_numbers_are_ranked_by_what_is_better(
    cli: Command, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")

    def worse(number: dict[str, Any]) -> None:
        number["value"] += 1
        number["protocol"].update(seed=5)

    (a,) = evaluated.glob("*.json")
    done = cli("evaluate", "--compare", a, changed(evaluated, tmp_path / "b.json", worse))
    assert done.code == 0, done.err
    verdicts = {line.split("  ")[0].strip(): line for line in done.out.splitlines() if line.strip()}
    assert "B is better" in verdicts["PSNR of held-out reconstructions"]
    assert "A is better" in verdicts["Frechet distance (classifier features)"]
    assert "neither is better by itself" in " ".join(done.out.split())


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format_version": 1, "numbers": [{}]}', '{"format_version": 9, "numbers": []}']
)
def test_files_that_are_no_evaluations_are_named(cli: Command, evaluated: Path, tmp_path: Path, text: str) -> None:
    (a,) = evaluated.glob("*.json")
    (tmp_path / "b.json").write_text(text)
    refused = cli("evaluate", "--compare", a, tmp_path / "b.json")
    assert refused.code == 2 and f"{tmp_path / 'b.json'}: " in refused.err and refused.err.count("\n") == 1


# ---- while training ------------------------------------------------------------------------------------------------

ONLINE = ("training.evaluate_samples=20", "training.evaluate_every=4", "training.evaluate_steps=1")


def test_the_best_model_is_kept_by_a_named_metric(tmp_path: Path) -> None:
    """Evaluated at steps 4 and 8 and at the end; each file warns of the few samples."""
    out = tmp_path / "run"
    Trainer(digits(*ONLINE, "training.best=psnr"), out).fit()
    found = {int(p.stem[5:]): by_metric(json.loads(p.read_text())) for p in (out / "eval").glob("step_*.json")}
    assert sorted(found) == [4, 8, 12]
    assert found[4]["frechet_pixels"]["key"] == "frechet_pixels20/adm/heun-1/cfg1"
    assert "n = 20" in found[4]["frechet_pixels"]["cautions"]
    values = {step: one["psnr"]["value"] for step, one in found.items()}
    best = json.loads((out / "best" / "best.json").read_text())
    assert best["step"] == max(values, key=values.__getitem__) and best["value"] == max(values.values())
    content = json.loads((out / "eval" / f"step_{best['step']:08d}.json").read_text())
    assert unilatent.load(out / "best", device="cpu").fingerprint() == content["fingerprint"]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/psnr360/adm" in line for line in logged), logged[-1].keys()
    assert not list((out / "eval" / "records").glob("samples-*"))


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_numbers_of_other_protocols_do_not_replace_the_best(tmp_path: Path) -> None:
    """While training one solver step, at the end 50; then the run goes on with more samples. Said once each time."""
    out, settings = tmp_path / "run", [*ONLINE, "sampling.num_inference_steps=50", "training.best=frechet_pixels"]
    Trainer(digits(*settings), out).fit()
    rewrite(out / "best" / "best.json", value=1e9)  # any number would beat it
    before = json.loads((out / "best" / "best.json").read_text())
    assert before["step"] in (4, 8) and before["key"] == "frechet_pixels20/adm/heun-1/cfg1"
    log = (out / "log.txt").read_text()
    assert (
        log.count("warning: best/ stays: its frechet_pixels20/adm/heun-1/cfg1 has sampling.num_inference_steps 1, ")
        == 1
    )
    for step in (8, 12):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08d}")
    Trainer(digits(*settings, "training.evaluate_samples=30"), out, resume="auto").fit()
    assert json.loads((out / "best" / "best.json").read_text()) == before
    log = (out / "log.txt").read_text().removeprefix(log)
    assert log.count("has num_samples 20, this number 30; delete best/ to begin again") == 1


def test_the_best_stays_the_best_when_a_run_goes_on(tmp_path: Path) -> None:
    """After a resume, a better model from before is not replaced by a worse one, and a worse one is replaced."""
    out = tmp_path / "run"
    trainer = Trainer(digits(*ONLINE, "training.best=l1"), out)
    trainer.fit()
    for step in (8, 12):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(out / "model")
    before = (out / "best" / "config.json").stat().st_mtime_ns
    rewrite(out / "best" / "best.json", value=0.0)
    Trainer(digits(*ONLINE, "training.best=l1"), out, resume="auto").fit()
    assert json.loads((out / "best" / "best.json").read_text())["value"] == 0
    assert (out / "best" / "config.json").stat().st_mtime_ns == before
    for step in (8, 12):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08d}")
    rewrite(out / "best" / "best.json", value=9.0)
    Trainer(digits(*ONLINE, "training.best=l1"), out, resume="auto").fit()
    assert json.loads((out / "best" / "best.json").read_text())["step"] in (8, 12)


@pytest.mark.parametrize("point", ["model.before_rename", "evaluation.before_file", "evaluation.written"])
def test_an_evaluation_that_is_cut_short_is_completed_from_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Cut short before best/ is there, before the evaluation's file is, and before its samples are removed."""
    settings, out, drawn = [*ONLINE, "training.best=l1"], tmp_path / "run", list[int]()
    plain = evaluate.sample_batches

    def counted(model: Any, num: int, **how: Any) -> Any:
        drawn.append(len(drawn))
        return plain(model, num, **how)

    monkeypatch.setattr(evaluate, "sample_batches", counted)
    monkeypatch.setattr(monitoring, "reach", faults._act)
    monkeypatch.setattr(faults, "ARMED", faults.Fault.parse(f"{point}:raise::4"))
    with pytest.raises(RuntimeError, match=point):
        Trainer(digits(*settings), out).fit()
    assert (out / "best").is_dir() == (point != "model.before_rename")
    assert (out / "eval" / "step_00000004.json").is_file() == (point == "evaluation.written")
    Trainer(digits(*settings), out, resume="auto").fit()
    assert len(drawn) == 3, "of three evaluations"
    values = {int(p.stem[5:]): by_metric(json.loads(p.read_text()))["l1"] for p in (out / "eval").glob("step_*.json")}
    best = json.loads((out / "best" / "best.json").read_text())
    assert sorted(values) == [4, 8, 12] and best["value"] == min(one["value"] for one in values.values())
    assert {**values[best["step"]], "step": best["step"]} == best


@pytest.mark.parametrize("point", ["", "model.before_rename", "model.set_aside", "model.after_rename"])
def test_a_model_folder_is_replaced_without_losing_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Also by a writing that is cut short, before and after the next start settles it."""

    class Model:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            for name in ("model.safetensors", "README.md"):
                (folder / name).write_text("")
            (folder / "model.safetensors").write_text("new")

    folder, monitor = tmp_path / "best", SimpleNamespace(state=SimpleNamespace(step=4), journal=MagicMock())
    folder.mkdir()
    for name in ("model.safetensors", "README.md", "notes.txt"):
        (folder / name).write_text("old")
    monkeypatch.setattr(monitoring, "reach", faults._act)
    monkeypatch.setattr(faults, "ARMED", faults.Fault.parse(f"{point or 'none'}:raise"))
    with pytest.raises(RuntimeError) if point else nullcontext():
        monitoring.Monitor._write_model(monitor, Model(), folder, {"key": "l1", "value": 1.0, "step": 4})  # type: ignore[arg-type]
    monitoring.settle(folder)
    is_new = point in ("", "model.after_rename")
    assert (folder / "model.safetensors").read_text() == ("new" if is_new else "old")
    assert (folder / "README.md").read_text() == (folder / "notes.txt").read_text() == "old"
    assert (folder / "best.json").is_file() == is_new and not (tmp_path / "best.old").exists()


def test_an_evaluation_that_a_stop_prevented_is_made_up_for(tmp_path: Path) -> None:
    out = tmp_path / "run"
    Trainer(digits(*ONLINE), out).fit()
    for step in (8, 12):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08d}")
    want = json.loads((out / "eval" / "step_00000004.json").read_text())
    (out / "eval" / "step_00000004.json").unlink()
    Trainer(digits(*ONLINE), out, resume="auto").fit()
    again = json.loads((out / "eval" / "step_00000004.json").read_text())
    assert again["numbers"] == want["numbers"] and again["fingerprint"] == want["fingerprint"]


@pytest.mark.parametrize("metric", ["fid", "fyd"])
def test_a_best_that_is_never_measured_is_refused_before_training(cli: Command, tmp_path: Path, metric: str) -> None:
    refused = cli("train", "digits", *QUICK, *ONLINE, f"training.best={metric}", "--out", tmp_path / "run")
    assert refused.code == 2 and f"training.best: '{metric}' is not measured while training; there are" in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_two_processes_share_an_evaluation(tmp_path: Path) -> None:
    """Their numbers equal those of one process with the same weights."""
    Trainer(digits("training.steps=1"), tmp_path / "one").fit()
    overrides = [*QUICK, "training.steps=1", "training.evaluate_samples=140", "training.best=psnr"]
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port()),
               "-m", "unilatent", "train", "digits", *overrides, "--out", str(tmp_path / "two")]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "eval" / "step_00000001.json").read_text())
    model = unilatent.load(tmp_path / "two", device="cpu")
    request = EvaluationRequest(num_samples=140, num_reference=20_000)
    alone = Evaluator(model, splits_of(model.modality, tmp_path / "two", None), tmp_path / "records", request).run()
    values = {measured.row.key: measured.row.value for measured in alone.numbers}
    assert {key: one["value"] for key, one in by_metric(two).items()} == pytest.approx(values, rel=1e-4)
    assert json.loads((tmp_path / "two" / "best" / "best.json").read_text())["value"] == by_metric(two)["psnr"]["value"]


def test_images_of_a_folder_as_reference(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """A folder replaces the training data as reference, with its own name and hash."""
    rng = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / "set" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "set" / str(i % 2) / f"{i}.png")
    done = cli("evaluate", run_folder, *FAST, "--reference", tmp_path / "set", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    protocol = by_metric(numbers(tmp_path / "out"))["frechet_classifier"]["protocol"]
    assert protocol["reference"] == "set" and protocol["num_reference"] == 40


def test_a_model_folder_is_held_against_the_data_that_is_given(cli: Command, run_folder: Path, tmp_path: Path) -> None:
    """All of the data are reconstructed and are the reference; then there is no held-out baseline for samples."""
    done = cli("evaluate", run_folder / "model", "--data", "digits", "--num", 40, "--steps", 1, "--num-held-out", 50,
               "--out", tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    found = by_metric(numbers(tmp_path))
    assert found.keys() == {"psnr", "l1", "frechet_classifier", "classified", "frechet_ratio"}
    assert found["psnr"]["protocol"]["num_samples"] == 50 and found["frechet_classifier"]["beside"] == {}
    assert found["frechet_classifier"]["protocol"]["num_reference"] == 1797
    ratio = found["frechet_ratio"]["protocol"]
    assert ratio["relative_to"] == "half of the reference" and ratio["num_reference"] == 899


def test_two_runs_are_compared_by_their_newest_evaluations(cli: Command, evaluated: Path, tmp_path: Path) -> None:
    (a,) = evaluated.glob("*.json")
    for name in ("one", "other"):
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "eval" / "evaluation-1.json").write_bytes(a.read_bytes())
    done = cli("evaluate", "--compare", tmp_path / "one", evaluated, "--json")
    assert done.code == 0 and json.loads(done.out)["a"] == str(tmp_path / "one" / "eval" / "evaluation-1.json"), done
    empty = cli("evaluate", "--compare", tmp_path, tmp_path / "one")
    assert empty.code == 2 and f"{tmp_path}: no evaluation in it" in empty.err
