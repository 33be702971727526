"""What molecules, crystals and both together share as modalities; their chemistry is in their own folders.

Data are dicts of tensors, padded to `max_atoms` with the real atoms first, so that every batch has one shape:

    types        (B, N) int64, atomic numbers, 0 at padding
    positions    (B, N, 3) float32, Angstrom, about the mean of the atoms, 0 at padding       molecules
    fractional   (B, N, 3) float32 in [0, 1), 0 at padding                                    crystals
    lattice      (B, 6) float32, lengths in Angstrom, angles in degrees                       crystals
    periodic     (B,) bool, which of the two a sample is                                      where there are both
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from ..maths.geometry import centre, rotation_of, wrap
from ..maths.streams import Streams
from ..modalities.base import Metric, Modality, Space, Splits
from ..nets.fields import TokenField
from ..types import Layout, Tokens
from . import losses
from .dataset import SystemsDataset, classes_of, property_of
from .grid import paste_grid
from .systems import HEAVIEST, Systems
from .tokens import SURE, Format

CENTRED = 1e-4
"""Angstrom that the mean of positions may lie from 0."""
SHORTEST, FLATTEST = 0.1, 1.0
"""Length in Angstrom and angle in degrees (and 180 less it) beyond which a lattice is none."""


class AtomConfig(Config):
    """max_atoms: of the largest system. elements: atomic numbers of the vocabulary, lightest first; "found" takes
    those in the data, null all up to 99 (as the papers do). sizes: how many training systems have 0, 1, 2, ... atoms,
    which new samples follow; found in the data when left empty. augment: turn molecules, shift the origin of crystals.
    type_weight: of the cross-entropy of the elements.
    """

    max_atoms: int = Field(ge=1)
    elements: tuple[int, ...] | Literal["found"] | None = None
    sizes: tuple[int, ...] | None = None
    augment: bool = True
    type_weight: float = Field(default=1.0, ge=0)

    @field_validator("elements")
    @classmethod
    def _numbers(cls, elements: Any) -> Any:
        if isinstance(elements, tuple) and (
            not elements or list(elements) != sorted(set(elements)) or not 1 <= elements[0] <= elements[-1] <= HEAVIEST
        ):
            raise ValueError(f"give different atomic numbers from 1 to {HEAVIEST}, lightest first")
        return elements

    @model_validator(mode="after")
    def _fit(self) -> Self:
        sizes = self.sizes
        if sizes is not None and (len(sizes) > self.max_atoms + 1 or min(sizes, default=0) < 0 or not sum(sizes[1:])):
            raise ValueError(f"sizes: give counts of systems with 0 to {self.max_atoms} (max_atoms) atoms, not all 0")
        return self


class MoleculeLosses(Config):
    """position_weight: of squared distances in nm, about the mean."""

    position_weight: float = Field(default=10.0, ge=0)


class CrystalLosses(Config):
    """Weights of squared errors of fractional coordinates, of lengths in Angstrom / N^(1/3), of angles in radians.
    frac_loss: "wrapped" takes the nearest periodic image; "plain" does not (ADiT)."""

    fractional_weight: float = Field(default=10.0, ge=0)
    length_weight: float = Field(default=1.0, ge=0)
    angle_weight: float = Field(default=10.0, ge=0)
    frac_loss: Literal["wrapped", "plain"] = "wrapped"


class AtomModality(Modality):
    """Tokens, losses, sizes and views of systems of atoms. molecules, crystals: which of them there may be."""

    molecules: ClassVar[bool] = False
    crystals: ClassVar[bool] = False
    config: Any

    @property
    def form(self) -> Format:
        elements = self.config.elements
        return Format(elements if isinstance(elements, tuple) else tuple(range(1, HEAVIEST + 1)), self.crystals)

    @property
    def channels(self) -> int:
        return sum(self.form.widths)

    @property
    def max_tokens(self) -> int:
        return self.config.max_atoms + self.form.extra

    @property
    def axes(self) -> int:
        return 1

    @property
    def fields(self) -> tuple[TokenField, ...]:
        kinds: list[Literal["linear", "smooth", "periodic"]] = ["linear", "smooth", "periodic", "smooth"]
        return tuple(TokenField(width, kind) for width, kind in zip(self.form.widths, kinds, strict=False))

    @property
    def units(self) -> dict[str, int]:
        return {"atom": self.config.max_atoms}

    @property
    def resolution(self) -> tuple[int, ...]:
        """The most atoms."""
        return (self.config.max_atoms,)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of data."""
        both = self.molecules and self.crystals
        return (
            "types", *(["positions"] if self.molecules else []), *(["fractional", "lattice"] if self.crystals else []),
            *(["periodic"] if both else []),
        )  # fmt: skip

    # Tokens.

    def pack(self, data: dict[str, Tensor]) -> Tokens:
        given = {key: data[key] for key in self.keys}
        if self.crystals and not self.molecules:
            given["periodic"] = (data["types"] > 0).any(1)
        return self.form.pack(**given)

    def unpack(self, tokens: Tokens) -> dict[str, Tensor]:
        found = self.form.unpack(tokens)
        return {key: found[key] for key in self.keys}

    def ideal(self, data: dict[str, Tensor]) -> Tokens:
        """The tokens, sure of their classes: a prediction's are scores."""
        truth = self.pack(data)
        factor = torch.ones(self.channels, device=truth.values.device)
        factor[: self.form.classes] = SURE
        return Tokens(truth.values * factor, truth.layout)

    def finish(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Positions about their mean, fractional coordinates in [0, 1), lattices that are some."""
        out, atoms = dict(data), data["types"] > 0
        real = atoms[..., None]
        if self.molecules:
            moved = centre(data["positions"].double(), atoms)
            near = moved.norm(dim=-1, keepdim=True) <= CENTRED
            free = (data["positions"].double() - torch.where(near, 0.0, moved)).float()
            out["positions"] = torch.where(real & self._free(data)[:, None, None], free, 0.0)
        if self.crystals:
            periodic = ~self._free(data)
            out["fractional"] = torch.where(real & periodic[:, None, None], wrap(data["fractional"]), 0.0)
            lengths, angles = data["lattice"].split(3, dim=-1)
            lattice = torch.cat([lengths.clamp(min=SHORTEST), angles.clamp(FLATTEST, 180 - FLATTEST)], -1)
            out["lattice"] = torch.where(periodic[:, None], lattice, 0.0)
        return out

    def _free(self, data: dict[str, Tensor]) -> Tensor:
        """(B,) which samples are molecules."""
        if self.molecules and self.crystals:
            return ~data["periodic"]
        return torch.full((len(data["types"]),), self.molecules, device=data["types"].device)

    def check(self, data: Any) -> dict[str, Tensor]:
        """The data; shorter ones padded to `max_atoms`, and finished: centred, wrapped."""
        n, known = self.config.max_atoms, ", ".join(self.keys)
        if not isinstance(data, dict) or set(data) != set(self.keys) or not all(map(torch.is_tensor, data.values())):
            found = f"a dict of {sorted(map(str, data))}" if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"atoms: expected a dict of tensors {known}, got {found}")
        types = data["types"]
        b, given = types.shape if types.ndim == 2 else (0, 0)
        if not 1 <= given <= n or not b or types.is_floating_point() or types.dtype == torch.bool:
            raise ValueError(
                f"types: expected whole numbers (B, up to {n}), B > 0, got {types.dtype} {tuple(types.shape)}"
            )
        shapes = {
            "positions": (b, given, 3), "fractional": (b, given, 3), "lattice": (b, 6), "periodic": (b,),
        }  # fmt: skip
        for key in self.keys[1:]:
            value = data[key]
            if tuple(value.shape) != shapes[key] or value.is_floating_point() != (key != "periodic"):
                raise ValueError(f"{key}: expected shape {shapes[key]}, got {value.dtype} {tuple(value.shape)}")
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{key}: expected finite values, got NaN or infinity; leave those samples out")
        self._refuse_types(types)
        room = n - given
        out = {key: data[key].bool() if key == "periodic" else data[key].float() for key in self.keys}
        out["types"] = F.pad(types.long(), (0, room))
        for key in ("positions", "fractional"):
            if key in out:
                out[key] = F.pad(out[key], (0, 0, 0, room))
        return self.finish(out)

    def _refuse_types(self, types: Tensor) -> None:
        atoms = types > 0
        if types.min() < 0 or types.max() > HEAVIEST or not atoms[:, 0].all() or (atoms[:, 1:] & ~atoms[:, :-1]).any():
            raise ValueError(f"types: expected atomic numbers from 1 to {HEAVIEST}, then 0 at padding")
        if (unknown := (self.form.class_of(types) == 0) & atoms).any():
            number = int(types[unknown][0])
            raise ValueError(f"types: atomic number {number} is not among this model's elements (modality.elements)")

    # Losses.

    def reconstruction_loss(self, prediction: Tokens, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms `types`, and those of positions, or of fractional coordinates, lengths and angles (`atoms.losses`)."""
        c = self.config
        weights = losses.Weights(
            c.type_weight, getattr(c, "position_weight", 0.0), getattr(c, "fractional_weight", 0.0),
            getattr(c, "length_weight", 0.0), getattr(c, "angle_weight", 0.0),
            getattr(c, "frac_loss", "wrapped") == "wrapped",
        )  # fmt: skip
        return losses.terms(prediction, self.pack(data), self.form, weights, self.molecules)

    # Sizes and views.

    layout_arguments = ("num_atoms",)

    def parse_layout(self, n: int, given: dict[str, Any]) -> dict[str, Tensor]:
        """num_atoms: 12, "12", "8-12", "8,12", or a list of them."""
        if given.get("num_atoms") is None:
            return {}
        sizes = _whole_numbers(given["num_atoms"], self.config.max_atoms)
        counts = self._counts
        if counts and (unseen := sorted({size for size in sizes if size >= len(counts) or not counts[size]})):
            shown = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
            warnings.warn(f"num_atoms: no training system has {shown} atoms; samples may be poor", stacklevel=3)
        return {"num_atoms": torch.tensor(sizes)[torch.arange(n) % len(sizes)]}

    @property
    def _counts(self) -> Sequence[int]:
        """How many training systems have 0, 1, 2, ... atoms; empty where that is not known."""
        return self.config.sizes or ()

    def sample_layout(self, streams: Streams, values: dict[str, Tensor] | None = None) -> Layout:
        """As many atoms as `num_atoms` says, else as training systems have; any number up to the most where that is not
        known."""
        return self.form.layout(*self._sized(streams, values))

    def _sized(self, streams: Streams, values: dict[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """(B, N) which atoms there are, and (B,) which samples are periodic."""
        sizes = drawn(streams.uniform(), self.config.sizes, self.config.max_atoms)
        if values and "num_atoms" in values:
            sizes = values["num_atoms"].to(sizes.device)
        atoms = torch.arange(self.config.max_atoms, device=sizes.device) < sizes[:, None]
        return atoms, torch.ones_like(sizes, dtype=torch.bool) if self.crystals else None

    def layout_of(self, mask: Tensor) -> Layout:
        atoms = mask[:, self.form.extra :]
        alone = self.crystals and not self.molecules and not mask[:, 0].all()
        if alone or not atoms[:, 0].all() or (atoms[:, 1:] & ~atoms[:, :-1]).any():
            raise ValueError("latents: expected zeros at padding alone, after those of atoms; give what encode gave")
        return self.form.layout(atoms, mask[:, 0] if self.crystals else None)

    def augment(self, data: dict[str, Tensor], streams: Streams) -> dict[str, Tensor]:
        """Molecules turned by a random rotation; crystals seen from a random origin, in their own frame."""
        if not self.config.augment:
            return data
        out, real = dict(data), (data["types"] > 0)[..., None]
        device = data["types"].device
        if self.molecules:
            turn = rotation_of(streams.normal(4)).to(device)  # (B, 3, 3)
            turned = (data["positions"][..., None, :] * turn[:, None]).sum(-1)
            out["positions"] = torch.where(real, turned, 0.0)
        if self.crystals:
            shift = streams.uniform(1, 3).to(device)
            moved = real & ~self._free(data)[:, None, None]
            out["fractional"] = torch.where(moved, wrap(data["fractional"] + shift), 0.0)
        return out

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([sample[key] for sample in samples]) for key in self.keys}

    # Data.

    def datasets(
        self, train: Systems, held_out: Systems, label_column: str | None, property_column: str | None = None
    ) -> Splits:
        """Both as padded samples; label_column: whose values are classes; property_column: whose values are numbers
        that samples can be asked for."""
        classes = None if label_column is None else classes_of(label_column, train, held_out)
        elements = self.config.elements if isinstance(self.config.elements, tuple) else None
        n = self.config.max_atoms
        asked = None if property_column is None else property_of(property_column, train)
        return Splits(*[SystemsDataset(part, n, elements, classes, asked) for part in (train, held_out)])

    def as_made(self, systems: Systems) -> SystemsDataset:
        """Systems that somebody made; ValueError names one that this modality cannot hold."""
        data = SystemsDataset(systems, self.config.max_atoms, self.form.elements)
        for index in range(len(data)):
            data[index]
        return data

    def in_batches(self, systems: Systems, batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """Batches of data with the systems' names, in order; ValueError names one that this modality cannot hold."""
        data = SystemsDataset(systems, self.config.max_atoms, self.form.elements)
        for start in range(0, len(data), batch_size):
            rows = range(start, min(start + batch_size, len(data)))
            yield self.collate([data[row][0] for row in rows]), [systems.names[row] for row in rows]

    def arrays(self, data: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The data themselves."""
        return {key: data[key].cpu().numpy() for key in self.keys}

    def fitted(self, splits: Splits) -> AtomConfig:
        """With `sizes` of the training systems, and the elements that occur in any, where they are to be found."""
        found: dict[str, Any] = {}
        sets = [part for part in (splits.train, splits.held_out) if isinstance(part, SystemsDataset)]
        if self.config.sizes is None and sets and len(sets[0]):
            fitting = sets[0].systems.sizes[sets[0].systems.sizes <= self.config.max_atoms]
            if not len(fitting):
                raise ValueError(f"modality.max_atoms: every training system has more than {self.config.max_atoms}")
            found["sizes"] = tuple(torch.from_numpy(fitting).bincount().tolist())
        if self.config.elements == "found":
            found["elements"] = tuple(sorted(elements_in(splits)))
        return self.config.model_copy(update=found)


def _whole_numbers(value: Any, most: int) -> list[int]:
    """Sizes that a user asks for; ValueError unless all are whole numbers from 1 to `most`."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple | range):
        sizes = [size for part in value for size in _whole_numbers(part, most)]
        if not sizes:
            raise ValueError("num_atoms: empty; give at least one number")
        return sizes
    text = str(value).strip()
    if isinstance(value, str) and "," in text:
        return [size for part in text.split(",") for size in _whole_numbers(part, most)]
    span = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if span is None:
        raise ValueError(f"num_atoms: {text!r} is neither a whole number nor a range like 8-12")
    first, last = int(span[1]), int(span[2] or span[1])
    if first > last:
        raise ValueError(f"num_atoms: {text} runs backwards; write {last}-{first}")
    if first < 1 or last > most:
        raise ValueError(f"num_atoms: {text} is out of range; this model makes 1 to {most} atoms (modality.max_atoms)")
    return list(range(first, last + 1))


def elements_in(splits: Splits) -> set[int]:
    """Atomic numbers that occur in any system."""
    sets = [part for part in (splits.train, splits.held_out) if isinstance(part, SystemsDataset)]
    return {int(z) for part in sets for z in np.unique(part.systems.types)}


def drawn(uniform: Tensor, counts: Sequence[int] | None, most: int) -> Tensor:
    """Sizes (B,) from uniforms in [0, 1), as often as counts say; 1 to `most` equally often without any."""
    weights = torch.tensor([0, *[1] * most] if counts is None else counts, dtype=torch.float64, device=uniform.device)
    steps = (weights.cumsum(0) / weights.sum()).contiguous()
    return torch.searchsorted(steps, uniform.double().contiguous(), right=True).clamp(max=len(steps) - 1)


class OneKind(AtomModality):
    """Molecules alone, or crystals: what is said of them stands in modules of their own.

    reading: `read_files(path, own)`. judging: `spaces()`, `metrics()`, `errors(made, data)`. drawing: `cells(data)`,
    `write(data, folder, start)`.
    """

    reading: ModuleType
    judging: ModuleType
    drawing: ModuleType

    def made(self, source: Path) -> SystemsDataset:
        """Any files that the data can be read from."""
        return self.as_made(self.reading.read_files(source))

    def read(self, path: Path, batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        return self.in_batches(self.reading.read_files(path), batch_size)

    def read_own(self, path: Path, batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """`read` of a place where files of the other kind may lie too: these are passed over."""
        return self.in_batches(self.reading.read_files(path, own=True), batch_size)

    def spaces(self) -> list[Space]:
        return self.judging.spaces()

    def metrics(self) -> list[Metric]:
        return self.judging.metrics()

    def errors(self, made: Any, data: Any) -> dict[str, list[float]]:
        return self.judging.errors(made, data)

    def draw_grid(
        self, rows: Sequence[Any], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        paste_grid([self.drawing.cells(row) for row in rows], path, columns, captions)

    def write(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        return self.drawing.write(data, folder, start)
