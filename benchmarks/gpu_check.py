"""Check this package on a GPU: numbers, repeatability, speed, memory, and real training runs, in ten minutes.

make gpu-check                                            one GPU of 80 GB, all parts; no network
python benchmarks/gpu_check.py --golden FOLDER            also against numbers recorded from the UNITE authors' network
python benchmarks/gpu_check.py --pictures cifar10.zip     trains on these 32 x 32 pictures in place of drawn scenes
python benchmarks/gpu_check.py --molecules FILE.npz       trains on these in place of molecules without rings
python benchmarks/gpu_check.py --tiny                     the same code at tiny sizes on a CPU, in about 90 seconds
python benchmarks/gpu_check.py --only steps --minutes 20 --presets imagenet256-unite-l

It needs torch and a few small packages. On a machine with a network, for those that the GPU machine lacks:

    pip download -d wheels --only-binary=:all: numpy pydantic pyyaml safetensors huggingface_hub rich pillow

On the GPU machine: pip install --no-index --find-links wheels numpy pydantic pyyaml safetensors huggingface_hub rich
pillow. Only the part `digits` needs more (scikit-learn, scipy, matplotlib); it is left out without them. RDKit, typer
and torchdiffeq are not needed. Nor are downloads: networks have random weights, LPIPS too, which cost the same.

Parts run in the order of PARTS, each in its own share of the time. One that fails or has no time left costs a line, not
the others. OUT/gpu_check.json is written after each part. The exit status is 1 if a check failed.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: products that repeat bit for bit
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own messages

NEEDED = {
    "numpy": "numpy", "pydantic": "pydantic", "yaml": "pyyaml", "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub", "rich": "rich", "PIL": "pillow",
}  # fmt: skip
"""Modules that the check imports besides torch, and their packages."""
if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
    sys.exit(f"missing: {' '.join(missing)}; see the first lines of {__file__} for how to bring them without a network")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import saturated
from train_step import count_flop, timed
from unilatent.batches import collate, load_all
from unilatent.conditions.base import Conditions
from unilatent.devices import (
    autocast,
    cpuinfo,
    float32_products,
    matmul_rates,
    resolve_precision,
    set_float32_products,
)
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities._atoms.modality import SingleKindModality
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities._media.similarity import psnr
from unilatent.modalities.image import ImageConfig
from unilatent.nets.layers import Repeated
from unilatent.nets.lpips import vgg_features
from unilatent.presets import preset
from unilatent.processes import Processes
from unilatent.registry import find
from unilatent.runs.checkpoint import newest
from unilatent.sampling import reconstruct, sample
from unilatent.training import setup
from unilatent.training.config import RunConfig
from unilatent.training.memory import estimate, is_out_of_memory, micro_batch
from unilatent.training.optimizer import clip_gradients
from unilatent.training.parts import differentiate
from unilatent.training.state import TrainingState
from unilatent.training.step import OptimiserStep
from unilatent.training.trainer import Trainer
from unilatent.types import Batch, take

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "gpu.md"

# ---- sizes -----------------------------------------------------------------------------------------------------------

UNITE_TINY = (
    "method.generative_encoder.width=64", "method.generative_encoder.depth=2", "method.generative_encoder.heads=2",
    "method.generative_encoder.in_context_tokens=4", "method.generative_encoder.in_context_start=1",
    "method.decoder.width=64", "method.decoder.depth=2", "method.decoder.heads=2", "method.decoder.mlp_width=128",
)  # fmt: skip
UL_TINY = (
    "method.encoder.channels=[16,16,16,32]", "method.encoder.blocks=[1,1,1,1]", "method.prior.width=64",
    "method.prior.depth=2", "method.prior.heads=2", "method.decoder.channels=[16,16,16,32]",
    "method.decoder.blocks=[1,1,1,1]", "method.decoder.heads=2", "modality.size=32",
)  # fmt: skip
TINY = {
    "imagenet256-unite": ("modality.size=64", *UNITE_TINY),
    "imagenet512-ul, stage 1": UL_TINY,
    "imagenet512-ul, stage 2": ("method.base.channels=[16,32]", "method.base.blocks=[1,1]", "method.base.heads=2"),
    "qm9-unite-s": UNITE_TINY,
}
"""Overrides of each preset, by the beginning of its name, for --tiny."""
SHALLOW = ("method.generative_encoder.depth=5", "method.decoder.depth=2")
"""Of imagenet256-unite-b where it is compared in float64 on a CPU: full width, fewer blocks."""
STEPS = (
    "imagenet256-unite-l", "imagenet256-unite-xl", "imagenet512-ul, stage 1", "imagenet512-ul, stage 2", "qm9-unite-s",
)  # fmt: skip
FIRST = "imagenet256-unite-b"
BOUNDS = {
    "fp32": (2e-5, 2e-5), "fp32, compiled": (2e-5, 2e-5), "bf16": (3e-2, 1e-1), "bf16, compiled": (3e-2, 1e-1),
}  # fmt: skip
"""Largest relative error of outputs, and of the gradient, against float64. A CPU shows 4e-7 and, in bf16, 1e-2."""
GOLDEN_BOUNDS = {"fp32": 1e-4, "fp32, compiled": 1e-4, "bf16": 5e-2, "bf16, compiled": 5e-2}
"""Largest relative error against the authors' recorded float32 outputs."""
FLOORS = {"psnr": (24.0, None), "recognised": (97.0, None), "spread": (85.0, None), "frechet_pixels": (None, 0.21)}
"""At least and at most, for digits."""


# ---- what a check records --------------------------------------------------------------------------------------------


@dataclass
class Line:
    """One number. need: what it was judged by; passed: None if it was not judged."""

    part: str
    name: str
    value: float | str | None
    unit: str = ""
    need: str = ""
    passed: bool | None = None


@dataclass
class Check:
    """Options and results of this run."""

    device: torch.device
    out: Path
    tiny: bool
    end: float
    golden: Path | None = None
    pictures: str | None = None
    molecules: Path | None = None
    presets: tuple[str, ...] = STEPS
    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    part: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.end - time.monotonic()

    @property
    def precision(self) -> str:
        """What networks are trained in here."""
        return resolve_precision("auto", self.device)

    def add(
        self, name: str, value: float | str | None, unit: str = "", *, least: float | None = None,
        most: float | None = None, judged: bool = True,
    ) -> None:  # fmt: skip
        """Record a number; it passes if it is at least `least` and at most `most`. Infinity and NaN never pass."""
        need = ", ".join(
            f"{sign} {bound:g}" for sign, bound in ((">=", least), ("<=", most)) if bound is not None
        )  # fmt: skip
        passed = None
        if need and judged and isinstance(value, int | float):
            passed = math.isfinite(value) and (least is None or value >= least) and (most is None or value <= most)
        self.lines.append(Line(self.part, name, value, unit, need, passed))
        print(f"  {as_text(self.lines[-1])}", flush=True)

    def fault(self, name: str, error: BaseException) -> None:
        """Record an error as a failed line, and its traceback in OUT/errors.log."""
        with (self.out / "errors.log").open("a", encoding="utf-8") as file:
            file.write(f"{self.part}: {name}\n{traceback.format_exc()}\n")
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        self.lines.append(Line(self.part, name, "error", "", "runs", False))
        self.note(f"{name}: {kind}: {' '.join(str(error).split())[:160]} (traceback: {self.out / 'errors.log'})")

    def note(self, text: str) -> None:
        """Record a sentence about this part."""
        self.notes.append(f"{self.part}: {text}")
        print(f"  {text}", flush=True)

    @property
    def failed(self) -> bool:
        return any(line.passed is False for line in self.lines)

    def write(self) -> None:
        content = {"facts": self.facts, "lines": [asdict(line) for line in self.lines], "notes": self.notes}
        temporary = self.out / "gpu_check.json.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.out / "gpu_check.json")


def as_text(line: Line) -> str:
    return f"{line.name}: {number(line.value)} {line.unit}{f'  [{line.need}: {verdict(line)}]' if line.need else ''}"


def number(value: float | str | None) -> str:
    if isinstance(value, int | float):
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
    return value or "not measured"


def verdict(line: Line) -> str:
    return {True: "pass", False: "FAIL", None: "-"}[line.passed]


# ---- 1: environment --------------------------------------------------------------------------------------------------


def environment(check: Check) -> None:
    """The machine, and the speed of its matrix products."""
    facts = check.facts
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "tiny": check.tiny}
    if check.cuda:
        properties = torch.cuda.get_device_properties(check.device)
        facts |= {
            "card": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda, "memory": properties.total_memory, "driver": driver(),
        }  # fmt: skip
    else:
        facts |= {"card": f"CPU: {cpuinfo().get('model name', platform.machine())}", "threads": torch.get_num_threads()}
    print(f"  {facts}")
    rates = matmul_rates(check.device, 0.05 if check.tiny else 0.5)
    for name, rate in rates.items():
        check.add(f"matmul, {name}", rate / 1e12, "TFLOP/s")
    facts["matmul"] = rates


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    return None


# ---- 2: numbers ------------------------------------------------------------------------------------------------------


def parity(check: Check) -> None:
    """UNITE on this device against float64 on the CPU: latents, estimate, images, and the gradient of the loss."""
    config = sized(check, FIRST, *(() if check.tiny else SHALLOW), "modality.perceptual_weight=0").example()
    torch.manual_seed(0)
    model = randomised(LatentModel.build(config.model()))
    exact = results(copy.deepcopy(model).double(), "fp32")
    model.to(check.device)
    for name, (most, most_of_gradient) in BOUNDS.items():
        ours = results(compiled(check, model) if "compiled" in name else model, name[:4])
        for key, value in ours.items():
            bound = most_of_gradient if key == "gradient" else most
            check.add(f"{name}: {key}", relative_error(value, exact[key]), most=bound)
    if check.golden is not None:
        golden(check, check.golden)
    else:
        check.note("no --golden: not compared with the authors' recorded numbers")


def results(model: LatentModel, precision: str) -> dict[str, Tensor]:
    """Latents and decoded images of two fixed images, a clean estimate, and the gradient of the loss, on the CPU."""
    draw = torch.Generator().manual_seed(1)
    config = model.config.modality
    assert isinstance(config, ImageConfig)
    images = torch.rand(2, config.channels, config.height, config.width, generator=draw)
    batch = Batch(images, {"labels": torch.tensor([3, 7])}).to(model.device)
    out: dict[str, Tensor] = {}
    with torch.no_grad(), float32_products(), autocast(model.device, precision):
        out["latents"] = z = model.encode(batch.data)
        noise = torch.randn(z.shape, generator=draw).to(z)
        out["estimate"] = model.denoise(0.7 * z + 0.3 * noise, 0.3, model.conditions(batch.values))
        out["images"] = model.decode(z)
    with float32_products():
        model.train()
        differentiate(model, batch, Streams(("check",), range(2), model.device), precision)
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    out["gradient"] = torch.cat(gradients)
    model.zero_grad(set_to_none=True)
    return {key: value.detach().cpu().double() for key, value in out.items()}


def golden(check: Check, folder: Path) -> None:
    """UNITE with the authors' weights against what their network gave on a CPU in float32."""
    from unilatent.importers.unite_official import convert

    recorded = load_file(folder / "golden.safetensors")
    model = convert(folder / "tiny_ckpt.pt").to(check.device)
    on_device = {key: value.to(check.device) for key, value in recorded.items()}
    for name, most in GOLDEN_BOUNDS.items():
        ours = compiled(check, model) if "compiled" in name else model
        with torch.no_grad(), float32_products(), autocast(check.device, name[:4]):
            tokens = ours.modality.pack(on_device["imgs_u8"].float() / 255)
            z = ours.tokenize(tokens, on_device["encode.z_noise"], on_device["encode.flow_t_uniform"])
            labels, t = on_device["denoise.y"], 1 - on_device["denoise.t"]
            some, null = ours.conditions({"labels": labels.clamp(max=999)}), ours.conditions.null(len(labels))
            estimate = ours.denoise(on_device["denoise.x_t"], t, some.where(labels < 1000, null))
            images = ours.decode(on_device["encode.z_normed"])
        pairs = {
            "latents": (z, "encode.z_normed"), "estimate": (estimate, "denoise.out_normed"),
            "images": (images[:1], "decode.img_sample0"),
        }  # fmt: skip
        for key, (value, official) in pairs.items():
            wanted = recorded[official].clamp(0, 1) if key == "images" else recorded[official]
            check.add(f"golden, {name}: {key}", relative_error(value.cpu(), wanted), most=most)


def randomised(model: LatentModel) -> LatentModel:
    """With random matrices: initial ones have zeros that would hide errors."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model


def compiled(check: Check, model: LatentModel) -> LatentModel:
    """A copy with its blocks compiled."""
    model = copy.deepcopy(model)
    compile_blocks(check, model)
    return model


def compile_blocks(check: Check, model: LatentModel) -> None:
    """As `training.compile` does; at tiny sizes without generated code, which takes minutes to build on a CPU."""
    for module in model.modules():
        if isinstance(module, Repeated):
            nn.Module.compile(module, backend="aot_eager_decomp_partition" if check.tiny else "inductor")


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """|value - wanted| / |wanted|, Euclidean norms in float64."""
    return float((value.double() - wanted.double()).norm() / wanted.double().norm())


# ---- 3: bits ---------------------------------------------------------------------------------------------------------


def bits(check: Check) -> None:
    """Noise of CPU and device; a run twice; a run that stops and resumes."""
    shape = (256, 16) if check.tiny else (1024, 128)
    drawn = {
        place: (streams.uniform(*shape).cpu(), streams.normal(*shape).cpu(), streams.stratified().cpu())
        for place in ("cpu", check.device)
        for streams in [Streams(("check",), range(64), place)]
    }
    for name, ours, other in zip(("uniform", "normal", "stratified"), *drawn.values(), strict=True):
        differing = ours != other
        check.add(
            f"{name} numbers against the CPU's", int(differing.sum()), f"of {ours.numel():,} differ",
            most=ours.numel() // 100_000 if name == "normal" else 0,
        )  # fmt: skip
        if differing.any():
            check.add(f"{name}: largest difference", float((ours - other).abs().max()), most=1e-6)
    if runs_repeat(check, "as trained", judged=False):
        return
    check.note("training does not repeat bit for bit as it is; again with torch.use_deterministic_algorithms")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs_repeat(check, "deterministic", judged=True)
    finally:
        torch.use_deterministic_algorithms(False)


def runs_repeat(check: Check, how: str, judged: bool) -> bool:
    """Train a small model twice, and once with a stop in the middle; count the numbers that differ at the end."""
    config = scenes(check, 64, 8).override(
        "training.steps=4", "training.checkpoint_every=2", f"training.batch_size={4 if check.tiny else 32}",
        "training.sample_every=0", "training.schedule.onsets={}",
    )  # fmt: skip
    folder = fresh(check.out / "bits")
    for name in ("one", "two", "parts"):
        fit(check, Trainer(config, folder / name))
    shutil.rmtree(folder / "parts" / "checkpoints" / "step_00000004")
    shutil.rmtree(folder / "parts" / "model")
    fit(check, Trainer(config, folder / "parts", resume="auto"))
    wanted, same = stored(folder / "one"), []
    for name, text in (("two", "run twice"), ("parts", "stopped, resumed")):
        others = stored(folder / name)
        differing = sum(int((value != others[key]).sum()) for key, value in wanted.items())
        total = sum(value.numel() for value in wanted.values())
        same.append(not differing)
        judge = judged or same[-1]
        check.add(f"{text}, {how}", differing, f"of {total:,} differ", most=0 if judge else None)
    return all(same)


def stored(run: Path) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoint."""
    checkpoint, _ = newest(run / "checkpoints")
    assert checkpoint is not None
    return {
        f"{path.stem}/{key}": value
        for path in sorted(checkpoint.glob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def fit(check: Check, trainer: Trainer, seconds: float = math.inf) -> None:
    """Train, with all that is printed in OUT/runs.log; after this time the run is asked to stop, as by a signal."""

    def stop() -> None:
        trainer.stop.received = trainer.stop.received or signal.SIGTERM

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), stop)
    timer.daemon = True
    timer.start()
    try:
        with (check.out / "runs.log").open("a", encoding="utf-8") as log:
            trainer.console = Console(file=log, width=120)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                trainer.fit()
    finally:
        timer.cancel()


# ---- 4: training steps -----------------------------------------------------------------------------------------------


def first_steps(check: Check) -> None:
    """imagenet256-unite-b: LPIPS with random weights on and off, eager and compiled."""
    judged = any(card in check.facts["card"] for card in ("H100", "H200"))
    for compile, lpips in ((False, True), (True, True), (True, False))[:: 2 if check.tiny else 1]:
        case = measure(check, FIRST, compile, lpips)
        if compile:
            name = f"LPIPS {'on' if lpips else 'off'}, compiled"
            check.add(f"{name}: images/s", case["rate"], least=300 if lpips else 400, judged=judged)
            if not lpips:
                check.add(f"{name}: share of matmul", case["share"], "%", least=45, judged=judged)


def steps(check: Check) -> None:
    """The other presets: eager all, then compiled all."""
    for compile in (False, True):
        for name in check.presets:
            title = f"{name}{', compiled' if compile else ''}"
            if check.tiny and (name == "imagenet256-unite-xl" or (compile and not name.endswith("stage 1"))):
                continue  # as large as others when tiny; compiling takes most of the time
            if not check.tiny and check.left < 20:
                check.note(f"no time left for {title}")
                continue
            try:
                measure(check, name, compile, lpips=False)
            except Exception as error:
                check.fault(title, error)


def measure(check: Check, name: str, compile: bool, lpips: bool) -> dict[str, float]:
    """One optimiser step of a preset, as the trainer takes it, on made-up samples.

    Rates are of whole batches: all their micro-batches, and one update of the weights.
    """
    release(check)
    config, sources = run_config(check, name, lpips)
    find("modalities", config.modality.name)(config.modality).prepare(check.device)  # LPIPS, which is not predicted
    base = torch.cuda.memory_allocated(check.device) if check.cuda else 0
    config, predicted = fitting(check, config)
    training, size = config.training, micro_batch(config.training, 1)
    flop = size * flop_per_sample(check, f"{name} {lpips}", config)
    step = built(check, config, sources, compile)
    state, batch = step.state, [(range(size), made_up(config, size, check.device))]
    if check.cuda:
        torch.cuda.reset_peak_memory_stats(check.device)
    first = timed(lambda: step(batch), check.device)
    step(batch)

    def update() -> None:
        clip_gradients(state.model, training.gradient_clip)
        state.optimizers.step()
        state.optimizers.zero_grad()
        state.ema.update(state.model)

    passes, updates = [], []
    for _ in range(2 if check.tiny else 5):
        passes.append(timed(lambda: step.accumulate(batch), check.device))
        updates.append(timed(update, check.device))
    peak = torch.cuda.max_memory_allocated(check.device) - base if check.cuda else None
    seconds, updating = median(passes), median(updates)
    row = {
        "rate": training.batch_size / (training.batch_size / size * seconds + updating), "batch": training.batch_size,
        "size": size, "pass": seconds, "update": updating, "first": first,
        "share": 100 * flop / seconds / check.facts["matmul"][training.precision], "precision": training.precision,
        "launches": count_launches(check, lambda: step.accumulate(batch)),
        "launches_update": count_launches(check, update), "predicted": predicted, "peak": peak,
    }  # fmt: skip
    title = f"{name}{', LPIPS' if lpips else ''}{', compiled' if compile else ''}"
    check.facts.setdefault("steps", {})[title] = row
    print(f"  {title}: {', '.join(f'{key} {number(value)}' for key, value in row.items())}", flush=True)
    if peak is not None and not compile:
        check.add(f"{title}: memory ratio", peak / predicted, least=0.85, most=1.15)
    if not compile:
        once = gradients_of(step, batch)
        differing = sum(int((a != b).sum()) for a, b in zip(once, gradients_of(step, batch), strict=True))
        check.add(f"{title}: gradients again", differing, f"of {sum(a.numel() for a in once):,} differ")
    return row


def built(check: Check, config: RunConfig, sources: Any, compile: bool) -> OptimiserStep:
    """A step of the run, with a new model on the device. sources: the method's settings, with the path of a tokenizer.

    At tiny sizes without generated code, which takes minutes to build on a CPU.
    """
    config = config.override(f"training.compile={str(compile and not check.tiny).lower()}")
    set_float32_products(check.device, config.training.precision)
    processes = Processes(str(check.device))
    with check.device:
        model = setup.build_model(config, False, sources, processes, False)
    if compile and check.tiny:
        compile_blocks(check, model)
    return OptimiserStep(TrainingState(model, config.training), config, processes, 1000.0, measure_gradients=False)


def flop_per_sample(check: Check, key: str, config: RunConfig) -> float:
    """Floating-point operations of forward and backward pass of one sample, from shapes."""
    known = check.facts.setdefault("flop", {})
    if key not in known:
        with check.device:
            model = LatentModel.build(config.model())
        known[key] = count_flop(model, made_up(config, 2, check.device), 2) / 2
    return float(known[key])


def run_config(check: Check, name: str, lpips: bool) -> tuple[RunConfig, Any]:
    """The run of a preset, or of one of its stages, with all that it reads made up, and its method's own settings."""
    config = sized(check, name)
    if isinstance(config.modality, ImageConfig):
        weights = f"modality.perceptual_weights={random_vgg(check)}" if lpips else "modality.perceptual_weight=0"
        config = config.override(weights)
    if name.endswith("stage 2"):
        first = config.first
        assert first is not None
        folder = check.out / "tokenizer"
        LatentModel.build(first.example().model()).save_pretrained(folder)
        config = config.override(f"method.tokenizer={folder}")
    sources = config.method
    config = config.override("training.log_gradients=false").with_sources()
    if isinstance(config.modality, ImageConfig):
        config = config.model_copy(update={"conditions": {key: c.example() for key, c in config.conditions.items()}})
    else:
        config = config.with_data(systems(config))
    return config.computing_in(check.precision), sources


def sized(check: Check, name: str, *overrides: str) -> RunConfig:
    """A preset, or a stage of it (", stage 1"), at its own size or tiny."""
    plain, _, stage = name.partition(", ")
    config = preset(plain).resolved()
    tiny = next((values for start, values in TINY.items() if name.startswith(start)), ()) if check.tiny else ()
    batch = ("training.batch_size=4", "training.micro_batch_size=2") if check.tiny else ()
    if stage == "stage 2" and check.tiny:
        assert config.tokenizer is not None
        config = config.model_copy(update={"tokenizer": config.tokenizer.override(*UL_TINY)})
        config = config.override("modality.size=32")
    if stage == "stage 1":
        assert config.first is not None
        config = config.first
    return config.override(*tiny, *batch, *overrides)


def fitting(check: Check, config: RunConfig) -> tuple[RunConfig, int]:
    """The run with micro-batches that fit, of at most 64 images or 512 systems, and the bytes predicted for a step."""
    most = 64 if isinstance(config.modality, ImageConfig) else 512
    size = min(micro_batch(config.training, 1), most)
    while True:
        config = config.override(f"training.micro_batch_size={size}")
        memory = estimate(config, made_up(config, 1, torch.device("cpu")), check.device)
        if memory.fits or size == 1:
            return config, memory.total
        size = memory.fitting or 1


def made_up(config: RunConfig, size: int, device: torch.device) -> Batch:
    """Random images, or systems of atoms."""
    image = config.modality
    if not isinstance(image, ImageConfig):
        train = systems(config).train
        return collate([train[i % len(train)] for i in range(size)], find("modalities", image.name)(image)).to(device)
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(size, image.channels, image.height, image.width, generator=draw)
    return Batch(images, Conditions(config.conditions, dim=8).example(size)).to(device)


def systems(config: RunConfig) -> Any:
    """Made-up molecules of 9 to 29 atoms of the elements of QM9, as data sets."""
    draw = np.random.default_rng(0)
    modality = find("modalities", config.modality.name)(config.modality)
    assert isinstance(modality, SingleKindModality)
    sizes = draw.integers(9, 30, 64)
    made = Systems.of(
        [
            System(draw.choice([1, 6, 7, 8, 9], n), (2 * draw.standard_normal((n, 3))).astype(np.float32), name=str(i))
            for i, n in enumerate(sizes)
        ]
    )
    return modality.datasets(made, made.take(range(8)), None)


def random_vgg(check: Check) -> Path:
    """A file with random weights for LPIPS's network, scaled so that its features neither vanish nor grow."""
    path = check.out / "random_vgg16.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        network = vgg_features()
        for parameter in network.parameters():
            nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
        save_file({f"features.{key}": value for key, value in network.state_dict().items()}, path)
    return path


def gradients_of(step: OptimiserStep, batch: list[tuple[range, Batch]]) -> list[Tensor]:
    """The gradients of one micro-batch, which are cleared."""
    torch.manual_seed(0)
    step.accumulate(batch)
    gradients = [p.grad.clone() for p in step.state.model.parameters() if p.grad is not None]
    step.state.optimizers.zero_grad()
    return gradients


def count_launches(check: Check, work: Callable[[], object]) -> int:
    """Kernels, copies and fills that a GPU runs; on a CPU, calls of torch's operators."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if check.cuda else ProfilerActivity.CPU]) as record:
        timed(work, check.device)
    events = record.events()
    if check.cuda:
        return sum(event.device_type == DeviceType.CUDA for event in events)
    return sum(event.name.startswith("aten::") for event in events)


def median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def release(check: Check) -> None:
    """Free what the last case held."""
    torch.compiler.reset()
    gc.collect()
    if check.cuda:
        torch.cuda.empty_cache()


# ---- 5: sampling -----------------------------------------------------------------------------------------------------


def sampling(check: Check) -> None:
    """imagenet256-unite-b with random weights: 50 Euler steps and the decoder, without and with its guidance."""
    release(check)
    torch.manual_seed(0)
    config = sized(check, FIRST, "modality.perceptual_weight=0").example()
    model = randomised(LatentModel.build(config.model())).to(check.device).eval()
    model.precision, size = check.precision, 2 if check.tiny else 64
    set_float32_products(check.device, check.precision)
    for scale in (1.0, config.sampling.guidance_scale):
        settings = {"solver": "euler", "guidance_scale": scale, "batch_size": size}
        sample(model, size, num_inference_steps=2, **settings)
        seconds = timed(lambda settings=settings: sample(model, size, num_inference_steps=50, **settings), check.device)
        check.add(f"50 steps of {size}, {model.precision}, guidance {scale:g}", size / seconds, "images/s")


# ---- 6, 7: training runs ---------------------------------------------------------------------------------------------


def digits(check: Check) -> None:
    """The preset `digits` from start to end, judged by its own evaluation."""
    if lacking := [name for name in ("sklearn", "scipy", "matplotlib") if find_spec(name) is None]:
        check.note(f"left out: {', '.join(lacking)} not installed")
        return
    config = preset("digits").override(f"training.device={check.device}", "training.sample_every=0")
    if check.tiny:
        config = config.override("training.steps=20", "training.evaluate_samples=50", "data.held_out=50")
    run = fresh(check.out / "digits")
    started = time.perf_counter()
    fit(check, Trainer(config, run), max(20.0, check.left))
    check.add("training and evaluation", time.perf_counter() - started, "s")
    files = sorted((run / "eval").glob("step_*.json"))
    if not files:
        check.note("stopped before its evaluation: no time left")
        return
    found = {entry["metric"]: entry for entry in json.loads(files[-1].read_text())["numbers"]}
    for name, (least, most) in FLOORS.items():
        entry = found[name]
        check.add(entry["name"], entry["value"], entry["unit"] or "", least=least, most=most, judged=not check.tiny)


def pictures(check: Check) -> None:
    """Two minutes of training on 32 x 32 colour pictures: does it learn to reconstruct what it has not seen?"""
    if check.pictures is None:
        config = scenes(check, None if not check.tiny else 128, 32 if check.tiny else 0.03)
    else:
        config = preset("cifar10-unite-s").override(f"data.path={check.pictures}", f"training.device={check.device}")
        config = config.override("training.epochs=10000")
    config = config.override("training.sample_every=0", "training.checkpoint_every=0", "training.log_every=10")
    if check.tiny:
        config = config.override("training.batch_size=8", "training.steps=12", "training.log_every=3")
    seconds = 60.0 if check.tiny else min(120.0, check.left - 15)
    run = fresh(check.out / "pictures")
    trainer = Trainer(config, run)
    started = time.perf_counter()
    fit(check, trainer, seconds)
    seconds = time.perf_counter() - started
    check.add("steps", trainer.step)
    check.add("training, with reading and start", trainer.step * config.training.batch_size / seconds, "images/s")
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/l1"] for line in logs if "loss/l1" in line]
    judged = not check.tiny
    check.add("loss/l1, last / first logged", mean(losses[-3:]) / losses[0], most=0.5, judged=judged)
    modality, splits = trainer.model.modality, trainer.splits
    held_out = load_all(splits.held_out, modality, limit=256).data
    typical = load_all(splits.train, modality, limit=512).data.mean(0, keepdim=True)
    with trainer.state.ema.applied(trainer.model) as _:
        model = trainer.model.eval()
        made = reconstruct(model, held_out)
        samples = sample(model, 4 if check.tiny else 64, num_inference_steps=25)
    baseline = float(psnr(typical.expand_as(held_out), held_out).mean())
    check.add("PSNR of held-out pictures, the mean picture", baseline, "dB")
    reached = float(psnr(made, held_out).mean())
    check.add("PSNR of held-out pictures, reconstructed", reached, "dB", least=round(baseline + 3, 1), judged=judged)
    modality.draw_grid([samples], run / "samples.png", columns=8)
    modality.draw_grid([held_out[:16], made[:16]], run / "reconstructions.png")
    check.note(f"look at {run / 'samples.png'} and {run / 'reconstructions.png'}")


def scenes(check: Check, train: int | None, held_out: float) -> RunConfig:
    """The run `scenes-unite`, whose pictures and captions are drawn as they are needed; it is not evaluated."""
    workers = min(8, os.cpu_count() or 1) if train is None else 0
    return preset("scenes-unite").override(
        f"data.num_samples={train or 'null'}", f"data.held_out={held_out}", "training.evaluate_samples=0",
        f"training.workers={workers}", f"training.device={check.device}", "training.threads=null",
    )  # fmt: skip


MADE = 10_000
"""Molecules that are made where no file of them is given."""


def molecules(check: Check) -> None:
    """Two minutes of `qm9-unite-s-1h`: how far is the published size on its way to whole molecules?

    Bonds are those of EDM's distance tables, which need no RDKit. Judged are the weights themselves: their EMA, over
    10,000 steps, is still near the start.
    """
    path, number = check.molecules, 16 if check.tiny else 1000
    if path is None:
        path = check.out / "saturated.npz"
        saturated.make(100 if check.tiny else MADE).save(path)
    config = preset("qm9-unite-s-1h").override(
        f"data.path={path}", f"data.held_out={32 if check.tiny else 256}", f"training.device={check.device}",
        "training.evaluate_samples=0", "training.sample_every=0", "training.checkpoint_every=0", "training.workers=0",
        "training.log_every=20",
    )  # fmt: skip
    if check.tiny:
        tiny = ("training.batch_size=8", "training.steps=4", "training.log_every=2")
        config = config.override(*UNITE_TINY, *tiny, "training.schedule.decays=[]", "training.schedule.warmup=2")
    run, seconds = fresh(check.out / "molecules"), 60.0 if check.tiny else min(120.0, check.left - 15)
    trainer = Trainer(config, run)
    started = time.perf_counter()
    fit(check, trainer, seconds)
    seconds = time.perf_counter() - started
    check.add("steps", trainer.step, f"of {config.training.steps:,}")
    check.add("training, with reading and start", trainer.step * config.training.batch_size / seconds, "molecules/s")
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/types"] + line["loss/positions"] for line in logs if "loss/types" in line]
    ratio = mean(losses[-3:]) / losses[0]
    check.add("loss of reconstruction, last / first logged", ratio, most=0.1, judged=not check.tiny)
    model, held_out = trainer.model.eval(), load_all(trainer.splits.held_out, trainer.model.modality, limit=256).data
    errors = model.modality.errors(reconstruct(model, held_out), held_out)
    check.add("held-out atoms of the right element", mean(errors["type_accuracy"]), "%")
    check.add("RMSD of held-out molecules", mean(errors["rmsd"]), "A")
    noise = 0.05 * torch.randn(held_out["positions"].shape, generator=torch.Generator().manual_seed(0))
    noisy = {**held_out, "positions": held_out["positions"].cpu() + noise * (held_out["types"].cpu() > 0)[..., None]}
    new = sample(model, number, batch_size=min(number, 500), num_inference_steps=5 if check.tiny else None)
    for name, data in (("held-out", held_out), ("held-out, 0.05 A of noise", noisy), ("new", new)):
        found = saturated.stability(data["types"], data["positions"])
        real = data["types"].cpu() > 0
        whole = found.molecules & saturated.in_one_piece(data["types"], data["positions"])
        check.add(f"{name}: stable atoms (EDM)", 100 * float(found.stable[real].double().mean()), "%")
        check.add(f"{name}: stable, in one piece", 100 * float(whole.double().mean()), "%")
    model.modality.draw_grid([take(new, slice(32))], run / "samples.png", columns=8)
    check.note(f"{len(trainer.splits.train):,} molecules of {path.name}; look at {run / 'samples.png'}")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- the whole -------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Check], None], float]] = {
    "environment": (environment, 0),
    "parity": (parity, 20),
    "bits": (bits, 15),
    "first_steps": (first_steps, 30),
    "sampling": (sampling, 15),
    "digits": (digits, 40),
    "pictures": (pictures, 40),
    "molecules": (molecules, 60),
    "steps": (steps, 25),
}
"""What is run, the most valuable first, and the seconds that must be left to begin it on a GPU."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--molecules", type=Path, help="file of `unilatent data make-molecules`")
    parser.add_argument("--minutes", type=float, default=10.0, help="time of all parts together")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts, and the environment")
    parser.add_argument("--presets", nargs="+", default=STEPS, choices=STEPS, help="of the part `steps`")
    parser.add_argument("--golden", type=Path, help="folder with golden.safetensors and tiny_ckpt.pt")
    parser.add_argument("--pictures", help="folder or zip of class folders of pictures")
    parser.add_argument("--record", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("no GPU here: give --tiny, which runs the same code at sizes for a CPU")
    if options.device == "cpu":
        torch.set_num_threads(1)  # several stall where the machine has other work
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    check = Check(
        torch.empty(0, device=options.device).device, options.out, options.tiny, started + 60 * options.minutes,
        options.golden, options.pictures, options.molecules, tuple(options.presets),
    )  # fmt: skip
    for name, (part, needed) in PARTS.items():
        if options.only is None or name in {"environment", *options.only}:
            run_part(check, name, part, 0 if check.tiny else needed)
    check.facts["seconds"] = round(time.monotonic() - started)
    check.write()
    print(table(check))
    if options.record:
        PAGE.write_text(page(check), encoding="utf-8")
    return int(check.failed)


def run_part(check: Check, name: str, part: Callable[[Check], None], needed: float) -> None:
    """Run a part; whatever it raises is a failed line."""
    check.part, started = name, time.monotonic()
    print(f"{name}:", flush=True)
    if check.left < needed:
        check.note(f"left out: {max(check.left, 0):.0f} s are left")
        return
    try:
        part(check)
    except Exception as error:
        check.fault("the whole part", error)
    check.facts.setdefault("seconds_of_parts", {})[name] = round(time.monotonic() - started, 1)
    check.write()


COLUMNS = ("samples/s", "% of matmul", "launches", "update ms", "peak GiB", "predicted GiB")
"""Of the table of training steps; launches: of a micro-batch, kernels and copies of a GPU or operators of a CPU."""


SHORT = ("samples/s", "% matmul", "launches", "upd. ms", "GiB")


def cells(row: dict[str, Any]) -> list[str]:
    return [
        number(row["rate"]), f"{row['share']:.0f}", number(row["launches"]), f"{1e3 * row['update']:.1f}",
        "-" if row["peak"] is None else number(row["peak"] / 2**30), number(row["predicted"] / 2**30),
    ]  # fmt: skip


def table(check: Check) -> str:
    """What was judged and what was measured, in 80 columns; the JSON file has all of it."""
    lines = ["", f"{check.facts.get('card')}, torch {torch.__version__}"]
    for part in PARTS:
        of_part = [line for line in check.lines if line.part == part]
        lines += [f"{part} {'-' * (79 - len(part))}"] if of_part else []
        for line in of_part:
            value = f"{number(line.value)} {line.unit}"
            lines.append(f"{line.name[:43]:43} {value[:21]:21} {line.need[:9]:9} {verdict(line)}".rstrip())
    rows = check.facts.get("steps", {})
    if rows:
        lines += ["-" * 80, f"{'training step':35}{''.join(f'{name:>9}' for name in SHORT)}"]
        lines += [f"{title[-35:]:35}{''.join(f'{cell:>9}' for cell in cells(row)[:5])}" for title, row in rows.items()]
    lines += ["-" * 80, *(wrapped for note in check.notes for wrapped in textwrap.wrap(note, 80))]
    passed = sum(line.passed is True for line in check.lines)
    failed = sum(line.passed is False for line in check.lines)
    lines.append(f"{passed} passed, {failed} failed, {check.facts['seconds']} s: {check.out / 'gpu_check.json'}")
    return "\n".join(lines)


def page(check: Check) -> str:
    """docs/results/gpu.md."""
    facts = check.facts
    tiny = (
        "**These are not numbers of a GPU.** They are from a CPU at tiny sizes (`--tiny`), and show that the check\n"
        "itself runs. Speeds of models this small mean nothing, and what was trained for seconds is not judged.\n\n"
    )
    where = [f"{facts['card']}, torch {facts['torch']}, Python {facts['python']}"]
    if check.cuda:
        where.append(f"CUDA {facts['cuda']}, driver {facts['driver']}, {facts['memory'] / 2**30:.0f} GiB")
    lines = [
        f"| {line.part} | {line.name} | {number(line.value)} {line.unit} | {line.need} | {verdict(line)} |"
        for line in check.lines
    ]
    steps = [
        f"| {title} | {row['size']} of {row['batch']} | {' | '.join(cells(row))} |"
        for title, row in facts.get("steps", {}).items()
    ]
    return "\n".join(
        [
            f"{HEAD}## Results\n\n{tiny if check.tiny else ''}{'; '.join(where)}.",
            f"{facts['seconds']} s in all. A dash: not judged.\n",
            "| part | what | value | needed | |", "| --- | --- | --- | --- | --- |", *lines, "",
            f"| training step | micro-batch of batch | {' | '.join(COLUMNS)} |", "| --- " * (2 + len(COLUMNS)) + "|",
            *steps, "", *(f"- {note.replace(str(check.out), 'OUT')}" for note in check.notes), "",
        ]
    )  # fmt: skip


HEAD = """# Check on a GPU

<!-- not run: needs a GPU of 80 GB -->
```bash
make gpu-check
```

checks this package on one GPU of 80 GB within ten minutes, two of them for `molecules`, without a network and without
installing anything.
`GPU_CHECK="--golden FOLDER --record"` passes options on, `PYTHON=` chooses the interpreter of the image. Written are
`runs/gpu-check/gpu_check.json` and, with `--record`, this page.

| part | what it checks |
| --- | --- |
| environment | card, driver, versions; the speed of large matrix products in float32, TF32 and bfloat16 |
| parity | UNITE against float64 on the CPU: outputs and gradient, eager and compiled, in float32 (TF32 off) and bf16 |
| bits | noise is the same on CPU and GPU; a run twice, and one that is resumed, end with the same bits |
| first_steps | a training step of `imagenet256-unite-b`, LPIPS on and off, eager and compiled |
| sampling | images/s of 50 Euler steps and the decoder |
| digits | the preset `digits` from start to end, with the floors of its table |
| pictures | two minutes of training on drawn scenes: loss, PSNR of held-out pictures, a grid of samples |
| molecules | two minutes of `qm9-unite-s-1h`: loss, held-out molecules, how many new ones are whole by EDM's tables |
| steps | a training step of other large presets: speed, kernels, memory against `train --dry-run` |

- Targets on one H100 (three flow draws): 300 images/s with LPIPS, 400 without, 45 % of the measured matrix product.
- Networks have random weights, LPIPS's too, which cost the same. The molecules of "steps" are made up.
- The part `molecules` trains on 10,000 molecules of C, N, O, F and H without rings and double bonds, which it makes
  itself, or on those of `--molecules FILE.npz`, a file of `unilatent data make-molecules`. Stable is what EDM's tables
  of bond lengths say, which need no RDKit. Two minutes are a thirtieth of the preset, with its learning rate at its
  peak: the numbers say how far that is, and compare with those of noise beside them.
- `--golden` compares with numbers of the UNITE authors' network. `--pictures` trains on a folder or zip of your own.
- "parity" has relative errors (Euclidean norms). "memory ratio" is the measured peak over the predicted one.
- Sampling is with scale 1 (no guidance) and with the preset's guidance and interval.
- Launches are kernels, copies and fills of a micro-batch on a GPU, and operators on a CPU.
- Training on a GPU may not repeat bit for bit as it is: the check then repeats it with deterministic algorithms.
- Rates count whole batches: all their micro-batches and one update of the weights.

It needs torch and numpy, pydantic, pyyaml, safetensors, huggingface_hub, rich and pillow. Where some are missing, bring
them as wheels, downloaded for the Python version of that machine:

<!-- not run: needs a GPU of 80 GB -->
```bash
pip download -d wheels --only-binary=:all: numpy pydantic pyyaml safetensors huggingface_hub rich pillow
pip install --no-index --find-links wheels numpy pydantic pyyaml safetensors huggingface_hub rich pillow
```

The part `digits` is left out where scikit-learn, scipy or matplotlib is missing. RDKit, typer and torchdiffeq are not
needed. `python benchmarks/gpu_check.py --tiny` runs the same code on a CPU.

"""

if __name__ == "__main__":
    sys.exit(main())
