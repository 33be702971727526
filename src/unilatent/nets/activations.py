"""Reading what modules return, while `forward` stays clean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

Activations = dict[str, list[Tensor]]
"""Name of a module -> what it returned, one entry a call, in order. A module that was not called has none."""


@contextmanager
def record(module: nn.Module, *patterns: str) -> Iterator[Activations]:
    """Record the outputs of submodules inside the context; they are detached, and on the module's device.

    patterns: a module is recorded if the last parts of its name match all parts of a pattern: "blocks.*" is every
    block of any transformer, and not what is inside the blocks; "*.attn" every attention. ValueError if a pattern
    matches nothing, with names that exist. The tokens are all that a module sees, which may be more than the latents.
    A solver of order two calls the network twice a step.

        with unilatent.record(model, "blocks.*") as activations:
            model.encode(images)
        activations["generative_encoder.transformer.blocks.0"][0]  # (B, N, H)

    A compiled module returns the same, but only if it was compiled after the context began.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"record: {module!r} is no module; give a model, such as that of unilatent.load")
    if not patterns:
        raise ValueError('record: no pattern; give one, such as "blocks.*"')
    modules = {name: child for name, child in module.named_modules() if name}
    found: Activations = {}
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in modules if _matches(name, pattern)]
        if not matching:
            shown = ", ".join(list(modules)[:8])
            known = {"blocks.*", *modules} if any(_matches(name, "blocks.*") for name in modules) else modules
            close = get_close_matches(pattern, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"record: {pattern!r} is no module's name{hint}; there are {shown} and {len(modules)} in all"
            )
        chosen |= dict.fromkeys(matching)

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, []).append(output.detach())

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in chosen]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))
