"""A whole copy of a sharded model, to be written."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.base import LatentModel
from ..sharding import full


@torch.no_grad()
def whole_copy(model: LatentModel, keep: bool) -> LatentModel:
    """Return an unsharded copy of the weights on the CPU in the processes that `keep` it, and the model itself in the
    others; all must call. Every tensor is gathered alone, and no device ever holds more than one."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        gathered = full(tensor.detach())
        if keep:
            weights[name] = gathered.cpu()
    if not keep:
        return model
    with torch.device("meta"):
        copy = LatentModel.build(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.precision = model.precision
    return copy.eval()
