"""unilatent convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..outputs import Outputs
from .command import Record, examples


@examples("unilatent convert unite_b.pt --out unite-b", "unilatent sample unite-b --labels 207 --num 8")
def run(
    source: Annotated[Path, typer.Argument(help="A checkpoint of UNITE's authors (.pt).", metavar="FILE.pt")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    weights: Annotated[
        str, typer.Option(help="ema (the EMA weights, which the authors evaluate) or model (the live weights).")
    ] = "ema",
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="HEIGHT WIDTH", help="Image size, where the latents form no square [default: a square]."),
    ] = None,
) -> Record:
    """Convert a checkpoint of UNITE's authors.

    Writes a model folder: safetensors weights and config.json.
    """
    from ..importers.unite_official import convert

    if weights not in ("ema", "model"):
        raise ValueError(f"--weights: {weights!r} is unknown; use ema or model")
    outputs = Outputs(out, "convert", [source])
    model = convert(source, "ema" if weights == "ema" else "model", image_size)
    with outputs.writing(4 * model.num_parameters) as new:
        model.save_pretrained(new)
    ge, decoder = model.method.generative_encoder, model.method.decoder
    print(
        f"{out}: {model.num_trainable:,} parameters, generative encoder {ge.depth} x {ge.width}, "
        f"decoder {decoder.depth} x {decoder.width}, {weights} weights"
    )
    return {"out": out, "parameters": model.num_trainable, "weights": weights, "fingerprint": model.fingerprint()}
