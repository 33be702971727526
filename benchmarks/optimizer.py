"""Optimizer steps side by side: Muon here and torch.optim.Muon, AdamW fused and foreach, on the weights of a preset.

python benchmarks/optimizer.py                                       digits: the optimizers alone, and whole steps
python benchmarks/optimizer.py --preset imagenet256-unite-b          large matrices
python benchmarks/optimizer.py --preset imagenet256-unite-b --device cuda --batch 64

Cases take turns and the shortest time of each counts, so that other work on the machine falls on all of them. On a CPU
it is the time of this process on the cores, not that on the wall. An x86 processor without bfloat16 instructions is
imitated by ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.optim import AdamW, Optimizer
from torch.optim import Muon as TorchMuon

from train_step import a_batch
from unilatent.devices import matmul_rates
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities.image import ImageConfig
from unilatent.nets.layers import muon_parameters
from unilatent.presets import preset
from unilatent.training.muon import Muon
from unilatent.training.parts import differentiate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--batch", type=int, default=64, help="samples of the forward and backward pass")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    config = preset(options.preset).resolved()
    if isinstance(config.modality, ImageConfig):
        config = config.override("modality.perceptual_weight=0")  # LPIPS: a download
    config = config.example()
    torch.manual_seed(0)
    model = LatentModel.build(config.model()).to(device)
    matrices = list(muon_parameters(model))
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in matmul_rates(device).items())
    print(
        f"{options.preset}, {device}, {options.threads} threads, torch {torch.__version__}; GFLOP/s of matmul: {rates}"
    )
    print(f"Muon: {len(matrices)} matrices, {sum(p.numel() for p in matrices) / 1e6:.2f} M; ", end="")
    print(f"AdamW: {len(others)} tensors, {sum(p.numel() for p in others) / 1e6:.2f} M\n", flush=True)

    size: int = options.batch
    batch = a_batch(model, config, size, model.device)

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        differentiate(model, batch, Streams(("bench",), range(size), device), "fp32")

    forward_backward()
    common = {"lr": 1e-9, "momentum": 0.95, "weight_decay": 0.0}
    muons: dict[str, Optimizer] = {
        "torch.optim.Muon (bf16)": TorchMuon(matrices, **common, adjust_lr_fn="match_rms_adamw"),
        "Muon, auto": Muon(matrices, **common),
        "Muon, fp32": Muon(matrices, **common, precision="fp32"),
        "Muon, bf16": Muon(matrices, **common, precision="bf16"),
    }
    adamws: dict[str, Optimizer] = {
        "AdamW, foreach": AdamW(others, 1e-9, foreach=True),
        "AdamW, fused": AdamW(others, 1e-9, fused=True),
    }
    cases: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in (muons | adamws).items()}
    cases[f"forward + backward, fp32, batch {size}"] = forward_backward
    shortest = dict.fromkeys(cases, float("inf"))
    for _ in range(options.repeat + 1):
        for name, work in cases.items():
            shortest[name] = min(shortest[name], timed(work, device))
    passes = shortest.popitem()[1]
    before = shortest["torch.optim.Muon (bf16)"] + shortest["AdamW, foreach"]
    print("| optimizer step | ms | relative to torch.optim.Muon or foreach | of a whole step | whole step, relative |")
    print("| --- | --- | --- | --- | --- |")
    for name, seconds in shortest.items():
        first, other = (
            ("AdamW, foreach", None) if name.startswith("AdamW") else ("torch.optim.Muon (bf16)", "AdamW, fused")
        )
        cells = ["", ""]
        if other is not None:
            rest = shortest["AdamW, foreach" if name == first else other]
            whole = passes + seconds + rest
            cells = [f"{100 * seconds / whole:.0f} %", f"{whole / (passes + before):.2f}"]
        print(f"| {name} | {1e3 * seconds:.2f} | {seconds / shortest[first]:.2f} | {' | '.join(cells)} |")
    print(f"\nforward and backward in fp32, batch {size}: {1e3 * passes:.1f} ms")


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a GPU, or of all cores of a CPU."""
    if device.type != "cuda":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
