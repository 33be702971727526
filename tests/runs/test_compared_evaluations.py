"""Comparisons: which of a run's files is used, with the cautions of its numbers, and metrics that one side lacks."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from unilatent.analysis.comparison import last_evaluation
from unilatent.evaluation.comparison import compare
from unilatent.evaluation.evaluate import EvaluatedMetric, Evaluation
from unilatent.evaluation.protocol import Protocol
from unilatent.evaluation.search import Search, grid
from unilatent.evaluation.table import write_evaluation
from unilatent.modalities.base import Evidence, Row
from unilatent.model_card import ModelRecord, write_record


def measured(key: str, value: float, track: str = "generation") -> EvaluatedMetric:
    sampling: dict[str, Any] = {
        "solver": "heun", "num_inference_steps": 2, "guidance_scale": 1.0, "guidance_interval": (0, 1),
    }  # fmt: skip
    protocol = Protocol(
        track=track, num_samples=70, reference="training data", reference_data="d", num_reference=90,  # type: ignore[arg-type]
        preprocessing="adm", resolution=(8, 8, 1), reference_preprocessing="adm", reference_resolution=(8, 8, 1),
        space="inception", sampling=sampling if track == "generation" else None,
    )  # fmt: skip
    return EvaluatedMetric(Row(key, f"{key} distance", value, "", "lower"), protocol)


def stored(path: Path, numbers: list[EvaluatedMetric], age: float) -> Path:
    write_evaluation(Evaluation(numbers, Evidence(None, None, None, None)), path, {}, 0.0)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_evaluation_of_samples_is_a_run_s_last(tmp_path: Path) -> None:
    """A newer search file, or a newer evaluation of reconstructions alone, does not replace it."""
    folder = tmp_path / "eval"
    assert last_evaluation(tmp_path) == []
    stored(folder / "evaluation-a-1.json", [measured("rfid", 1.0, "reconstruction")], age=0)
    assert [m.row.key for m in last_evaluation(tmp_path)] == ["rfid"]
    stored(folder / "step_00000004.json", [measured("fid", 3.0)], age=9)
    stored(folder / "evaluation-b-1.json", [measured("fid", 2.0)], age=5)
    grid(Search("ema", "fid", {}, folder, lambda at: (measured("fid", 7.0), {}), say=lambda line: None), [0.1])
    assert len(list(folder.glob("*.json"))) == 4
    assert [m.row.value for m in last_evaluation(tmp_path)] == [2.0]


def test_cautions_stand_beside_compared_numbers_and_unshared_ones_are_named(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    a = stored(tmp_path / "a.json", [measured("fid", 1.0), measured("kid", 1.0)], 0)
    b = stored(tmp_path / "b.json", [measured("fid", 2.0), measured("is", 1.0), measured("sfid", 1.0)], 0)
    done = cli("evaluate", "--compare", a, b)
    assert done.code == 0 and "A is better" in done.out, done.err
    for caution in (r"(?<!reference) n = 70\b", "reference n = 90"):
        assert len(re.findall(caution, done.out)) == 2, done.out
    assert "only in A, not compared: kid70/adm/heun-2/cfg1\n" in done.out
    assert "only in B, not compared: is70/adm/heun-2/cfg1, sfid70/adm/heun-2/cfg1\n" in done.out
    same = cli("evaluate", "--compare", a, a)
    assert same.code == 0 and "only in" not in same.out
    assert json.loads(a.read_text())["numbers"][0]["cautions"] == ["n = 70", "reference n = 90"]


def test_an_evaluation_of_other_weights_than_a_run_has_now_is_named(cli: Command, tmp_path: Path) -> None:
    for name, fingerprint in (("a", "old"), ("b", "same")):
        path = tmp_path / name / "eval" / "evaluation-x-1.json"
        evaluation = Evaluation([measured("fid", 1.0)], Evidence(None, None, None, None))
        write_evaluation(evaluation, path, {"fingerprint": fingerprint}, 0.0)
        (tmp_path / name / "model").mkdir()
        write_record(tmp_path / name / "model", ModelRecord("same"))
    done = cli("evaluate", "--compare", tmp_path / "a", tmp_path / "b")
    assert done.code == 0
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and f"is of other weights than {tmp_path / 'a'} has now" in " ".join(warnings)
    (tmp_path / "a" / "eval" / "evaluation-x-1.json").write_text('{"format_version": 0, "numbers": []}')
    other = cli("evaluate", "--compare", tmp_path / "a", tmp_path / "b")
    assert other.code == 2 and "this package reads" in other.err, "older files are refused in words"
    third = cli("evaluate", tmp_path / "c", "--compare", tmp_path / "a", tmp_path / "b")
    assert third.code == 2 and "beside --compare, which takes two evaluations" in third.err


def test_every_field_in_which_protocols_differ_is_named() -> None:
    a, b = measured("fid", 1.0), measured("fid", 2.0)
    other = replace(b, protocol=b.protocol.model_copy(update={"num_samples": 50, "num_reference": 10}))
    verdict = compare([a], [other])[0].verdict
    assert verdict.startswith("not comparable: num_samples is 70 in A and 50 in B; num_reference differs too")
