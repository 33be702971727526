"""unilatent presets"""

from __future__ import annotations


def run() -> None:
    """List the presets, with their trainable parameters and the published numbers of exactly their settings."""
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..methods.base import LatentModel
    from ..presets import preset, presets, summary
    from ..training.plan import stages_of

    table = Table("preset", "parameters", "what it is", show_lines=False)
    for name, entry in presets().items():
        config = preset(name)
        sizes = []
        for stage in stages_of(config):
            with torch.device("meta"):
                sizes.append(f"{LatentModel.build(stage.example().model()).num_trainable / 1e6:.2f}")
        lines = [summary(name), *(f"Published: {record}." for record in entry.published)]
        table.add_row(name, f"{' + '.join(sizes)} M", escape("\n".join(lines)))
    Console().print(table)
    print("A + B: the two stages of Unified Latents, both trained by one command.")
    print("Published: numbers of the authors at the settings beside them; nothing of that size was trained here.")
    print("All settings of a preset: unilatent config show PRESET; what it needs on GPUs: unilatent plan PRESET")
