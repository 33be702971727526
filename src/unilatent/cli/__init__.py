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

from . import (
    analyze,
    calibrate,
    ckpt,
    config,
    convert,
    data,
    decode,
    doctor,
    ema,
    encode,
    evaluate,
    presets,
    reconstruct,
    reference,
    runs,
    sample,
    search,
    train,
)
from .running import STOPPED

ClickException: Any = typer.BadParameter.__mro__[2]
"""Of the click that typer uses: its own copy in some versions, the installed package in others."""

app = typer.Typer(
    name="unilatent",
    help="Train a tokenizer and a latent generator together; sample, reconstruct, encode and decode with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command in (
    train, sample, reconstruct, encode, decode, evaluate, analyze, calibrate, search, reference, ema, convert, presets,
    runs, doctor,
):  # fmt: skip
    app.command(command.__name__.rpartition(".")[2])(command.run)
app.add_typer(config.app, name="config")
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from ..version import __version__

        print(f"unilatent {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit.

    arguments: None for those of this process. UNILATENT_DEBUG=1 shows tracebacks of bad input too.
    """
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show must not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning
    try:
        code = app(arguments, standalone_mode=False)
    except ClickException as error:
        _refuse(error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _refuse("stopped", STOPPED)
    except (ValueError, FloatingPointError, MemoryError) as error:
        if os.environ.get("UNILATENT_DEBUG") or not _is_ours(error):
            raise
        _refuse(" ".join(str(error).split()), 2 if isinstance(error, ValueError) else 1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


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
