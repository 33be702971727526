"""The parts of a loss, computed and differentiated one after the other: by a step, and by what measures or estimates
one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..devices import autocast
from ..maths.streams import Streams
from ..methods.base import LatentModel, LossPart
from ..nets.casts import cast_together
from ..nets.layers import Repeated
from ..sharding import is_sharded
from ..types import Batch


@contextmanager
def weights_cast_once(model: LatentModel, precision: str) -> Iterator[None]:
    """The context around all parts of a micro-batch's loss: weights are cast once for all of them.

    Autocast keeps its copies until its outermost context ends. Weights sharded over processes are cast by FSDP.
    """
    blocks = [module for module in model.modules() if isinstance(module, Repeated)] if precision == "bf16" else []
    groups = [[weight for weight in block.narrow_weights() if not is_sharded(weight)] for block in blocks]
    with autocast(model.device, "fp32"), cast_together(groups, torch.bfloat16):
        yield


def loss_parts(model: LatentModel, batch: Batch, streams: Streams, precision: str) -> Iterator[LossPart]:
    """Compute each part of the loss of a micro-batch under autocast, when the one before has been differentiated.

    The caller differentiates outside that context, inside one `weights_cast_once`.
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
    with weights_cast_once(model, precision):
        for part in loss_parts(model, batch, streams, precision):
            part.value.backward()
            part.close()
            titles.add(part.title)
    return titles
