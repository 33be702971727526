"""unilatent demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import Record, announce, examples
from .options import Device, Model, Precision
from .running import load, precision_of


@examples(
    "unilatent demo digits              # a model of the package",
    "unilatent demo runs/scenes --open",
)
def run(
    model: Model,
    port: Annotated[
        int | None, typer.Option(help="Port of the page [default: the first free one from 7860 on].", min=1, max=65535)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in, without a password.")
    ] = "127.0.0.1",
    upload_mb: Annotated[int, typer.Option(help="The largest file that is taken, in MiB.", min=1, max=4096)] = 32,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Also give the page a public address, through a server of Gradio.")
    ] = False,
    device: Device = None,
    precision: Precision = "auto",
) -> Record:
    """Show a model on a page in a browser.

    Sample, reconstruct your own, interpolate, watch it denoise, map its latents.

    The page is served on this machine only and loads nothing from the network. Ctrl-C ends it.
    """
    from ..demo.server import LOOPBACK, served, wait

    network = load(model, device)
    computed = precision_of(precision, network)
    name = Path(model).resolve().name if Path(model).is_dir() else model
    with served(
        network, name, precision=computed, host=host, port=port, upload_mb=upload_mb, share=share, browse=browse
    ) as page:  # fmt: skip
        print(f"{name} is at {page.address}", flush=True)
        if host not in LOOPBACK:
            print("note: other machines can reach it; there is no password", flush=True)
        if page.shared:
            print(f"public address, without a password: {page.shared}", flush=True)
        print("Ctrl-C ends it", flush=True)
        announce({"address": page.address, "shared": page.shared})
        code = wait()
    raise typer.Exit(code)
