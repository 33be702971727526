"""`unilatent push`, and what a stored model says of itself: cards, records, the models of the package."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command
from PIL import Image
from test_cli import images

import unilatent
from unilatent import packaged
from unilatent.model_card import CARD, PICTURES, RECORD, is_untouched, read_record
from unilatent.model_folder import places
from unilatent.registry import available, find
from unilatent.runs.record import name_of


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload needs."""

    files: dict[str, bytes]
    created: list[dict[str, Any]]
    refuse: int | None
    private: bool

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refuse is not None:
            return self.answer({"error": "no"}, self.refuse)
        if self.path.startswith("/api/repos/create"):
            self.created.append(json.loads(raw))
            return self.answer({"url": f"http://{self.headers['Host']}/jane/{json.loads(raw)['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(raw)["files"]]
            regular = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer({"files": regular})
        assert "/commit/" in self.path, self.path
        for line in map(json.loads, raw.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(
            {"commitUrl": f"http://{self.headers['Host']}/jane/digits/commit/1", "commitOid": "1", "success": True}
        )

    def do_GET(self) -> None:
        if self.path == "/api/models/jane/digits":
            return self.answer({"id": "jane/digits", "private": self.private})
        self.answer({"error": "not found"}, 404)

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine."""
    handler = type("OwnHub", (Hub,), {"files": {}, "created": [], "refuse": None, "private": True})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    for name in ("UNILATENT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Path:
    """A run with images whose model was evaluated."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run_folder, run)
    for folder in ("samples", "recon"):
        (run / folder).mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(run / folder / "step_00000012.png")
    with pytest.raises(SystemExit) as stop:
        unilatent.cli.main(["evaluate", str(run), "--num", "20", "--steps", "1"])
    assert stop.value.code == 0
    return run


def head_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_a_card_has_numbers_protocols_images_data_and_licences(evaluated: Path, tmp_path: Path):
    unilatent.load(evaluated, device="cpu").save_pretrained(tmp_path / "model", licence="apache-2.0")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", CARD, RECORD, *PICTURES
    }  # fmt: skip
    card = (tmp_path / "model" / CARD).read_text()
    (file,) = (evaluated / "eval").glob("evaluation-*.json")
    numbers = json.loads(file.read_text())["numbers"]
    assert len(numbers) > 6
    for number in numbers:
        assert number["name"] in card and f"`{number['key']}`" in card and f"{number['value']:.4g}" in card
        assert number["outline"] in card
    head = head_of(card)
    results = {m["name"]: m["value"] for r in head["model-index"][0]["results"] for m in r["metrics"]}
    assert results == {n["key"]: pytest.approx(n["value"]) for n in numbers if n["headline"]}
    assert head["license"] == "apache-2.0" and head["pipeline_tag"] == "unconditional-image-generation"
    for part in (
        "![",
        "samples.png",
        "CC BY 4.0",
        "preset: digits",
        "steps: 12",
        "1,437 training samples",
        "## Limits",
    ):
        assert part in card, part
    assert str(tmp_path) not in card and str(evaluated) not in card + (tmp_path / "model" / RECORD).read_text()


def test_numbers_stay_with_the_weights_that_they_are_of(evaluated: Path, tmp_path: Path):
    """Through folders; and not on a model that was changed."""
    model = unilatent.load(evaluated, device="cpu")
    model.save_pretrained(tmp_path / "a")
    unilatent.load(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    first, second = (read_record(tmp_path / name) for name in "ab")
    assert first is not None and second is not None and second.numbers and first.plain() == second.plain()
    assert set(second.pictures) == set(PICTURES)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(tmp_path / "b")
    changed = read_record(tmp_path / "b")
    assert changed is not None and changed.numbers == [] and changed.fingerprint == model.fingerprint()
    assert "was not evaluated with the weights" in (tmp_path / "b" / CARD).read_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_weights_are_stored_small_and_are_another_model(evaluated: Path, tmp_path: Path, dtype: str):
    model = unilatent.load(evaluated, device="cpu")
    whole, fingerprint = {k: v.clone() for k, v in model.state_dict().items()}, model.fingerprint()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "half", dtype=dtype)
    assert model.fingerprint() == fingerprint and all(torch.equal(whole[k], v) for k, v in model.state_dict().items())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.55 * sizes[1]
    again = unilatent.load(tmp_path / "half", device="cpu")
    assert again.dtype == torch.float32 and again.fingerprint() != fingerprint
    for key, value in again.state_dict().items():
        expected = whole[key].to(getattr(torch, dtype)).to(value.dtype) if value.is_floating_point() else whole[key]
        assert torch.equal(value, expected), key
    card = (tmp_path / "half" / CARD).read_text()
    assert f"stored as {dtype}" in card and "was not evaluated" in card
    again.save_pretrained(tmp_path / "again", dtype=dtype)
    assert unilatent.load(tmp_path / "again", device="cpu").fingerprint() == again.fingerprint()


def test_weights_that_a_type_cannot_hold_are_refused(evaluated: Path, tmp_path: Path):
    model = unilatent.load(evaluated, device="cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match=r"dtype: \S+ has values that torch.float16 cannot hold"):
        model.save_pretrained(tmp_path / "half", dtype="float16")


def test_a_card_that_somebody_wrote_stays_and_an_own_one_is_renewed(evaluated: Path, tmp_path: Path):
    model = unilatent.load(evaluated, device="cpu")
    model.save_pretrained(tmp_path)
    card = tmp_path / CARD
    assert is_untouched(card)
    model.save_pretrained(tmp_path, licence="mit")
    assert "license: mit" in card.read_text() and is_untouched(card)
    card.write_text(card.read_text().replace("digits", "my digits"))
    assert not is_untouched(card)
    model.save_pretrained(tmp_path, licence="apache-2.0")
    assert "license: mit" in card.read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 2}',
                                     '{"format_version": 1, "fingerprint": 1, "training": {}, "data": {}, "licence": 1,'
                                     ' "evaluations": [{"numbers": [{"key": 1}]}]}'])  # fmt: skip
def test_a_damaged_record_is_no_record(evaluated: Path, tmp_path: Path, content: str):
    unilatent.load(evaluated, device="cpu").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / RECORD).write_text(content)
    assert read_record(tmp_path / "a") is None
    unilatent.load(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    assert "was not evaluated" in (tmp_path / "b" / CARD).read_text()


def test_every_modality_knows_where_its_own_data_come_from():
    for name in available("modalities"):
        kind = find("modalities", name)
        assert kind.origin_of(kind.DataConfig.small()), name


def test_a_run_describes_its_model_with_its_last_evaluation(cli: Command, tmp_path: Path):
    quick = ["training.steps=2", "training.checkpoint_every=0", "training.batch_size=8", "training.evaluate_samples=12"]
    done = cli("train", "digits", *quick, "training.sample_every=2", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    model = tmp_path / "run" / "model"
    record = read_record(model)
    assert record is not None and len(record.numbers) > 6 and set(record.pictures) == set(PICTURES)
    assert is_untouched(model / CARD) and "recognised" in (model / CARD).read_text()
    assert record.fingerprint == unilatent.load(model, device="cpu").fingerprint()


# ---- the models of the package ---------------------------------------------------------------------------------------

MODELS = packaged.names()


def test_the_package_has_models_of_eight_megabytes_in_all():
    assert "digits" in MODELS
    assert sum(path.stat().st_size for path in packaged.FOLDER.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_package_samples_offline(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    model = unilatent.load(name, device="cpu")
    made = unilatent.sample(model, num=2, num_inference_steps=2)
    assert len(made) == 2 and made.isfinite().all() and not model.training
    record = read_record(packaged.FOLDER / name)
    assert record is not None and record.fingerprint == model.fingerprint() and len(record.numbers) > 6
    assert set(record.pictures) == set(PICTURES) and record.licence == "apache-2.0" and record.data["origin"]
    card = (packaged.FOLDER / name / CARD).read_text()
    assert f'unilatent.load("{name}")' in card and all(f"`{n['key']}`" in card for n in record.numbers)


def test_the_digits_reconstruct_and_are_of_their_class():
    """The stored weights are the trained ones: the numbers of the card hold, on a few samples."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    real = load_digits()
    judge = SVC(gamma=0.001, C=10).fit(real.data, real.target)
    model = unilatent.load("digits", device="cpu")
    made = unilatent.sample(model, num=100, labels=range(10), seed=1)
    assert (judge.predict(made.flatten(1).numpy() * 16) == [i % 10 for i in range(100)]).mean() > 0.9
    held = torch.from_numpy(real.images[:64] / 16).float()[:, None]
    assert -10 * (unilatent.reconstruct(model, held) - held).square().mean().log10() > 25


def test_the_list_of_files_is_complete_and_true():
    listed = dict(
        reversed(line.split(maxsplit=1)) for line in (packaged.FOLDER / packaged.SUMS).read_text().splitlines()
    )
    files = {
        path.relative_to(packaged.FOLDER).as_posix() for path in packaged.FOLDER.glob("*/*") if path.suffix != ".pyc"
    }
    assert set(listed) == files
    done = subprocess.run(["sha256sum", "--check", "--quiet", packaged.SUMS], cwd=packaged.FOLDER, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_a_damaged_model_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shutil.copytree(packaged.FOLDER, tmp_path / "packaged", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "packaged")
    weights = tmp_path / "packaged" / "digits" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors: its SHA-256 is not that of the release; install"):
        unilatent.load("digits")
    weights.unlink()
    with pytest.raises(ValueError, match="install unilatent again"):
        unilatent.load("digits")


def test_a_folder_comes_before_a_model_of_the_package(evaluated: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(evaluated, tmp_path / "digits")
    assert unilatent.load("digits").fingerprint() == unilatent.load(evaluated).fingerprint()


def test_commands_take_a_model_of_the_package(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = cli("sample", "digits", "--num", 4, "--steps", 2, "--out", tmp_path / "out")
    assert done.code == 0 and (tmp_path / "out" / "grid.png").is_file(), done.err
    done = cli("reconstruct", "digits", images(tmp_path / "in"), "--out", tmp_path / "r")
    assert done.code == 0, done.err
    unknown = cli("sample", "digitz", "--out", tmp_path / "x")
    assert unknown.code == 2 and "digits" in unknown.err


# ---- push ------------------------------------------------------------------------------------------------------------


def test_push_uploads_the_model_with_its_card(cli: Command, evaluated: Path, hub: type[Hub], tmp_path: Path):
    done = cli("push", evaluated, "jane/digits", "--licence", "apache-2.0", "--private", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert hub.created[0]["name"] == "digits" and hub.created[0]["organization"] == "jane"
    assert set(hub.files) == {"config.json", "model.safetensors", CARD, RECORD, *PICTURES} == set(record["files"])
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert unilatent.load(tmp_path, device="cpu").fingerprint() == unilatent.load(evaluated, device="cpu").fingerprint()
    assert 'unilatent.load("jane/digits")' in hub.files[CARD].decode()
    assert record["uploaded"] and record["lacks"] == []


def test_a_private_upload_never_goes_to_a_public_repository(cli: Command, evaluated: Path, hub: type[Hub]):
    """One that is there already stays public whatever `create_repo` is asked for."""
    hub.private = False
    refused = cli("push", evaluated, "jane/digits", "--private")
    assert refused.code == 2 and not hub.files, refused
    assert "--private: jane/digits is there already, and is public" in refused.err
    assert cli("push", evaluated, "jane/digits").code == 0 and hub.files


def moved(run: Path, target: Path, **changes: str) -> Path:
    """A copy of a run whose model has other settings of its modality."""
    shutil.copytree(run, target)
    path = target / "model" / "config.json"
    content = json.loads(path.read_text())
    content["modality"] |= changes
    path.write_text(json.dumps(content))
    return target


def test_push_uploads_no_places_of_this_machine(cli: Command, evaluated: Path, hub: type[Hub], tmp_path: Path):
    """What only losses and metrics read is left out of the configuration, unless it is an id of the hub."""
    (tmp_path / "inception.pth").touch()
    run = moved(
        evaluated, tmp_path / "run", perceptual_weights="/home/jane/vgg.pth", clip="~/clip", dinov2="owner/dinov2",
        inception_weights=str(tmp_path / "inception.pth"),
    )  # fmt: skip
    assert cli("push", run, "jane/digits").code == 0
    uploaded = json.loads(hub.files["config.json"])["modality"]
    wanted = {"perceptual_weights": None, "inception_weights": None, "clip": None, "dinov2": "owner/dinov2"}
    assert {name: uploaded[name] for name in wanted} == wanted
    model = unilatent.load(run, device="cpu")
    model.push_to_hub("jane/digits")
    assert json.loads(hub.files["config.json"])["modality"] == uploaded
    assert model.config.modality.clip == "~/clip", "the model keeps its own"
    for name, content in hub.files.items():
        assert b"/home/jane" not in content and str(tmp_path).encode() not in content, name


def test_places_that_a_model_needs_are_named(tmp_path: Path):
    settings = {"conditions": {"text": {"encoder": str(tmp_path), "cache": "no/place"}}, "method": {"name": "unite"}}
    assert list(places(settings)) == [("conditions.text.encoder", str(tmp_path))]


@pytest.mark.parametrize(("path", "shown"), [
    ("hf:jane/birds", "hf:jane/birds"), ("hf:/home/jane/set", "set"), ("hf:./sets/a", "a"), ("/home/jane/set", "set"),
    ("https://bucket.example/birds.tar?X-Amz-Signature=secret", "birds.tar"), ("s3://bucket/a/b-{000..009}.tar",
    "b-{000..009}.tar"), ("hf:/home/jane/a?b#c", "a?b#c"),
])  # fmt: skip
def test_a_record_has_the_name_of_the_data_alone(path: str, shown: str):
    assert name_of(path) == shown


def test_a_dry_run_uploads_nothing_and_names_what_is_missing(cli: Command, run_folder: Path, hub: type[Hub]):
    done = cli("push", run_folder, "jane/digits", "--dry-run")
    assert done.code == 0 and not hub.files and not hub.created, done.err
    assert "model.safetensors" in done.out and "# unite on image" in done.out and "would be uploaded" in done.out
    assert "no numbers" in done.err and "--licence" in done.err and "origin" not in done.err


def test_an_edited_card_is_uploaded_as_it_is(cli: Command, evaluated: Path, hub: type[Hub], tmp_path: Path):
    shutil.copytree(evaluated, tmp_path / "run")
    (tmp_path / "run" / "model" / CARD).write_text("my card\n")
    assert cli("push", tmp_path / "run", "jane/digits").code == 0
    assert hub.files[CARD] == b"my card\n"


@pytest.mark.parametrize(("status", "words"), [(401, "hf auth login"), (403, "may not write"), (500, "refused (500)")])
def test_refusals_of_the_hub_are_one_line(cli: Command, evaluated: Path, hub: type[Hub], status: int, words: str):
    hub.refuse = status
    done = cli("push", evaluated, "jane/digits")
    assert (
        done.code == 2 and words in done.err.splitlines()[-1] and done.err.splitlines()[-1].startswith("error: jane/")
    )


def test_push_refuses_names_and_offline(cli: Command, evaluated: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch):
    for name in ("digits", "a/b/c", "jane/di gits", "jane/"):
        refused = cli("push", evaluated, name)
        assert refused.code == 2 and re.match(r"error: OWNER/NAME: ", refused.err), refused
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    refused = cli("push", evaluated, "jane/digits")
    assert refused.code == 2 and "UNILATENT_OFFLINE forbids" in refused.err and not hub.created
