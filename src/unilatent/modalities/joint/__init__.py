"""Molecules and crystals in one model: each sample is of one kind, which its label tells and its layout shows.

The two kinds are modalities of their own, named in the configuration; their files, chemistry and pictures are theirs.
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

from ...atoms import modality as atoms
from ...atoms.dataset import Property, SystemsDataset, property_from
from ...atoms.grid import paste_grid
from ...config import Config, component, resolve_as
from ...maths.streams import Streams
from ...registry import available, find
from ...types import count, take
from ..base import Dataset, Metric, Space, Splits
from . import metrics


def _kinds() -> list[type[atoms.OneKind]]:
    """Every modality of one kind of system, molecules first."""
    found = [find("modalities", name) for name in available("modalities")]
    return sorted((cls for cls in found if issubclass(cls, atoms.OneKind)), key=lambda cls: cls.crystals)


class JointConfig(atoms.AtomConfig, atoms.MoleculeLosses, atoms.CrystalLosses):
    """parts: the configurations of a modality of molecules and one of crystals, in the order of the labels; their own
    `sizes` are found in the data, and say how often each kind is drawn where no label does. Their weights, elements and
    augmentation are those here.
    """

    name: Literal["joint"] = "joint"
    parts: tuple[component("modalities"), component("modalities")]  # type: ignore[valid-type]

    @classmethod
    def small(cls) -> Self:
        parts: list[Any] = [kind.Config.small() for kind in _kinds()]
        return cls(max_atoms=max(part.max_atoms for part in parts), elements="found", parts=tuple(parts))

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        kinds = [find("modalities", part.name) for part in self.parts]
        if not all(issubclass(kind, atoms.OneKind) for kind in kinds) or kinds[0].crystals == kinds[1].crystals:
            raise ValueError("parts: give one modality of molecules and one of crystals")
        if max(part.max_atoms for part in self.parts) > self.max_atoms:
            raise ValueError(f"parts: max_atoms of a part is above max_atoms {self.max_atoms}; raise that")
        return self


class JointData(Config):
    """parts: the data of each part, by its modality's name. held_out: over both together, how many samples no training
    step sees; None: what the parts say."""

    parts: dict[str, SerializeAsAny[Config]]
    held_out: int | None = Field(default=None, ge=0)

    @classmethod
    def small(cls) -> Self:
        return cls(parts={kind.__module__.rpartition(".")[2]: kind.DataConfig.small() for kind in _kinds()})

    @field_validator("parts", mode="before")
    @classmethod
    def _of_their_modalities(cls, parts: Any) -> Any:
        if not isinstance(parts, dict):
            return parts
        return {name: resolve_as(find("modalities", name).DataConfig, part, f"{name}.") for name, part in parts.items()}


class JointDataset(Dataset):
    """Two data sets as one: their samples follow each other in turn, as often as each has some."""

    def __init__(self, parts: Sequence[Dataset], names: Sequence[str], max_atoms: int):
        self.parts, self.max_atoms = list(parts), max_atoms
        places = [((i + 0.5) / len(part), kind, i) for kind, part in enumerate(parts) for i in range(len(part))]
        self.order = [(kind, i) for _, kind, i in sorted(places)]
        self.facts = {"labels": {"class_names": tuple(names)}}
        self.columns = tuple(dict.fromkeys(name for part in parts for name in part.columns))

    def asking_for(self, asked: Property | None) -> Self:
        """With a number that samples of both kinds can be asked for; of a kind that does not know it, it is NaN."""
        if asked is not None:
            self.facts["properties"] = asked.facts
        return self

    def numbers_of(self, index: int) -> dict[str, float]:
        kind, i = self.order[index]
        part = self.parts[kind]
        return dict.fromkeys(self.columns, float("nan")) | (part.numbers_of(i) if part.columns else {})

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        kind, i = self.order[index]
        sample, own = self.parts[kind][i]
        values = {"labels": kind}
        if "properties" in self.facts:
            values["properties"] = own.get("properties", float("nan"))
        return _widened(sample, self.max_atoms), values

    @property
    def fingerprint(self) -> str:
        own = [part.fingerprint for part in self.parts]
        asked = [self.facts["properties"]] if "properties" in self.facts else []
        return hashlib.sha256(repr((own, self.max_atoms, *asked)).encode()).hexdigest()


class Joint(atoms.AtomModality):
    """Data: those of both kinds, zeros of what a sample is not, and `periodic` (B,), which of them it is."""

    Config = JointConfig
    DataConfig = JointData
    config: JointConfig
    molecules = True
    crystals = True
    token_scale = 0.25  # most of a token are the zeros of its class

    @cached_property
    def parts(self) -> list[atoms.OneKind]:
        return [find("modalities", part.name)(part) for part in self.config.parts]

    def splits(self, data: JointData) -> Splits:
        names = [part.name for part in self.config.parts]
        if set(data.parts) != set(names):
            raise ValueError(f"data.parts: give the data of {' and '.join(names)}, not of {', '.join(data.parts)}")
        found = []
        for number, (name, part) in enumerate(zip(names, self.parts, strict=True)):
            own: Any = data.parts[name]
            if data.held_out is not None:
                own = own.model_copy(update={"held_out": (data.held_out + number) // len(names)})
            try:
                found.append(part.splits(own))
            except ValueError as error:
                said = str(error)
                own_field = said.startswith("data.")
                raise ValueError(f"data.parts.{name}.{said[5:]}" if own_field else f"{name}: {said}") from None
        n, asked = self.config.max_atoms, _shared_property([split.train for split in found])
        return Splits(
            JointDataset([split.train for split in found], names, n).asking_for(asked),
            JointDataset([split.held_out for split in found], names, n).asking_for(asked),
        )

    def fitted(self, splits: Splits) -> JointConfig:
        train, held_out = splits.train, splits.held_out
        assert isinstance(train, JointDataset) and isinstance(held_out, JointDataset)
        own = [Splits(a, b) for a, b in zip(train.parts, held_out.parts, strict=True)]
        parts = tuple(part.fitted(split) for part, split in zip(self.parts, own, strict=True))
        found: dict[str, Any] = {"parts": parts}
        if self.config.elements == "found":
            found["elements"] = tuple(sorted({z for split in own for z in atoms.elements_in(split)}))
        return self.config.model_copy(update=found)

    def _sized(self, streams: Streams, values: dict[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """Of the kind that a label asks for, else each as often as training has it."""
        counts = [sum(part.sizes or (0, 1)) for part in self.config.parts]
        kinds = (streams.uniform() * sum(counts) >= counts[0]).long()
        if values and "labels" in values:
            kinds = values["labels"].to(kinds.device)
        uniform, most = streams.uniform(), self.config.max_atoms
        each = torch.stack([atoms.drawn(uniform, part.sizes, part.max_atoms) for part in self.config.parts])
        sizes = each.gather(0, kinds[None])[0]
        if values and "num_atoms" in values:
            sizes = values["num_atoms"].to(kinds.device)
            for number, part in enumerate(self.config.parts):
                if (large := sizes[(kinds == number) & (sizes > part.max_atoms)]).numel():
                    raise ValueError(
                        f"num_atoms: {int(large[0])} is out of range for a {part.name}; this model makes 1 to "
                        f"{part.max_atoms} atoms of one; ask for fewer, or for the other kind by labels"
                    )
        periodic = torch.tensor([part.crystals for part in self.parts], device=kinds.device)[kinds]
        return torch.arange(most, device=sizes.device) < sizes[:, None], periodic

    @property
    def _counts(self) -> Sequence[int]:
        """Of both kinds together."""
        known = [part.sizes for part in self.config.parts]
        if None in known:
            return ()
        return [sum(row) for row in zip_longest(*known, fillvalue=0)]

    # What belongs to the parts.

    def spaces(self) -> list[Space]:
        """The parts' own; each looks at samples of its kind alone."""
        return metrics.spaces(self.parts)

    def metrics(self) -> list[Metric]:
        """The parts' own, each of samples of its kind: numbers of two kinds have no mean."""
        return metrics.metrics(self.parts)

    @property
    def preprocessing(self) -> str:
        return "; ".join(part.preprocessing for part in self.parts)

    def errors(self, made: Any, data: Any) -> dict[str, list[float]]:
        """What both kinds have: percent of atoms of the right element."""
        atoms = data["types"] > 0
        right = (made["types"].to(atoms.device) == data["types"]) & atoms
        return {"type_accuracy": (100 * right.sum(1) / atoms.sum(1)).tolist()}

    def draw_grid(
        self, rows: Sequence[Any], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        """Each sample as its own kind draws it."""
        with tempfile.TemporaryDirectory() as folder:
            cells = [[self._drawn(take(row, slice(i, i + 1)), Path(folder)) for i in range(count(row))] for row in rows]
        paste_grid(cells, path, columns, captions)

    def _drawn(self, one: dict[str, Tensor], folder: Path) -> Image.Image:
        part = self._part(one)
        part.draw_grid([metrics.narrowed(one, part)], folder / "cell.png")
        with Image.open(folder / "cell.png") as picture:
            return picture.convert("RGB")

    def write(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        """Each sample as its own kind writes it, in a folder of that kind."""
        written = []
        for i in range(count(data)):
            one = take(data, slice(i, i + 1))
            part = self._part(one)
            written += part.write(metrics.narrowed(one, part), folder / part.config.name, start + i)
        return written

    def read(self, path: Path, batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """What each kind finds in its own folder of `path`, or where there is none in `path` itself, by name;
        ValueError on a file of either that cannot be used."""
        found: list[tuple[str, dict[str, Tensor]]] = []
        for part in self.parts:
            own = path / part.config.name
            for data, names in part.read_own(own if own.is_dir() else path, batch_size):
                rows = [take(data, slice(i, i + 1)) for i in range(len(names))]
                wide = [_widened(row, self.config.max_atoms, 1) for row in rows]
                found += zip(names, wide, strict=True)
        if not found:
            raise ValueError(f"{path}: holds neither molecules nor crystals; give files of either")
        found.sort(key=lambda pair: pair[0])
        for first in range(0, len(found), batch_size):
            some = found[first : first + batch_size]
            yield self.join([row for _, row in some]), [name for name, _ in some]

    @property
    def subfolders(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.config.parts)

    def _part(self, one: dict[str, Tensor]) -> atoms.AtomModality:
        """The kind of a sample (1, ...)."""
        return next(part for part in self.parts if part.crystals == bool(one["periodic"][0]))


def _shared_property(parts: Sequence[Dataset]) -> Property | None:
    """The number that samples of either kind can be asked for, over both; ValueError where they name two."""
    asking = [part for part in parts if isinstance(part, SystemsDataset) and part.asked is not None]
    columns = list(dict.fromkeys(part.asked.column for part in asking if part.asked is not None))
    if len(columns) > 1:
        raise ValueError(
            f"data.parts: property_column is {' of one kind and '.join(columns)} of the other; name the same for both, "
            "or leave one null"
        )
    if not columns:
        return None
    return property_from(columns[0], np.concatenate([part.systems.columns[columns[0]] for part in asking]))


def _widened(sample: dict[str, Tensor], max_atoms: int, axes: int = 0) -> dict[str, Tensor]:
    """A sample of one kind as one of both; axes: before that of its atoms."""
    batch = sample["types"].shape[:axes]
    room = max_atoms - sample["types"].shape[-1]
    out = {
        "types": F.pad(sample["types"], (0, room)),
        "positions": torch.zeros(*batch, max_atoms, 3), "fractional": torch.zeros(*batch, max_atoms, 3),
        "lattice": sample.get("lattice", torch.zeros(*batch, 6)),
        "periodic": torch.full(batch, "lattice" in sample),
    }  # fmt: skip
    for key in ("positions", "fractional"):
        if key in sample:
            out[key] = F.pad(sample[key], (0, 0, 0, room))
    return out
