"""Metrics, alarms, loggers, listings and curves of a run; none of them can stop it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, Command
from PIL import Image
from test_faults import armed  # noqa: F401
from test_processes import train
from test_training import assert_same, digits, state

from unilatent.config import ConfigError
from unilatent.maths.streams import Streams
from unilatent.runs.curves import draw_curves
from unilatent.runs.journal import AlarmChange, Journal, read_lines
from unilatent.runs.listing import describe
from unilatent.training import loggers
from unilatent.training.alarms import GRACE, PATIENCE, STUCK_LOGS, ZERO_STEPS, Alarms
from unilatent.training.trainer import Trainer

REAL = Path(__file__).with_name("digits_metrics.jsonl")
"""What the digits preset logged every ten steps, to four digits."""
DRAWN = ("training.sample_every=4", "training.num_samples=4", "sampling.num_inference_steps=2")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# Metrics.


def test_gradient_norms_of_the_parts_are_those_of_their_gradients(tmp_path: Path) -> None:
    """Compared with each part differentiated alone, summed over micro-batches; the parts add up to the whole."""
    run = tmp_path / "run"
    trainer = Trainer(digits("training.steps=1", "training.micro_batch_size=6"), run)
    model, found = trainer.model, {}
    rows = [(trainer.splits.train.index_at(0, i), i) for i in range(16)]
    from unilatent.batches import collate

    for micro in (rows[:6], rows[6:12], rows[12:]):
        batch = collate([trainer.splits.train[index] for index, _ in micro], model.modality)
        for part in model.loss(batch, Streams(("train", 0), [i for _, i in micro])):
            parameters = [p for p in model.parameters() if p.requires_grad]
            got = torch.autograd.grad(part.value * len(micro) / 16, parameters, allow_unused=True)
            before = found.get(part.title, [0.0] * len(got))
            found[part.title] = [a if g is None else a + g for a, g in zip(before, got, strict=True)]
    norms = {key: sum(float(torch.as_tensor(g).double().square().sum()) for g in v) ** 0.5 for key, v in found.items()}
    whole = sum(float((a + b).double().square().sum()) for a, b in zip(*found.values(), strict=True)) ** 0.5
    trainer.fit()
    (line,) = metrics(run)
    assert set(norms) == {"reconstruction", "flow"}
    for key, norm in norms.items():
        assert line[f"grad_norm/{key}"] == pytest.approx(norm, rel=1e-4)
    assert line["grad_norm"] == pytest.approx(whole, rel=1e-4)


def test_measurements_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    lines = []
    for size in (1, 6, 16):
        Trainer(digits("training.steps=1", f"training.micro_batch_size={size}"), tmp_path / str(size)).fit()
        lines += metrics(tmp_path / str(size))
    for key in ("latent_std", "latent_rms", "latent_rank", "grad_norm/reconstruction", "grad_norm/flow"):
        assert [line[key] for line in lines] == pytest.approx([lines[0][key]] * 3, rel=1e-4)


@pytest.mark.faults
def test_measurements_do_not_depend_on_processes(tmp_path: Path) -> None:
    for processes in (1, 2):
        assert train(tmp_path / str(processes), "training.batch_size=17", processes=processes).returncode == 0
    one, two = metrics(tmp_path / "1")[0], metrics(tmp_path / "2")[0]
    for key in ("latent_std", "latent_rank", "grad_norm/reconstruction", "grad_norm/flow"):
        assert two[key] == pytest.approx(one[key], rel=1e-3)


# Alarms.


def feed(alarms: Alarms, lines: list[dict[str, float]]) -> list[AlarmChange]:
    changes = []
    for line in lines:
        changes += alarms.after_step(line["step"], line["grad_norm"])
        changes += alarms.after_log(line["step"], line)
    return changes


def real() -> list[dict[str, float]]:
    return list(read_lines(REAL))


def test_a_real_run_raises_no_alarm() -> None:
    """Its latents are collapsed for 250 steps, then informative along one direction; its flow loss rises 100 times."""
    assert real()[20]["latent_std"] < 0.03 < 0.9 < real()[-1]["latent_std"]
    assert real()[27]["latent_rank"] < 2
    assert feed(Alarms(1400, 16), real()) == []


def later(line: dict[str, float], count: int, **numbers: float) -> list[dict[str, float]]:
    return [{**line, "step": line["step"] + 10 * (i + 1), **numbers} for i in range(count)]


def test_collapse_and_recovery_are_reported_once_each() -> None:
    alarms, last = Alarms(3000, 16), real()[-1]
    feed(alarms, real())
    dead = later(last, 30, latent_std=0.1)
    changes = [c for c in feed(alarms, dead) if not c.alarm.startswith("loss")]
    assert [(c.alarm, c.on, c.step) for c in changes] == [("latents_collapsed", True, last["step"] + 10 * PATIENCE)]
    assert "down from 0.9" in changes[0].message
    assert [(c.alarm, c.on) for c in feed(alarms, later(dead[-1], 1, latent_std=0.8)) if "lat" in c.alarm] == [
        ("latents_collapsed", False)
    ]


def test_a_single_odd_batch_raises_no_alarm() -> None:
    alarms, last = Alarms(3000, 16), real()[-1]
    feed(alarms, real())
    assert feed(alarms, later(last, 1, latent_std=0.01) + later(last, 2)) == []


def test_a_falling_rank_is_noticed_where_there_could_be_more_directions() -> None:
    alarms, last = Alarms(3000, 16), real()[-1]
    feed(alarms, real())
    assert [c.alarm for c in feed(alarms, later(last, 5, latent_rank=1.5))] == ["latents_flat"]
    narrow = Alarms(3000, 3)
    feed(narrow, [{**line, "latent_rank": min(line["latent_rank"], 2.5)} for line in real()])
    assert feed(narrow, later(last, 5, latent_rank=1.5)) == []


def test_latents_that_stay_collapsed_raise_an_alarm_after_the_grace() -> None:
    asleep = [line for line in real() if line["step"] <= 240]
    alarms = Alarms(4000, 16)
    changes = feed(alarms, asleep + [{**asleep[i % 24], "step": 240 + 10 * i} for i in range(1, 300)])
    assert [(c.alarm, c.on, c.step) for c in changes] == [("latents_asleep", True, 2000)]
    assert feed(Alarms(600, 16), asleep + [{**asleep[i % 24], "step": 240 + 10 * i} for i in range(1, 36)]) == []
    assert Alarms(10**6, 16).grace == GRACE[1]


def test_a_loss_that_does_not_move_is_stuck() -> None:
    alarms, last = Alarms(3000, 16), real()[-1]
    feed(alarms, real())
    moving = [{**line, "loss/flow": 0.0, "step": line["step"] + 1400} for line in real()[-STUCK_LOGS:]]
    changes = feed(alarms, moving)
    assert [(c.alarm, c.on) for c in changes] == [("loss_stuck:loss/flow", True)] and changes[0].step == moving[-1][
        "step"
    ]
    assert "has been 0 for 20 logged steps" in changes[0].message and last["loss/flow"] > 0


def test_a_resumed_run_restores_its_alarms(tmp_path: Path) -> None:
    lines = real() + later(real()[-1], 10, latent_std=0.1)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99')
    resumed = Alarms(3000, 16)
    resumed.replay(tmp_path / "metrics.jsonl")
    assert "latents_collapsed" in resumed.active
    assert not [c for c in feed(resumed, later(lines[-1], 1, latent_std=0.1)) if c.on and "lat" in c.alarm]


def test_f13_gradients_that_are_all_zero_raise_an_alarm(cli: Command, tmp_path: Path, armed) -> None:  # noqa: F811
    armed("step.gradients:zero")
    run = tmp_path / "run"
    done = cli("train", "digits", *QUICK, "training.log_every=100", "--out", run)
    assert done.code == 0 and f"ALARM zero_gradients, step {ZERO_STEPS}: every gradient" in done.err
    (line,) = read_lines(run / "alarms.jsonl")
    assert (line["step"], line["alarm"], line["on"]) == (ZERO_STEPS, "zero_gradients", True)
    assert describe(run).alarms == ("zero_gradients",)
    assert "zero_gradients" in cli("runs", tmp_path).out


# Loggers.


def test_tensorboard_equals_metrics_and_a_resumed_run_replaces_abandoned_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, settings = tmp_path / "run", ("training.loggers=[tensorboard]", *DRAWN)
    Trainer(digits(*settings), run).fit()
    for resume in ("auto", str(run / "checkpoints" / "step_00000004")):
        Trainer(digits(*settings), run, resume=resume).fit()
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    lines = metrics(run)
    assert set(events.Tags()["scalars"]) == set(lines[-1]) - {"step"}
    for key in ("loss/total", "latent_rank", "grad_norm/flow"):
        got = [(event.step, event.value) for event in events.Scalars(key)]
        assert got == [(line["step"], pytest.approx(line[key])) for line in lines]
    assert {event.step for event in events.Images("samples")} == {4, 8, 12}
    (run / "image.png").write_bytes(events.Images("samples")[-1].encoded_image_string)
    shown, drawn = Image.open(run / "image.png"), Image.open(run / "samples" / "step_00000012.png").convert("RGB")
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(drawn))


@pytest.mark.faults
def test_wandb_keeps_one_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "unilatent",
        "train",
        "digits",
        *QUICK,
        "training.loggers=[wandb]",
        "--out",
        str(run),
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment = {**clean, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    for extra in ((), ("training.steps=16", "--resume", "auto")):
        done = subprocess.run([*command, *extra], env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0 and "failed" not in done.stderr, done.stderr[-2000:]
    kept = (run / "wandb_id.txt").read_text().strip()
    files = sorted((run / "wandb").glob("offline-run-*"))
    assert len(files) == 2 and all(file.name.endswith(kept) for file in files)
    assert all(next(file.glob("*.wandb")).stat().st_size > 1000 for file in files)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_other_trackers_keep_one_run_offline(tmp_path: Path, name: str) -> None:
    """What a resumed run logs goes on in the run that the first launch began, in a database on this machine."""
    pytest.importorskip(name)
    run, base = tmp_path / "run", tmp_path / "trackio"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TRACKIO_"))}
    environment = {**clean, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "TRACKIO_DIR": str(base)}
    command = [sys.executable, "-m", "unilatent", "train", "digits", *QUICK, f"training.loggers=[{name}]",
               "training.sample_every=12", "--out", str(run)]  # fmt: skip
    for extra in ((), ("training.steps=16", "--resume", "auto")):
        done = subprocess.run([*command, *extra], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "failed and is dropped" not in done.stderr, done.stderr[-2000:]
    query, database = {
        "mlflow": ("select step from metrics where key = 'loss/total'", run / "mlflow" / "mlflow.db"),
        "trackio": ("select step from metrics where metrics like '%loss/total%'", base / "unilatent.db"),
    }[name]
    with contextlib.closing(sqlite3.connect(database)) as rows:
        assert sorted(step for (step,) in rows.execute(query)) == [4, 8, 12, 16]
        runs = {"mlflow": "select count(*) from runs", "trackio": "select count(distinct run_name) from metrics"}[name]
        assert rows.execute(runs).fetchone() == (1,)


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_f36_a_missing_library_is_refused_before_the_run_starts(
    cli: Command, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda module: None)
    done = cli("train", "digits", *QUICK, f"training.loggers=[{name}]", "--out", tmp_path / "run")
    assert done.code == 2 and f"pip install 'unilatent[{name}]'" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"training\.loggers"):
        digits("training.loggers=[no_such_tracker]")


class Failing:
    """A logger whose server went away."""

    calls = 0

    def __init__(self, run: loggers.LoggedRun, fails: str):
        self.fails = fails
        self._may_fail("open")

    def _may_fail(self, where: str) -> None:
        Failing.calls += 1
        if where == self.fails:
            raise ConnectionError("the server went away\nand more")

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        self._may_fail("numbers")

    def image(self, step: int, name: str, file: Path) -> None:
        self._may_fail("image")

    def close(self) -> None:
        raise ConnectionError("still away")


@pytest.mark.parametrize("fails", ["open", "numbers", "image", "close"])
def test_f36_a_failing_logger_costs_one_warning(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch, run_folder: Path
) -> None:
    monkeypatch.setattr(loggers, "check_loggers", lambda names: None)
    monkeypatch.setattr("unilatent.training.trainer.check_loggers", lambda names: None)
    monkeypatch.setattr("unilatent.training.trainer.open_logger", lambda name, run: Failing(run, fails))
    Failing.calls, run = 0, tmp_path / "run"
    Trainer(digits("training.loggers=[wandb]", *DRAWN), run).fit()
    warnings = [line for line in (run / "log.txt").read_text().splitlines() if "warning" in line]
    assert len(warnings) == 1 and "wandb failed and is dropped (ConnectionError:" in warnings[0]
    assert Failing.calls == {"open": 1, "numbers": 2, "image": 3, "close": 10}[fails]
    assert_same(state(run, 12), state(run_folder, 12))


# Full disks.


def test_f06_nothing_that_watches_is_worth_a_run(tmp_path: Path, run_folder: Path) -> None:
    """A device without space where logs would be, and images that cannot be put in place: training is bitwise what it
    is without, with a warning each."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    run = tmp_path / "run"
    for step in (4, 12):
        (run / "samples" / f"step_{step:08d}.png").mkdir(parents=True)
    for name in ("metrics.jsonl", "log.txt"):
        (run / name).symlink_to("/dev/full")
    from rich.console import Console

    with (tmp_path / "said.txt").open("w") as said:
        Trainer(digits(*DRAWN), run, console=Console(file=said)).fit()
    words = (tmp_path / "said.txt").read_text()
    for what in ("metrics.jsonl cannot be written (No space left on device)", "log.txt cannot be written",
                 "images of step 4 not drawn: [Errno", "model is not written: [Errno"):  # fmt: skip
        assert words.count(what) == 1, words
    assert words.count("warning") == 4 and "finished" in words, words
    assert (run / "samples" / "step_00000008.png").is_file()
    assert_same(state(run, 12), state(run_folder, 12))


def test_f06_a_line_that_does_not_fit_is_taken_back_and_the_file_goes_on_whole(tmp_path: Path) -> None:
    """Under a real limit on file sizes, which cuts writes in the middle; when it is lifted, lines come again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path, 100, 0) as journal:
        for step in range(1, 101):
            limit = 1000 if step < 60 else soft
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                journal.metrics.write(json.dumps({"step": step, "loss/total": 1 / step}))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    few = [step for step in lines if step < 60]
    assert few == list(range(1, len(few) + 1)) and 10 < len(few) < 59 and lines[len(few) :] == list(range(60, 101))
    assert (tmp_path / "log.txt").read_text().count("warning: metrics.jsonl cannot be written (File too large)") == 1


# Listings and curves.


def test_states_of_runs(tmp_path: Path, run_folder: Path, cli: Command) -> None:
    copy = tmp_path / "runs" / "a"
    shutil.copytree(run_folder, copy)
    assert describe(copy).state == "finished" and (describe(copy).step, describe(copy).steps) == (12, 12)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss/to')  # killed in the middle of a line
    assert describe(copy).step == 12
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    import socket

    (copy / "lock.json").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    assert describe(copy).state == "killed"
    (copy / "lock.json").unlink()
    (copy / "crash").mkdir()
    (copy / "crash" / "20260101-000000.rank0.txt").write_text("== traceback")
    assert describe(copy).state == "crashed"
    os.utime(copy / "env.json")  # started again since
    os.utime(copy / "crash" / "20260101-000000.rank0.txt", (1, 1))
    shutil.rmtree(copy / "model")
    assert describe(copy).state == "stopped"
    alarms = [{"step": 4, "alarm": "a", "on": True}, {"step": 5, "alarm": "b", "on": True}, {"step": 8, "alarm": "a"}]
    (copy / "alarms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in alarms))
    listed = cli("runs", tmp_path / "runs", "--plot").out
    row = next(line for line in listed.splitlines() if "stopped" in line)
    assert "12 / 12" in row and row.split()[-1] == "b"
    assert Image.open(copy / "curves.png").size == (1300, 750)


def test_curves_show_every_metric(tmp_path: Path) -> None:
    draw_curves(REAL, tmp_path / "curves.png")
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    panels = [half for row in np.array_split(image[40:], 2) for half in np.array_split(row, 3, axis=1)]
    coloured = [int((np.ptp(panel, axis=2) > 60).sum()) for panel in panels]
    assert min(coloured[:5]) > 300, coloured  # a line in each panel that has numbers; there are no learning rates here
    draw_curves(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
