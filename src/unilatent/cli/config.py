"""unilatent config show"""

from __future__ import annotations

from typing import Annotated

import typer

from .train import Overrides, read_run

app = typer.Typer(help="Show a configuration.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Show a configuration."""


@app.command()
def show(
    preset: Annotated[str, typer.Argument(help="A preset or a YAML file.", metavar="PRESET|FILE")],
    overrides: Overrides = None,
) -> None:
    """Print the whole configuration as YAML: save it, edit it, train it."""
    print(read_run(preset, overrides).to_yaml(), end="")
