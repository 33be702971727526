"""Runs: what they write, that resuming is bitwise, that nothing depends on how a batch is cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import QUICK, Command
from safetensors.torch import load_file

from unilatent import devices
from unilatent.batches import micro_batches
from unilatent.cli.running import note_drawback
from unilatent.config import ConfigError
from unilatent.devices import bf16_drawback, has_bf16
from unilatent.methods.base import LossPart
from unilatent.modalities.base import permutation
from unilatent.presets import preset
from unilatent.runs import checkpoint as ckpt
from unilatent.training.config import Decay, Onset, RunConfig, ScheduleConfig
from unilatent.training.schedule import factor, unreachable, weight
from unilatent.training.trainer import Trainer


def digits(*overrides: str) -> RunConfig:
    return preset("digits").override(*QUICK, *overrides)


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {
        f"{name}:{key}": value
        for name in ("model", "ema", "optimizer")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_what_a_run_writes(run_folder: Path) -> None:
    assert {"config.yaml", "env.json", "metrics.jsonl", "log.txt", "latest.json", "checkpoints", "model"} <= {
        path.name for path in run_folder.iterdir()
    }
    written = {path.name for path in (run_folder / "model").iterdir()}
    assert written == {"config.json", "model.safetensors", "README.md", "record.json"}
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert {"loss/total", "loss/flow", "loss/l1", "grad_norm", "latent_std", "learning_rate", "samples"} <= lines[
        0
    ].keys()
    assert json.loads((run_folder / "latest.json").read_text())["step"] == 12


def test_the_first_step_moves_the_weights(tmp_path: Path) -> None:
    """The learning rate of step 1 is not 0."""
    trainer = Trainer(digits("training.steps=1"), tmp_path / "one")
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.fit()
    moved = [key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])]
    assert len(moved) > 10


@pytest.mark.covers("F24")
@pytest.mark.parametrize("overrides", [(), ("training.micro_batch_size=6",)])
def test_resume_is_bitwise(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Resumed at step 4 of 12, whole and in micro-batches: final weights, average and optimizer bitwise."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Trainer(digits(*overrides), whole).fit()
    Trainer(digits(*overrides), parts).fit()
    for step in (8, 12):
        shutil.rmtree(parts / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(parts / "model")
    resumed = Trainer(digits(*overrides), parts, resume="auto")
    assert resumed.step == 4
    resumed.fit()
    assert_same(state(whole, 12), state(parts, 12))
    steps = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12]


@pytest.mark.covers("F07", "F24")
def test_a_stop_signal_saves_and_resumes_bitwise(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of a step: finished, saved, resumed, bitwise."""
    trainer = Trainer(digits(), tmp_path / "run")
    original = trainer._one_step

    def interrupted(micro: list) -> dict:
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(micro)

    monkeypatch.setattr(trainer, "_one_step", interrupted)
    trainer.fit()
    assert trainer.step == 6 and not (tmp_path / "run" / "model").exists()
    Trainer(digits(), tmp_path / "run", resume="auto").fit()
    assert_same(state(tmp_path / "run", 12), state(run_folder, 12))


def test_f09_sigusr1_saves_and_goes_on(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1: saved, training goes on, final weights equal."""
    trainer = Trainer(digits(), tmp_path / "run")
    original = trainer._one_step

    def interrupted(micro: list) -> dict:
        if trainer.step == 9:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(micro)

    monkeypatch.setattr(trainer, "_one_step", interrupted)
    trainer.fit()
    ckpt.verify(tmp_path / "run" / "checkpoints" / "step_00000010")
    assert_same(state(tmp_path / "run", 12), state(run_folder, 12))


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    """Sixteen samples at once, or in micro-batches of 6, 6 and 4: none is lost, noise stays each sample's own."""
    runs = {}
    for micro in ("null", "6"):
        trainer = Trainer(
            digits("training.steps=1", f"training.micro_batch_size={micro}", "training.optimizer.muon=false"),
            tmp_path / micro,
        )
        trainer.model.generative_encoder.transformer.out.weight.data.normal_(
            std=0.1, generator=torch.Generator().manual_seed(0)
        )
        gradients = {}
        trainer.state.optimizers.step = lambda g=gradients, t=trainer: g.update(  # type: ignore[method-assign]
            {name: p.grad.clone() for name, p in t.model.named_parameters() if p.grad is not None}
        )
        trainer.fit()
        runs[micro] = gradients
    for name, gradient in runs["null"].items():
        torch.testing.assert_close(runs["6"][name], gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_cover_everything_once() -> None:
    positions = [p for r in range(3) for batch in micro_batches(range(2, 4), 10, 2, rank=r, world=3) for p in batch]
    assert sorted(positions) == list(range(20, 40))


def test_an_epoch_visits_every_sample_once() -> None:
    assert sorted(permutation(0, 1, 7)) == list(range(7))
    assert permutation(0, 0, 50) != permutation(1, 0, 50) != permutation(1, 1, 50)


@pytest.mark.covers("F24")
def test_workers_and_memory_settings_change_nothing(tmp_path: Path, run_folder: Path) -> None:
    """Two data workers: bitwise; recomputed activations: within rounding."""
    Trainer(digits("training.workers=2"), tmp_path / "workers").fit()
    assert_same(state(tmp_path / "workers", 12), state(run_folder, 12))
    Trainer(digits("training.activation_checkpointing=true"), tmp_path / "recompute").fit()
    a, b = state(tmp_path / "recompute", 12), state(run_folder, 12)
    assert max(float((a[k] - b[k]).abs().max()) for k in a if k.startswith("model:")) < 1e-4


def test_bf16_autocast_steps(tmp_path: Path) -> None:
    trainer = Trainer(digits("training.precision=bf16", "training.steps=3"), tmp_path / "bf16")
    trainer.fit()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.covers("F24")
def test_a_finished_run_says_so(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed after its last step: trains nothing and says so."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    Trainer(digits(), copy, resume="auto").fit()
    assert "nothing is left to train" in capsys.readouterr().err.replace("\n", " ")
    assert_same(state(copy, 12), state(run_folder, 12))


@pytest.mark.covers("F14")
def test_resume_auto_passes_over_damage_and_a_path_does_not(tmp_path: Path, run_folder: Path) -> None:
    """A flipped bit in the newest checkpoint: `auto` takes the one before, a path is refused."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    last = copy / "checkpoints" / "step_00000012"
    damaged = bytearray((last / "model.safetensors").read_bytes())
    damaged[-5] ^= 1
    (last / "model.safetensors").write_bytes(damaged)
    assert Trainer(digits(), copy, resume="auto").step == 8
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        Trainer(digits(), copy, resume=str(last))


@pytest.mark.covers("F23", "F26")
@pytest.mark.parametrize(
    ("override", "field"),
    [("method.generative_encoder.width=32", "method.generative_encoder.width"), ("seed=3", "seed"),
     ("training.batch_size=8", "training.batch_size"), ("data.held_out=100", "data.held_out"),
     ("training.optimizer.muon=false", "training.optimizer.muon")],
)  # fmt: skip
def test_resume_refuses_another_run(tmp_path: Path, run_folder: Path, override: str, field: str) -> None:
    """Another width, seed, batch size, optimizer or data on resume: refused by field."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    with pytest.raises(ConfigError, match=f"^{field}: .* the (checkpoint has|run had)"):
        Trainer(digits(override), copy, resume="auto")


CHANGED = (
    "training.ema_decay=0.9", "training.optimizer.learning_rate=1e-5", "training.optimizer.betas=[0.8,0.99]",
    "training.optimizer.muon_learning_rate=0.002", "training.schedule.warmup=7", "training.schedule.decays=[]",
    "training.schedule.onsets={flow: {start: 1, end: 2}}", "training.gradient_clip=null", "training.precision=bf16",
    "training.non_finite=skip:3",
)  # fmt: skip


@pytest.mark.parametrize("older", [False, True], ids=["state.json", "config.yaml"])
def test_settings_changed_on_resuming_are_named_once(
    tmp_path: Path, run_folder: Path, older: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the value of the checkpoint's run and the new one; also of checkpoints that do not store their settings."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    checkpoint = copy / "checkpoints" / "step_00000012"
    if older:
        facts = json.loads((checkpoint / "state.json").read_text())
        del facts["training"]
        (checkpoint / "state.json").write_text(json.dumps(facts))
        manifest = json.loads((checkpoint / ckpt.MANIFEST).read_text())
        manifest["files"]["state.json"] = ckpt.describe(checkpoint / "state.json")
        (checkpoint / ckpt.MANIFEST).write_text(ckpt._manifest(12, manifest["files"]))
    trainer = Trainer(digits("training.steps=13", *CHANGED), copy, resume="auto")
    then = digits().training
    want = [
        ("ema_decay", "0.99", "0.9"),
        ("optimizer.learning_rate", str(then.optimizer.learning_rate), "1e-05"),
        ("optimizer.betas", "[0.9, 0.999]", "[0.8, 0.99]"),
        ("optimizer.muon_learning_rate", json.dumps(then.optimizer.muon_learning_rate), "0.002"),
        ("schedule.warmup", "50.0", "7.0"),
        ("schedule.decays", json.dumps([decay.plain() for decay in then.schedule.decays]), "[]"),
        ("schedule.onsets", json.dumps({k: v.plain() for k, v in then.schedule.onsets.items()}),
         '{"flow": {"start": 1.0, "end": 2.0}}'),
        ("gradient_clip", str(then.gradient_clip), "null"),
        ("precision", "fp32", "bf16"),
        ("non_finite", "stop", "skip:3"),
    ]  # fmt: skip
    assert sorted(trainer.changed) == sorted(
        f"training.{field}: {old} in the checkpoint's run, {new} now" for field, old, new in want
    )
    trainer.fit()
    err = capsys.readouterr().err
    assert err.count("note: training.ema_decay: 0.99 in the checkpoint's run, 0.9 now") == 1


def test_settings_that_change_nothing_are_not_named(tmp_path: Path, run_folder: Path) -> None:
    """Speed, logging and length may change without a word; so does nothing at all."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    for overrides in ((), ("training.steps=20", "training.log_every=7", "training.micro_batch_size=4")):
        assert Trainer(digits(*overrides), copy, resume="auto").changed == []


@pytest.mark.covers("F23")
def test_what_is_no_checkpoint_is_named_with_the_way_out(tmp_path: Path, run_folder: Path) -> None:
    """A run, its checkpoints, its model, a file, another folder, nothing."""
    newest = run_folder / "checkpoints" / "step_00000012"
    ways = f"to continue that run: --out {run_folder} --resume auto with more training.steps than its 12"
    bare, other, half = tmp_path / "model", tmp_path / "other", tmp_path / "half"
    shutil.copytree(run_folder / "model", bare)
    shutil.copytree(run_folder, half)
    shutil.rmtree(half / "model")
    shutil.rmtree(half / "checkpoints" / "step_00000012")
    other.mkdir()
    (tmp_path / "step_00000003").mkdir()
    for given, *parts in (
        (run_folder, "is a run folder, not a checkpoint", ways, f"start another run from it: --resume {newest}"),
        (newest.parent, "is a folder of checkpoints, not one of them", ways),
        (run_folder / "model", "is a model without the optimiser state", ways, f"--resume {newest}"),
        (bare, "is a model without the optimiser state", "RUN/checkpoints/step_00001000 of the run that made it"),
        (half, f"to continue that run: --out {half} --resume auto; to start", "--resume", "step_00000008"),
        (newest / "model.safetensors", "is a file, a checkpoint is a folder", f"give its folder, {newest}"),
        (run_folder / "config.yaml", "is a file, a checkpoint is a folder; give a folder like"),
        (other, "neither a checkpoint nor a run; give a folder like RUN/checkpoints/step_00001000"),
        (tmp_path / "none", "no such checkpoint; give a folder like RUN/checkpoints/step_00001000"),
        (tmp_path / "step_00000003", "has no MANIFEST.json, so it is incomplete"),
    ):
        with pytest.raises(ValueError) as error:
            Trainer(digits(), tmp_path / "next", resume=str(given))
        message = str(error.value)
        assert all(part in message for part in parts) and "\n" not in message, message
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(
    ("length", "named"),
    [(("training.steps=8",), "training.steps: 8"),
     (("training.steps=null", "training.epochs=0.05"), "training.epochs: 0.05, which are 4 steps")],
)  # fmt: skip
def test_fewer_steps_than_the_checkpoint_has_are_refused(
    tmp_path: Path, run_folder: Path, length: tuple[str, ...], named: str
) -> None:
    """Nothing is trained or written; the message says where the model is."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    for resume in ("auto", str(copy / "checkpoints" / "step_00000012")):
        with pytest.raises(ConfigError) as error:
            Trainer(digits(*length), copy, resume=resume)
        message = str(error.value)
        assert message.startswith(f"{named}, but {copy}/checkpoints/step_00000012 has 12 steps: nothing is left")
        assert f"its model is in {copy / 'model'}. To train on, give more than 12 steps" in message
    shutil.rmtree(copy / "model")
    with pytest.raises(ConfigError, match=f"its model is in {copy}/checkpoints/step_00000012"):
        Trainer(digits(*length), tmp_path / "next", resume=str(copy / "checkpoints" / "step_00000012"))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")}.items() <= before.items()
    assert not (tmp_path / "next").exists()


X86, ARM = "flags\t\t: fpu avx2 {}\n", "Features\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("text", "known"),
    [(X86.format("avx512_bf16"), True), (X86.format("amx_bf16 amx_tile"), True), (ARM.format("bf16"), True),
     (X86.format("avx512f"), False), (ARM.format("sve"), False), ("processor: 0\n", None), (None, None)],
)  # fmt: skip
def test_a_processor_that_is_slow_in_bf16_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, known: bool | None
) -> None:
    """Emulated or not: what counts is the measured factor. Of AMX it is known that it is fast."""
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "_bf16_factor", devices._bf16_factor.__wrapped__)  # not cached
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert has_bf16("cpu") is known
    for ratio, words in ((0.25, "0.25 times as long"), (2.0, "2 times as long")):
        monkeypatch.setattr(devices, "matmul_seconds", lambda *_, ratio=ratio: {"fp32": 1.0, "bf16": ratio})
        line = bf16_drawback("cpu")
        if known is None or (known and (ratio < 1 or "amx" in str(text))):
            assert line is None
            continue
        assert line is not None and words in line
        how = "has slow bf16 instructions" if known else "has no bf16 instructions and emulates them"
        assert line.startswith(f"this CPU {how}") and (known or ("which is slow" in line) == (ratio > 1))


def test_products_are_measured_on_one_thread() -> None:
    threads = torch.get_num_threads()
    seconds = devices.matmul_seconds("cpu", ("fp32", "bf16"), 64, 0.01)
    assert all(0 < value < 1 for value in seconds.values()) and torch.get_num_threads() == threads


@pytest.mark.parametrize(("capability", "known"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_old_gpus_emulate_bf16(capability: tuple[int, int], known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_bf16(torch.device("cuda")) is known


def test_a_run_says_that_bf16_is_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unilatent.training.setup.bf16_drawback", lambda device: f"emulated on {device}")
    Trainer(digits("training.steps=1", "training.precision=bf16"), tmp_path / "bf16").fit()
    assert capsys.readouterr().err.count("note: training.precision=bf16: emulated on cpu\n") == 1
    assert not [line for line in Trainer(digits(), tmp_path / "fp32").notes() if "bf16" in line]


def test_other_commands_say_that_bf16_is_emulated(
    tmp_path: Path, run_folder: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and only where it is used."""
    monkeypatch.setattr("unilatent.devices.bf16_drawback", lambda device: f"emulated on {device}")
    sampled = ("sample", run_folder, "--num", 4, "--batch-size", 2, "--steps", 1)
    evaluated = ("evaluate", run_folder, "--num", 20, "--num-held-out", 20, "--batch-size", 5, "--steps", 1)
    for number, command in enumerate((sampled, evaluated)):
        for precision, times in (("bf16", 1), ("fp32", 0)):
            note_drawback.cache_clear()
            done = cli(*command, "--precision", precision, "--out", tmp_path / f"{number}-{precision}")
            assert done.code == 0 and done.err.count("note: --precision bf16: emulated on cpu\n") == times, done.err
    refused = cli("sample", run_folder, "--precision", "fp8", "--out", tmp_path / "none")
    assert refused.code == 2 and "--precision: 'fp8' is unknown; use auto, fp32 or bf16" in refused.err
    note_drawback.cache_clear()


def test_a_run_says_that_it_compiles_and_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Announced before the first step, and once with its time after it."""
    monkeypatch.setattr("unilatent.nets.layers.Repeated.compile", lambda self, **options: None)
    Trainer(digits("training.steps=3", "training.compile=true"), tmp_path / "run").fit()
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if "compile" in line]
    first = "note: training.compile=true: the first step compiles 5 blocks, which takes minutes"
    assert len(said) == 2 and said[0].startswith(first)
    assert said[1].startswith("compiled: step 1 took ") and lines.index(said[0]) < lines.index(said[1])
    assert not [line for line in Trainer(digits(), tmp_path / "eager").notes() if "compile" in line]


@pytest.mark.covers("F04")
def test_a_failed_save_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    """A save that fails leaves the older checkpoints and no temporary folder."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        ckpt.save(folder, step, lambda f: (f / "a").write_bytes(b"x"), keep=2)
    assert [p.name for p in sorted(folder.iterdir())] == ["step_00000003", "step_00000004"]

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        ckpt.save(folder, 5, fail, keep=2)
    assert [p.name for p in sorted(folder.iterdir())] == ["step_00000003", "step_00000004"]
    assert ckpt.newest(folder)[0] == folder / "step_00000004"


def test_schedule_in_epochs_ignores_accumulation_and_names_what_is_never_reached() -> None:
    schedule = ScheduleConfig(unit="epochs", warmup=2, decays=(Decay(start=4, end=6, factor=0.1),))
    assert [factor(schedule, step, 10) for step in (1, 20, 40, 60, 99)] == pytest.approx([0.05, 1, 1, 0.1, 0.1])
    assert unreachable(schedule, 100, 10) == []
    assert "decay to 0.1 is not reached" in unreachable(schedule, 30, 10)[0]
    low = ScheduleConfig(decays=(Decay(start=400, end=600, factor=0.03),))
    assert (
        unreachable(low, 600, 10) == [] and "stays at 0.03 of its peak from 600 steps" in unreachable(low, 700, 10)[0]
    )


def test_a_part_of_the_loss_comes_in_between_two_marks() -> None:
    schedule = ScheduleConfig(onsets={"flow": Onset(start=2, end=6)})
    assert [weight(schedule, "flow", step, 10) for step in (0, 2, 3, 5, 6, 99)] == [0, 0, 0.25, 0.75, 1, 1]
    assert weight(schedule, "reconstruction", 0, 10) == 1
    epochs = schedule.model_copy(update={"unit": "epochs"})
    assert weight(epochs, "flow", 40, 10) == 0.5 and "onset of flow is not reached" in unreachable(epochs, 20, 10)[0]


def test_what_has_not_come_in_moves_no_weight(tmp_path: Path) -> None:
    """Until its onset the flow loss is measured, and the run goes where it goes without that loss."""
    late = "training.schedule.onsets={flow: {start: 100, end: 200}}"
    settings = ("training.steps=2", "training.batch_size=4", "training.log_every=1")
    ended = [
        Trainer(digits(*settings, *more), tmp_path / name)
        for name, more in (("late", (late,)), ("never", ("method.flow_weight=0",)), ("at_once", ()))
    ]
    for trainer in ended:
        trainer.fit()
    weights = [dict(trainer.model.named_parameters()) for trainer in ended]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())
    flow = [json.loads(line)["loss/flow"] for line in (tmp_path / "late" / "metrics.jsonl").read_text().splitlines()]
    assert flow[-1] > 0


def test_a_part_that_the_loss_does_not_have_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(digits("training.schedule.onsets={flaw: {start: 1, end: 2}}"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"training\.schedule\.onsets\.flaw: .* it has flow, reconstruction"):
        trainer.fit()


@pytest.mark.covers("F11")
def test_a_diverged_step_never_reaches_weights_or_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN gradient with a save every step: the newest checkpoint is the one before."""
    trainer = Trainer(digits("training.log_every=10", "training.checkpoint_every=1"), tmp_path / "nan")
    original = trainer.optimise.backward

    def poisoned(*arguments: object) -> Iterator[LossPart]:
        yield from original(*arguments)
        if trainer.step == 3:
            trainer.model.decoder.out.weight.grad[0, 0] = float("nan")

    monkeypatch.setattr(trainer.optimise, "backward", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 4: grad_norm is not finite; the weights are those of step 3"):
        trainer.fit()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    found, passed = ckpt.newest(tmp_path / "nan" / "checkpoints")
    assert found is not None and found.name == "step_00000003" and not passed


def test_going_back_to_an_older_step_keeps_what_it_saves(tmp_path: Path, run_folder: Path) -> None:
    """Checkpoints of the abandoned continuation are set aside: they neither push new ones out nor are resumed from."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    trainer = Trainer(digits(), copy, resume=str(copy / "checkpoints" / "step_00000004"))
    trainer.fit()
    names = sorted(p.name for p in (copy / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008", "step_00000008.aside", "step_00000012", "step_00000012.aside"]
    assert_same(state(copy, 12), state(run_folder, 12))


@pytest.mark.covers("F15")
def test_a_run_without_a_sound_checkpoint_is_not_started_over(tmp_path: Path, run_folder: Path) -> None:
    """No sound checkpoint left: refused, never started over."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    for folder in (copy / "checkpoints").iterdir():
        (folder / "ema.safetensors").unlink()
    with pytest.raises(ConfigError, match="no valid checkpoint is left"):
        Trainer(digits(), copy, resume="auto")


@pytest.mark.covers("F15")
def test_saving_a_step_again_keeps_one_of_the_two_at_every_moment(tmp_path: Path) -> None:
    """The same step saved again, killed in between: one of the two is always there."""
    folder = tmp_path / "checkpoints"
    ckpt.save(folder, 1, lambda f: (f / "a").write_bytes(b"old"), keep=2)
    # As if killed between setting the old one aside and publishing the new one.
    (folder / "step_00000001").rename(folder / "step_00000001.old-7")
    (folder / "step_00000001.tmp-7").mkdir()
    ckpt.clean(folder, 1)
    assert [p.name for p in folder.iterdir()] == ["step_00000001"]
    ckpt.save(folder, 1, lambda f: (f / "a").write_bytes(b"new"), keep=2)
    assert [p.name for p in folder.iterdir()] == ["step_00000001"]
    assert (folder / "step_00000001" / "a").read_bytes() == b"new"


def test_missing_perceptual_weights_are_refused_before_a_run_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    config = digits("modality.size=32", "modality.channels=3", "modality.perceptual_weight=1")
    with pytest.raises(ValueError, match=r"modality\.perceptual_weight"):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_runs_equal_eager_ones(tmp_path: Path, precision: str) -> None:
    """Every block really compiles (no silent fall back to eager), and the weights after three steps agree."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for mode in ("true", "false"):
            settings = (f"training.compile={mode}", f"training.precision={precision}", "training.steps=3")
            Trainer(digits(*settings), tmp_path / mode).fit()
    a, b = state(tmp_path / "true", 3), state(tmp_path / "false", 3)
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a if k.startswith("model:")) < 2e-2


def test_evaluations_that_never_come_are_said(tmp_path: Path) -> None:
    """A preset's cadence counts steps of its own data; with fewer of one's own, a run may end before."""
    late = Trainer(digits("training.evaluate_samples=8", "training.evaluate_every=50040"), tmp_path / "late").notes()
    assert (
        "note: training.evaluate_every 50,040 is more than the run's 12 steps: it is evaluated at its end only" in late
    )
    usual = Trainer(digits("training.evaluate_samples=8", "training.evaluate_every=6"), tmp_path / "usual").notes()
    assert not any("evaluate_every" in line for line in usual)
