"""Sampling: evaluations and time of each solver, with and without an interval, side by side in one run.

python benchmarks/sampling.py                       imagenet256-unite-b with random weights, batch 2
"""

from __future__ import annotations

import argparse
import time

import torch

from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.model_config import SamplingConfig
from unilatent.presets import preset
from unilatent.sampling import sample_latents

CASES = {
    "dopri5 (adaptive, as the authors sample)": {"solver": "dopri5"},
    "euler 50": {"solver": "euler"},
    "euler 50, guided for t in (0, 0.9)": {"solver": "euler", "guidance_interval": (0.0, 0.9)},
    "euler 50, guided for t in (0.2, 0.8)": {"solver": "euler", "guidance_interval": (0.2, 0.8)},
    "heun 25": {"solver": "heun", "num_inference_steps": 25},
    "dpmpp_2m 25": {"solver": "dpmpp_2m", "num_inference_steps": 25},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="imagenet256-unite-b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LatentModel.build(preset(options.preset).example().model()).to(options.device).eval()
    for parameter in model.parameters():  # zero-initialised outputs would make every estimate the same
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else None
    print(f"{options.preset}, {options.device}, {options.precision}, batch {options.batch}, guidance scale 4\n")
    print("| solver | calls | network passes a sample | s | against the first |\n| --- | --- | --- | --- | --- |")
    first = None
    for label in options.cases:
        calls, passes, seconds = measure(model, options, CASES[label])
        first = first or seconds
        print(f"| {label} | {calls} | {passes:.0f} | {seconds:.2f} | {seconds / first:.2f} |", flush=True)


@torch.no_grad()
def measure(model: LatentModel, options: argparse.Namespace, settings: dict) -> tuple[int, float, float]:
    """Calls of the network, passes a sample (a guided call is two), seconds."""
    calls, rows = 0, 0

    def count(module: torch.nn.Module, inputs: tuple) -> None:
        nonlocal calls, rows
        calls, rows = calls + 1, rows + len(inputs[0])

    hook = model.generative_encoder.register_forward_pre_hook(count)
    chosen = SamplingConfig.parse({"time_shift": 2.0, "guidance_scale": 4.0, **settings})
    streams = Streams(("bench",), range(options.batch))
    values = {key: value.to(options.device) for key, value in model.conditions.example(options.batch).items()}
    layout = model.modality.sample_layout(streams).to(model.device)
    device = torch.device(options.device)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        started = time.perf_counter()
        sample_latents(model, values, layout, streams, chosen)
        if device.type == "cuda":
            torch.cuda.synchronize()
    hook.remove()
    return calls, rows / options.batch, time.perf_counter() - started


if __name__ == "__main__":
    main()
