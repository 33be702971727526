"""What recipes need on several cards, as `unilatent plan` counts it: writes the tables of docs/recipes.md.

python benchmarks/recipe_table.py            some minutes on one CPU core; no GPU, no data
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from unilatent.cli.plan import duration
from unilatent.presets import preset
from unilatent.training.config import RunConfig
from unilatent.training.memory import USABLE, Memory
from unilatent.training.plan import Machines, RunPlan, example, plan, stages_of

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
RECIPE = re.compile(
    r"(```bash\nunilatent train (?P<command>.*?)```\n\n<!-- recipe: (?P<samples>\d+) samples; (?P<cards>.*?) -->\n)"
    r".*?(?=<!-- end -->)",
    re.DOTALL,
)
"""A command, and the comment above its table: training samples, and cards as NAME or NUMBER x NAME."""
HEAD = ("card", "micro-batch", "memory, GiB", "a step", "the run", "GPU hours")
COUNTED = (2, 8), (64, 128)
"""Micro-batches that are counted, and those of systems of different sizes. Memory is linear in their size; but systems
are padded to the largest of a micro-batch, so theirs is counted again for the micro-batch that is chosen."""


def written(page: str) -> str:
    """Return the page with its tables counted again."""
    return RECIPE.sub(lambda found: found[1] + "\n".join(table(found)) + "\n", page)


def table(recipe: re.Match[str]) -> Iterator[str]:
    """Yield the lines of the table of one recipe."""
    words = shlex.split(recipe["command"].replace("\\\n", " "), comments=True)
    config = preset(words[0]).override(*(word for word in words[1 : words.index("--out")]))
    yield f"| {' | '.join(HEAD)} |"
    yield f"|{' --- |' * len(HEAD)}"
    for named in recipe["cards"].split(", "):
        number, _, card = named.rpartition(" x ")
        machines = Machines(card, int(number or 1))
        stages = stages_of(config)
        for place, stage in enumerate(stages, 1):
            yield row(stage, machines, int(recipe["samples"]), f", stage {place}" if len(stages) > 1 else "")


def row(stage: RunConfig, machines: Machines, samples: int, place: str) -> str:
    """Return the row of a stage on some cards, with the largest micro-batch of a power of two that fits."""
    title = (f"{machines.gpus} x " if machines.gpus > 1 else "") + machines.gpu.title + place
    padded = isinstance(example(stage.example()).data, dict)
    sizes = COUNTED[padded]
    small, large = (counted(stage, micro, machines.gpus, samples) for micro in sizes)
    share = -(-stage.training.batch_size // machines.gpus)
    micro, most = 0, 1
    while most <= share and memory(small.memory, large.memory, most).total <= USABLE * machines.gpu.memory:
        micro, most = most, 2 * most
    if not micro:
        return f"| {title} | does not fit | | | | |"
    needed = memory(small.memory, large.memory, micro)
    if padded:
        needed = counted(stage, micro, machines.gpus, samples).memory
        assert needed.total <= USABLE * machines.gpu.memory, f"{title}: {micro} do not fit; count fewer"
    run = replace(large, machines=machines, memory=needed, micro_batches=-(-share // micro))
    seconds, hours = run.plain()["seconds"]["run"], run.plain()["gpu_hours"]
    cells = [title, str(micro), f"{needed.total / 2**30:.1f}", duration(run.step_seconds), duration(seconds),
             f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


_counted: dict[tuple[str, int, int], RunPlan] = {}


def counted(stage: RunConfig, micro: int, gpus: int, samples: int) -> RunPlan:
    """Count a step with micro-batches of this size; the card itself changes nothing that is counted."""
    key = (stage.to_yaml(), micro, gpus)
    if key not in _counted:
        changed = stage.override(f"training.micro_batch_size={micro}")
        _counted[key] = plan(changed, Machines("b200", gpus), samples)
        print(f"counted {stage.preset}, micro-batch {micro}, {gpus} cards", flush=True)
    return _counted[key]


def memory(small: Memory, large: Memory, micro: int) -> Memory:
    """Return the memory of a step with micro-batches of this size."""
    low, high = small.activations or 0, large.activations or 0
    one = (high - low) / (large.micro_batch - small.micro_batch)
    return replace(large, micro_batch=micro, activations=int(low + one * (micro - small.micro_batch)))


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
