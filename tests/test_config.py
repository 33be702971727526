"""Configuration: strict, with helpful errors, and unable to run code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from unilatent.config import Config, ConfigError, read_yaml
from unilatent.model_config import ModelConfig
from unilatent.presets import preset, presets, summary
from unilatent.training.config import RunConfig


def digits(**changes: Any) -> dict[str, Any]:
    """Plain data of a run configuration; dotted keys set nested fields."""
    data = preset("digits").plain()
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        inner = data
        for key in path:
            inner = inner[key]
        inner[last] = value
    return data


def fault(data: Any, cls: type[Config] = RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        cls.parse(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


UNKNOWN = {
    "sede": ("sede", "seed"),
    "training.batchsize": ("training.batchsize", "batch_size"),
    "training.optimizer.learning_rat": ("training.optimizer.learning_rat", "learning_rate"),
    "method.flow_drawz": ("method.flow_drawz", "flow_draws"),
    "method.decoder.widht": ("method.decoder.widht", "width"),
    "modality.patchsize": ("modality.patchsize", "patch_size"),
    "data.heldout": ("data.heldout", "held_out"),
    "conditions.class_label.droput": ("class_label.droput", "dropout"),
    "sampling.solvr": ("sampling.solvr", "solver"),
}


@pytest.mark.parametrize(("key", "words"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_key_is_refused_with_a_suggestion_at_every_level(key: str, words: tuple[str, str]):
    said = fault(digits(**{key: 1}))
    assert said.startswith(words[0]) or f".{words[0]}" in said
    assert "unknown field" in said and f"did you mean {words[1]!r}?" in said


def test_an_unknown_key_like_none_lists_the_fields():
    said = fault(digits(**{"training.zzzzzz": 1}))
    assert "training.zzzzzz: unknown field" in said and "batch_size" in said


WRONG = {
    "training.steps": ("many", "'many'"),
    "training.batch_size": (0, "0"),
    "training.optimizer.learning_rate": (-1, "-1"),
    "method.latent_channels": (2.5, "2.5"),
    "method.generative_encoder.depth": ("x", "'x'"),
    "modality.channels": (2, "2"),
    "data.held_out": (-1, "-1"),
    "sampling.solver": ("rk4", "'rk4'"),
    "training.compile": ("maybe", "'maybe'"),
    "training.optimizer.eps": (float("nan"), "nan"),
}


@pytest.mark.parametrize(("key", "case"), WRONG.items(), ids=WRONG)
def test_a_wrong_value_is_refused_by_field_and_value(key: str, case: tuple[Any, str]):
    said = fault(digits(**{key: case[0]}))
    assert key in said and case[1] in said


def test_rules_across_fields_are_explained():
    assert "training.steps or training.epochs" in fault(digits(**{"training.epochs": 3}))
    assert "flow_chunk must be null" in fault(digits(**{"method.stop_gradient": False, "method.flow_chunk": 1}))
    assert "overlap" in fault(digits(**{"training.schedule.warmup": 1500}))
    assert "sampling.guidance_interval" in fault(digits(**{"sampling.guidance_interval": [0.5, 0.2]}))


@pytest.mark.parametrize("name", ["os.system", "os", "unit", "builtins.eval", None, 3, ["unite"], {"a": 1}])
@pytest.mark.parametrize("kind", ["method", "modality"])
def test_a_component_is_one_of_those_that_exist(kind: str, name: Any):
    said = fault(digits(**{f"{kind}.name": name}))
    assert kind in said and "is unknown" in said and "available: " in said
    if name == "unit" and kind == "method":
        assert "did you mean 'unite'?" in said
    assert "os.system" not in sys.modules


def test_conditions_are_named_by_their_key():
    assert ModelConfig.parse({k: v for k, v in digits().items() if k in ModelConfig.model_fields}).conditions
    short = digits(conditions={"class_label": {"dropout": 0.2}})
    assert RunConfig.parse(short).conditions["class_label"].dropout == 0.2
    assert "labelz" in fault(digits(conditions={"labelz": {}}))


@pytest.mark.parametrize("name", sorted(presets()))
def test_yaml_of_every_preset_reads_back_exactly(name: str, tmp_path: Path):
    config = preset(name)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = RunConfig.parse(read_yaml(path))
    assert again == config and again.to_yaml() == config.to_yaml() and type(again.method) is type(config.method)
    assert config.preset == name and summary(name)


def test_an_unknown_preset_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="preset 'digit' is unknown; did you mean 'digits'"):
        preset("digit")


def test_configurations_are_frozen_and_comparable():
    config = preset("digits")
    assert config == preset("digits") and config is not preset("digits")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


OVERRIDES = [
    ("training.optimizer.learning_rate=1e-4", lambda c: c.training.optimizer.learning_rate, 1e-4),
    ("training.optimizer.learning_rate=2.5E-3", lambda c: c.training.optimizer.learning_rate, 2.5e-3),
    ("training.gradient_clip=null", lambda c: c.training.gradient_clip, None),
    ("training.gradient_clip=", lambda c: c.training.gradient_clip, None),
    ("sampling.guidance_interval=[0.1, 0.9]", lambda c: c.sampling.guidance_interval, (0.1, 0.9)),
    ("modality.size=[8, 16]", lambda c: c.modality.size, (8, 16)),
    ("conditions={}", lambda c: c.conditions, {}),
    ("data.path=some/folder=with=signs", lambda c: c.data.path, "some/folder=with=signs"),
    ("method.latent_norm=rms", lambda c: c.method.latent_norm, "rms"),
    ("training.compile=true", lambda c: c.training.compile, True),
    ("conditions.class_label.dropout=0.3", lambda c: c.conditions["class_label"].dropout, 0.3),
    (
        "training.schedule.decays=[{start: 60, end: 70, factor: 1e-1}]",
        lambda c: c.training.schedule.decays[0].factor,
        0.1,
    ),
]


@pytest.mark.parametrize(("assignment", "read", "want"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_overrides(assignment: str, read, want: Any):
    before = preset("digits")
    config = before.override(assignment)
    assert read(config) == want and type(read(config)) is type(want)
    assert before == preset("digits")


def test_overrides_apply_in_order_and_together():
    config = preset("digits").override("training.steps=null", "training.epochs=3", "seed=1", "seed=2")
    assert config.training.steps is None and config.training.epochs == 3 and config.seed == 2


def test_steps_and_epochs_take_each_other_s_place():
    epochs = preset("digits").override("training.epochs=3")
    assert epochs.training.steps is None and epochs.training.epochs == 3
    assert epochs.override("training.steps=5").training.epochs is None
    with pytest.raises(ConfigError, match=r"either training\.steps or training\.epochs"):
        epochs.override("training.steps=5", "training.epochs=1")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.step=5", "did you mean 'steps'"),
        ("trainin.steps=5", "did you mean 'training'"),
        ("seed.deeper=5", "seed is a single value"),
        ("seed", "is not KEY=VALUE"),
        ("=5", "is not KEY=VALUE"),
        ("seed=[1", "is not a YAML value"),
        ("seed=!!python/object/apply:os.system [true]", "is not a YAML value"),
        ("training.steps=abc", "training.steps: 'abc'"),
        ("method.name=os.system", "'os.system' is unknown"),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(assignment: str, words: str):
    with pytest.raises(ConfigError) as caught:
        preset("digits").override(assignment)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.covers("F17")
@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:os.system", "!!python/name:os.system", "!x"],
)
def test_tags_in_files_never_build_anything(tag: str, tmp_path: Path):
    path, witness = tmp_path / "config.yaml", tmp_path / "witness"
    path.write_text(f"seed: {tag} ['touch {witness}']\n")
    with pytest.raises(ConfigError, match="is not plain YAML"):
        read_yaml(path)
    assert not witness.exists()


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")
    for content, words in (
        ("- 1\n- 2\n", "contains list, not a mapping"),
        ("a: [", "is not plain YAML"),
        ("", "contains NoneType"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            read_yaml(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="is not plain YAML"):
        read_yaml(tmp_path / "binary.yaml")


def test_numbers_in_files_are_what_everybody_means(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("a: 1e-4\nb: [1E3, x, true]\nc: {d: 2e5, e: eleven}\n")
    assert read_yaml(path) == {"a": 1e-4, "b": [1e3, "x", True], "c": {"d": 2e5, "e": "eleven"}}


def test_text_that_looks_like_a_number_survives_an_override():
    assert preset("digits").override("data.path='1e5'").data.path == "1e5"


def test_text_that_looks_like_a_number_survives_a_round_trip(tmp_path: Path):
    """A folder, or a class, may be called 1e5."""
    config = preset("digits").override("data.path='folder'")
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": "1e5"})})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert yaml.safe_load(path.read_text())["data"]["path"] == "1e5"
    assert RunConfig.parse(read_yaml(path)) == config


def test_a_field_without_its_section_is_found() -> None:
    with pytest.raises(ConfigError, match=r"^max_atoms: unknown field; did you mean modality\.max_atoms"):
        preset("molecules").override("max_atoms=16")
