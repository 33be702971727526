"""Sweeps: their cells, what is read from finished runs, and what is compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unilatent.analysis import sweeps
from unilatent.analysis.sweeps import Cell, SweepRun, collect, grid_cells, split_grid, table_of
from unilatent.config import ConfigError
from unilatent.evaluation.evaluate import EvaluatedMetric
from unilatent.evaluation.protocol import Protocol
from unilatent.evaluation.table import as_json
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities.base import Row
from unilatent.presets import preset
from unilatent.registry import available, find
from unilatent.training.config import RunConfig
from unilatent.types import Batch


def test_values_are_split_at_commas_outside_of_brackets_and_quotes():
    fixed, axes = split_grid(["a.b=1,2", "c=[1,2]", 'd="x,y"', "e=[1,2],[3]", "f=1"])
    assert fixed == ["c=[1,2]", 'd="x,y"', "f=1"] and axes == {"a.b": ["1", "2"], "e": ["[1,2]", "[3]"]}
    cells = grid_cells(axes)
    assert [cell.overrides for cell in cells] == [
        ("a.b=1", "e=[1,2]"), ("a.b=1", "e=[3]"), ("a.b=2", "e=[1,2]"), ("a.b=2", "e=[3]"),
    ]  # fmt: skip
    assert len({cell.name for cell in cells}) == 4


@pytest.mark.parametrize("method", [name for name in available("methods") if find("methods", name).ablations])
def test_every_ablation_is_a_setting_of_its_method(method: str):
    """Each changes the configuration, has a folder of its own, and is a model that takes a step."""
    run = preset({"unite": "digits", "unified_latents": "digits-ul"}[method])
    cells = sweeps.ablation_cells(run, list(find("methods", method).ablations))
    assert len(cells) > 6 and len({cell.name for cell in cells}) == len(cells)
    batch = Batch(torch.rand(4, 1, 8, 8), {"labels": torch.arange(4)})
    for cell in cells:
        changed = run.override(*cell.overrides)
        assert changed.plain() != run.plain() and cell.published and cell.base, cell.label
        stage = changed.first or changed
        model = LatentModel.build(follow_labels(stage).model())
        parts = list(model.loss(batch, Streams(("loss",), range(4))))
        assert parts and all(part.value.isfinite() for part in parts), cell.label


def follow_labels(run: RunConfig) -> RunConfig:
    """The run with the ten classes that its data have."""
    conditions = {name: c.with_data(class_names=tuple("0123456789")) for name, c in run.conditions.items()}
    return run.model_copy(update={"conditions": conditions})


UNIFIED_LATENTS = {
    "factor": {"loss factor x 0.87": "better worse", "loss factor x 1.1": "worse better",
               "loss factor x 1.3": "worse better", "loss factor x 1.4": "worse better"},
    "channels": {"channels x 0.125": "worse", "channels x 0.25": "worse", "channels x 0.5": "worse worse",
                 "channels x 2": "worse worse"},
    "shape": {"latents per side x 2": "worse better", "latents per side x 0.5": "worse worse"},
    "prior": {"normal prior": "worse better"},
    "decoder": {"decoder in one pass": "worse worse"},
    "gradient": {"A: no gradient from the prior": "worse worse"},
    "precision": {"B: logsnr_0 = 10": "worse"},
    "variance": {"D: learned variance at logsnr_0 = 10": "worse worse"},
}  # fmt: skip
"""Ablation -> label -> direction of FID and rFID in Tables 2 to 6 (one word: of rFID, where there is no FID)."""


def test_the_tables_of_unified_latents_have_the_paper_s_direction_beside_each_row():
    run = preset("digits-ul")
    found = {
        name: {cell.label: " ".join(sweeps._paper(cell).values()) for cell in sweeps.ablation_cells(run, [name])}
        for name in find("methods", "unified_latents").ablations
    }
    assert found == UNIFIED_LATENTS


def test_the_shape_of_latents_is_that_of_the_run_s_patches():
    """Which a first stage shares; clips have none, so there the ablation does not exist."""
    run = preset("digits-ul")
    assert [cell.overrides for cell in sweeps.ablation_cells(run, ["shape"])] == [
        ("modality.patch_size=1",), ("modality.patch_size=4",),
    ]  # fmt: skip
    finer = run.override("modality.patch_size=1")
    assert finer.first is not None and finer.first.modality.patch_size == 1
    with pytest.raises(ConfigError, match=r"'latents per side x 2' changes modality\.patch_size, which is no number"):
        sweeps.ablation_cells(preset("bouncing-ul"), ["shape"])


def test_ablations_of_a_first_stage_change_that_stage():
    run = preset("digits-ul")
    [cell] = sweeps.ablation_cells(run, ["precision"])
    assert cell.overrides == ("tokenizer.method.latent_logsnr=10",)
    labels = [cell.label for cell in sweeps.ablation_cells(run, ["channels"])]
    assert labels == ["channels x 0.125", "channels x 0.25", "channels x 0.5", "channels x 2"]
    assert sweeps.ablation_cells(run, ["channels"])[3].overrides == ("tokenizer.method.latent_channels=8",)
    with pytest.raises(ConfigError, match="'shift' is no ablation of this method; there are factor, channels"):
        sweeps.ablation_cells(preset("digits-ul"), ["shift"])


def protocol(**changes: object) -> Protocol:
    fields = {"track": "generation", "num_samples": 100, "reference": "training data", "reference_data": "0",
              "num_reference": 100, "preprocessing": "adm", "resolution": (8, 8, 1), **changes}  # fmt: skip
    return Protocol.parse(fields)


def finished(folder: Path, distance: float, psnr: float, **changes: object) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "latest.json").write_text('{"step": 10}')
    (folder / "eval").mkdir()
    numbers = [
        EvaluatedMetric(Row("frechet", "distance", distance, "", "lower"), protocol(**changes)),
        EvaluatedMetric(Row("psnr", "PSNR", psnr, "dB", "higher"), protocol(track="reconstruction")),
    ]
    content = {"format_version": 1, "numbers": [as_json(number) for number in numbers]}
    (folder / "eval" / "step_00000010.json").write_text(json.dumps(content))


def runs_of(folder: Path, cells: Sequence[Cell], seeds: int = 3) -> list[SweepRun]:
    return [SweepRun(cell, seed, folder / cell.name / f"seed-{seed}") for seed in range(seeds) for cell in cells]


BASE = {"FID": 2.71, "rFID": 1.01}
CELLS = [Cell("default", "default"), Cell("a", "A", ("x=1",), {"FID": 5.69, "rFID": 0.95}, BASE),
         Cell("b", "B", ("x=2",), {"FID": 2.70}, BASE)]  # fmt: skip


def test_means_spreads_and_directions(tmp_path: Path):
    runs = runs_of(tmp_path, CELLS)
    values = {"default": (1.0, 1.2, 1.1), "a": (2.0, 2.1, 2.2), "b": (1.05, 1.2, 1.25)}
    for run in runs:
        distance = values[run.cell.name][run.seed]
        finished(run.folder, distance, {"default": 30.0, "a": 31.0, "b": 29.0}[run.cell.name] + 0.1 * run.seed)
    result = collect(runs)
    assert list(result.metrics) == ["psnr", "frechet"] and not result.left_out
    default, a, b = result.rows
    assert default.numbers["frechet"].mean == pytest.approx(1.1) and default.numbers["frechet"].std == pytest.approx(
        0.1
    )
    assert default.here == default.paper == {}
    assert a.here == {"psnr": "better", "frechet": "worse"}
    assert a.paper == {"generation": "worse", "reconstruction": "better"}
    assert b.here == {"psnr": "worse", "frechet": "equal"} and b.paper == {"generation": "equal"}
    head, *rows = table_of(result)
    assert head[2:4] == ["PSNR, dB", "distance"] and rows[1][3] == "2.1 +- 0.1 (worse)"
    assert rows[1][4] == "FID 5.69, rFID 0.95 (worse, better)"
    json.dumps(sweeps.plain(result))


def test_one_seed_has_no_spread_and_so_no_direction(tmp_path: Path):
    runs = runs_of(tmp_path, CELLS[:2], seeds=1)
    for distance, run in enumerate(runs, 1):
        finished(run.folder, distance, 30.0)
    assert collect(runs).rows[1].here == {} and collect(runs).rows[1].paper["generation"] == "worse"


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path: Path):
    run = preset("digits").override("training.steps=7")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text(run.to_yaml())
    cell = Cell("x", "x")
    SweepRun(cell, 0, tmp_path / "x", run.override("training.threads=2")).refuse_other()
    with pytest.raises(ConfigError, match=r"training\.steps: 8, but .* was trained with 7"):
        SweepRun(cell, 0, tmp_path / "x", run.override("training.steps=8")).refuse_other()


def test_the_settings_of_a_first_stage_count_as_well(tmp_path: Path):
    run = preset("digits-ul").override("tokenizer.training.steps=7")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text(run.to_yaml())
    cell = Cell("x", "x")
    SweepRun(cell, 0, tmp_path / "x", run.override("tokenizer.training.threads=2")).refuse_other()
    with pytest.raises(ConfigError, match=r"tokenizer\.training\.steps: 8, but .* was trained with 7"):
        SweepRun(cell, 0, tmp_path / "x", run.override("tokenizer.training.steps=8")).refuse_other()


def test_parts_that_only_one_of_two_runs_has_are_differences(tmp_path: Path):
    """A run without conditions is another one, either way; a field that a run of an earlier version does not have is
    its default."""
    run = preset("digits").override("training.steps=7")
    plain = run.plain()
    del plain["training"]["gradient_clip"]
    (tmp_path / "config.yaml").write_text(json.dumps(plain))
    cell = Cell("x", "x")
    SweepRun(cell, 0, tmp_path, run).refuse_other()
    with pytest.raises(ConfigError, match=r"training\.gradient_clip: 1\.0, but .* was trained with 3\.0"):
        SweepRun(cell, 0, tmp_path, run.override("training.gradient_clip=1")).refuse_other()
    none = run.model_copy(update={"conditions": {}})
    with pytest.raises(ConfigError, match=r"conditions\.class_label: nothing, but .* was trained with \{"):
        SweepRun(cell, 0, tmp_path, none).refuse_other()
    (tmp_path / "config.yaml").write_text(none.to_yaml())
    with pytest.raises(ConfigError, match=r"conditions\.class_label: \{.*\}, but .* was trained with nothing"):
        SweepRun(cell, 0, tmp_path, run).refuse_other()


def test_settings_that_read_alike_have_folders_of_their_own():
    names = {cell.name for cell in grid_cells({"method.bias": ["-1", "1"], "data.path": ["a/b", "a-b"]})}
    assert len(names) == 4
    assert grid_cells({"a.depth": ["2"]})[0].name != grid_cells({"b.depth": ["2"]})[0].name
    assert len(grid_cells({"k": ["1", "1"]})) == 1


def test_a_run_is_finished_once_its_last_step_is_evaluated(tmp_path: Path):
    """A kill between the finished model and its evaluation leaves those from before."""
    [run] = runs_of(tmp_path, CELLS[:1], seeds=1)
    finished(run.folder, 1.0, 30.0)
    assert run.is_finished
    (run.folder / "latest.json").write_text('{"step": 20}')
    assert not run.is_finished
    (run.folder / "eval" / "step_00000010.json").rename(run.folder / "eval" / "step_00000020.json")
    assert run.is_finished


@pytest.mark.parametrize(
    ("beside", "values", "verdict"),
    [({"real": 100.0}, (105, 130), "worse"), ({"real": 100.0}, (70, 90), "better"),
     ({"real": 100.0}, (80, 120), "equal"), ({}, (70, 90), None),
     ({"real": 100.0, "training mean": 0.0}, (70, 90), None)],
)  # fmt: skip
def test_where_nearer_to_a_baseline_is_better(beside: dict[str, float], values: tuple[int, int], verdict: str | None):
    """And more is not; nothing is said without a baseline, or with several."""
    first, other = (sweeps.Measured(value, 1.0, (value - 1.0, value, value + 1.0)) for value in values)
    example = {"spread": EvaluatedMetric(Row("spread", "spread", 0.0, "%", "same", beside), protocol())}
    base = sweeps.SweepRow(CELLS[0], (0, 1, 2), {"spread": first}, {}, {})
    assert sweeps._here({"spread": other}, base, example).get("spread") == verdict


def test_other_protocols_and_unfinished_runs_are_left_out_by_name(tmp_path: Path):
    runs = runs_of(tmp_path, CELLS[:2], seeds=2)
    for run in runs[:3]:
        finished(run.folder, 1.0, 30.0, **({"num_samples": 50} if run is runs[1] else {}))
    result = collect(runs)
    assert result.left_out == ["A, seed 1: is not finished", "A, seed 0: frechet has num_samples 50, others 100"]
    assert "frechet" not in result.rows[1].numbers and "psnr" in result.rows[1].numbers
    with pytest.raises(ValueError, match="'fid' was not measured; there are frechet, psnr"):
        collect(runs, ["fid"])
    with pytest.raises(ValueError, match="no run is finished"):
        collect([replace(run, folder=tmp_path / "nothing") for run in runs])
