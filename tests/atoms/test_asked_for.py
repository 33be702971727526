"""Conditioning on a scalar property, and choosing the number of atoms of samples."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_unite_on_atoms import model_of

from unilatent.batches import collate
from unilatent.config import ConfigError
from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities._atoms.dataset import Classes, Property, SystemsDataset, property_of
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.base import Splits
from unilatent.modalities.joint import Joint, JointConfig, JointDataset
from unilatent.modalities.molecule import Molecule, MoleculeConfig, MoleculeData
from unilatent.model_config import ModelConfig
from unilatent.presets import preset
from unilatent.sampling import sample, sample_batches

FAST: dict[str, Any] = {"num_inference_steps": 2, "solver": "ddim"}


def molecules(n: int = 24) -> Systems:
    """Molecules of 2 to 5 atoms; `carbons` is their number of carbon atoms, `gap` is unknown for every fourth."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        types = rng.choice([1, 6, 8], 2 + i % 4)
        columns = {"carbons": float((types == 6).sum()), "gap": math.nan if i % 4 == 3 else 10.0 + i}
        made.append(System(types, rng.normal(size=(len(types), 3)) * 2, name=f"m{i}", columns=columns))
    return Systems.of(made)


def write_xyz(systems: Systems, path: Path) -> Path:
    symbols = {1: "H", 6: "C", 8: "O"}
    lines = []
    for i in range(len(systems)):
        one = systems[i]
        gap = "" if math.isnan(one.columns["gap"]) else f" gap={one.columns['gap']}"
        lines += [str(len(one.types)), f"carbons={one.columns['carbons']}{gap}"]
        lines += [
            f"{symbols[int(z)]} {x:.4f} {y:.4f} {w:.4f}"
            for z, (x, y, w) in zip(one.types, one.coordinates, strict=True)
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


def conditioned(data: MoleculeData, **conditions: Any) -> tuple[ModelConfig, Splits]:
    modality = Molecule(MoleculeConfig(max_atoms=9, elements=(1, 6, 8)))
    splits = modality.splits(data)
    return small_model(modality, **conditions).with_data(splits), splits


def small_model(modality: Molecule, **conditions: Any) -> ModelConfig:
    encoder = {"width": 32, "depth": 1, "heads": 2, "in_context_tokens": 0}
    return ModelConfig.parse({
        "modality": modality.config.plain(), "conditions": conditions,
        "method": {"name": "unite", "latent_channels": 8, "generative_encoder": encoder, "time_shift": 1.0,
                   "decoder": {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64}},
    })  # fmt: skip


def test_a_column_becomes_a_condition(tmp_path: Path) -> None:
    """From a file to samples: statistics in the configuration, NaN for unknown numbers, the loss, captions."""
    data = MoleculeData(path=str(write_xyz(molecules(), tmp_path / "m.xyz")), held_out=4, property_column="gap",
                        bad_share=0.2)  # fmt: skip
    config, splits = conditioned(data, scalar={"column": "gap"})
    assert isinstance(splits.train, SystemsDataset)
    known = splits.train.systems.columns["gap"]
    known = known[np.isfinite(known)]
    scalar = config.conditions["scalar"]
    assert scalar.mean == pytest.approx(known.mean()) and scalar.std == pytest.approx(known.std())
    assert (scalar.quantiles[0], scalar.quantiles[-1]) == (known.min(), known.max())
    torch.manual_seed(0)
    model = LatentModel.build(config)
    batch = collate([splits.train[i] for i in range(len(splits.train))], model.modality)
    assert batch.values["properties"].dtype == torch.float32
    assert int(batch.values["properties"].isnan().sum()) == len(splits.train) - len(known)
    parts = list(model.loss(batch, Streams(("test",), range(len(splits.train)))))
    sum(part.value for part in parts).backward()
    grads = [p.grad for p in model.conditions.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    part = next(sample_batches(model.eval(), 3, properties="12-20:3", **FAST))
    assert part.values["properties"].tolist() == [12, 16, 20]
    assert model.conditions.grid_captions(part.values) == ["12", "16", "20"]


@pytest.mark.parametrize("column", ["gap", "logp"])
def test_properties_that_can_be_computed_have_samples_without_a_condition_beside(column: str, tmp_path: Path) -> None:
    """The first samples of an evaluation once more, without their values; a search over guidance makes them once."""
    pytest.importorskip("rdkit")
    systems = molecules()
    systems = replace(systems, columns={column: systems.columns["carbons"]})
    modality = Molecule(MoleculeConfig(max_atoms=9, elements=(1, 6, 8)))
    splits = modality.datasets(systems.take(range(18)), systems.take(range(18, 24)), None, column)
    model = LatentModel.build(small_model(modality, scalar={}).with_data(splits))
    assert model.conditions.all[0].column == column
    for parameter in model.parameters():  # initial weights ignore the condition
        torch.nn.init.normal_(parameter, std=0.3)
    request = EvaluationRequest(num_samples=5, batch_size=2, metrics=("property_mae", "valid_rdkit"))
    for scale in (1.0, 2.0):
        evaluator = Evaluator(model, splits, tmp_path, request, guidance_scale=scale, **FAST)
        free = evaluator.run().evidence.unconditional
        evaluator.clear("samples", "reconstructions")
    made = sorted(tmp_path.glob("unconditional-*"))
    if column == "gap":
        assert free is None and not made
        return
    assert free is not None and len(free) == 5 and len(made) == 1
    expected = sample(model, 5, guidance_scale=0, properties=[float("nan")], **FAST)
    assert torch.allclose(free["positions"], expected["positions"], atol=1e-5)
    asked = sample(model, 5, properties=[2.0], guidance_scale=40, **FAST)
    assert not torch.allclose(free["positions"], asked["positions"], atol=1e-2)


def test_data_and_condition_must_agree(tmp_path: Path) -> None:
    data = MoleculeData(path=str(write_xyz(molecules(), tmp_path / "m.xyz")), held_out=4, bad_share=0.2)
    with pytest.raises(ConfigError, match=r"has no properties \(a column of numbers, named in data.property_column\)"):
        conditioned(data, scalar={})
    asking = data.model_copy(update={"property_column": "carbons"})
    with pytest.raises(ValueError, match=r"set data\.property_column=gap"):
        conditioned(asking, scalar={"column": "gap"})
    with pytest.raises(
        ValueError, match=r"^data.property_column: .* has no column of numbers 'mu'; it has carbons, gap"
    ):
        conditioned(data.model_copy(update={"property_column": "mu"}))
    with pytest.raises(ValueError, match=r"'gap' is unknown for every training system"):
        property_of("gap", molecules().take([3, 7]))


def test_another_column_is_another_data_set() -> None:
    systems = molecules()
    plain, *with_scalar = [
        SystemsDataset(systems, 9, scalar=name and property_of(name, systems)) for name in (None, "gap", "carbons")
    ]
    assert len({plain.fingerprint, *(other.fingerprint for other in with_scalar)}) == 3
    assert plain[0][1] == {} and with_scalar[1][0][1] == {"properties": systems.columns["carbons"][0]}
    assert plain.numbers_of(5) == {"carbons": systems.columns["carbons"][5], "gap": 15.0}


def test_fingerprints_of_earlier_versions_stay_valid() -> None:
    """They contain these reprs, and a run resumes only with data of the same fingerprint."""
    assert repr(Classes("kind", (0.0,), ("0",))) == "Classes(column='kind', values=(0.0,), names=('0',))"
    property_repr = "Property(column='gap', mean=1.0, std=2.0, quantiles=(0.5,))"
    assert repr(Property("gap", 1.0, 2.0, (0.5,))) == property_repr


def test_samples_have_the_requested_number_of_atoms() -> None:
    model = model_of("molecule").eval()
    made = sample(model, 5, num_atoms="3-4,7", **FAST)
    assert (made["types"] > 0).sum(1).tolist() == [3, 4, 7, 3, 4]
    drawn = sample(model, 5, **FAST)
    again = sample(model, 5, num_atoms=(drawn["types"] > 0).sum(1), **FAST)
    assert all(torch.equal(drawn[key], again[key]) for key in drawn), (
        "requesting the sizes that are drawn anyway changes nothing"
    )
    bound = sample(model_of("crystal").eval(), 2, num_atoms=[2, 9], **FAST)
    assert (bound["types"] > 0).sum(1).tolist() == [2, 9]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (10, r"10 is out of range; this model makes 1 to 9 atoms \(modality.max_atoms\)"), (0, "out of range"),
        ("3-12", "3-12 is out of range"), ("5-3", "write 3-5"), (2.5, "'2.5' is neither"), ("many", "neither"),
        (True, "neither"), ([], "empty"),
    ],
)  # fmt: skip
def test_impossible_numbers_of_atoms_are_refused(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        sample(model_of("molecule").eval(), 2, num_atoms=given, **FAST)
    assert str(error.value).startswith("num_atoms: ")


def test_sizes_without_training_systems_give_a_warning() -> None:
    molecule = Molecule(MoleculeConfig(max_atoms=9, sizes=(0, 0, 5, 0, 1)))
    with pytest.warns(UserWarning, match="no training system has 3, 7 atoms"):
        molecule.parse_layout(4, {"num_atoms": "2-3,7"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        molecule.parse_layout(2, {"num_atoms": [2, 4]})


def test_each_kind_has_its_own_max_atoms_and_both_share_a_property() -> None:
    free = molecules(8)
    bound = Systems.of([System([11, 17], np.random.rand(2, 3), [4, 4, 4, 90, 90, 90], f"c{i}") for i in range(4)])
    parts = ({"name": "molecule", "max_atoms": 6}, {"name": "crystal", "max_atoms": 4})
    joint = Joint(JointConfig.parse({"max_atoms": 6, "parts": parts}))
    labels = torch.tensor([0, 1])
    streams = Streams(("test",), range(2))
    sizes = joint.parse_layout(2, {"num_atoms": "6,4"})
    assert joint.sample_layout(streams, {"labels": labels, **sizes}).mask[:, 1:].sum(1).tolist() == [6, 4]
    with pytest.raises(ValueError, match="num_atoms: 6 is out of range for a crystal; this model makes 1 to 4"):
        joint.sample_layout(streams, {"labels": 1 - labels, **sizes})
    scalar = property_of("gap", free)
    data = JointDataset([SystemsDataset(free, 6, scalar=scalar), SystemsDataset(bound, 4)], ["molecule", "crystal"], 6)
    values = [data.with_scalar(scalar)[i][1] for i in range(len(data))]
    assert data.facts["properties"]["column"] == "gap" and data.columns == ("carbons", "gap")
    assert all(math.isnan(value["properties"]) for value in values if value["labels"] == 1)
    assert sum(not math.isnan(value["properties"]) for value in values) == 6
    assert all(math.isnan(n) for i in range(12) if values[i]["labels"] == 1 for n in data.numbers_of(i).values())


def test_images_have_no_atoms() -> None:
    run = preset("digits").example()
    model = LatentModel.build(run.model())
    with pytest.raises(ValueError, match="num_atoms: this model has no such condition"):
        next(sample_batches(model, 1, num_atoms=3))
