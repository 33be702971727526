"""Builds every registered component in its small size, with data, so that new components are tested automatically."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unilatent.batches import collate
from unilatent.methods.base import LatentModel
from unilatent.modalities.base import Modality, Splits
from unilatent.model_config import ModelConfig
from unilatent.registry import available, find
from unilatent.types import Batch, Tokens

HELD_OUT = 20


@cache
def modality_of(name: str) -> Modality:
    cls = find("modalities", name)
    return cls(cls.Config.small())


@cache
def splits_of(name: str) -> Splits:
    modality = modality_of(name)
    return modality.splits(modality.DataConfig.small().model_copy(update={"held_out": HELD_OUT}))


def batch_of(name: str, n: int, start: int = 0) -> Batch:
    """Return training samples `start` to `start + n`."""
    dataset = splits_of(name).train
    return collate([dataset[i] for i in range(start, start + n)], modality_of(name))


def model_config(modality: str, method: str, **fields: Any) -> ModelConfig:
    """Return a model conditioned on all that the data has values for; fields: changes to the method's small size."""
    facts = splits_of(modality).train.facts
    conditions = {name: condition_config(name, facts) for name in conditions_for(facts)}
    method_config = find("methods", method).Config.small()
    if "tokenizer_model" in type(method_config).model_fields:
        fields = {"tokenizer_model": model_config(modality, first_tokenizer()).plain(), **fields}
    method_config = type(method_config).parse({**method_config.plain(), **fields})
    config = ModelConfig(modality=modality_of(modality).config, conditions=conditions, method=method_config)
    return config.with_data(splits_of(modality))


def condition_config(name: str, facts: dict[str, Any]) -> Any:
    """Return a condition's small size, or its defaults if the small size does not fit the data (e.g. its classes)."""
    cls = find("conditions", name)
    try:
        cls.Config.small().with_data(**facts[cls.argument])
    except ValueError:
        return cls.Config()
    return cls.Config.small()


def first_tokenizer() -> str:
    """Return a method that does not need another method's tokenizer."""
    names = available("methods")
    return next(name for name in names if "tokenizer_model" not in find("methods", name).Config.model_fields)


def conditions_for(facts: dict[str, Any]) -> list[str]:
    return [name for name in available("conditions") if find("conditions", name).argument in facts]


def with_given(config: ModelConfig) -> ModelConfig:
    """Return the configuration of the same model, which is given parts of samples, as its tokenizer is."""
    plain = config.plain()
    plain["given"] = {}
    if (tokenizer := plain["method"].get("tokenizer_model")) is not None:
        tokenizer["given"] = {}
    return ModelConfig.parse(plain)


def model_of(
    modality: str, method: str, seed: int = 0, awake: bool = False, given: bool = False, **fields: Any
) -> LatentModel:  # fmt: skip
    """awake: random weights where initialisation has zeros, so that nothing is trivially equal or without gradient.
    given: whether it is given parts of samples."""
    torch.manual_seed(seed)
    config = model_config(modality, method, **fields)
    model = LatentModel.build(with_given(config) if given else config)
    if awake:
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.05 * torch.randn_like(p)
    return model


def tensors(data: Any) -> list[Tensor]:
    """Return all tensors of a batch of data, in order."""
    if isinstance(data, dict):
        return [tensor for key in sorted(data) for tensor in tensors(data[key])]
    return [data]


def apply(data: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor of a batch of data."""
    return {key: apply(value, function) for key, value in data.items()} if isinstance(data, dict) else function(data)


def rows(data: Any, which: Any) -> Any:
    """Select samples of a batch of data."""
    return apply(data, lambda tensor: tensor[which])


def pick(batch: Batch, which: Any) -> Batch:
    return Batch(rows(batch.data, which), {key: value[which] for key, value in batch.values.items()})


def same(a: Any, b: Any, atol: float = 0.0) -> bool:
    """Whether two batches of data are equal."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=0, atol=atol) for x, y in pairs)


def alike(modality: Modality, a: Any, b: Any, atol: float) -> bool:
    """Whether the tokens of two batches are equal up to rounding; data have other scales (degrees, pixels)."""
    return torch.allclose(flat(modality.pack(a)), flat(modality.pack(b)), rtol=0, atol=atol)


def flat(tokens: Tokens) -> Tensor:
    """Return the values (B, N C) with zeros at padding."""
    mask = tokens.layout.mask
    values = tokens.values if mask is None else tokens.values * mask[..., None]
    return values.flatten(1).double()
