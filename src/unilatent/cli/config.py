"""unilatent config show"""

from __future__ import annotations

import typer

from .options import Overrides, Preset
from .train import read_run

HELP = "Show a configuration."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.callback(help=HELP)
def _group() -> None: ...


@app.command()
def show(preset: Preset, overrides: Overrides = None) -> None:
    """Print a complete configuration as YAML, to save, edit and train."""
    print(read_run(preset, overrides).to_yaml(), end="")
