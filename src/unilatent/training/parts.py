"""The parts of a loss, computed and differentiated one after the other: by a step, and by what measures or estimates
one."""

from __future__ import annotations

from collections.abc import Iterator

from ..devices import autocast
from ..maths.streams import Streams
from ..methods.base import LatentModel, LossPart
from ..types import Batch


def loss_parts(model: LatentModel, batch: Batch, streams: Streams, precision: str) -> Iterator[LossPart]:
    """Compute each part of the loss of a micro-batch under autocast, when the one before has been differentiated.

    The caller differentiates outside that context, inside one `autocast(device, "fp32")` around all parts: weights are
    then cast once for all of them.
    """
    parts = iter(model.loss(batch, streams))
    while True:
        with autocast(model.device, precision):
            part = next(parts, None)
        if part is None:
            return
        yield part


def differentiate(model: LatentModel, batch: Batch, streams: Streams, precision: str) -> set[str]:
    """Add the gradients of a micro-batch's loss to those of the model; return the titles of its parts.

    As in `OptimiserStep`, without schedules, measurements and other processes.
    """
    titles = set()
    with autocast(model.device, "fp32"):
        for part in loss_parts(model, batch, streams, precision):
            part.value.backward()
            part.close()
            titles.add(part.title)
    return titles
