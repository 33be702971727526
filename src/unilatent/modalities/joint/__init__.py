"""Molecules and crystals in one model. Each sample is of one kind, given by its class label and visible in its layout.

The parts are two other modalities, named in the configuration. Files, metrics and images of a sample are handled by the
part of its kind.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, SerializeAsAny, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from ...config import Config, component, resolve_as
from ...listings import ALONE, Listings
from ...maths.streams import Streams
from ...registry import available, find
from ...types import count, take
from .._atoms import modality as atoms
from .._atoms.dataset import Property, SystemsDataset, property_from
from .._atoms.grid import paste_grid
from .._atoms.metrics import type_accuracy
from .._atoms.viewer import AtomsView
from ..base import Dataset, Metric, Skipped, Space, Splits
from . import metrics


def _part_classes() -> list[type[atoms.SingleKindModality]]:
    """Return every modality of a single kind of system, free ones first."""
    modalities = [find("modalities", name) for name in available("modalities")]
    return sorted(
        (cls for cls in modalities if issubclass(cls, atoms.SingleKindModality)), key=lambda cls: cls.has_periodic
    )


class JointConfig(atoms.AtomConfig, atoms.FreeLossConfig, atoms.PeriodicLossConfig):
    """Molecules and crystals in one model.

    parts: the configurations of a modality of molecules and one of crystals, in the order of the class labels. The
        `sizes` of each part are counted in the data; without a label they also determine how often each kind is drawn.
        Loss weights, elements and augmentation are set here and not in the parts.
    """

    name: Literal["joint"] = "joint"
    parts: tuple[component("modalities"), component("modalities")]  # type: ignore[valid-type]

    @classmethod
    def small(cls) -> Self:
        parts: list[Any] = [part_class.Config.small() for part_class in _part_classes()]
        return cls(max_atoms=max(part.max_atoms for part in parts), elements="found", parts=tuple(parts))

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        classes = [find("modalities", part.name) for part in self.parts]
        if (
            not all(issubclass(cls, atoms.SingleKindModality) for cls in classes)
            or classes[0].has_periodic == classes[1].has_periodic
        ):
            raise ValueError("parts: give one modality of molecules and one of crystals")
        if max(part.max_atoms for part in self.parts) > self.max_atoms:
            raise ValueError(f"parts: max_atoms of a part is above max_atoms {self.max_atoms}; raise that")
        return self


class JointData(Config):
    """Where molecules and crystals come from.

    parts: the data of each part, by the name of its modality.
    held_out: number of held-out samples over both parts; null: as set in the parts.
    """

    parts: dict[str, SerializeAsAny[Config]]
    held_out: int | None = Field(default=None, ge=0)

    @classmethod
    def small(cls) -> Self:
        return cls(parts={cls.__module__.rpartition(".")[2]: cls.DataConfig.small() for cls in _part_classes()})

    @field_validator("parts", mode="before")
    @classmethod
    def _of_their_modalities(cls, parts: Any) -> Any:
        if not isinstance(parts, dict):
            return parts
        return {name: resolve_as(find("modalities", name).DataConfig, part, f"{name}.") for name, part in parts.items()}


class JointDataset(Dataset):
    """Two data sets merged into one, interleaved in proportion to their sizes."""

    def __init__(self, parts: Sequence[Dataset], names: Sequence[str], max_atoms: int):
        self.parts, self.max_atoms = list(parts), max_atoms
        keys = [((i + 0.5) / len(part), kind, i) for kind, part in enumerate(parts) for i in range(len(part))]
        self.order = [(kind, i) for _, kind, i in sorted(keys)]
        self.facts = {"labels": {"class_names": tuple(names)}}
        self.columns = tuple(dict.fromkeys(name for part in parts for name in part.columns))

    def with_scalar(self, scalar: Property | None) -> Self:
        """Add a property to condition on; it is NaN for a part that does not have it. Return this data set."""
        if scalar is not None:
            self.facts["properties"] = scalar.facts
        return self

    def numbers_of(self, index: int) -> dict[str, float]:
        kind, i = self.order[index]
        part = self.parts[kind]
        return dict.fromkeys(self.columns, float("nan")) | (part.numbers_of(i) if part.columns else {})

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        kind, i = self.order[index]
        sample, part_values = self.parts[kind][i]
        values = {"labels": kind}
        if "properties" in self.facts:
            values["properties"] = part_values.get("properties", float("nan"))
        return _widened(sample, self.max_atoms), values

    @property
    def fingerprint(self) -> str:
        fingerprints = [part.fingerprint for part in self.parts]
        scalar = [self.facts["properties"]] if "properties" in self.facts else []
        return hashlib.sha256(repr((fingerprints, self.max_atoms, *scalar)).encode()).hexdigest()


class Joint(atoms.AtomModality):
    """Data: the keys of both parts, 0 where they do not apply, and `periodic` (B,) bool, True for crystals."""

    Config = JointConfig
    DataConfig = JointData
    config: JointConfig
    has_free = True
    has_periodic = True
    token_scale = 0.25  # most channels of a token are zeros of its one-hot class

    @cached_property
    def parts(self) -> list[atoms.SingleKindModality]:
        return [find("modalities", part.name)(part) for part in self.config.parts]

    def splits(self, data: JointData, listings: Listings = ALONE) -> Splits:
        names = [part.name for part in self.config.parts]
        if set(data.parts) != set(names):
            raise ValueError(f"data.parts: give the data of {' and '.join(names)}, not of {', '.join(data.parts)}")
        part_splits = []
        for number, (name, part) in enumerate(zip(names, self.parts, strict=True)):
            part_data: Any = data.parts[name]
            if data.held_out is not None:
                part_data = part_data.model_copy(update={"held_out": (data.held_out + number) // len(names)})
            try:
                part_splits.append(part.splits(part_data, listings))
            except ValueError as error:
                message = str(error)
                is_field = message.startswith("data.")
                raise ValueError(f"data.parts.{name}.{message[5:]}" if is_field else f"{name}: {message}") from None
        n, scalar = self.config.max_atoms, _shared_property([split.train for split in part_splits])
        return Splits(
            JointDataset([split.train for split in part_splits], names, n).with_scalar(scalar),
            JointDataset([split.held_out for split in part_splits], names, n).with_scalar(scalar),
        )

    def fitted(self, splits: Splits) -> JointConfig:
        train, held_out = splits.train, splits.held_out
        assert isinstance(train, JointDataset) and isinstance(held_out, JointDataset)
        part_splits = [Splits(a, b) for a, b in zip(train.parts, held_out.parts, strict=True)]
        parts = tuple(part.fitted(split) for part, split in zip(self.parts, part_splits, strict=True))
        updates: dict[str, Any] = {"parts": parts}
        if self.config.elements == "found":
            updates["elements"] = tuple(sorted({z for split in part_splits for z in atoms.elements_in(split)}))
        return self.config.model_copy(update=updates)

    def keeping(self, fitted: Any, stored: dict[str, Any]) -> Any:
        parts = stored.get("parts")
        if not isinstance(parts, list) or len(parts) != len(self.parts):
            return fitted
        kept = zip(self.parts, fitted.parts, parts, strict=True)
        updates = {
            "elements": atoms.kept_elements(self.config, fitted, stored),
            "parts": tuple(part.keeping(config, facts) for part, config, facts in kept),
        }
        return fitted.model_copy(update=updates)

    def _draw_atoms(self, streams: Streams, values: dict[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """As in the base class. The kind is that of the label, else drawn as often as it occurs in training."""
        counts = [sum(part.sizes or (0, 1)) for part in self.config.parts]
        kinds = (streams.uniform() * sum(counts) >= counts[0]).long()
        if values and "labels" in values:
            kinds = values["labels"].to(kinds.device)
        uniform, most = streams.uniform(), self.config.max_atoms
        part_sizes = torch.stack([atoms.draw_sizes(uniform, part.sizes, part.max_atoms) for part in self.config.parts])
        sizes = part_sizes.gather(0, kinds[None])[0]
        if values and "num_atoms" in values:
            sizes = values["num_atoms"].to(kinds.device)
            for number, part in enumerate(self.config.parts):
                if (large := sizes[(kinds == number) & (sizes > part.max_atoms)]).numel():
                    raise ValueError(
                        f"num_atoms: {int(large[0])} is out of range for a {part.name}; this model makes 1 to "
                        f"{part.max_atoms} atoms of one; request fewer, or the other kind by labels"
                    )
        periodic = torch.tensor([part.has_periodic for part in self.parts], device=kinds.device)[kinds]
        return torch.arange(most, device=sizes.device) < sizes[:, None], periodic

    @property
    def _size_counts(self) -> Sequence[int]:
        """As in the base class, summed over both parts."""
        known = [part.sizes for part in self.config.parts]
        if None in known:
            return ()
        return [sum(row) for row in zip_longest(*known, fillvalue=0)]

    # Delegated to the parts.

    def spaces(self) -> list[Space]:
        """The spaces of the parts; each receives only samples of its kind."""
        return metrics.spaces(self.parts)

    def metrics(self) -> list[Metric]:
        """The metrics of the parts, separately per kind; their numbers are not averaged."""
        return metrics.metrics(self.parts)

    @property
    def readable(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(suffix for part in self.parts for suffix in part.readable))

    @property
    def preprocessing(self) -> str:
        return "; ".join(part.preprocessing for part in self.parts)

    def errors(self, made: Any, data: Any) -> dict[str, list[float]]:
        """The percentage of atoms with the right element, which applies to both kinds."""
        return {"type_accuracy": type_accuracy(made, data).tolist()}

    def draw_grid(
        self, rows: Sequence[Any], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        """Each sample is drawn by the part of its kind."""
        with tempfile.TemporaryDirectory() as folder:
            cells = [
                [self._draw_cell(take(row, slice(i, i + 1)), Path(folder)) for i in range(count(row))] for row in rows
            ]
        paste_grid(cells, path, columns, captions)

    def _draw_cell(self, sample: dict[str, Tensor], folder: Path) -> Image.Image:
        part = self._part_of(sample)
        part.draw_grid([metrics.narrowed(sample, part)], folder / "cell.png")
        with Image.open(folder / "cell.png") as image:
            return image.convert("RGB")

    def scenes(self, data: Any, moving: bool = False) -> list[AtomsView]:
        """Each sample as the part of its kind shows it."""
        if moving:
            part = self._part_of(take(data, slice(-1, None)))
            return part.scenes(metrics.narrowed(data, part), moving)
        found: list[AtomsView] = []
        for i in range(count(data)):
            sample = take(data, slice(i, i + 1))
            part = self._part_of(sample)
            found += part.scenes(metrics.narrowed(sample, part))
        return found

    def write(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        """Each sample is written by the part of its kind, into a subfolder named after the part."""
        written = []
        for i in range(count(data)):
            sample = take(data, slice(i, i + 1))
            part = self._part_of(sample)
            written += part.write(metrics.narrowed(sample, part), folder / part.config.name, start + i)
        return written

    @classmethod
    def origin_of(cls, data: JointData) -> str:
        origins = [find("modalities", name).origin_of(part) for name, part in data.parts.items()]
        return " ".join(origins) if all(origins) else ""

    def read(
        self, path: Path, batch_size: int, skipped: Skipped | None = None
    ) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """Samples of both kinds, sorted by name.

        Each part reads the subfolder of `path` named after it, or `path` itself if there is none. ValueError names a
        file of either kind that cannot be used, unless `skipped` takes it.
        """
        samples: list[tuple[str, dict[str, Tensor]]] = []
        for part in self.parts:
            subfolder = path / part.config.name
            for data, names in part.read_mixed(subfolder if subfolder.is_dir() else path, batch_size, skipped):
                rows = [take(data, slice(i, i + 1)) for i in range(len(names))]
                wide = [_widened(row, self.config.max_atoms, 1) for row in rows]
                samples += zip(names, wide, strict=True)
        if not samples:
            raise ValueError(f"{path}: holds neither molecules nor crystals; give files of either")
        samples.sort(key=lambda pair: pair[0])
        for first in range(0, len(samples), batch_size):
            batch = samples[first : first + batch_size]
            yield self.join([sample for _, sample in batch]), [name for name, _ in batch]

    def _part_of(self, sample: dict[str, Tensor]) -> atoms.SingleKindModality:
        """Return the part that handles a sample, a batch of one."""
        return next(part for part in self.parts if part.has_periodic == bool(sample["periodic"][0]))


def _shared_property(parts: Sequence[Dataset]) -> Property | None:
    """Return the property to condition on, with statistics over both parts; ValueError if they name different ones."""
    with_scalar = [part for part in parts if isinstance(part, SystemsDataset) and part.scalar is not None]
    columns = list(dict.fromkeys(part.scalar.column for part in with_scalar if part.scalar is not None))
    if len(columns) > 1:
        raise ValueError(
            f"data.parts: property_column is {' in one part and '.join(columns)} in the other; give both the same, or "
            "leave one null"
        )
    if not columns:
        return None
    return property_from(columns[0], np.concatenate([part.systems.columns[columns[0]] for part in with_scalar]))


def _widened(sample: dict[str, Tensor], max_atoms: int, axes: int = 0) -> dict[str, Tensor]:
    """Convert a sample of one part to joint data. axes: number of batch axes, 0 or 1."""
    batch = sample["types"].shape[:axes]
    padding = max_atoms - sample["types"].shape[-1]
    out = {
        "types": F.pad(sample["types"], (0, padding)),
        "positions": torch.zeros(*batch, max_atoms, 3), "fractional": torch.zeros(*batch, max_atoms, 3),
        "lattice": sample.get("lattice", torch.zeros(*batch, 6)),
        "periodic": torch.full(batch, "lattice" in sample),
    }  # fmt: skip
    for key in ("positions", "fractional"):
        if key in sample:
            out[key] = F.pad(sample[key], (0, 0, 0, padding))
    return out
