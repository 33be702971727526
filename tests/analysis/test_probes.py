"""What a linear map reads off latents, beside a sample's own tokens and its size; lines between systems of atoms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unilatent.analysis.analyze import analysis_table, analyze, write_analysis
from unilatent.analysis.latents import interpolations, same_layouts
from unilatent.analysis.probes import probes, with_columns
from unilatent.atoms.dataset import SystemsDataset
from unilatent.atoms.systems import System, Systems
from unilatent.methods.base import LatentModel, ModelConfig
from unilatent.training.batches import whole
from unilatent.types import Batch, take

N, MOST = 120, 7


def systems() -> Systems:
    """Of 3 to 7 atoms. height: of the first atom; carbons: how many; pure: nothing that could be known."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(N):
        types, places = rng.choice([1, 6, 8], 3 + i % 5), rng.normal(size=(3 + i % 5, 3)) * 2
        places -= places.mean(0)
        columns = {"height": float(places[0, 2]), "carbons": float((types == 6).sum()), "pure": rng.normal(),
                   "same": 1.0, "rare": 1.0 * i if i < 19 else math.nan}  # fmt: skip
        made.append(System(types, places, name=f"m{i}", columns=columns))
    return Systems.of(made)


def model_of() -> LatentModel:
    torch.manual_seed(0)
    encoder = {"width": 32, "depth": 1, "heads": 2, "in_context_tokens": 0}
    model = LatentModel.build(ModelConfig.parse({
        "modality": {"name": "molecule", "max_atoms": MOST, "elements": [1, 6, 8]},
        "method": {"name": "unite", "latent_channels": 8, "generative_encoder": encoder, "time_shift": 1.0,
                   "decoder": {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64}},
    }))  # fmt: skip
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def data_of(model: LatentModel) -> Batch:
    return whole(with_columns(SystemsDataset(systems(), MOST)), model.modality)


def halves(batch: Batch) -> list[Batch]:
    rows = (slice(0, 50), slice(50, None))
    return [Batch(take(batch.data, own), {k: v[own] for k, v in batch.values.items()}) for own in rows]


def test_what_latents_hold_is_found_and_what_they_do_not_is_not() -> None:
    """Latents that hold the first atom's height in one channel of one token, and nothing else but noise."""
    model = model_of()

    def heights(data: dict[str, Tensor], streams: Any) -> Tensor:
        z = streams.normal(MOST, 8)
        z[:, :, 0] = 0
        z[:, 0, 0] = data["positions"][:, 0, 2] + 0.1 * z[:, 0, 1]
        return z

    model.encode_clean = heights  # type: ignore[method-assign, assignment]
    found = {probe.name: probe for probe in probes(model, halves(data_of(model)))}
    assert set(found) == {"height", "carbons", "pure"}, "neither a constant nor what only 19 have"
    assert found["height"].latents > 0.97 and abs(found["height"].tokens) < 0.15 and found["height"].size < 0.1
    assert found["carbons"].tokens > 0.999 > 0.7 > found["carbons"].latents and found["carbons"].size > 0.1
    assert max(found["pure"].latents, found["pure"].tokens) < 0.1
    assert all(probe.samples == N and probe.measure == "R^2" for probe in found.values())


def test_classes_are_read_as_classes() -> None:
    model, batch = model_of(), data_of(model_of())
    carbons = (batch.values["column.carbons"] >= 2).long()
    (found,) = probes(model, [Batch(batch.data, {"labels": carbons})])
    share = float(torch.bincount(carbons).max()) / N
    assert found.measure == "accuracy" and found.constant == pytest.approx(share, abs=0.05)
    assert found.tokens > 0.9 > 0.8 > found.constant
    assert probes(model, [Batch(batch.data, {})]) == []


def test_batches_change_nothing() -> None:
    model = model_of()
    batch = data_of(model)
    a, b = probes(model, [batch]), probes(model, halves(batch))
    for one, other in zip(a, b, strict=True):
        assert one.latents == pytest.approx(other.latents, abs=1e-4) and one.tokens == pytest.approx(other.tokens)


def test_lines_lie_between_systems_of_a_size() -> None:
    model = model_of()
    data = data_of(model).data
    sizes = (data["types"] > 0).sum(1)
    pairs = same_layouts(model, data)
    assert len(pairs) == N // 2 and len({row for pair in pairs for row in pair}) == N
    assert all(sizes[a] == sizes[b] and a < b for a, b in pairs)
    rows = interpolations(model, data, steps=4, most=3)
    assert len(rows) == 3
    for (a, b), row in zip(pairs, rows, strict=False):
        assert torch.equal(row["types"][0], data["types"][a]) and torch.equal(row["types"][-1], data["types"][b])
        assert ((row["types"] > 0).sum(1) == sizes[a]).all() and len(row["types"]) == 6
        assert not torch.equal(row["positions"][1], row["positions"][4])
    lone = take(data, torch.tensor([0, 1, 2, 3]))
    assert interpolations(model, lone) == [], "four sizes, no pair"


def test_an_analysis_says_it(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    model = model_of()
    batch = data_of(model)
    batch = Batch(take(batch.data, slice(40)), {k: v[:40] for k, v in batch.values.items()})
    found = analyze(model, batch, draws=1)
    paths = write_analysis(model, batch, found, tmp_path, {})
    assert tmp_path / "interpolation.png" in paths and (tmp_path / "interpolation.png").stat().st_size > 1000
    kept = json.loads((tmp_path / "analysis.json").read_text())["probes"]
    assert [probe["name"] for probe in kept] == ["height", "carbons", "pure"] and "size" in kept[0]
    from rich.console import Console

    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(analysis_table(found, "t"))
    assert "probe carbons" in console.export_text()
