"""What the large presets need on cards of 80 GB, as `unilatent plan` counts it: writes the table of docs/presets.md.

python benchmarks/preset_table.py            five minutes on one CPU core; no GPU, no data
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unilatent.cli.plan import duration
from unilatent.presets import preset, presets
from unilatent.training.plan import Machines, plan, stages_of

PAGE = Path(__file__).parents[1] / "docs" / "presets.md"
START, END = "<!-- plan -->\n", "<!-- end -->"
HEAD = (
    "preset", "parameters, M", "cards", "micro-batches", "memory of 74.5 GiB", "TFLOP a sample", "a step, H100",
    "the run, H100", "GPU hours, H100", "GPU hours, A100", "bound by",
)  # fmt: skip


def rows() -> list[str]:
    """A row for each stage of each preset that is meant for GPUs."""
    found = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for name, entry in presets().items():
        stages = stages_of(preset(name)) if entry.gpus else []
        for number, stage in enumerate(stages, 1):
            h100 = plan(stage, Machines("h100", entry.gpus), entry.samples)
            a100 = replace(h100, machines=Machines("a100", entry.gpus))
            title = f"`{name}`" + (f", stage {number}" if len(stages) > 1 else "")
            run = h100.plain()["seconds"]["run"]
            hours = [p.plain()["gpu_hours"] for p in (h100, a100)]
            cells = [
                title, f"{h100.parameters / 1e6:.2f}", str(entry.gpus),
                f"{h100.micro_batches} of {h100.memory.micro_batch}", f"{h100.memory.total / 2**30:.1f}",
                f"{h100.flop_per_sample / 1e12:.3f}", duration(h100.step_seconds),
                duration(run) if run else "your data", *(f"{h:,.0f}" if h else "your data" for h in hours), h100.bound,
            ]  # fmt: skip
            assert h100.memory.fits, f"{title}: {h100.memory.warning()}"
            found.append(f"| {' | '.join(cells)} |")
            print(found[-1], flush=True)
    return found


def main() -> None:
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + START + "\n".join(rows()) + "\n" + END + after)


if __name__ == "__main__":
    main()
