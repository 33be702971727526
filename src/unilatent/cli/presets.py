"""unilatent presets"""

from __future__ import annotations


def run() -> None:
    """List the presets, with their number of parameters."""
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..methods.base import LatentModel
    from ..presets import preset, presets, summary

    table = Table("preset", "parameters", "what it is", show_lines=False)
    for name in presets():
        config = preset(name)
        with torch.device("meta"):
            model = LatentModel.build(config.example().model())
        table.add_row(name, f"{model.num_trainable / 1e6:.2f} M", escape(summary(name)))
    Console().print(table)
    print("All settings of a preset: unilatent config show PRESET")
