"""The tensors of a checkpoint, brought to all processes without each of them reading the whole checkpoint.

The first process reads a replicated tensor and broadcasts it. Of a sharded tensor, each process reads its own shard.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..model_folder import check_layout, non_finite, open_weights
from ..processes import Processes, together
from ..sharding import is_sharded, local, part_of
from ..tensor_files import StoredTensor, TensorFile

Targets = Callable[[Mapping[str, StoredTensor]], Mapping[str, Tensor]]
"""Given the tensors of a file, by name, returns those of this process that they fill."""


def restore(path: Path, targets: Targets, processes: Processes, ignored: Collection[str] = ()) -> None:
    """Fill tensors with those of a safetensors file, one at a time; collective.

    ignored: names that the file may hold and that are not restored. ValueError in all processes names the file if it is
    damaged, does not fit, or holds a tensor that is not finite.
    """
    found = processes.from_main(lambda: open_weights(path))
    stored = {name: tensor for name, tensor in found.tensors.items() if name not in ignored}
    wanted = targets(stored)
    check_layout(wanted, stored, path)
    with ExitStack() as stack:
        reader = _Reader(found, stack)
        names = {id(tensor): name for name, tensor in wanted.items()}
        for group in together([tensor for tensor in wanted.values() if not is_sharded(tensor)]):
            for tensor in group if processes.is_main else ():
                reader.fill(names[id(tensor)], tensor)
            processes.broadcast(group)
        for name, tensor in wanted.items():
            if is_sharded(tensor):
                reader.fill(name, tensor)
    # A process that cannot read takes part in the broadcasts all the same: the others wait for it in these.
    if fault := next(filter(None, processes.gather(reader.fault)), None):
        raise ValueError(f"{path}: {fault}")


class _Reader:
    """Reads tensors of a file, which is opened at the first one, and keeps the first fault that it meets."""

    def __init__(self, found: TensorFile, stack: ExitStack):
        self.found, self.stack, self.fault = found, stack, ""

    @cached_property
    def file(self) -> BinaryIO:
        return self.stack.enter_context(self.found.path.open("rb", buffering=0))

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor of the file, or this process's shard of it, into the tensor of this process."""
        if self.fault:
            return
        try:
            shape, offset = part_of(tensor) if is_sharded(tensor) else (None, ())
            value = self.found.read(self.file, name, offset, shape)
        except OSError as error:
            self.fault = f"cannot be read ({error.strerror or error}); use an older checkpoint"
            return
        self.fault = non_finite(name, value, tensor.dtype)
        local(tensor).copy_(value)
