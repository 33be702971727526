"""A run of a few steps on the embedded digits, made once, and the command line in this process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from workplace import Workplace

from unilatent.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
QUICK = (
    "training.steps=12", "training.sample_every=0", "training.evaluate_samples=0", "training.checkpoint_every=4",
    "training.log_every=4", "training.batch_size=16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def hangup_ends_a_process() -> Iterator[None]:
    """As in a terminal, and in processes that a test starts: under nohup, and in jobs in the background, SIGHUP is
    ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Command:
    """unilatent with arguments -> exit code and what was printed."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve steps, with checkpoints 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.raises(SystemExit) as stop:
        main(["train", "digits", *QUICK, "--out", str(folder)])
    assert stop.value.code == 0
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> dict[str, Path]:
    """What each verb reads: class folders of images, and their latents."""
    from test_cli import images

    from unilatent.latents import encode_to_shards
    from unilatent.loading import load

    folder = tmp_path_factory.mktemp("sources")
    encode_to_shards(load(run_folder, device="cpu"), images(folder / "images", each=4), folder / "latents")
    return {"images": folder / "images", "latents": folder / "latents"}


@pytest.fixture(scope="session")
def trained() -> dict[tuple[str, ...], Path]:
    """Runs that documents train, by their arguments: each is trained once."""
    return {}


@pytest.fixture
def workplace(
    tmp_path: Path, run_folder: Path, cli: Command, monkeypatch: pytest.MonkeyPatch,
    trained: dict[tuple[str, ...], Path], tmp_path_factory: pytest.TempPathFactory,
) -> Workplace:  # fmt: skip
    """A reader's folder, which is the current one; what is generated and cached is shared by all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("unilatent.demo.server.wait", lambda: 0)  # a page that is shown ends at once
    return Workplace(tmp_path, run_folder, cli, trained)
