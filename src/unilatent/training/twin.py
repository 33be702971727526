"""An unsharded copy of a model in training, for the work of one process."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.base import LatentModel
from ..model_config import ModelConfig
from ..model_folder import load_weights
from ..sharding import full


@torch.no_grad()
def twin(config: ModelConfig, weights: dict[str, Tensor], device: torch.device, keep: bool) -> LatentModel | None:
    """An unsharded model with these weights, in evaluation mode, in the processes that `keep` it; all must call."""
    whole: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tensor = full(tensor.detach())
        if keep:
            whole[name] = tensor.cpu()
    if not keep:
        return None
    with torch.device("meta"):  # no initialisation that the weights would replace
        model = LatentModel.build(config)
    load_weights(model.to_empty(device=device), whole, "the weights in training")
    return model.eval()
