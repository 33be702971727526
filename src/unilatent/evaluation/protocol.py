"""How a number was computed: everything that could change it between two equally good models."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator

from ..config import Config
from ..plain_text import count_of

ENOUGH = 10_000
"""With fewer samples, a distance between distributions depends mainly on their number."""
Track = Literal["generation", "reconstruction"]


class Balance(Config):
    """How evenly the values of a condition were sampled.

    smallest, largest: counts over the `values` different ones that occur. of: how many exist; None if unknown or
    infinite.
    """

    values: int
    smallest: int
    largest: int
    of: int | None = None

    @property
    def even(self) -> bool:
        return self.largest - self.smallest <= 1 and self.of in (None, self.values)


class Protocol(Config):
    """The protocol of one number.

    reference: the real samples it is compared with; reference_data: their hash. preprocessing: how samples were brought
    to their size. space, weights: the feature extractor and the checksum of its weights, of several separated by
    commas; None without a network.
    reference_preprocessing, reference_resolution: the same for the reference; None if unknown. sampling: solver, steps,
    restarts, guidance; None for reconstructions and external samples. decoding: solver and steps of a decoder with
    steps; else None. nfe: evaluations of the denoiser, and of a decoder with steps, per sample. replaced: number of
    unusable real samples that were replaced by others. precision: what the model computed in. details: what else the
    extractor and the metric depend on, name -> what. relative_to: the real samples whose distance to the
    reference the number is divided by; None if it is not.
    """

    track: Track
    num_samples: int
    reference: str
    reference_data: str
    num_reference: int
    preprocessing: str
    resolution: tuple[int, ...]
    reference_preprocessing: str | None = None
    reference_resolution: tuple[int, ...] | None = None
    replaced: int = 0
    space: str | None = None
    weights: str | None = None
    balance: dict[str, Balance] = Field(default_factory=dict)
    sampling: dict[str, Any] | None = None
    decoding: dict[str, Any] | None = None
    nfe: float | None = None
    seed: int = 0
    precision: str = "fp32"
    details: dict[str, str] = Field(default_factory=dict)
    relative_to: str | None = None

    @field_validator("sampling")
    @classmethod
    def _once_without(cls, sampling: dict[str, Any] | None) -> dict[str, Any] | None:
        """Files that lack a setting of sampling are from when there was none. Without restarts there is no interval."""
        if sampling is None:
            return None
        sampling = {"denoise_to_zero": False, "restarts": 0, **sampling}
        return sampling if sampling["restarts"] else {**sampling, "restart_interval": None}

    def key(self, metric: str) -> str:
        """Return the metric's full name, e.g. fid50k/adm/heun-50/cfg2.4[0.1,1]; the interval has t = 1 at noise.

        Details follow the preprocessing: fvd2048/centre/16f-stride1/heun-50/cfg1. The steps of a decoder come last:
        psnr360/adm/decoder-ddim-50.
        """
        between = "-" if metric[-1:].isdigit() else ""
        parts = [f"{metric}{between}{_count(self.num_samples)}", self.preprocessing.split(" ")[0]]
        parts += [detail.replace(" ", "-") for detail in self.details.values()]
        if self.sampling is not None:
            s = self.sampling
            parts.append(f"{s['solver']}-{s['num_inference_steps']}")
            if s["restarts"]:
                low, high = s["restart_interval"]
                parts.append(f"restarts-{s['restarts']}[{low:g},{high:g}]")
            low, high = s["guidance_interval"]
            interval = "" if (low, high) == (0, 1) else f"[{low:g},{high:g}]"
            parts.append(f"cfg{s['guidance_scale']:g}{interval}" if s["guidance_scale"] != 1 else "cfg1")
        elif self.track == "generation":
            parts.append("made-elsewhere")
        if self.decoding is not None:
            parts.append(f"decoder-{self.decoding['decoder_solver']}-{self.decoding['decoder_steps']}")
        return "/".join(parts)

    def cautions(self) -> list[str]:
        """Return the caveats to print wherever the number is shown."""
        lines = []
        if self.space is not None and self.num_samples < ENOUGH:
            lines.append(f"n = {self.num_samples:,}")
        if self.space is not None and 0 < self.num_reference < ENOUGH:
            lines.append(f"reference n = {self.num_reference:,}")
        lines += [f"{name} not evenly sampled" for name, balance in self.balance.items() if not balance.even]
        if self.reference_preprocessing is None or self.reference_resolution is None:
            lines.append("reference preprocessing unknown")
        elif self.reference_preprocessing != self.preprocessing:
            lines.append(f"reference preprocessed differently ({self.reference_preprocessing})")
        if self.reference_resolution is not None and self.reference_resolution != self.resolution:
            lines.append(f"reference of another size ({' x '.join(map(str, self.reference_resolution))})")
        if self.track == "generation" and self.sampling is None:
            lines.append("generated elsewhere, settings unknown")
        if self.replaced:
            lines.append(
                f"{count_of(self.replaced, 'unusable real sample was', 'unusable real samples were')} replaced"
            )
        return lines

    def differences(self, other: Self) -> list[tuple[str, Any, Any]]:
        """Return (field, value here, value in `other`) wherever two protocols differ, except for the seed and nfe."""
        a, b = _flat(self.plain()), _flat(other.plain())
        keys = [key for key in {**a, **b} if key not in ("seed", "nfe")]
        return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _count(n: int) -> str:
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)
