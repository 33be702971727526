"""Base classes of the modalities of atoms: free systems (molecules), periodic systems (crystals), or both.

Data are dicts of tensors, padded to N = `max_atoms` with the real atoms first, so that every batch has the same shape:

    types        (B, N) int64, atomic numbers, 0 at padding                                 always
    positions    (B, N, 3) float32, Angstrom, about the mean of the atoms, 0 at padding     if systems may be free
    fractional   (B, N, 3) float32 in [0, 1), 0 at padding                                  if they may be periodic
    lattice      (B, 6) float32, lengths in Angstrom, angles in degrees                     if they may be periodic
    periodic     (B,) bool, whether the sample is periodic                                  if they may be either

With both kinds in a batch, values that do not apply to a sample are 0.
"""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from ...config import Config
from ...controls import Control
from ...maths.geometry import centre, in_first_axes, in_principal_axes, rotation_of, wrap
from ...maths.streams import Streams
from ...nets.fields import TokenField
from ...types import Layout, Tokens, move, refuse_unused
from ..base import BadSample, CheckedRecords, CountedBatches, Metric, Modality, Skipped, Space, Splits
from . import losses, viewer
from .dataset import SystemsDataset, classes_of, property_of
from .elements import SYMBOLS
from .files import SystemKind, existing, unread_names
from .grid import paste_grid
from .reading import LoadedSystems
from .systems import HEAVIEST, Systems
from .tokens import SURE, TokenFormat

CENTRED = 1e-4
"""Distance in Angstrom from 0 up to which the mean of positions counts as centred."""
SHORTEST, FLATTEST = 0.1, 1.0
"""Smallest length (Angstrom) and smallest angle (degrees) of a lattice; the largest angle is 180 - FLATTEST."""


class AtomConfig(Config):
    """What systems of atoms have in common.

    max_atoms: the most atoms of a system.
    elements: atomic numbers of the vocabulary in ascending order; "found": those in the data, null: 1 to 99 (as in the
        papers).
    sizes: how many training systems have 0, 1, 2, ... atoms, from which sizes of samples are drawn; null: counted in
        the training data.
    augment: rotate free systems, shift the origin of periodic ones.
    type_weight: weight of the cross-entropy of the elements.
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
            raise ValueError(f"give different atomic numbers from 1 to {HEAVIEST} in ascending order")
        return elements

    @model_validator(mode="after")
    def _fit(self) -> Self:
        sizes = self.sizes
        if sizes is not None and (len(sizes) > self.max_atoms + 1 or min(sizes, default=0) < 0 or not sum(sizes[1:])):
            raise ValueError(f"sizes: give counts of systems with 0 to {self.max_atoms} (max_atoms) atoms, not all 0")
        return self


class FreeLossConfig(Config):
    """Loss of free systems, such as molecules.

    position_weight: weight of squared distances in nm between positions about their means.
    frame: "given": a network sees systems as they are turned, in training at random (`augment`); "principal": turned
        to their principal axes; "first": moved and turned so that atom 0 is at 0, atom 1 on the x axis, and the next
        atom off that axis in the xy plane. The last two leave it less to learn. A decoded system is turned as the
        network saw it.
    """

    position_weight: float = Field(default=10.0, ge=0)
    frame: Literal["given", "principal", "first"] = "given"


class PeriodicLossConfig(Config):
    """Loss of periodic systems.

    fractional_weight: weight of squared errors of fractional coordinates.
    length_weight: weight of squared errors of the cell's lengths, in Angstrom / N^(1/3).
    angle_weight: weight of squared errors of the cell's angles, in radians.
    frac_loss: "wrapped" compares with the nearest periodic image; "plain" does not (ADiT).
    origin: "given": a network sees the origin of the data, in training a random one (`augment`); "rarest": an atom of
        the element with the fewest atoms, which leaves it less to learn. A decoded system has the origin that the
        network saw.
    """

    fractional_weight: float = Field(default=10.0, ge=0)
    length_weight: float = Field(default=1.0, ge=0)
    angle_weight: float = Field(default=10.0, ge=0)
    frac_loss: Literal["wrapped", "plain"] = "wrapped"
    origin: Literal["given", "rarest"] = "given"


class AtomModality(Modality):
    """Tokens, losses, sizes and augmentation of systems of atoms.

    has_free, has_periodic: whether a sample may be free, and whether it may be periodic.
    """

    has_free: ClassVar[bool] = False
    has_periodic: ClassVar[bool] = False
    config: Any

    @property
    def token_format(self) -> TokenFormat:
        elements = self.config.elements
        return TokenFormat(
            elements if isinstance(elements, tuple) else tuple(range(1, HEAVIEST + 1)), self.has_periodic
        )  # fmt: skip

    @property
    def channels(self) -> int:
        return sum(self.token_format.widths)

    @property
    def max_tokens(self) -> int:
        return self.config.max_atoms + self.token_format.lattice_tokens

    @property
    def axes(self) -> int:
        return 1

    @property
    def fields(self) -> tuple[TokenField, ...]:
        kinds: list[Literal["linear", "smooth", "periodic"]] = ["linear", "smooth", "periodic", "smooth"]
        return tuple(TokenField(width, kind) for width, kind in zip(self.token_format.widths, kinds, strict=False))

    def units(self, layout: Layout) -> dict[str, int | Tensor]:
        """Real atoms; the token of a lattice is none."""
        assert layout.mask is not None
        return {"atom": layout.mask[:, self.token_format.lattice_tokens :].sum(1)}

    @property
    def resolution(self) -> tuple[int, ...]:
        """The most atoms of a sample."""
        return (self.config.max_atoms,)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the data."""
        keys = ["types"]
        if self.has_free:
            keys += ["positions"]
        if self.has_periodic:
            keys += ["fractional", "lattice"]
        if self.has_free and self.has_periodic:
            keys += ["periodic"]
        return tuple(keys)

    # Tokens.

    @property
    def token_settings(self) -> dict[str, Any]:
        return {key: value for key in ("frame", "origin") if (value := getattr(self.config, key, "given")) != "given"}

    def pack(self, data: dict[str, Tensor]) -> Tokens:
        arguments = {key: data[key] for key in self.keys}
        if self.has_free and self.config.frame != "given":
            turn = in_principal_axes if self.config.frame == "principal" else in_first_axes
            arguments["positions"] = turn(data["positions"], data["types"] > 0)
        if self.has_periodic and self.config.origin == "rarest":
            arguments["fractional"] = about_rarest(data["fractional"], data["types"])
        if self.has_periodic and not self.has_free:
            arguments["periodic"] = (data["types"] > 0).any(1)
        return self.token_format.pack(**arguments)

    def unpack(self, tokens: Tokens) -> dict[str, Tensor]:
        data = self.token_format.unpack(tokens)
        return {key: data[key] for key in self.keys}

    def ideal(self, data: dict[str, Tensor]) -> Tokens:
        """The tokens, with scores of SURE for the classes, since a prediction's classes are scores."""
        truth = self.pack(data)
        factor = torch.ones(self.channels, device=truth.values.device)
        factor[: self.token_format.classes] = SURE
        return Tokens(truth.values * factor, truth.layout)

    def finish(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Centre positions, wrap fractional coordinates into [0, 1), clamp lattices to possible lengths and angles."""
        out, atoms = dict(data), data["types"] > 0
        real = atoms[..., None]
        if self.has_free:
            mean = centre(data["positions"].double(), atoms)
            is_centred = mean.norm(dim=-1, keepdim=True) <= CENTRED
            positions = (data["positions"].double() - torch.where(is_centred, 0.0, mean)).float()
            out["positions"] = torch.where(real & self._is_free(data)[:, None, None], positions, 0.0)
        if self.has_periodic:
            periodic = ~self._is_free(data)
            out["fractional"] = torch.where(real & periodic[:, None, None], wrap(data["fractional"]), 0.0)
            lengths, angles = data["lattice"].split(3, dim=-1)
            lattice = torch.cat([lengths.clamp(min=SHORTEST), angles.clamp(FLATTEST, 180 - FLATTEST)], -1)
            out["lattice"] = torch.where(periodic[:, None], lattice, 0.0)
        return out

    def _is_free(self, data: dict[str, Tensor]) -> Tensor:
        """(B,) bool, which samples are free."""
        if self.has_free and self.has_periodic:
            return ~data["periodic"]
        return torch.full((len(data["types"]),), self.has_free, device=data["types"].device)

    def check(self, data: Any) -> dict[str, Tensor]:
        """Validate data, pad them to `max_atoms` and apply `finish`; ValueError names the key and what was expected."""
        n, keys = self.config.max_atoms, ", ".join(self.keys)
        if not isinstance(data, dict) or set(data) != set(self.keys) or not all(map(torch.is_tensor, data.values())):
            actual = f"a dict of {sorted(map(str, data))}" if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"atoms: expected a dict of tensors {keys}, got {actual}")
        types = data["types"]
        b, slots = types.shape if types.ndim == 2 else (0, 0)
        if not 1 <= slots <= n or not b or types.is_floating_point() or types.dtype == torch.bool:
            raise ValueError(
                f"types: expected whole numbers (B, up to {n}), B > 0, got {types.dtype} {tuple(types.shape)}"
            )
        shapes = {
            "positions": (b, slots, 3), "fractional": (b, slots, 3), "lattice": (b, 6), "periodic": (b,),
        }  # fmt: skip
        for key in self.keys[1:]:
            value = data[key]
            if tuple(value.shape) != shapes[key] or value.is_floating_point() != (key != "periodic"):
                raise ValueError(f"{key}: expected shape {shapes[key]}, got {value.dtype} {tuple(value.shape)}")
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{key}: expected finite values, got NaN or infinity; leave those samples out")
        self._check_types(types)
        padding = n - slots
        out = {key: data[key].bool() if key == "periodic" else data[key].float() for key in self.keys}
        out["types"] = F.pad(types.long(), (0, padding))
        for key in ("positions", "fractional"):
            if key in out:
                out[key] = F.pad(out[key], (0, 0, 0, padding))
        return self.finish(out)

    def _check_types(self, types: Tensor) -> None:
        atoms = types > 0
        if types.min() < 0 or types.max() > HEAVIEST or not atoms[:, 0].all() or (atoms[:, 1:] & ~atoms[:, :-1]).any():
            raise ValueError(f"types: expected atomic numbers from 1 to {HEAVIEST}, then 0 at padding")
        if (unknown := (self.token_format.class_of(types) == 0) & atoms).any():
            number = int(types[unknown][0])
            raise ValueError(f"types: atomic number {number} is not among this model's elements (modality.elements)")

    # Losses.

    def reconstruction_loss(self, prediction: Tokens, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms `types`, `positions` if samples may be free, `fractional`, `lengths` and `angles` if periodic."""
        c = self.config
        weights = losses.AtomLossWeights(
            c.type_weight, getattr(c, "position_weight", 0.0), getattr(c, "fractional_weight", 0.0),
            getattr(c, "length_weight", 0.0), getattr(c, "angle_weight", 0.0),
            getattr(c, "frac_loss", "wrapped") == "wrapped",
        )  # fmt: skip
        return losses.loss_terms(prediction, self.pack(data), self.token_format, weights, self.has_free)

    # Sizes and augmentation.

    layout_arguments = ("num_atoms",)

    def parse_layout(self, n: int, given: dict[str, Any]) -> dict[str, Tensor]:
        """num_atoms: 12, "12", "8-12", "8,12", or a list of these."""
        if given.get("num_atoms") is None:
            return {}
        sizes = _parsed_sizes(given["num_atoms"], self.config.max_atoms)
        refuse_unused("num_atoms", len(sizes), n)
        counts = self._size_counts
        if counts and (unseen := sorted({size for size in sizes if size >= len(counts) or not counts[size]})):
            shown = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
            warnings.warn(f"num_atoms: no training system has {shown} atoms; samples may be poor", stacklevel=3)
        return {"num_atoms": torch.tensor(sizes)[torch.arange(n) % len(sizes)]}

    def layout_control(self, argument: str) -> Control:
        """A line for numbers of atoms."""
        seen = [size for size, number in enumerate(self._size_counts) if number]
        span = f"{min(seen)} to {max(seen)} in training" if seen else f"1 to {self.config.max_atoms}"
        hint = f"{span}; a number, a list 8,12 or a range 8-12; empty: as in training"
        return Control("Number of atoms", hint=hint)

    @property
    def _size_counts(self) -> Sequence[int]:
        """How many training systems have 0, 1, 2, ... atoms; empty if unknown."""
        return self.config.sizes or ()

    def sample_layout(self, streams: Streams, values: dict[str, Tensor] | None = None) -> Layout:
        """Layouts with `num_atoms` atoms if requested, else with sizes drawn as often as training systems have them.

        Without known sizes of training systems, 1 to `max_atoms` are equally likely.
        """
        return self.token_format.layout(*self._draw_atoms(streams, values))

    def _draw_atoms(self, streams: Streams, values: dict[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """Masks of real atoms (B, N) and of periodic samples (B,), None if samples are never periodic."""
        sizes = draw_sizes(streams.uniform(), self.config.sizes, self.config.max_atoms)
        if values and "num_atoms" in values:
            sizes = values["num_atoms"].to(sizes.device)
        atoms = torch.arange(self.config.max_atoms, device=sizes.device) < sizes[:, None]
        return atoms, torch.ones_like(sizes, dtype=torch.bool) if self.has_periodic else None

    def layout_of(self, mask: Tensor) -> Layout:
        atoms = mask[:, self.token_format.lattice_tokens :]
        lacks_lattice = self.has_periodic and not self.has_free and not mask[:, 0].all()
        if lacks_lattice or not atoms[:, 0].all() or (atoms[:, 1:] & ~atoms[:, :-1]).any():
            raise ValueError(
                "latents: expected zeros at padding only, after those of the atoms; give latents that encode returned"
            )
        return self.token_format.layout(atoms, mask[:, 0] if self.has_periodic else None)

    def augment(self, data: dict[str, Tensor], streams: Streams) -> dict[str, Tensor]:
        """Rotate each free system at random; shift the origin of each periodic system at random, without rotation."""
        if not self.config.augment:
            return data
        out, real = dict(data), (data["types"] > 0)[..., None]
        device = data["types"].device
        if self.has_free:
            rotation = rotation_of(streams.normal(4)).to(device)  # (B, 3, 3)
            rotated = (data["positions"][..., None, :] * rotation[:, None]).sum(-1)
            out["positions"] = torch.where(real, rotated, 0.0)
        if self.has_periodic:
            shift = streams.uniform(1, 3).to(device)
            moved = real & ~self._is_free(data)[:, None, None]
            out["fractional"] = torch.where(moved, wrap(data["fractional"] + shift), 0.0)
        return out

    @property
    def augmentation(self) -> dict[str, Any]:
        return {"augment": self.config.augment}

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([sample[key] for sample in samples]) for key in self.keys}

    # Data.

    def datasets(
        self, train: Systems, held_out: Systems, label_column: str | None, property_column: str | None = None
    ) -> Splits:
        """Return systems as data sets of padded samples.

        label_column: its values are the class labels. property_column: its values are numbers to condition on.
        """
        classes = None if label_column is None else classes_of(label_column, train, held_out)
        elements = self.config.elements if isinstance(self.config.elements, tuple) else None
        n = self.config.max_atoms
        scalar = None if property_column is None else property_of(property_column, train)
        return Splits(*[SystemsDataset(part, n, elements, classes, scalar) for part in (train, held_out)])

    def as_dataset(self, systems: Systems) -> SystemsDataset:
        """Return systems as a data set, without labels; reading one that this modality cannot hold raises BadSample."""
        return SystemsDataset(systems, self.config.max_atoms, self.token_format.elements)

    def in_batches(self, systems: Systems, batch_size: int, skipped: Skipped | None = None) -> CountedBatches:
        """Return batches of data with the systems' names, in order.

        A system that this modality cannot hold is a ValueError, or is left out (`skipped`, as in `read`).
        """
        return CountedBatches(len(systems), self._in_batches(systems, batch_size, skipped))

    def _in_batches(
        self, systems: Systems, batch_size: int, skipped: Skipped | None
    ) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        dataset = self.as_dataset(systems)
        for start in range(0, len(dataset), batch_size):
            batch: list[tuple[Any, str]] = []
            for row in range(start, min(start + batch_size, len(dataset))):
                try:
                    batch.append((dataset[row][0], systems.names[row]))
                except BadSample as error:
                    if skipped is None:
                        raise
                    skipped(str(error))
            if batch:
                yield self.collate([sample for sample, _ in batch]), [name for _, name in batch]

    def arrays(self, data: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The data as numpy arrays."""
        return {key: data[key].cpu().numpy() for key in self.keys}

    @abstractmethod
    def scenes(self, data: Any, moving: bool = False) -> list[viewer.AtomsView]:
        """Return each sample as it is seen in three dimensions. moving: they are moments of one."""

    def viewer(
        self, data: Any, captions: Sequence[str] | None = None, title: str = "", moving: bool = False
    ) -> str:  # fmt: skip
        """Return a page on which systems can be turned, enlarged and measured."""
        return viewer.page(self.scenes(move(data, "cpu"), moving), captions, title, moving)

    def fitted(self, splits: Splits) -> AtomConfig:
        """Return the configuration with `sizes` of the training systems filled in, and `elements` if they are "found".

        ValueError if every training system has more than `max_atoms` atoms.
        """
        updates: dict[str, Any] = {}
        parts = [part for part in (splits.train, splits.held_out) if isinstance(part, SystemsDataset)]
        if self.config.sizes is None and parts and len(parts[0]):
            fitting = parts[0].systems.sizes[parts[0].systems.sizes <= self.config.max_atoms]
            if not len(fitting):
                raise ValueError(f"modality.max_atoms: every training system has more than {self.config.max_atoms}")
            updates["sizes"] = tuple(torch.from_numpy(fitting).bincount().tolist())
        if self.config.elements == "found":
            updates["elements"] = tuple(sorted(elements_in(splits)))
        return self.config.model_copy(update=updates)

    def keeping(self, fitted: Any, stored: dict[str, Any]) -> Any:
        updates: dict[str, Any] = {"elements": kept_elements(self.config, fitted, stored)}
        sizes = stored.get("sizes")
        if self.config.sizes is None and isinstance(sizes, list) and len(sizes) <= fitted.max_atoms + 1:
            updates["sizes"] = tuple(sizes)
        return fitted.model_copy(update=updates)


def kept_elements(asked: AtomConfig, fitted: AtomConfig, stored: dict[str, Any]) -> tuple[int, ...] | str | None:
    """Return the stored vocabulary if it was found in data, and has all elements of these ones; else the fitted one."""
    known = stored.get("elements")
    has_all = isinstance(known, list) and isinstance(fitted.elements, tuple) and set(fitted.elements) <= set(known)
    return tuple(known) if asked.elements == "found" and has_all and isinstance(known, list) else fitted.elements


def _extent(systems: Systems) -> list[str]:
    """Return a line on how large systems are and of which elements, which `modality.max_atoms` has to fit."""
    if not len(systems):
        return []
    sizes, elements = systems.sizes, ", ".join(SYMBOLS[z] for z in np.unique(systems.types).tolist())
    atoms = f"{sizes.min()} to {sizes.max()}" if sizes.min() < sizes.max() else str(sizes.max())
    return [f"{atoms} atoms each (modality.max_atoms), of {elements}"]


def _parsed_sizes(value: Any, most: int) -> list[int]:
    """Parse requested numbers of atoms; ValueError unless all are whole numbers from 1 to `most`."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple | range):
        sizes = [size for part in value for size in _parsed_sizes(part, most)]
        if not sizes:
            raise ValueError("num_atoms: empty; give at least one number")
        return sizes
    text = str(value).strip()
    if isinstance(value, str) and "," in text:
        return [size for part in text.split(",") for size in _parsed_sizes(part, most)]
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
    """Return the atomic numbers that occur in any system."""
    parts = [part for part in (splits.train, splits.held_out) if isinstance(part, SystemsDataset)]
    return {int(z) for part in parts for z in np.unique(part.systems.types)}


BEFORE = 1 / 16
"""How far fractional coordinates reach below 0: many atoms of symmetric crystals are at 0, where [0, 1) would tear them
apart, and hardly any at -1/16."""


def about_rarest(fractional: Tensor, types: Tensor) -> Tensor:
    """Move the origin of fractional coordinates (B, N, 3) to the first atom of the element with the fewest atoms; they
    are in [-1/16, 15/16) then."""
    atoms = types > 0  # (B, N)
    count = (types[:, :, None] == types[:, None]).sum(-1)
    place = torch.where(atoms, count, types.shape[1] + 1).argmin(1)  # the first one if several are as few
    origin = fractional.gather(1, place[:, None, None].expand(-1, 1, 3))
    return torch.where(atoms[..., None], wrap(fractional - origin + BEFORE) - BEFORE, 0.0)


def draw_sizes(uniform: Tensor, counts: Sequence[int] | None, most: int) -> Tensor:
    """Map uniforms (B,) in [0, 1) to sizes distributed like `counts` (of 0, 1, 2, ... atoms).

    counts None: 1 to `most` are equally likely.
    """
    weights = torch.tensor([0, *[1] * most] if counts is None else counts, dtype=torch.float64, device=uniform.device)
    steps = (weights.cumsum(0) / weights.sum()).contiguous()
    return torch.searchsorted(steps, uniform.double().contiguous(), right=True).clamp(max=len(steps) - 1)


class SingleKindModality(AtomModality):
    """A modality whose samples are all free or all periodic; what depends on the kind is in three modules.

    files_module: KIND, FORMS, `read_files(path, mixed, skipped)`, `read_all(path)`. metrics_module: `spaces()`,
    `metrics()`, `errors(made, data)`.
    render_module: `cells(data)`, `write(data, folder, start)`, `scenes(data, moving)`.
    """

    files_module: ModuleType
    metrics_module: ModuleType
    render_module: ModuleType

    def made(self, source: Path) -> SystemsDataset:
        dataset = self.as_dataset(self.files_module.read_files(source))
        for index in range(len(dataset)):
            dataset[index]  # raises now if a system cannot be held
        return dataset

    @classmethod
    def verify(cls, source: Path) -> CheckedRecords | None:
        kind: SystemKind = cls.files_module.KIND
        loaded: LoadedSystems = cls.files_module.read_all(source := existing(source, kind))
        total = len(loaded.systems) + len(loaded.bad) + len(loaded.large)
        if not total:
            return None
        unread = frozenset(unread_names(source, kind))
        large = [f"left out: {line}" for line in loaded.large]
        return CheckedRecords(total, loaded.bad, (*loaded.notes, *large, *_extent(loaded.systems)), unread)

    @classmethod
    def origin_of(cls, data: Any) -> str:
        kind = cls.DataConfig.kind  # type: ignore[attr-defined]
        return f"{kind.plural.capitalize()} that this package generates." if data.path in kind.offline else ""

    def read(
        self, path: Path, batch_size: int, skipped: Skipped | None = None
    ) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        return self.in_batches(self.files_module.read_files(path, skipped=skipped), batch_size, skipped)

    def read_mixed(
        self, path: Path, batch_size: int, skipped: Skipped | None = None
    ) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """Like `read`, from a path that may also hold files of the other kind, which are not read."""
        return self.in_batches(self.files_module.read_files(path, mixed=True, skipped=skipped), batch_size, skipped)

    @property
    def readable(self) -> tuple[str, ...]:
        return tuple(f".{suffix}" for suffix in self.files_module.FORMS)

    def spaces(self) -> list[Space]:
        return self.metrics_module.spaces()

    def metrics(self) -> list[Metric]:
        return self.metrics_module.metrics()

    def errors(self, made: Any, data: Any) -> dict[str, list[float]]:
        return self.metrics_module.errors(made, data)

    def draw_grid(
        self, rows: Sequence[Any], path: Path, columns: int | None = None, captions: Sequence[str] | None = None
    ) -> None:
        paste_grid([self.render_module.cells(row) for row in rows], path, columns, captions)

    def write(self, data: Any, folder: Path, start: int = 0) -> list[Path]:
        return self.render_module.write(data, folder, start)

    def scenes(self, data: Any, moving: bool = False) -> list[viewer.AtomsView]:
        """Return each sample as it is seen in three dimensions. moving: they are moments of one."""
        return self.render_module.scenes(data, moving)
