"""The command line, one file per command. Bad input is reported in one line, with exit code 2; a failure exits with a
traceback and code 1."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import typer

from .. import openmp  # noqa: F401  before torch is loaded
from ..files import FULL, UNWRITABLE, DiskError, disk_error, system_reason
from ..terminal import lasting_output, open_closed_descriptors, output_error
from . import (
    analyze,
    calibrate,
    ckpt,
    config,
    convert,
    data,
    decode,
    demo,
    doctor,
    ema,
    encode,
    evaluate,
    finetune_decoder,
    plan,
    presets,
    push,
    reconstruct,
    reference,
    runs,
    sample,
    search,
    sweep,
    train,
)
from .command import command, epilog, examples

ClickException: Any = typer.BadParameter.__mro__[2]
"""Of the click that typer uses: its own copy in some versions, the installed package in others."""

app = typer.Typer(
    name="unilatent",
    help="Train a tokenizer and a latent generator together; sample, reconstruct, encode and decode with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for verb in (
    train, sample, reconstruct, encode, decode, evaluate, analyze, calibrate, search, sweep, finetune_decoder,
    reference, ema, convert, push, demo, presets, plan, runs, doctor,
):  # fmt: skip
    name = verb.__name__.rpartition(".")[2].replace("_", "-")
    app.command(name, epilog=epilog(verb.run))(command(verb.run))
for name, group in {"config": config.app, "ckpt": ckpt.app, "data": data.app}.items():
    for entry in group.registered_commands:
        assert entry.callback is not None
        entry.epilog = epilog(entry.callback)
        entry.callback = command(entry.callback)
    app.add_typer(group, name=name)
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""
PRINTING = ("config", "presets", "plan", "runs", "doctor", "ckpt")
"""Commands whose work is what they print."""


@examples(
    "unilatent train digits --out runs/digits        # train a small model",
    "unilatent sample digits --labels 0-9 --num 100  # of a model of the package",
    "unilatent COMMAND --help                        # options and examples",
)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from ..version import __version__

        print(f"unilatent {__version__}")
        raise typer.Exit


app.callback(invoke_without_command=True, epilog=epilog(_version))(_version)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit.

    arguments: None for those of this process. UNILATENT_DEBUG=1 shows tracebacks of bad input too.
    """
    open_closed_descriptors()
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show must not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning
    with lasting_output():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> None:
    try:
        code = app(arguments, standalone_mode=False, prog_name="unilatent")
    except ClickException as error:
        _refuse(error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _refuse("stopped", INTERRUPTED)
    except (ValueError, FloatingPointError, MemoryError) as error:
        if os.environ.get("UNILATENT_DEBUG") or not _is_ours(error):
            raise
        _refuse(" ".join(str(error).split()), 2 if isinstance(error, ValueError) else 1)
    except Exception as error:
        reason = system_reason(error)
        if os.environ.get("UNILATENT_DEBUG") or reason is None or reason[0] not in UNWRITABLE:
            raise
        _refuse(" ".join(_about_disk(error, reason).split()), 1)
    prints = bool(arguments) and (arguments[0] in PRINTING or "--json" in arguments)
    if prints and (unwritten := output_error()) is not None:
        _refuse(f"standard output: {unwritten.strerror}; what was printed there is not complete", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _about_disk(error: Exception, reason: tuple[int, str]) -> str:
    """What to say about an error of the file system."""
    if isinstance(error, DiskError):
        return str(error.strerror)
    name = os.fsdecode(getattr(error, "filename", None) or "")
    if reason[0] in FULL:
        return str(disk_error(Path(name).parent, reason, 0).strerror)
    return f"{name or 'a file'}: {reason[1]}"


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Warnings of this package in one line; those of others with file and line."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _is_ours(error: Exception) -> bool:
    """Whether this package raised the error; a ValueError of a library is a failure, with its traceback."""
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised).is_relative_to(Path(__file__).parents[1])


def _refuse(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
