"""Samples of a joint model are evaluated per kind, by the modality of that kind, independently of the other kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unilatent.evaluation.evaluate import EvaluationRequest, Evaluator, choose_metrics
from unilatent.methods.base import LatentModel
from unilatent.modalities._atoms.dataset import SystemsDataset
from unilatent.modalities._atoms.systems import System, Systems
from unilatent.modalities.base import Evidence, Row, Splits
from unilatent.modalities.joint import Joint, JointDataset
from unilatent.model_config import ModelConfig
from unilatent.records import MemoryRows
from unilatent.types import take

pytest.importorskip("rdkit")
pytest.importorskip("pymatgen")
pytest.importorskip("smact")
METHANE = np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.629
WATER = np.array([[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]])
SALT = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
PARTS = ({"name": "molecule", "max_atoms": 6}, {"name": "crystal", "max_atoms": 4})


def splits() -> Splits:
    """Methane and water, some distorted; rock salts, some with atoms too close."""
    rng = np.random.default_rng(0)
    free, bound = [], []
    for i in range(12):
        types, places = ([6, 1, 1, 1, 1], METHANE) if i % 2 else ([8, 1, 1], WATER)
        bent = rng.normal(size=places.shape) * (0.3 if i % 3 == 0 else 0.005)
        free.append(System(types, places + bent, name=f"m{i}"))
    for i in range(8):
        a = 1.2 if i % 4 == 0 else 4.0 + 0.2 * i
        bound.append(System([11, 17 if i % 2 else 11], SALT, [a, a, a, 90, 90, 90], f"c{i}"))
    names = [part["name"] for part in PARTS]
    sets = [Systems.of(free), Systems.of(bound)]

    def half(start: int) -> JointDataset:
        halves = [systems.take(range(start, len(systems), 2)) for systems in sets]
        parts = [SystemsDataset(systems, part["max_atoms"]) for systems, part in zip(halves, PARTS, strict=True)]
        return JointDataset(parts, names, 6)

    return Splits(half(0), half(1))


def model_of() -> LatentModel:
    torch.manual_seed(0)
    encoder = {"width": 32, "depth": 1, "heads": 2, "in_context_tokens": 0}
    config = ModelConfig.parse({
        "modality": {"name": "joint", "max_atoms": 6, "parts": PARTS, "elements": "found"},
        "conditions": {"class_label": {}},
        "method": {"name": "unite", "latent_channels": 8, "generative_encoder": encoder, "time_shift": 1.0,
                   "decoder": {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64}},
    })  # fmt: skip
    model = LatentModel.build(config.with_data(splits()))
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def everything(joint: Joint, dataset: JointDataset, periodic: bool | None = None) -> dict[str, torch.Tensor]:
    """All samples, or those of one kind."""
    data = joint.collate([dataset[i][0] for i in range(len(dataset))])
    return data if periodic is None else take(data, data["periodic"] == periodic)


def evaluated(modality: Any, train: Any, held_out: Any) -> dict[str, Row]:
    """Every metric of a modality that runs by default, with held-out samples in place of generated ones."""
    spaces = [space for space in modality.spaces() if not (space.needs_download or space.on_request)]
    for space in spaces:
        space.prepare(torch.device("cpu"))

    def extracted(data: Any, against: Any = None) -> MemoryRows:
        tensors: dict[str, torch.Tensor] = {}
        if against is not None:
            tensors = {key: torch.tensor(row) for key, row in modality.errors(data, against).items()}
        for space in spaces:
            if not space.compares:
                tensors |= space(data)
            if against is not None:
                tensors |= space.against(data, against)
        return MemoryRows(tensors)

    swapped = {**held_out, "types": torch.where(held_out["types"] == 1, 8, held_out["types"])}
    evidence = Evidence(extracted(train), extracted(held_out), extracted(held_out), extracted(swapped, held_out))
    return {row.key: row for metric in choose_metrics(modality, ()) for row in metric(evidence)}


def test_a_mixed_set_is_evaluated_like_its_two_halves() -> None:
    """Every value and every baseline is equal; keys that both kinds have get the name of the kind as prefix."""
    joint = model_of().modality
    assert isinstance(joint, Joint)
    data = splits()
    both = evaluated(joint, *(everything(joint, part) for part in (data.train, data.held_out)))
    compared = set()
    for part in joint.parts:
        halves = [everything(joint, split, part.has_periodic) for split in (data.train, data.held_out)]
        single = evaluated(part, *({key: half[key] for key in part.keys} for half in halves))
        for key, row in single.items():
            renamed = key if key in both else f"{part.config.name}_{key}"
            compared.add(renamed)
            assert both[renamed].value == pytest.approx(row.value, nan_ok=True), key
            assert both[renamed].beside == pytest.approx(row.beside, nan_ok=True), key
            assert both[renamed].name == f"{part.config.name}: {row.name}"
    assert compared == set(both) >= {"molecule_type_accuracy", "crystal_type_accuracy", "mol_stable", "struct_valid"}
    assert 0 < both["mol_stable"].value < 100 and 0 < both["molecule_type_accuracy"].value < 100


def test_evaluate_works_on_a_joint_model(tmp_path: Path) -> None:
    model = model_of()
    request = EvaluationRequest(num_samples=8, batch_size=3)
    found = Evaluator(model, splits(), tmp_path / "a", request, num_inference_steps=2).run()
    keys = {measured.row.key: measured.row for measured in found.numbers}
    assert {"molecule_type_accuracy", "rmsd", "valid_rdkit", "crystal_type_accuracy", "struct_valid"} <= set(keys)
    assert keys["valid_rdkit"].beside["held-out real"] > 0
    one = Evaluator(model, splits(), tmp_path / "b", request, num_inference_steps=2, labels=[1]).run()
    of_crystals = {measured.row.key for measured in one.numbers if measured.protocol.track == "generation"}
    assert "struct_valid" in of_crystals and "valid_rdkit" not in of_crystals
    chosen = Evaluator(
        model, splits(), tmp_path / "c", EvaluationRequest(metrics=("rmsd", "crystal_type_accuracy"), batch_size=1)
    ).run()
    assert {m.row.key: m.row.value for m in chosen.numbers} == {
        key: pytest.approx(keys[key].value, rel=1e-4) for key in ("rmsd", "crystal_type_accuracy")
    }
