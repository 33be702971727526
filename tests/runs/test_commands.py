"""What every command has, new ones included: examples that parse, help for 80 columns, --json; how commands print."""

from __future__ import annotations

import inspect
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import QUICK, Command
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from test_cli import images

import unilatent.cli
from unilatent.cli.command import plain
from unilatent.cli.options import SOLVER_NAMES
from unilatent.maths.solvers import SOLVERS
from unilatent.progress import SECONDS_PER_LINE, Task, Tasks, clock, line_of, progress_of
from unilatent.tables import show

COLUMNS = 80
ROOT: Any = typer.main.get_command(unilatent.cli.app)


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(words, click command) of every command that does something."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())


def help_of(words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `--help` prints in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((COLUMNS, 24)))
    with pytest.raises(SystemExit):
        unilatent.cli.main([*words.split(), "--help"])
    return capsys.readouterr().out


def examples_of(text: str) -> list[list[str]]:
    """The words after `unilatent` of each example, up to a pipe or the like."""
    lines = text.partition("Examples:\n")[2].splitlines()
    found = []
    for line in filter(None, map(str.strip, lines)):
        words = shlex.split(line, comments=True)
        start = words.index("unilatent") + 1
        ends = [i for i, word in enumerate(words) if word in (">", "|", "||", "&&")]
        found.append(words[start : min([*ends, len(words)])])
    return found


# ---- help ------------------------------------------------------------------------------------------------------------


def test_the_commands_are_found():
    assert {"train", "sample", "data prepare", "ckpt ls", "config show"} <= COMMANDS.keys() and len(COMMANDS) > 22


@pytest.mark.parametrize("words", ["", "data", *COMMANDS])
def test_help_has_examples_that_parse_and_fits_80_columns(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    text = help_of(words, capsys, monkeypatch)
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []
    assert "..." not in text.partition("Commands:")[2].partition("Examples:")[0], "a summary is cut off: shorten it"
    if words not in COMMANDS:
        return
    found = examples_of(text)
    assert found, f"give the function of `unilatent {words}` @examples(...)"
    assert any(example[: len(words.split())] == words.split() for example in found)
    for example in found:
        name = next(name for name in (" ".join(example[:2]), example[0]) if name in COMMANDS)
        COMMANDS[name].make_context(name, example[len(name.split()) :])  # an unknown option is an error


def test_an_example_with_a_wrong_option_is_noticed():
    with pytest.raises(unilatent.cli.ClickException, match="--nun"):
        COMMANDS["sample"].make_context("sample", ["runs/digits", "--nun", "3"])


def test_help_texts_name_every_solver():
    assert tuple(SOLVERS) == SOLVER_NAMES


# ---- start-up --------------------------------------------------------------------------------------------------------

SLOW = ("torch", "numpy", "pydantic", "yaml", "rich", "matplotlib", "scipy", "sklearn", "huggingface_hub", "PIL")


def test_help_and_completion_wait_for_no_library():
    """Before a command runs, nothing is imported but typer and this package's own light modules."""
    code = f"import sys, unilatent.cli; print([name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_completion(tmp_path: Path):
    """The shell's question is answered, and the installed script asks it."""
    home = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    run = [sys.executable, "-m", "unilatent"]
    asked = {"_UNILATENT_COMPLETE": "complete_bash", "COMP_WORDS": "unilatent sample --guidance", "COMP_CWORD": "2"}
    done = subprocess.run(run, env=home | asked, capture_output=True, text=True)
    assert done.stdout.split() == ["--guidance-scale", "--guidance-interval", "--guidance-norm"], done
    subprocess.run([*run, "--install-completion", "bash"], env=home, capture_output=True, check=True)
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert (
        "_UNILATENT_COMPLETE=complete_bash" in script.read_text() and "unilatent" in (tmp_path / ".bashrc").read_text()
    )


# ---- --json ----------------------------------------------------------------------------------------------------------

FEW = "--num 8 --steps 1"
TINY = " ".join(QUICK)
LINES: dict[str, str] = {
    "train": f"digits {TINY} training.evaluate_samples=8 --out {{new}}",
    "sample": f"{{run}} {FEW} --out {{new}}",
    "reconstruct": "{run} {images} --out {new}",
    "encode": "{run} {images} --out {new}",
    "decode": "{run} {latents} --out {new}",
    "evaluate": f"{{run}} {FEW} --metrics frechet_pixels,psnr --out {{new}}",
    "analyze": "{run} --num 8 --only latents,reconstruction --out {new}",
    "search": f"{{run}} --over guidance_scale --values 1,2 --metric frechet_pixels {FEW} --out {{new}}",
    "sweep": "digits method.flow_weight=0.1,0.2 --seeds 1 --dry-run --out {new}",
    "finetune-decoder": "{run} steps=1 batch_size=4 sample_every=0 --out {new}",
    "presets": "",
    "plan": "digits --gpus 1",
    "push": "{run} owner/name --dry-run",
    "runs": "{run}",
    "doctor": "",
    "config show": "digits",
    "ckpt ls": "{run}",
    "ckpt verify": "{run}",
    "ckpt prune": "{copy} --keep 2",
    "data prepare": "{images} --out {new}",
    "data verify": "{images}",
}  # fmt: skip
"""Command -> arguments with which it ends in a second or a few."""
ELSEWHERE = {
    "reference": "needs the Inception network: tests/runs/test_evaluate_files.py",
    "ema": "needs snapshots: tests/runs/test_posthoc_ema.py",
    "convert": "needs a checkpoint of the authors: tests/parity/test_converted.py",
    "demo": "serves until it is stopped: tests/demo/test_server.py",
    "calibrate": "trains a first stage: tests/runs/test_analyze.py",
    "data make-molecules": "needs rdkit", "data make-crystals": "needs pymatgen",
}  # fmt: skip
"""Commands that are not run here, and why. Their type says that they have a record."""


@pytest.fixture
def places(tmp_path: Path, run_folder: Path, sources: dict[str, Path]) -> dict[str, object]:
    shutil.copytree(run_folder, tmp_path / "copy")
    return {"run": run_folder, "new": tmp_path / "new", "copy": tmp_path / "copy", **sources}


def test_every_command_has_json_and_a_record():
    assert set(COMMANDS) == set(LINES) | set(ELSEWHERE), "add the command to LINES"
    for words, command in COMMANDS.items():
        assert any("--json" in option.opts for option in command.params), words
        returned = inspect.unwrap(command.callback).__annotations__["return"]
        assert "Record" in str(returned), f"the function of `unilatent {words}` must return a Record"


@pytest.mark.parametrize("words", LINES)
def test_json_is_all_that_is_printed(cli: Command, places: dict[str, object], words: str):
    done = cli(*words.split(), *shlex.split(LINES[words].format(**places)), "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(record, dict) and record


def test_json_has_the_numbers(cli: Command, places: dict[str, Any], tmp_path: Path):
    record = json.loads(cli("reconstruct", places["run"], places["images"], "--out", tmp_path / "r", "--json").out)
    assert record["num"] == len(record["files"]) > 4 and record["mean"]["psnr"] > 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["mean"] == record["mean"]
    kept = json.loads(cli("ckpt", "ls", places["run"], "--json").out)["checkpoints"]
    assert [Path(entry["checkpoint"]).name for entry in kept] == [f"step_{step:08d}" for step in (4, 8, 12)]


def test_json_of_what_is_bad_has_the_exit_code(cli: Command, places: dict[str, Any]):
    (places["copy"] / "checkpoints" / "step_00000012" / "state.json").write_text("{}")
    done = cli("ckpt", "verify", places["copy"], "--json")
    faults = [entry["fault"] for entry in json.loads(done.out)["checkpoints"]]
    assert done.code == 1 and faults[:2] == [None, None] and "state.json" in faults[2]


def test_json_of_bad_input_is_nothing(cli: Command, tmp_path: Path):
    done = cli("runs", tmp_path / "nothing", "--json")
    assert done.code == 2 and done.out == "" and done.err.startswith("error: ")


def test_plain_data():
    assert plain({"a": (Path("x"), float("nan"), None, True, 2)}) == {"a": ["x", None, None, True, 2]}
    with pytest.raises(TypeError, match="object has no form"):
        plain({"a": object()})


# ---- tables ----------------------------------------------------------------------------------------------------------


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={})


def printed(console: Console, table: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a table. `show` prints part of them by print."""
    capsys.readouterr()
    with console.capture() as own:
        show(table, console)
    return (own.get() + capsys.readouterr().out).splitlines()


def table_of(columns: int) -> Table:
    table = Table("run", *(f"number {i}" for i in range(columns)), "notes", title="what it is")
    table.add_row("runs/a-name", *(f"{i}.2345" for i in range(columns)), "a note of several words that go on and on")
    return table


def test_a_wide_table_breaks_between_words_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    console = terminal(COLUMNS)
    lines = printed(console, table_of(4), capsys)
    assert all(len(line) <= COLUMNS for line in lines) and len(lines) > 4
    words = {word for line in lines for word in line.split()}
    assert {"runs/a-name", "3.2345", "several", "words"} <= words


def test_a_table_that_is_too_wide_becomes_blocks(capsys: pytest.CaptureFixture[str]):
    lines = printed(terminal(COLUMNS), table_of(12), capsys)
    assert all(len(line) <= COLUMNS for line in lines)
    assert "number 11  11.2345" in lines and "run        runs/a-name" in lines


def test_in_a_pipe_a_row_is_a_line(capsys: pytest.CaptureFixture[str]):
    console = Console(file=io.StringIO(), width=COLUMNS, _environ={})
    lines = printed(console, Group(table_of(12), Text(("a long line " * 20).strip())), capsys)
    (row,) = (line for line in lines if line.startswith("runs/a-name"))
    assert row.split()[1:13] == [f"{i}.2345" for i in range(12)] and row.endswith("that go on and on")
    assert any(line == ("a long line " * 20).strip() for line in lines) and not any(
        line.endswith(" ") for line in lines
    )


@pytest.mark.parametrize("words", ["runs", "presets", "evaluate"])
def test_real_tables_fit_80_columns(cli: Command, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: str):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    done = cli(*words.split(), *shlex.split(LINES[words].format(**places)))
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    assert done.code == 0 and text.count("\n") > 4
    prose = ("all numbers", "Published:", "All settings", "A + B")  # of one sentence, which a terminal wraps
    assert [line for line in text.splitlines() if len(line) > COLUMNS and not line.startswith(prose)] == []


# ---- colours ---------------------------------------------------------------------------------------------------------

COLOUR = re.compile(rb"\x1b\[[0-9;]*m")


def in_terminal(line: list[str], **variables: str) -> bytes:
    """What a command prints in a terminal of its own."""
    leader, follower = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "unilatent", *line], stdin=follower, stdout=follower, stderr=follower,
        env=environment | variables,
    )  # fmt: skip
    os.close(follower)
    output = b""
    try:
        while process.poll() is None or select.select([leader], [], [], 0)[0]:
            if select.select([leader], [], [], 0.1)[0]:
                try:
                    output += os.read(leader, 65536)
                except OSError:  # nobody holds the other end
                    break
        assert process.wait(60) == 0, output
    finally:
        process.kill()
        os.close(leader)
    return output


def test_colours_are_off_where_they_should_be(run_folder: Path):
    line = ["runs", str(run_folder)]
    assert COLOUR.search(in_terminal(line, TERM="xterm-256color"))
    assert not COLOUR.search(in_terminal(line, TERM="dumb"))
    plain_codes = {b"\x1b[0m", b"\x1b[1m", b"\x1b[2m", b"\x1b[1;3m", b"\x1b[3m"}  # bold and faint are no colours
    assert set(COLOUR.findall(in_terminal(line, TERM="xterm-256color", NO_COLOR="1"))) <= plain_codes
    piped = subprocess.run([sys.executable, "-m", "unilatent", *line], capture_output=True, check=True)
    assert not COLOUR.search(piped.stdout + piped.stderr)


# ---- progress --------------------------------------------------------------------------------------------------------


def test_a_log_has_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    now = 1000.0
    monkeypatch.setattr("unilatent.progress.time.monotonic", lambda: now)
    with progress_of() as advance:
        advance("sampling", 0, 400)
        for _ in range(4):
            now += SECONDS_PER_LINE / 2
            advance("sampling", 50, 400)
    assert capsys.readouterr().err.splitlines() == [
        "sampling: 100 of 400, 0:30 elapsed, 1:30 left", "sampling: 200 of 400, 1:00 elapsed, 1:00 left",
    ]  # fmt: skip
    assert line_of("x", Task(0, 7, 0.0), 3700.0) == "x: 7, 1:01:40 elapsed"
    assert [clock(s) for s in (0, 59.9, 60, 3599, 3600)] == ["0:00", "0:59", "1:00", "59:59", "1:00:00"]


def test_quiet_tasks_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    tasks = Tasks(None, quiet=True)
    monkeypatch.setattr("unilatent.progress.time.monotonic", lambda: 1e9)
    tasks.advance("x", 1, 2)
    assert capsys.readouterr().err == "" and not tasks.tasks


LONG = (
    "sample", "reconstruct", "encode", "decode", "evaluate", "analyze", "search", "finetune-decoder", "data prepare",
    "data verify", "plan",
)  # fmt: skip


@pytest.mark.parametrize("words", LONG)
def test_long_commands_show_how_far_they_are(
    cli: Command, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: str
):
    """A line with the number done and, where the number of all is known before, the time left."""
    monkeypatch.setattr("unilatent.progress.SECONDS_PER_LINE", 0.0)
    done = cli(*words.split(), *shlex.split(LINES[words].format(**places)))
    assert done.code == 0, done.err
    assert re.search(r"^([^:\n]+: \d+ of \d+|step \d+/\d+).* left$", done.err, re.MULTILINE), done.err


def test_training_shows_losses_speed_memory_time_left_and_where_images_are(cli: Command, tmp_path: Path):
    done = cli("train", "digits", *QUICK, "training.sample_every=6", "--out", tmp_path / "run")
    line = next(line for line in done.err.splitlines() if line.startswith("step 4/12"))
    for part in (
        r"total [\d.]+",
        r"flow [\d.]+",
        r"[\d.]+ GiB",
        r"[\d.e+]+ samples/s",
        r"\d+:\d+ elapsed, \d+:\d+ left",
    ):
        assert re.search(part, line), (part, line)
    where = next(line for line in done.err.splitlines() if line.startswith("images: "))
    assert str(tmp_path / "run" / "samples") in where and "every 6 steps" in where and "curves.png" in where
    assert list((tmp_path / "run" / "samples").iterdir())
    numbers = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.05 < row["memory_gib"] < 1000 for row in numbers)


def test_the_bar_of_training_fits_80_columns(tmp_path: Path):
    from unilatent.runs.journal import Journal

    console = terminal(COLUMNS)
    with Journal(tmp_path, 100, 0, console) as journal:
        journal.log(20, {f"loss/part{i}": 1.2345 for i in range(12)} | {"samples_per_second": 99.5, "memory_gib": 1.5})
        journal.advance(20)
        for line in journal.bar.get_renderables():
            with console.capture() as shown:
                console.print(Group(line))
            rows = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.get()).splitlines()
            assert all(len(row) <= COLUMNS for row in rows), rows
        assert journal.bar.numbers[1] == "1.5 GiB  99.5 samples/s"


# ---- a report for an issue -------------------------------------------------------------------------------------------


def test_a_report_has_no_paths_and_no_names(cli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    home = tmp_path / "home" / "jane.doe"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "jane.doe")
    monkeypatch.setattr("platform.node", lambda: "node-17")
    monkeypatch.setattr("platform.platform", lambda: "Linux-6.1-on-node-17-of-jane.doe")
    monkeypatch.setenv("UNILATENT_CACHE", str(home / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.internal.example")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    report = cli("doctor", "--report").out
    assert report.startswith("```text\n") and report.endswith("```\n")
    for private in (str(tmp_path), "jane", "node-17", "internal", str(Path(unilatent.__file__).parent), "/"):
        lines = [line for line in report.splitlines() if private in line and "GFLOP/s" not in line]
        assert lines == [], private
    for shared in ("torch ", "variable    OMP_NUM_THREADS=3", "variable    HF_ENDPOINT is set", "cache       weights:"):
        assert shared in report
    assert str(home / "cache") in cli("doctor", "--report", "--with-paths").out
    assert str(home) not in cli("doctor", "--report", "--json").out
    refused = cli("doctor", "--with-paths")
    assert refused.code == 2 and "--report" in refused.err


def test_json_in_an_image_folder_is_not_mixed_with_notes(cli: Command, run_folder: Path, tmp_path: Path):
    """What is left out is told on stderr."""
    folder = images(tmp_path / "in")
    (folder / "class0" / "x.png").write_text("no image")
    done = cli("reconstruct", run_folder, folder, "--out", tmp_path / "out", "--json")
    assert len(json.loads(done.out)["left_out"]) == 1 and "left out: " in done.err
