"""Pictures and evaluations during a run: shared by processes, waited for without a timeout, measured by named metrics.

Where these tests name the metric `fid`, a small network that the tests make stands for Inception: the numbers are
Frechet distances on test-made weights, and no FID.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from conftest import QUICK, Command
from PIL import Image
from test_evaluate import by_metric
from test_processes import TORCHRUN, environment, port
from test_training import digits

import unilatent
from unilatent.config import ConfigError
from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.evaluation.reference import find_reference, splits_of
from unilatent.heartbeat import Heartbeat
from unilatent.modalities.image import Image as ImageModality
from unilatent.nets.inception import InceptionV3
from unilatent.processes import Processes
from unilatent.records import open_records
from unilatent.training.monitoring import check_evaluation
from unilatent.training.trainer import Trainer

# ---- waiting ---------------------------------------------------------------------------------------------------------


def pair(timeout: float) -> tuple[Heartbeat, Heartbeat]:
    """Two processes of one group, here in two threads."""
    store = dist.HashStore()
    one, two = Heartbeat(store, 2, timeout), Heartbeat(store, 2, timeout)
    two.store = one.store
    return one, two


def test_a_process_that_works_is_waited_for_beyond_the_timeout() -> None:
    one, two = pair(timeout=0.6)

    def work() -> None:
        for _ in range(2):
            with two.working():
                time.sleep(1.5)
            two.meet()

    thread = threading.Thread(target=work)
    thread.start()
    one.meet()
    one.meet()
    thread.join()
    assert one.store.num_keys() <= 3, "those of earlier meetings are deleted"


def test_a_process_without_a_sign_of_life_is_not_waited_for() -> None:
    one, two = pair(timeout=0.3)
    with two.working():
        pass  # it was alive once
    with pytest.raises(RuntimeError, match="1 of 2 processes did not come, and none of them gave a sign of life"):
        one.meet()


@pytest.mark.parametrize(("rows", "world"), [(50_000, 8), (50_000, 512), (5000, 64), (150, 2), (1, 4), (0, 4)])
def test_processes_get_equal_shares_of_records(tmp_path: Path, rows: int, world: int) -> None:
    records = open_records(tmp_path, rows, {}, world)
    shares = [sum(map(len, records.ranges[rank::world])) for rank in range(world)]
    assert sum(shares) == rows and max(map(len, records.ranges), default=0) <= 512
    assert max(shares) <= 1.05 * -(-rows // world)


def test_records_keep_their_chunks_for_any_number_of_processes(tmp_path: Path) -> None:
    written = open_records(tmp_path, 1000, {"seed": 1}, 3)
    assert open_records(tmp_path, 1000, {"seed": 1}).ranges == written.ranges
    with pytest.raises(ValueError, match="another seed"):
        open_records(tmp_path, 1000, {"seed": 2})


# ---- several processes -----------------------------------------------------------------------------------------------


def launch(script: Path, *arguments: str) -> None:
    """Run a script in two processes."""
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port()),
               str(script), *arguments]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


MADE = """
import torch
from torch import nn
from unilatent.nets.inception import Features, InceptionV3

class MadeByTest(nn.Module):
    '''Inception's outputs, of few values: random projections of 8 x 8 pixels, fixed by a seed.'''

    def forward(self, images):
        projection = torch.randn(3 * 64, 8, generator=torch.Generator().manual_seed(0))
        values = (images.flatten(1).float() / 255) @ projection
        return Features(values, values[:, :4], values)

InceptionV3.load = lambda *_: MadeByTest()
"""

TRAINED = (
    MADE
    + """
import sys
from pathlib import Path
from unilatent.presets import preset
from unilatent.training.trainer import Trainer

trainer = Trainer(preset("digits").override(*sys.argv[2:]), Path(sys.argv[1]))
trainer.fit()
trainer.processes.leave()
"""
)


@pytest.fixture
def made_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file whose hash stands for the weights of `MADE`, which is used in this process too."""
    monkeypatch.setattr(InceptionV3, "load", InceptionV3.load)  # restored at the end
    exec(MADE, {})
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "test_made_weights"
    path.write_text(MADE)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of the size of digits."""
    folder = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / str(i % 2) / f"{i}.png")
    return folder


def measured_by(weights: Path, real: Path) -> list[str]:
    return [f"modality.inception_weights={weights}", f"training.evaluate_reference={real}", "data.held_out=20",
            'training.evaluate_metrics=["fid","psnr"]', "sampling.num_inference_steps=2"]  # fmt: skip


@pytest.mark.faults
def test_sharded_processes_draw_and_evaluate_as_one(tmp_path: Path, made_weights: Path, real: Path) -> None:
    """Two processes that hold half of the blocks each: numbers and pictures of one process with the same weights, also
    where one of them has no sample left and keeps the other company."""
    settings = [*QUICK, *measured_by(made_weights, real), "training.steps=2", "training.evaluate_samples=13",
                "training.evaluate_every=1", "training.best=fid", "training.sample_every=1", "training.num_samples=1",
                "training.optimizer.muon=false", "training.shard=true"]  # fmt: skip
    out = tmp_path / "two"
    (tmp_path / "trained.py").write_text(TRAINED)
    launch(tmp_path / "trained.py", str(out), *settings)
    model = unilatent.load(out, device="cpu")
    request = EvaluationRequest(metrics=("fid", "psnr"), num_samples=13)
    alone = Evaluator(
        model, splits_of(model.modality, out, None), tmp_path / "records", request,
        reference=find_reference(model.modality, str(real)),
    ).run()  # fmt: skip
    found = by_metric(json.loads((out / "eval" / "step_00000002.json").read_text()))
    assert {key: one["value"] for key, one in found.items()} == pytest.approx(
        {one.row.key: one.row.value for one in alone.numbers}, rel=1e-5
    )
    assert found.keys() == {"fid", "psnr"}
    assert found["fid"]["protocol"] == json.loads(json.dumps(alone.find("fid").protocol.plain()))
    assert json.loads((out / "eval" / "step_00000002.json").read_text())["fingerprint"] == model.fingerprint()
    Trainer(digits(*settings), tmp_path / "one").fit()
    for name in ("samples/step_00000001.png", "recon/step_00000001.png", "recon/step_00000002.png"):
        assert np.abs(picture(out / name) - picture(tmp_path / "one" / name)).max() <= 1, name
    best = [json.loads((run / "best" / "best.json").read_text()) for run in (out, tmp_path / "one")]
    assert best[0]["step"] == best[1]["step"] and best[0]["value"] == pytest.approx(best[1]["value"], rel=1e-3)


RESUMED = """
import sys
from pathlib import Path
from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.presets import preset
from unilatent.training.trainer import Trainer

out = Path(sys.argv[1])
trainer = Trainer(preset("digits").override("training.shard=true", "training.steps=1", "data.held_out=70"), out)
before = {name: p.to_local().clone() if hasattr(p, "to_local") else p.clone()
          for name, p in trainer.model.named_parameters()}
request = EvaluationRequest(num_samples=150, num_reference=200, batch_size=32)

def numbers():
    with trainer.state.ema.applied(trainer.model):
        evaluator = Evaluator(trainer.model, trainer.splits, out, request, processes=trainer.processes,
                              num_inference_steps=2)
        assert evaluator.in_lock_step
        return [(one.row.key, one.row.value) for one in evaluator.run().numbers]

for value in trainer.state.ema.weights.values():
    value.mul_(1.01)
first = numbers()
if trainer.processes.is_main:
    for what in ("samples", "reconstructions"):
        next(out.glob(f"{what}-*/rows_00000000_*")).unlink()
trainer.processes.wait()
assert numbers() == first and len(first) > 3
for name, p in trainer.model.named_parameters():
    assert ((p.to_local() if hasattr(p, "to_local") else p) == before[name]).all(), name
trainer.processes.leave()
"""


@pytest.mark.faults
def test_sharded_processes_complete_what_is_missing_in_lock_step(tmp_path: Path) -> None:
    """One chunk is missing, so that the second process only keeps the first one company; afterwards the weights in
    training are those of before, to the bit."""
    (tmp_path / "resumed.py").write_text(RESUMED)
    launch(tmp_path / "resumed.py", str(tmp_path / "records"))


SLOW = """
import sys
import time
from pathlib import Path
from unilatent.modalities.image import metrics
from unilatent.presets import preset
from unilatent.runs import curves
from unilatent.training import monitoring
from unilatent.training.trainer import Trainer

config = preset("digits").override(
    "training.steps=2", "training.evaluate_samples=20", "training.evaluate_every=1", "training.timeout=12",
    "training.batch_size=16", "data.held_out=20", "sampling.num_inference_steps=1", "training.sample_every=1",
    "training.checkpoint_every=0", *sys.argv[2:])
trainer = Trainer(config, Path(sys.argv[1]))
measure, draw = metrics.PixelMetrics.__call__, monitoring.draw_curves

def slow_metric(self, evidence):
    time.sleep(20 if trainer.step == 1 else 0)
    return measure(self, evidence)

def slow_drawing(*paths):
    time.sleep(20 if trainer.step == 1 else 0)
    return draw(*paths)

metrics.PixelMetrics.__call__, monitoring.draw_curves = slow_metric, slow_drawing
batches = sys.modules["unilatent.evaluation.evaluate"].sample_batches

def slow_share(*arguments, **settings):
    time.sleep(20 if trainer.processes.rank == 1 and trainer.step == 2 and not trainer.sharded else 0)
    return batches(*arguments, **settings)

sys.modules["unilatent.evaluation.evaluate"].sample_batches = slow_share
trainer.fit()
trainer.processes.leave()
"""


@pytest.mark.faults
@pytest.mark.parametrize("shard", ["true", "false"])
def test_work_that_outlasts_the_timeout_ends_no_run(tmp_path: Path, shard: str) -> None:
    """Metrics and pictures of the first process, and the share of the second, take 20 s each; the timeout is 12 s."""
    (tmp_path / "slow.py").write_text(SLOW)
    launch(tmp_path / "slow.py", str(tmp_path / "run"), f"training.shard={shard}")
    assert sorted(path.stem for path in (tmp_path / "run" / "eval").glob("step_*.json")) == [
        "step_00000001", "step_00000002"
    ]  # fmt: skip
    assert (tmp_path / "run" / "model" / "config.json").is_file()


# ---- named metrics ---------------------------------------------------------------------------------------------------


def test_a_distance_on_test_made_weights_is_measured_at_its_cadence_and_keeps_the_best(
    tmp_path: Path, made_weights: Path, real: Path
) -> None:
    """Without held-out data too: only new samples are measured."""
    settings = [*measured_by(made_weights, real)[:2], "data.held_out=0", 'training.evaluate_metrics=["fid"]',
                "training.steps=6", "training.evaluate_samples=6", "training.evaluate_every=2", "training.best=fid",
                "training.evaluate_steps=1", "sampling.num_inference_steps=1"]  # fmt: skip
    out = tmp_path / "run"
    Trainer(digits(*settings), out).fit()
    found: dict[int, dict[str, Any]] = {
        int(path.stem[5:]): by_metric(json.loads(path.read_text())) for path in (out / "eval").glob("step_*.json")
    }
    assert sorted(found) == [2, 4, 6] and all(one.keys() == {"fid"} for one in found.values())
    values = {step: one["fid"]["value"] for step, one in found.items()}
    best = json.loads((out / "best" / "best.json").read_text())
    assert len(set(values.values())) == 3
    assert best["value"] == min(values.values()) and best["step"] == min(values, key=values.__getitem__)
    content = json.loads((out / "eval" / f"step_{best['step']:08d}.json").read_text())
    assert unilatent.load(out / "best", device="cpu").fingerprint() == content["fingerprint"]
    protocol = found[2]["fid"]["protocol"]
    assert protocol["reference"] == real.name and protocol["num_reference"] == 12
    assert protocol["weights"] == hashlib.sha256(made_weights.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ['training.evaluate_metrics=["fyd"]'],
            "training.evaluate_metrics: 'fyd' is unknown here; did you mean 'fid'?; use one of psnr",
        ),
        (['training.evaluate_metrics=["fid"]'], "training.evaluate_metrics: InceptionV3 weights for FID: not found at"),
        (['training.evaluate_metrics=["fid"]', "training.best=kid"], "training.best: 'kid' is not measured"),
        (['training.evaluate_metrics=["psnr"]', "data.held_out=0"], "psnr needs held-out samples; set data.held_out"),
        (["training.evaluate_reference=nowhere"], "training.evaluate_reference: "),
    ],
)
def test_what_an_evaluation_lacks_is_refused_before_training(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    refused = cli("train", "digits", *QUICK, "training.evaluate_samples=20", *overrides, "--out", tmp_path / "run")
    assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1, refused.err
    assert not (tmp_path / "run").exists()


def test_sharded_models_are_sampled_with_equally_many_steps() -> None:
    config = digits("sampling.solver=dopri5", "training.sample_every=5")
    modality = ImageModality(config.modality)
    splits = modality.splits(config.data)
    assert check_evaluation(config, modality, splits, False, Processes.alone()) is None
    with pytest.raises(ConfigError, match=r"sampling\.solver: dopri5 takes other steps for other samples"):
        check_evaluation(config, modality, splits, True, Processes.alone())
