"""What pages take from the code when the site is built: a line `<!-- generated: NAME -->` is replaced by it.

commands: every command of the command line, with its arguments and options. settings: every field of a run's
configuration. presets: all presets, with sizes and published numbers.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import command_reference
import setting_reference

MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def presets() -> str:
    """Return a table of all presets."""
    return "\n".join(["| preset | parameters | data | what it is |", "| --- | --- | --- | --- |", *preset_rows()])


def preset_rows() -> Iterator[str]:
    import torch

    from unilatent.methods.base import LatentModel
    from unilatent.presets import preset, summary
    from unilatent.presets import presets as entries
    from unilatent.training.plan import stages_of

    for name, entry in entries().items():
        with torch.device("meta"):
            built = [LatentModel.build(stage.example().model()) for stage in stages_of(preset(name))]
        size = " + ".join(f"{model.num_trainable / 1e6:.2f}" for model in built)
        published = "".join(f" Published: {record}." for record in entry.published)
        about = command_reference.escaped(summary(name) + published)
        yield f"| `{name}` | {size} M | {entry.data or 'yours'} | {about} |"


GENERATED: dict[str, Callable[[], str]] = {
    "commands": command_reference.markdown, "settings": setting_reference.markdown, "presets": presets,
}  # fmt: skip


def filled(text: str) -> str:
    """Return a page with its marks replaced; ValueError names one that is unknown."""
    for name in MARK.findall(text):
        if name not in GENERATED:
            raise ValueError(f"<!-- generated: {name} -->: there is only {', '.join(GENERATED)}")
    return MARK.sub(lambda mark: GENERATED[mark[1]](), text)


def on_read(app: Any, page: str, source: list[str]) -> None:
    source[0] = filled(source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", on_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
