"""unilatent config show"""

from __future__ import annotations

import typer

from .command import Record, examples
from .options import Overrides, Preset
from .train import read_run

HELP = "Show a configuration."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.callback(help=HELP)
def _group() -> None: ...


@app.command()
@examples("unilatent config show digits > run.yaml", "unilatent config show run.yaml training.steps=500")
def show(preset: Preset, overrides: Overrides = None) -> Record:
    """Print a complete configuration as YAML, to save, edit and train."""
    config = read_run(preset, overrides)
    print(config.to_yaml(), end="")
    return config.plain()
