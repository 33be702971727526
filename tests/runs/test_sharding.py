"""Blocks sharded over two processes (FSDP2, gloo): the same optimisation and files, half the memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from test_processes import TORCHRUN, environment, losses, port, train
from test_training import assert_same, digits, state

from unilatent.methods.base import LatentModel
from unilatent.nets.layers import Repeated
from unilatent.presets import preset
from unilatent.training.trainer import Trainer

ADAMW = "training.optimizer.muon=false"
TWENTY = ("training.steps=20", "training.checkpoint_every=10", "training.log_every=1")


def alone(out: Path, *overrides: str) -> Path:
    Trainer(digits(*overrides), out).fit()
    return out


def sharded(out: Path, *overrides: str) -> Path:
    done = train(out, "training.shard=true", *overrides, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def farthest(a: Path, b: Path, step: int) -> float:
    """Largest difference of any weight, EMA weight or optimizer state; names and shapes must agree."""
    one, two = state(a, step), state(b, step)
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}
    return max(float((one[key] - two[key]).abs().max()) for key in one)


def test_sharded_processes_are_one_optimisation(tmp_path: Path) -> None:
    """Losses and gradient norms over twenty steps, and the full state from which one process then resumes."""
    settings = (*TWENTY, ADAMW)
    one, two = alone(tmp_path / "one", *settings), sharded(tmp_path / "two", *settings)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(one)) == 20
    assert farthest(one, two, 20) < 1e-5
    longer = digits(*settings, "training.steps=24")
    for run in (one, two):
        trainer = Trainer(longer, run, resume="auto")
        assert trainer.step == 20
        trainer.fit()
    assert farthest(one, two, 24) < 1e-5


def test_one_process_is_not_sharded_and_says_so(tmp_path: Path, run_folder: Path) -> None:
    trainer = Trainer(digits("training.shard=true"), tmp_path / "run")
    assert any("training.shard does nothing in a single process" in line for line in trainer.notes())
    trainer.fit()
    assert_same(state(tmp_path / "run", 12), state(run_folder, 12))


def test_the_blocks_are_nearly_all_of_a_large_model() -> None:
    """The parameters that are replicated in every process."""
    with torch.device("meta"):
        model = LatentModel.build(preset("imagenet256-unite-xl").model())
    total = sum(p.numel() for p in model.parameters())
    blocks = [m for m in model.modules() if isinstance(m, Repeated)]
    assert sum(p.numel() for block in blocks for p in block.parameters()) > 0.97 * total


@pytest.mark.faults
@pytest.mark.parametrize(
    "overrides",
    [
        ("training.activation_checkpointing=true", "training.micro_batch_size=3"),
        ("method.stop_gradient=false",),
        ("method.shared_weights=false", "method.flow_chunk=1"),
    ],
)
def test_sharding_bears_recomputation_accumulation_and_other_gradients(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """With the shared encoder several times in one backward pass, and several backward passes a step."""
    one = alone(tmp_path / "one", *TWENTY, ADAMW, *overrides)
    two = sharded(tmp_path / "two", *TWENTY, ADAMW, *overrides)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert farthest(one, two, 20) < 1e-5


@pytest.mark.faults
def test_sharded_muon_agrees_to_rounding(tmp_path: Path) -> None:
    """Orthogonalising amplifies the rounding of gradients, whose sums have another order (equal ones: test_muon)."""
    one, two = alone(tmp_path / "one", *TWENTY), sharded(tmp_path / "two", *TWENTY)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert farthest(one, two, 20) < 1e-2


@pytest.mark.faults
def test_sharded_runs_draw_judge_and_go_on_from_one_process(tmp_path: Path) -> None:
    """The checkpoint of one process is sharded on loading; images, model and table come from the EMA weights."""
    extra = (*TWENTY, ADAMW, "training.sample_every=10", "training.evaluate_samples=50")
    one = alone(tmp_path / "one", *extra)
    sharded(tmp_path / "two", *extra, "--resume", str(one / "checkpoints" / "step_00000010"))
    assert farthest(one, tmp_path / "two", 20) < 1e-5
    for name in ("samples/step_00000020.png", "recon/step_00000020.png", "eval/step_00000020.json", "model"):
        assert (tmp_path / "two" / name).exists()
    a, b = (LatentModel.from_pretrained(run / "model").state_dict() for run in (one, tmp_path / "two"))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5


MEASURE = """
import sys
from pathlib import Path
from unilatent.presets import preset
from unilatent.sharding import is_sharded, local
from unilatent.training.trainer import Trainer

trainer = Trainer(preset("digits").override("training.shard=true", "training.steps=1"), Path(sys.argv[1]))
trainer.fit()
cut = [t.detach() for t in (*trainer.model.parameters(), *trainer.state.ema.weights.values(),
                            *trainer.state.optimizers.state().values()) if is_sharded(t)]
print("HOLDS", sum(t.numel() for t in cut), sum(local(t).numel() for t in cut))
trainer.processes.leave()
"""


@pytest.mark.faults
def test_each_process_holds_its_half(tmp_path: Path) -> None:
    """Each process stores half of the blocks' weights, EMA weights and optimizer state."""
    (tmp_path / "measure.py").write_text(MEASURE)
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port()),
               str(tmp_path / "measure.py"), str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("HOLDS")]
    assert len(found) == 2
    with torch.device("meta"):
        model = LatentModel.build(digits().example().model())
    blocks = [p for m in model.modules() if isinstance(m, Repeated) for p in m.parameters()]
    for whole, own in found:
        assert int(whole) > 3 * sum(p.numel() for p in blocks)
        assert 0.45 < int(own) / int(whole) < 0.55


@pytest.mark.faults
def test_unequal_shares_are_refused(tmp_path: Path) -> None:
    """Processes with unequal numbers of micro-batches would wait for each other for ever."""
    done = train(tmp_path / "run", "training.shard=true", "training.batch_size=9", "training.micro_batch_size=4",
                 processes=2)  # fmt: skip
    assert done.returncode != 0 and "make it a multiple of 2" in done.stderr
    assert not (tmp_path / "run").exists()
