"""UNITE, Unified Latents and a two-stage baseline on the same digits, with equal parameters and equal training time.

    python benchmarks/side_by_side.py --out runs/side-by-side      # six runs, about 6 minutes each on one core

The baseline is UNITE's tokenizer trained for reconstruction only (flow_weight 0), then `latent_diffusion` on its frozen
latents. Parameters are counted over all stages; time is CPU time of the whole command with its evaluation, on one
thread. Finished runs are not repeated: the same command resumes. Writes table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import yaml

import unilatent
from unilatent.presets import preset

SEEDS = (0, 1)
TOKENIZER = (
    "method.generative_encoder.width=96", "method.generative_encoder.depth=2", "method.decoder.width=96",
    "method.decoder.depth=2", "method.decoder.mlp_width=384",
)  # fmt: skip
BASE = "{kind: vit, width: 72, depth: 4, heads: 4}"


def schedule(steps: int) -> list[str]:
    """The presets' schedule: constant, then a linear decay over the last third."""
    return [
        f"training.steps={steps}",
        f"training.schedule.decays=[{{start: {steps * 2 // 3}, end: {steps}, factor: 0.05}}]",
    ]


UNITE = (
    "method.generative_encoder.width=96", "method.generative_encoder.depth=4", "method.decoder.width=96",
    "method.decoder.depth=3", "method.decoder.mlp_width=384", *schedule(1100),
)  # fmt: skip


def train(source: str, out: Path, *overrides: str) -> float:
    """Run or resume a training; return its CPU seconds over all launches."""
    record = out / "seconds.json"
    seconds = json.loads(record.read_text()) if record.is_file() else []
    if not (out / "eval").is_dir() and not (out / "model").is_dir():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "unilatent", "train", source, "--out", str(out), "--resume", "auto"]
        try:
            subprocess.run([*command, *overrides], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        finally:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            record.write_text(json.dumps(seconds))
    return float(sum(seconds))


def unite(out: Path, seed: int) -> float:
    return train("digits", out, f"seed={seed}", *UNITE)


def unified_latents(out: Path, seed: int) -> float:
    return train("digits-ul", out, f"seed={seed}")


def two_stages(out: Path, seed: int) -> float:
    tokenizer = out.with_name(f"{out.name}-tokenizer")
    quiet = ("training.sample_every=0", "training.evaluate_samples=0")
    seconds = train("digits", tokenizer, f"seed={seed}", "method.flow_weight=0", *TOKENIZER, *schedule(900), *quiet)
    base = preset("digits-ul").plain()
    sampling = preset("digits").plain()["sampling"]
    config = {**base, "modality": preset("digits").plain()["modality"], "tokenizer": None, "sampling": sampling}
    config["method"] = {"name": "latent_diffusion", "tokenizer": str(tokenizer), "base": yaml.safe_load(BASE)}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return seconds + train(str(path), out, f"seed={seed}", *schedule(2200))


METHODS = {"UNITE": unite, "Unified Latents": unified_latents, "two stages": two_stages}
ROWS = {
    "psnr": "PSNR of held-out reconstructions, dB",
    "recognised": "recognised as the requested class, %",
    "spread": "within-class standard deviation, % of real",
    "frechet_pixels": "Frechet distance (pixels)",
    "frechet_classifier": "Frechet distance (classifier features)",
    "nearest": "nearest training digit, mean distance",
}


def numbers(run: Path) -> dict[str, float]:
    """Return the results of the evaluation at the end of training, by metric."""
    (path,) = (run / "eval").glob("step_*.json")
    return {row["metric"]: row["value"] for row in json.loads(path.read_text())["numbers"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/side-by-side"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    columns: dict[str, dict[str, list[float]]] = {}
    for name, run_method in METHODS.items():
        column: dict[str, list[float]] = {}
        for seed in SEEDS:
            run = out / f"{name.replace(' ', '-').lower()}-{seed}"
            seconds = run_method(run, seed)
            values = numbers(run)
            model = unilatent.load(run, device="cpu")
            for key in ROWS:
                column.setdefault(ROWS[key], []).append(values[key])
            column.setdefault("parameters, million", []).append(sum(p.numel() for p in model.parameters()) / 1e6)
            column.setdefault("CPU seconds", []).append(seconds)
        columns[name] = column
    lines = ["| two seeds | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row in next(iter(columns.values())):
        cells = [" / ".join(f"{value:.3g}" for value in column[row]) for column in columns.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
