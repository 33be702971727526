"""Analyses of models with known properties: bits, curves, the decoder's use of its latents, interpolations."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from building import batch_of, model_of

from unilatent.analysis.analyze import BASIC, analyze
from unilatent.analysis.comparison import ComparedRun, sample_distance, settings_of
from unilatent.analysis.latents import interpolations
from unilatent.analysis.plots import draw_levels
from unilatent.analysis.rates import MeanWithError, RateReport, by_level, rate_report
from unilatent.evaluation.evaluate import EvaluatedMetric
from unilatent.evaluation.protocol import Protocol
from unilatent.maths.coding import histogram_entropy
from unilatent.maths.spread import Spread
from unilatent.maths.streams import Streams
from unilatent.methods.base import Costs, LatentModel
from unilatent.modalities.base import Row
from unilatent.types import Batch

N = 48


def rated(awake: bool = True, **fields) -> LatentModel:
    return model_of("image", "unified_latents", awake=awake, **fields).eval()


def report(model: LatentModel, size: int = 16, draws: int = 4) -> RateReport:
    found = rate_report(model, batch_of("image", N), draws, batch_size=size)
    assert found is not None
    return found


def test_all_bits_are_the_same_nats():
    found = report(rated())
    assert found.samples == N and found.nats.error > 0
    for name, count in {"pixel": 64, "subpixel": 64, "latent_dimension": 64}.items():
        bits = found.bits[f"bits_per_{name}"]
        assert bits.mean * count * math.log(2) == pytest.approx(found.nats.mean, rel=1e-9)
        assert bits.error * count * math.log(2) == pytest.approx(found.nats.error, rel=1e-9)


def test_the_rate_is_the_training_s_own_monitor():
    """Same samples, same streams, one draw: what `loss` logs."""
    model, data = rated(), batch_of("image", N)
    logged = next(iter(model.loss(data, Streams(("costs", 0), range(N))))).monitors
    found = report(model, size=N, draws=1)
    for name, value in logged.items():
        assert found.bits[name].mean == pytest.approx(value.item(), rel=1e-5)


def test_costs_do_not_depend_on_batch_mates_but_for_the_lent_latents():
    model = rated()
    a, b = report(model, 16), report(model, 12)
    for key in ("nats", "decoder"):
        assert getattr(a, key).mean == pytest.approx(getattr(b, key).mean, rel=1e-5)
    assert a.shuffled.mean != b.shuffled.mean


class Grey(type(model_of("image", "unified_latents"))):  # type: ignore[misc]
    """A model whose rate is a sample's brightness; another sample's latents cost the difference in brightness."""

    def costs(self, batch: Batch, streams: Streams) -> Costs:
        own = batch.data.flatten(1).mean(1)
        return Costs(rate=own, decoder=torch.ones_like(own), shuffled=(own - own.roll(1, 0)).abs())


@pytest.mark.parametrize("size", [2, 7, 16, N])
def test_sorted_data_lends_latents_as_any_does(size: int):
    """Half of the samples black, then half white: latents come from any other sample, whatever the batches."""
    model = rated()
    model.__class__ = Grey
    halves = (torch.arange(N) >= N // 2).float()[:, None, None, None].expand(-1, 1, 8, 8)
    found = rate_report(model, Batch(halves, {}), 16, batch_size=size)
    assert found is not None and found.shuffled.mean == pytest.approx(N / 2 / (N - 1), abs=0.08)


def test_errors_are_over_samples_whatever_their_order():
    """Each sample's draws are averaged before the spread over samples is taken."""
    model = rated()
    model.__class__ = Grey
    levels = torch.linspace(0, 1, N)
    found = rate_report(model, Batch(levels[:, None, None, None].expand(-1, 1, 8, 8), {}), 5)
    assert found is not None and found.nats.mean == pytest.approx(0.5)
    assert found.nats.error == pytest.approx(float(levels.std()) / math.sqrt(N), rel=1e-5)


def test_the_area_under_the_curves_is_the_loss():
    """With a linear path, times are uniform in log-SNR; the terminal KL is under 0.1 % here."""
    found = report(rated(path="linear"), draws=30)
    for curve, total, span in ((found.latents, found.nats.mean, 15), (found.data, found.decoder.mean, 20)):
        width = curve.logsnr[1] - curve.logsnr[0]
        assert sum(curve.mean) * width == pytest.approx(total, rel=0.03)
        assert len(curve.mean) * width == pytest.approx(span, rel=0.02) and sum(curve.count) == 30 * N


def test_a_decoder_that_is_deaf_to_its_latents_is_a_collapse_in_words():
    model = rated()
    assert abs(report(model).use - 1) > 1e-3
    torch.nn.init.zeros_(model.decoder.backbone.context_in.weight)
    found = report(model)
    assert found.use == pytest.approx(1, rel=1e-6)
    assert any(line.startswith("collapse: with another sample's latents") for line in found.warnings())


def test_latents_that_say_nothing_are_a_collapse_in_words():
    """A constant encoder, and a prior that predicts the constant 0: no bits."""
    model = rated(awake=False)
    for p in model.encoder.parameters():
        torch.nn.init.zeros_(p)

    class Zero(torch.nn.Module):
        def forward(self, z, *rest):
            return torch.zeros_like(z)

    model.prior = Zero()
    found = analyze(model, batch_of("image", 8), only=BASIC)
    assert found.rate.nats.mean == pytest.approx(0, abs=1e-3)
    said = " ".join(found.warnings())
    assert "the latents carry" in said and "loss factor" in said and "bias" in said


@pytest.mark.parametrize(("bits", "warned"), [(0.064, True), (0.099, True), (0.101, False)])
@pytest.mark.parametrize("decoder_loss", ["diffusion", "mse"])
def test_few_bits_are_told_with_the_dials_that_the_decoder_has(bits: float, warned: bool, decoder_loss: str):
    """The paper's collapsed ablation had 0.064 bits (Table 6, B)."""
    found = replace(report(rated(decoder_loss=decoder_loss), draws=1), use=5.0)
    mean = replace(found.bits["bits_per_latent_dimension"], mean=bits)
    said = replace(found, bits={**found.bits, "bits_per_latent_dimension": mean}).warnings()
    assert len(said) == warned
    if warned:
        assert "a larger loss factor" in said[0] and ("bias" in said[0]) == (decoder_loss == "diffusion")


def test_no_warning_where_nothing_is_wrong():
    class Fine(type(rated())):
        def costs(self, batch: Batch, streams: Streams) -> Costs:
            own = super().costs(batch, streams)
            return Costs(own.rate, own.decoder, 5 * own.decoder)

    model = rated()
    model.__class__ = Fine
    found = report(model)
    assert found.warnings() == [] and found.use == pytest.approx(5) and found.latents is None


@pytest.mark.parametrize("learned_variance", [False, True])
def test_a_second_stage_that_is_its_prior_has_the_prior_s_rate(learned_variance: bool):
    """An unconditional second stage with the prior's weights has the same bound, up to sampling error."""
    tokenizer = rated(learned_variance=learned_variance)
    own = model_of("image", "latent_diffusion", tokenizer_model=tokenizer.config.plain()).eval()
    own.tokenizer.load_state_dict(tokenizer.state_dict())
    own.base = own.tokenizer.prior
    own.conditions = tokenizer.conditions
    found = report(own, draws=8)
    assert found.nats.mean == pytest.approx(report(tokenizer, draws=8).nats.mean, rel=1e-6)
    prior, base = found.bits["bits_per_pixel"], found.base_bits["bits_per_pixel"]
    assert base.mean != prior.mean and abs(base.mean - prior.mean) < 5 * math.hypot(prior.error, base.error)


def test_methods_without_a_rate_are_analysed_without_it():
    found = analyze(model_of("image", "unite", awake=True).eval(), batch_of("image", 6))
    assert found.rate is None and found.latents.std > 0 and "psnr" in found.errors and not found.warnings()
    asleep = analyze(model_of("image", "unite").eval(), batch_of("image", 6))
    assert set(asleep.latents.channel_entropy) == {0.0}, "latents that never differ"
    assert asleep.latents.std == 0 and "all samples are nearly one point" in asleep.warnings()[0]


def test_latent_statistics_are_those_of_the_clean_latents():
    model, data = rated(), batch_of("image", N)
    found = analyze(model, data, draws=1, batch_size=20).latents
    z = model.encode_clean(data.data, Streams(("latents", 0), range(N)))
    spread = Spread(16, 4)
    spread.add(z)
    numbers = spread.numbers()
    assert found.std == pytest.approx(float(numbers["latent_std"]), rel=1e-5)
    assert found.rank == pytest.approx(float(numbers["latent_rank"]), rel=1e-4)
    want = (z.double() - z.double().mean(0)).square().sum((0, 1)) / (16 * (N - 1))
    assert found.channel_std == pytest.approx(want.sqrt().tolist(), rel=1e-5)
    wanted = histogram_entropy(z.flatten(0, 1), found.rms / 16)
    assert found.channel_entropy == pytest.approx(wanted.tolist(), abs=1e-6) and min(found.channel_entropy) > 1
    assert sum(found.shares) == pytest.approx(1) and len(found.edges) == len(found.shares) + 1
    assert asdict(found)["samples"] == N


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        analyze(rated(), batch_of("image", 1))


@pytest.mark.parametrize("method", ["unite", "unified_latents"])
def test_lines_between_samples_start_and_end_at_them(method: str):
    model, data = model_of("image", method, awake=True).eval(), batch_of("image", 5).data
    rows = interpolations(model, data, steps=4)
    assert len(rows) == 2 and all(len(row) == 6 for row in rows)
    for pair, row in enumerate(rows):
        assert torch.equal(row[0], data[2 * pair]) and torch.equal(row[5], data[2 * pair + 1])
        assert not torch.equal(row[1], row[4])


def test_all_noise_is_the_same_along_a_line():
    """An interpolation from a sample to itself is constant, although z_0 and the decoder are noisy."""
    same = interpolations(rated(), batch_of("image", 1).data.expand(2, -1, -1, -1), steps=3)[0]
    torch.testing.assert_close(same[1:4], same[1:2].expand(3, -1, -1, -1), rtol=0, atol=1e-5)


def test_levels_hold_their_own_values():
    logsnr = torch.linspace(-10, 10, 2001)
    curve = by_level(logsnr, logsnr.square(), levels=10)
    assert curve.logsnr == pytest.approx([-9 + 2 * i for i in range(10)])
    assert curve.mean == pytest.approx([m**2 + 1 / 3 for m in curve.logsnr], abs=0.1) and sum(curve.count) == 2001
    assert by_level(torch.ones(5), torch.ones(5)).mean == [1.0]


def test_a_single_value_has_no_standard_error(tmp_path: Path):
    curve = by_level(torch.tensor([0.0, 10, 10]), torch.tensor([1.0, 2, 4]), levels=2)
    assert curve.mean == [1.0, 3.0] and curve.error == [None, pytest.approx(1.0)] and curve.count == [1, 2]
    assert str(MeanWithError(1.25, None)) == "1.25" and str(MeanWithError(1.25, 0.5)) == "1.25 ± 0.5"
    found = rate_report(rated(), batch_of("image", 2), 1)
    assert found is not None and found.nats.error is not None
    draw_levels(replace(found, data=curve, data_shuffled=None), tmp_path / "levels.png")
    assert (tmp_path / "levels.png").stat().st_size > 1000
    assert json.loads(json.dumps(asdict(curve)))["error"][0] is None


def compared(name: str, **numbers: float) -> ComparedRun:
    model = rated(awake=False)
    protocol = Protocol(
        track="generation", num_samples=int(numbers.pop("num", 100)), reference="r", reference_data="h",
        num_reference=10, preprocessing="p", resolution=(8, 8, 1), sampling=model.config.sampling.plain(),
    )  # fmt: skip
    rows = [
        EvaluatedMetric(Row(key, f"distance {key}", value, "", "lower"), protocol) for key, value in numbers.items()
    ]
    return ComparedRun(name, analyze(model, batch_of("image", 2), draws=1), rows, settings_of(model))


def results(*runs: ComparedRun) -> dict[str, list[EvaluatedMetric]]:
    return {run.name: run.numbers for run in runs}


def test_a_curve_of_distances_needs_the_same_number_measured_the_same_way():
    a, b = compared("a", fid=3.0, kid=1.0), compared("b", kid=2.0)
    assert sample_distance(results(a, b), None) == "kid" and sample_distance(results(a, b), "kid") == "kid"
    assert sample_distance(results(a, compared("c")), None) is None
    with pytest.raises(ValueError, match="--distance fid: b has no such number"):
        sample_distance(results(a, b), "fid")
    with pytest.raises(ValueError, match="num_samples is 100 in a and 50 in d"):
        sample_distance(results(a, compared("d", kid=1.0, num=50)), "kid")
