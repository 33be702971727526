"""unilatent presets"""

from __future__ import annotations

from .command import Record, examples


@examples("unilatent presets", "unilatent config show digits         # all settings of one")
def run() -> Record:
    """List the presets and their sizes.

    With their trainable parameters, and the published numbers of exactly their settings.
    """
    import torch
    from rich.markup import escape
    from rich.table import Table

    from ..methods.base import LatentModel
    from ..presets import preset, presets, summary
    from ..tables import show
    from ..training.plan import stages_of

    table, records = Table("preset", "parameters", "what it is"), []
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for name, entry in presets().items():
        config = preset(name)
        sizes = []
        for stage in stages_of(config):
            with torch.device("meta"):
                sizes.append(LatentModel.build(stage.example().model()).num_trainable)
        lines = [summary(name), *(f"Published: {record}." for record in entry.published)]
        table.add_row(name, f"{' + '.join(f'{size / 1e6:.2f}' for size in sizes)} M", escape("\n".join(lines)))
        published = [{"numbers": p.numbers, "settings": p.settings, "source": p.source} for p in entry.published]
        records.append(
            {"preset": name, "parameters": sizes, "summary": summary(name), "published": published,
             "gpus": entry.gpus, "data": entry.data, "samples": entry.samples}
        )  # fmt: skip
    show(table)
    print("A + B: the two stages of Unified Latents, both trained by one command.")
    print("Published: numbers of the authors at the settings beside them; nothing of that size was trained here.")
    print("All settings of a preset: unilatent config show PRESET; what it needs on GPUs: unilatent plan PRESET")
    return {"presets": records}
