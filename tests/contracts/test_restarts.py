"""Restarts of the solver, for every method: a sample's own noise, their cost, their place in the protocol."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from building import model_of

from unilatent.analysis.decoding import trajectory
from unilatent.cli.options import check_restarts
from unilatent.config import ConfigError
from unilatent.evaluation.protocol import Protocol
from unilatent.model_config import SamplingConfig
from unilatent.registry import available, find
from unilatent.sampling import sample, sample_batches

AGAIN: dict[str, Any] = {
    "solver": "ddim", "num_inference_steps": 10, "decoder_steps": 2, "restarts": 3, "restart_interval": (0.3, 0.6),
}  # fmt: skip
GENERATORS = [name for name in available("methods") if find("methods", name).generates]


@pytest.mark.parametrize("method", GENERATORS)
def test_a_restarted_sample_is_a_function_of_its_number(method: str):
    model = model_of("image", method, awake=True).eval()

    def latents(batch_size: int = 64, **changes: Any) -> torch.Tensor:
        batches = sample_batches(model, 3, seed=5, batch_size=batch_size, **{**AGAIN, **changes})
        return torch.cat([batch.latents for batch in batches])

    together, once = latents(), latents(restarts=0)
    assert bool(together.isfinite().all())
    torch.testing.assert_close(latents(batch_size=2), together, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(latents(restarts=2), together, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(latents(restart_interval=(0.1, 0.9)), together, rtol=1e-2, atol=1e-2)
    assert torch.equal(latents(restarts=0, restart_interval=(0.1, 0.9)), once)


def test_restarts_are_counted_and_watched():
    model, seen = model_of("image", "unite", awake=True).eval(), []
    (batch,) = sample_batches(model, 2, watch=lambda t, _: seen.append(round(t, 6)), **AGAIN)
    assert batch.evaluations == len(seen) == 10 + 3 * 3
    again = [0.6, 0.5, 0.4]
    assert seen == [1.0, 0.9, 0.8, 0.7, *again, *(3 * again), 0.3, 0.2, 0.1]


def test_fields_of_restarts_are_checked():
    with pytest.raises(ConfigError, match=r"^restarts: "):
        SamplingConfig.parse({"restarts": -1})
    with pytest.raises(ConfigError, match=r"^restart_interval: .*0 <= low < high <= 1"):
        SamplingConfig.parse({"restart_interval": [0.6, 0.3]})
    assert SamplingConfig.parse({}).restarts == 0, "models that were saved without the field"
    with pytest.raises(ValueError, match=r"^restarts: "):
        sample(model_of("image", "unite"), 1, restarts=-1)


def test_restarts_are_part_of_a_number_s_protocol():
    """Files from before the setting are without any; where there are none, their interval is no difference."""

    def protocol(**sampling: Any) -> Protocol:
        return Protocol(
            track="generation", num_samples=4, reference="training data", reference_data="", num_reference=8,
            preprocessing="centre crop", resolution=(8, 8), sampling=sampling,
        )  # fmt: skip

    plain = SamplingConfig().plain()
    before = protocol(**{key: value for key, value in plain.items() if not key.startswith("restart")})
    assert before.differences(protocol(**plain)) == []
    assert before.differences(protocol(**{**plain, "restart_interval": [0.1, 0.9]})) == []
    again = protocol(**{**plain, "restarts": 30, "restart_interval": [0.1, 0.3]})
    assert ("sampling.restarts", 0, 30) in before.differences(again)
    assert "/heun-50/restarts-30[0.1,0.3]/cfg1" in again.key("fid")
    assert "restarts" not in before.key("fid")


def test_an_interval_without_restarts_is_refused():
    model = model_of("image", "unite")
    with pytest.raises(ValueError, match=r"^--restart-interval: there are no restarts"):
        check_restarts(model, {"restart_interval": (0.1, 0.4)})
    with pytest.raises(ValueError, match=r"^--restart-interval: there are no restarts"):
        check_restarts(model, {"restarts": 0, "restart_interval": (0.1, 0.4)})
    check_restarts(model, {"restarts": 2, "restart_interval": (0.1, 0.4)})
    check_restarts(model, {"restarts": None, "restart_interval": None})


@pytest.mark.parametrize("changes", [{"denoise_to_zero": True}, {"solver": "heun"}, {"solver": "dopri5"}], ids=str)
def test_restarts_go_with_every_way_of_solving(changes: dict[str, Any]):
    model = model_of("image", "unite", awake=True).eval()
    (batch,) = sample_batches(model, 2, **{**AGAIN, **changes})
    (once,) = sample_batches(model, 2, **{**AGAIN, **changes, "restarts": 0})
    assert bool(batch.latents.isfinite().all())
    assert batch.evaluations > once.evaluations
    assert not torch.allclose(batch.latents, once.latents, rtol=1e-2, atol=1e-2)


def test_a_trajectory_shows_the_steps_that_come_lower():
    model = model_of("image", "unite", awake=True).eval()
    course, columns = trajectory(model, 1, **AGAIN)
    assert course.times == sorted(course.times, reverse=True)
    assert len(course.times) == 10 and course.times[-1] == pytest.approx(0.1)
    assert len(columns) <= 10
