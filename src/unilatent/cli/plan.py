"""unilatent plan"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ..plain_text import count_of
from .command import Record, examples
from .options import Overrides, Preset
from .train import read_run

if TYPE_CHECKING:
    from ..training.config import RunConfig
    from ..training.plan import Machines, RunPlan

COLUMNS = 80
LABEL = 15
"""Columns of the names at the left."""


@examples(
    "unilatent plan imagenet256-unite-b",
    "unilatent plan imagenet256-unite-xl --gpus 32 --gpu h200",
    "unilatent plan cifar10-unite-s --gpus 1 --gpu rtx4090 --samples 50000",
)
def run(
    preset: Preset,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="How many cards.", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="a100, a100-40, h100, h200, b200, l40s or rtx4090.")] = "h100",
    samples: Annotated[
        int | None, typer.Option(help="Training samples of your data [default: those the preset is meant for].", min=1)
    ] = None,
    share: Annotated[
        float, typer.Option(help="Share of the peak of matrix products that a step is assumed to reach.")
    ] = 0.3,
    gpus_per_node: Annotated[int, typer.Option(help="Cards of one machine.", min=1)] = 8,
    network: Annotated[float, typer.Option(help="Gb/s between machines, of one machine.")] = 400,
) -> Record:
    """Estimate memory and time of a run on GPUs.

    Also FLOP and communication, without the GPUs and without the data; --json has bytes, FLOP and seconds. All is
    counted from the shapes of one step, which takes 10 to 60 seconds; times are counts divided by the rates that are
    printed.
    """
    from ..presets import presets
    from ..training.plan import Machines, plan, stages_of
    from .running import progress

    config = read_run(preset, overrides)
    machines = Machines(gpu, gpus, share, gpus_per_node, network * 1e9 / 8)
    known = presets().get(config.preset)
    if samples is None and known is not None and not _other_data(config, known()):
        samples = known.samples
    if getattr(config.method, "tokenizer", None) is not None:
        config = config.with_sources()  # what it reads of a finished first stage
    stages = stages_of(config)
    plans: list[RunPlan] = []
    with progress("counting", len(stages)) as advance:
        for stage in stages:
            plans.append(plan(stage, machines, samples))
            advance(1)
    for planned in plans:
        print("\n".join([*wrapped(rows(planned)), ""]))
    records = [record for record in (known.published if known else ()) if known and record.fits(config, known())]
    published = [("published", str(record)) for record in records]
    stored = any(planned.latents is not None for planned in plans)
    print("\n".join(wrapped([*published, *assumptions(machines, stored)])))
    return {"stages": [planned.plain() for planned in plans]}


def _other_data(config: RunConfig, preset: RunConfig) -> bool:
    """Whether settings may change the number of training samples; a path alone says where the preset's data are."""
    now, then = config.plain()["data"], preset.plain()["data"]
    return any(now[key] != then.get(key) for key in now if key != "path" or then.get(key) is not None)


_Row = tuple[str, str]
"""A name and its text."""


def wrapped(lines: list[_Row]) -> Iterator[str]:
    """Yield lines of at most 80 columns."""
    for name, text in lines:
        yield from textwrap.wrap(
            f"{name:{LABEL}}{text}", COLUMNS, subsequent_indent=" " * LABEL, break_long_words=False,
            break_on_hyphens=False, drop_whitespace=True,
        )  # fmt: skip


def rows(plan: RunPlan) -> list[_Row]:
    """Return what is printed of one stage."""
    from ..training.memory import in_bytes

    m, needed, gpu = plan.machines, plan.memory, plan.machines.gpu
    room = "" if needed.fits else f": {needed.warning()}"
    share = 100 * needed.total / gpu.memory
    batches = f"{count_of(plan.micro_batches, 'micro-batch', 'micro-batches')} of {needed.micro_batch}"
    twice = f", {100 * plan.flop_recomputed / plan.flop_per_sample:.0f} % of them computed a second time"
    update = f"; {amount(plan.flop_update)}FLOP a GPU for the update" if plan.flop_update else ""
    sent = ", ".join(f"{purpose} {amount(size)}B" for purpose, size in plan.sent.items())
    parts = ", ".join(
        f"{what} {duration(seconds)} ({100 * seconds / plan.step_seconds:.0f} %)"
        for what, seconds in plan.seconds.items() if seconds
    )  # fmt: skip
    return [
        ("run", f"{plan.preset} on {m.gpus} x {gpu.title}, {plan.precision}"),
        ("parameters", f"{plan.parameters / 1e6:.2f} M trainable"),
        *([("latents", f"stored in {plan.latents}; no step encodes")] if plan.latents is not None else []),
        ("batch", f"{plan.batch:,} samples: {-(-plan.batch // m.gpus):,} a GPU, in {batches}"),
        ("memory", f"{in_bytes(needed.total)} of {in_bytes(gpu.memory)} a GPU ({share:.0f} %)"
                   f"{': fits' if needed.fits else ': does not fit'}"),
        ("  weights", in_bytes(needed.weights)),
        ("  gradients", in_bytes(needed.gradients)),
        ("  optimizer", in_bytes(needed.optimizer)),
        ("  EMA", in_bytes(needed.average)),
        ("  activations", f"{in_bytes(needed.activations or 0)}, of a micro-batch"),
        *([("", room.removeprefix(": "))] if room else []),
        ("FLOP", f"{amount(plan.flop_per_sample)}FLOP a sample, {amount(plan.flop)}FLOP a step"
                 f"{twice if plan.flop_recomputed else ''}{update}"),
        ("launches", f"about {plan.launches:,} kernels a micro-batch, in eager code"),
        ("communication", f"{amount(sum(plan.sent.values()))}B sent by a GPU in a step: {sent}" if sent else "none"),
        ("time", f"{duration(plan.step_seconds)} a step: {parts}"),
        *lengths(plan),
        ("bound by", f"{plan.bound}{'' if needed.fits else '; and it does not fit in memory'}"),
        ("data", f"{plan.batch / plan.step_seconds:,.0f} samples/s to be read, "
                 f"{plan.batch / plan.step_seconds / m.gpus:,.0f} by each process"),
    ]  # fmt: skip


def lengths(plan: RunPlan) -> list[_Row]:
    """Return how long an epoch and the whole run take."""
    epoch, steps, found = plan.steps_per_epoch, plan.num_steps, list[_Row]()
    if epoch is not None:
        found.append(("", f"{duration(epoch * plan.step_seconds)} an epoch of {plan.samples:,} samples, {epoch:,.0f} "
                          "steps"))  # fmt: skip
    if steps is None:
        return [*found, ("", "the whole run: unknown, it is given in epochs; add --samples NUMBER")]
    seconds = steps * plan.step_seconds
    of = f" ({plan.epochs:g} epochs)" if plan.epochs is not None else ""
    hours = seconds * plan.machines.gpus / 3600
    return [*found, ("", f"{duration(seconds)} for the whole run of {steps:,} steps{of}: {hours:,.3g} GPU hours")]


def assumptions(machines: Machines, stored: bool) -> list[_Row]:
    """Return the rates and rules that the numbers rest on. stored: whether a stage reads stored latents."""
    from ..training.plan import LAUNCH

    gpu = machines.gpu
    far = f", {8 * machines.network / 1e9:g} Gb/s from machine to machine" if machines.nodes > 1 else ""
    return [
        ("assumed", f"{100 * machines.share:g} % of {gpu.bf16 / 1e12:g} TFLOP/s in bf16, {gpu.fp32 / 1e12:g} in fp32 "
                    f"(data sheet; --share). Not measured here: the UNITE authors' code reaches about 11 % of an H200"),
        ("", f"{gpu.bandwidth / 1e12:g} TB/s of memory for the update; {machines.rate / 1e9:g} GB/s sent by a GPU "
             f"({gpu.link / 1e9:g} inside a machine{far}); communication is not hidden behind the backward pass"),
        ("", f"eager code, {1e6 * LAUNCH:g} us a launch: compiled blocks hold and launch less. A step "
             "fits if it takes at most 90 % of the card. Left out: reading data, samples and evaluation, checkpoints, "
             "kernels' own memory"),
        *([("", "stored latents: complete, of this tokenizer and these data; the folder was not looked at. Left out: "
                "`unilatent encode --views`, which encodes each sample once for each view. The frozen tokenizer counts "
                "as weights: samples and evaluations need it on the card")] if stored else []),
    ]  # fmt: skip


def amount(number: float) -> str:
    """A number with three digits and its prefix: 1.03 T."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def duration(seconds: float) -> str:
    """A time in its largest unit below 100, with three digits."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 3600:.3g} h" if seconds < 100 * 3600 else f"{seconds / 86400:.3g} days"
