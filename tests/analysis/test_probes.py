"""Ridge probes of latents, tokens and size, against closed forms; interpolations between systems of atoms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unilatent.analysis import probes as probing
from unilatent.analysis.analyze import analysis_table, analyze, write_analysis
from unilatent.analysis.latents import interpolations, same_layouts
from unilatent.analysis.probes import probes, with_columns
from unilatent.batches import load_all
from unilatent.methods.base import LatentModel
from unilatent.modalities._atoms.dataset import SystemsDataset
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.model_config import ModelConfig
from unilatent.types import Batch, take

N, MOST = 120, 7


def systems() -> Systems:
    """Systems of 3 to 7 atoms. height: of the first atom; carbons: their number; pure: independent noise."""
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
    return load_all(with_columns(SystemsDataset(systems(), MOST)), model.modality)


def halves(batch: Batch) -> list[Batch]:
    rows = (slice(0, 50), slice(50, None))
    return [Batch(take(batch.data, own), {k: v[own] for k, v in batch.values.items()}) for own in rows]


def cloud(n: int, f: int) -> np.ndarray:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(n + f), dtype=torch.float64).numpy()


def test_the_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PENALTIES", (0.1,))
    x, y = cloud(35, 4) * 3 + 1, cloud(35, 2)
    predicted, means = probing.cross_predictions(x, y)
    test = np.arange(35) % 5 == 0
    x_fit, y_fit = x[~test], y[~test]
    a, b = (x_fit - x_fit.mean(0)) / x_fit.std(0), (y_fit - y_fit.mean(0)) / y_fit.std(0)
    w = np.linalg.solve(a.T @ a + 0.1 * len(a) * np.eye(4), a.T @ b)
    wanted = y_fit.mean(0) + y_fit.std(0) * (((x[test] - x_fit.mean(0)) / x_fit.std(0)) @ w)
    np.testing.assert_allclose(predicted[test], wanted, rtol=1e-9)
    np.testing.assert_allclose(means[test], np.tile(y_fit.mean(0), (7, 1)), rtol=1e-12)


def test_the_penalty_is_that_of_least_leave_one_out_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """More features than samples, one of which is informative: chosen by fitting without each sample in turn."""
    penalties = probing.PENALTIES
    x = cloud(35, 60)
    y = x[:, :1] + 0.5 * cloud(35, 1)
    test = np.arange(35) % 5 == 0
    chosen = probing.cross_predictions(x, y)[0][test]
    errors, matches = [], []
    for penalty in penalties:
        monkeypatch.setattr(probing, "PENALTIES", (penalty,))
        matches.append(np.allclose(probing.cross_predictions(x, y)[0][test], chosen))
        left_out, _ = probing.cross_predictions(x[~test], y[~test], folds=28)
        errors.append(float(np.square(left_out - y[~test]).sum()))
    assert sum(matches) == 1
    error = errors[matches.index(True)]
    assert error <= 1.2 * min(errors) and error < errors[0]


def test_what_is_linear_is_explained_and_noise_is_not() -> None:
    x = np.concatenate([cloud(200, 5), np.ones((200, 1))], 1)
    linear = x @ np.array([[1.0], [-2.0], [0.5], [0.0], [3.0], [7.0]])
    for y, least, most in ((linear, 0.999, 1.0), (cloud(200, 1), -0.2, 0.1)):
        assert least <= probing.r_squared(y, *probing.cross_predictions(x, y)) <= most


def test_no_sample_helps_to_predict_itself() -> None:
    x, y = cloud(50, 3), cloud(50, 1)
    before, _ = probing.cross_predictions(x, y)
    y[7] = 1e6
    after, _ = probing.cross_predictions(x, y)
    fold = np.arange(50) % 5 == 7 % 5
    np.testing.assert_allclose(before[fold], after[fold])
    assert not np.allclose(before[~fold], after[~fold])


def test_what_latents_hold_is_found_and_what_they_do_not_is_not() -> None:
    """Latents with the first atom's height in one channel of one token, and noise elsewhere."""
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
