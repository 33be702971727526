"""The learning rate that follows the batch size, unless the user sets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_training import assert_same, digits, state

from unilatent.config import ConfigError, read_yaml
from unilatent.presets import preset
from unilatent.training.config import BatchScaledRate, OptimizerConfig, RunConfig
from unilatent.training.trainer import Trainer

RULE = "training.optimizer.learning_rate={base: 1e-3, base_batch_size: 4}"


def rate(*overrides: str) -> float:
    return preset("imagenet256-unite-b").override(*overrides).resolved().training.optimizer.peak


def test_unite_s_rule_is_1e_4_max_1_batch_over_384() -> None:
    """UNITE's code: 1e-4 x max(1, batch / 384)."""
    sizes = (1, 383, 384, 385, 768, 1024, 4096)
    for size in sizes:
        assert rate(f"training.batch_size={size}") == pytest.approx(1e-4 * max(1.0, size / 384), rel=1e-12)
    assert rate("training.batch_size=100") == 1e-4
    assert rate() == 1e-4 * 1024 / 384, "bitwise that of runs before the rule"


@pytest.mark.parametrize("order", [1, -1])
def test_a_rate_that_the_user_sets_does_not_follow(order: int) -> None:
    settings = ("training.optimizer.learning_rate=3e-4", "training.batch_size=4096")
    assert rate(*settings[::order]) == 3e-4
    assert preset("qm9-unite-s").override("training.batch_size=4096").resolved().training.optimizer.peak == 1e-4


def test_parts_of_the_rule_can_be_set() -> None:
    assert rate("training.optimizer.learning_rate.base=2e-4", "training.batch_size=768") == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("-1", "learning_rate: -1 cannot be used: give a number above 0, or {base"),
        ("fast", "learning_rate: 'fast' cannot be used"),
        ("true", "learning_rate: True cannot be used"),
        (".inf", "learning_rate: inf cannot be used"),
        ("{base: 1e-4}", "learning_rate.base_batch_size"),
        ("{base: 0, base_batch_size: 1}", "learning_rate.base: 0"),
        ("{base: 1e-4, batch: 384}", "learning_rate.batch: unknown field"),
    ],
)
def test_what_is_no_rate_is_refused_in_one_line(value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preset("digits").override(f"training.optimizer.learning_rate={value}")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_rule_survives_yaml_and_the_resolved_number_too(tmp_path: Path) -> None:
    config = preset("imagenet256-unite-b")
    assert config.training.optimizer.learning_rate == BatchScaledRate(base=1e-4, base_batch_size=384)
    for stored in (config, config.resolved()):
        (tmp_path / "config.yaml").write_text(stored.to_yaml())
        assert RunConfig.parse(read_yaml(tmp_path / "config.yaml")) == stored
    assert config.resolved().resolved() == config.resolved()


def test_an_unresolved_rate_is_nobody_s_number() -> None:
    with pytest.raises(AssertionError, match="resolved"):
        _ = OptimizerConfig(learning_rate=BatchScaledRate(base=1e-4, base_batch_size=384)).peak


def test_a_run_stores_the_number_and_resumes_bitwise(tmp_path: Path) -> None:
    """config.yaml, the checkpoint and metrics.jsonl have the number; stopping changes no bit; the number itself gives
    the same run as the rule."""
    whole, stopped, plain = tmp_path / "whole", tmp_path / "stopped", tmp_path / "plain"
    Trainer(digits(RULE), whole).fit()
    expected = 1e-3 * digits().training.batch_size / 4
    assert read_yaml(whole / "config.yaml")["training"]["optimizer"]["learning_rate"] == expected
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["learning_rate"] == pytest.approx(expected * 12 / 50), "the warm-up takes 50 steps"
    Trainer(digits(RULE, "training.steps=8"), stopped).fit()
    resumed = Trainer(digits(RULE), stopped, resume="auto")
    assert not resumed.changed
    resumed.fit()
    assert_same(state(whole, 12), state(stopped, 12))
    Trainer(digits(f"training.optimizer.learning_rate={expected}"), plain).fit()
    assert_same(state(whole, 12), state(plain, 12))
