"""One optimiser step of a preset: time, FLOP counted from shapes, share of a large matmul's speed, peak memory.

python benchmarks/train_step.py                                  imagenet256-unite-b, batch 2, fp32 and bf16
python benchmarks/train_step.py --preset imagenet256-unite-l --batch 64 --device cuda --compile
python benchmarks/train_step.py --grow tokens|draws|batch        how the time grows
python benchmarks/train_step.py --against ../before --batch 1    another checkout in turn with this one, and the ratios
python benchmarks/train_step.py --preset qm9-unite-s --batch 32 data.path=qm9-like data.num=200

Images and videos are random numbers; of anything else, the first training samples of data.path.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from unilatent.batches import collate
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities._media.modality import PixelModality
from unilatent.nets.layers import Repeated
from unilatent.presets import preset
from unilatent.training.config import RunConfig
from unilatent.training.ema import EMA
from unilatent.training.flop import StepCounter
from unilatent.training.optimizer import Optimizers, clip_gradients
from unilatent.training.parts import differentiate
from unilatent.types import Batch, Tokens


@dataclass
class Result:
    label: str
    forward_backward: float
    optimizer: float
    flop: float
    matmul: float
    memory: float
    batch: int

    def row(self) -> str:
        speed = self.flop / self.forward_backward
        return (
            f"| {self.label} | {self.forward_backward:.3f} | {self.flop / 1e12:.3f} | {speed / 1e9:,.0f} | "
            f"{100 * speed / self.matmul:.0f} % | {self.optimizer:.3f} | "
            f"{self.batch / (self.forward_backward + self.optimizer):.2f} | {self.memory:.2f} |"
        )


HEADER = (
    "| case | forward + backward s | TFLOP | GFLOP/s | share of matmul | optimizer + EMA s | samples/s | peak GiB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="imagenet256-unite-b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--grow", choices=["tokens", "draws", "batch"])
    parser.add_argument("--against", type=Path, help="another checkout, whose own benchmark is run in turn with this")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.against:
        print(side_by_side(options.against, options.repeat))
        return
    device = torch.device(options.device)
    print(f"{options.preset}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n{HEADER}")
    for precision in options.precision:
        speed = matmul_speed(device, precision)
        for label, config, batch in cases(options):
            name = f"{label}, {precision}{', compiled' if options.compile else ''}"
            print(measure(name, config, batch, precision, speed, device, options).row(), flush=True)
        print(f"\nthe best large matmul in {precision}: {speed / 1e9:,.0f} GFLOP/s\n", flush=True)


def side_by_side(before: Path, rounds: int) -> str:
    """Run this benchmark of both checkouts in turn, in new processes; the shortest times, the least memory, ratios."""
    arguments = [a for a in sys.argv[1:] if a not in ("--against", str(before))]
    if "--repeat" in arguments:
        arguments[arguments.index("--repeat") + 1] = "1"
    else:
        arguments = ["--repeat", "1", *arguments]
    trees, found = {"before": before, "after": Path(__file__).parents[1]}, dict[str, dict[str, list[float]]]()
    for _ in range(rounds):
        for which, tree in trees.items():
            script = str(tree / "benchmarks" / "train_step.py")
            environment = {**os.environ, "PYTHONPATH": str((tree / "src").resolve())}
            command = [sys.executable, script, *arguments]
            said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            for label, seconds, _, _, _, update, _, memory in rows_of(said):
                numbers = [float(seconds), float(update), float(memory)]
                best = found.setdefault(label, {}).setdefault(which, numbers)
                best[:] = map(min, best, numbers)
    lines = [
        "| before / after = ratio | forward + backward s | optimizer + EMA s | peak GiB |",
        "| --- |" + 3 * " --- |",
    ]
    for label, times in found.items():
        pairs = zip(times["before"], times["after"], strict=True)
        lines.append(f"| {label} | " + " | ".join(f"{a:.3f} / {b:.3f} = {a / b:.2f}" for a, b in pairs) + " |")
    return "\n".join(lines)


def rows_of(table: str) -> list[list[str]]:
    """The cells of each case in what this benchmark prints."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] not in ("case", "---")]


def cases(options: argparse.Namespace) -> list[tuple[str, RunConfig, int]]:
    """Label, run and batch of each case; LPIPS is left out, since its network is a download."""
    base = preset(options.preset).override(*options.overrides).resolved()
    if "perceptual_weight" in type(base.modality).model_fields:
        base = base.override("modality.perceptual_weight=0")
    if options.grow == "tokens":
        return [(f"{side}x{side}", base.override(f"modality.size={side}"), options.batch) for side in (128, 192, 256)]
    if options.grow == "draws":
        return [(f"{n} draws", base.override(f"method.flow_draws={n}"), options.batch) for n in (1, 3, 7, 14)]
    if options.grow == "batch":
        return [(f"batch {n}", base, n) for n in (1, 2, 4, 8)]
    return [(f"batch {options.batch}", base, options.batch)]


def measure(
    label: str, config: RunConfig, batch_size: int, precision: str, speed: float, device: torch.device,
    options: argparse.Namespace,
) -> Result:  # fmt: skip
    torch.manual_seed(0)
    config = config.example()
    model = LatentModel.build(config.model()).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else None
    batch = a_batch(model, config, batch_size, device)
    flop = count_flop(model, batch, batch_size)
    if options.compile:
        for module in model.modules():
            if isinstance(module, Repeated):
                module.compile()
    optimizers, ema = Optimizers(model, config.training.optimizer), EMA(model, 0.99)

    def forward_backward() -> None:
        differentiate(model, batch, Streams(("bench",), range(batch_size), device), precision)

    def update() -> None:
        clip_gradients(model, 3.0)
        optimizers.step()
        ema.update(model)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    forward_backward()
    update()
    times = {"fb": [], "opt": []}
    for _ in range(options.repeat):
        optimizers.zero_grad()
        times["fb"].append(timed(forward_backward, device))
        times["opt"].append(timed(update, device))
    memory = (
        torch.cuda.max_memory_allocated(device) / 2**30
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    return Result(label, min(times["fb"]), statistics.median(times["opt"]), flop, speed, memory, batch_size)


def count_flop(model: LatentModel, batch: Batch, n: int) -> float:
    """Floating-point operations of one forward and backward pass, from the shapes of its matrix products."""
    streams = Streams(("flop",), range(n), model.device)
    with StepCounter() as counter:
        differentiate(model, batch, streams, "fp32")
    model.zero_grad(set_to_none=True)
    return float(counter.flop)


def a_batch(model: LatentModel, config: RunConfig, n: int, device: torch.device) -> Batch:
    """Random pixels, or the first training samples."""
    modality = model.modality
    if isinstance(modality, PixelModality):
        layout = modality.sample_layout(Streams(("layout",), range(n)))
        pixels = modality.unpack(Tokens(torch.rand(n, modality.max_tokens, modality.channels), layout))
        return Batch(pixels, model.conditions.example(n)).to(device)
    train = modality.splits(config.data).train
    return collate([train[i % len(train)] for i in range(n)], modality).to(device)


def matmul_speed(device: torch.device, precision: str) -> float:
    """FLOP/s of large square products in that precision, the best of several sizes and tries."""
    best = 0.0
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048, 4096):
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        timed(lambda a=a: a @ a, device)
        best = max(best, 2 * n**3 / min(timed(lambda a=a: a @ a, device) for _ in range(6)))
    return best


def timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
