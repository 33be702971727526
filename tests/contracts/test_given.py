"""Given parts of samples: what every method promises of every modality whose samples can be given in part."""

from __future__ import annotations

import pytest
import torch
from building import batch_of, model_config, model_of, same, with_given
from test_method import FAST, B, close, gradients, streams

from unilatent.methods.base import LatentModel
from unilatent.registry import available, find
from unilatent.sampling import sample, sample_rows
from unilatent.types import Given

every_pair = pytest.mark.parametrize(
    ("modality", "method"),
    [(a, b) for a in available("modalities") if find("modalities", a).given_kinds for b in available("methods")],
)


def given_of(model: LatentModel, count: int = B) -> Given:
    """Parts of all kinds."""
    data = batch_of(model.config.modality.name, count).data
    return Given(data, model.modality.draw_mask(data, streams(range(count)), model.modality.given_kinds))


def awake(modality: str, method: str) -> LatentModel:
    """A model whose frozen weights are random too."""
    model = model_of(modality, method, awake=True, given=True).eval()
    for p in model.parameters():
        if not p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return model


def of_mask(given: Given, value: bool) -> Given:
    return Given(given.data, torch.full_like(given.mask, value))


@every_pair
def test_given_parts_come_back_exactly_and_the_rest_is_made(modality: str, method: str):
    model = model_of(modality, method, awake=True, given=True).eval()
    given = given_of(model, 3)
    made = sample(model, 6, given=given, **FAST)
    assert same(model.modality.put_back(made[:3], given), made[:3])
    assert same(model.modality.put_back(made[3:], given), made[3:]), "fewer parts than samples are cycled"
    assert not same(made[:3], made[3:]), "several completions of one part are one and the same"
    assert not same(made[:3], given.data)
    model.modality.check(made)


@every_pair
def test_a_completion_depends_on_what_is_given_and_on_no_batch_mate(modality: str, method: str):
    model = awake(modality, method)
    given = given_of(model)
    together = sample(model, B, given=given, **FAST)
    alone = sample(model, B, given=given, batch_size=2, **FAST)
    assert same(together, alone, atol=2e-5)
    other = Given(given.data.flip(0), given.mask.flip(0))
    rest = ~given.mask & ~other.mask
    changed = (sample(model, B, given=other, **FAST) - together)[rest.expand_as(together)]
    assert changed.abs().max() > 1e-3
    unseen = Given(torch.where(given.mask, given.data, 0.25), given.mask)
    assert same(sample(model, B, given=unseen, **FAST), together), "what is not given has been seen"


@every_pair
def test_nothing_given_is_the_model_that_draws_whole_samples(modality: str, method: str):
    model = model_of(modality, method, awake=True, given=True).eval()
    nothing = of_mask(given_of(model), False)
    assert same(sample(model, B, given=nothing, **FAST), sample(model, B, **FAST), atol=1e-6)
    known = model.known_latents(nothing, streams(range(B)))
    assert known is not None and not known.any()
    z = model.encode(nothing.data)
    cond = model.conditions(batch_of(modality, B).values)
    torch.testing.assert_close(model.denoise(z, 0.5, cond.given(known)), model.denoise(z, 0.5, cond))


@every_pair
def test_every_weight_gets_a_gradient_and_micro_batches_change_nothing(modality: str, method: str):
    model = model_of(modality, method, awake=True, given=True)
    batch = batch_of(modality, 12)
    value, whole = gradients(model, batch, [range(12)])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not [n for n in trained if n not in whole or not whole[n].any()]
    assert any("known" in n or "patch_in" in n for n in trained)
    other, parts = gradients(model, batch, [range(5), range(5, 12)])
    assert other == pytest.approx(value, rel=1e-5)
    close(parts, whole)


@every_pair
def test_no_loss_is_paid_for_what_a_decoder_is_told(
    modality: str, method: str, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    """All given: the decoder's part is zero. Nothing given: as much as without the mechanism."""
    model, batch = model_of(modality, method, awake=True, given=True), batch_of(modality, B)
    if find("methods", method).trains_on_latents:
        pytest.skip("trains no decoder")
    given = given_of(model)

    def decoder_loss(drawn: Given) -> float:
        monkeypatch.setattr(model, "draw_given", lambda data, keys: drawn)
        return sum(
            term.item() for part in model.loss(batch, streams(range(B))) for name, term in part.terms.items()
            if name not in ("flow", "prior")
        )  # fmt: skip

    everything, nothing = decoder_loss(of_mask(given, True)), decoder_loss(of_mask(given, False))
    assert everything == pytest.approx(0, abs=1e-6)
    assert 0 < decoder_loss(given) < nothing


@every_pair
def test_the_share_of_a_latent_is_that_of_the_data_it_stands_for(modality: str, method: str):
    model = awake(modality, method)
    given = given_of(model)
    known = model.known_latents(given, streams(range(B)))
    assert known is not None and known.shape[2] == model.latent_channels + 1
    share = known[..., -1]
    whole = model.modality.pack_mask(given.mask).mean((1, 2))
    torch.testing.assert_close(share.mean(1), whole)
    assert not known[..., :-1][share == 0].any() and known[..., :-1][share > 0].any()


@every_pair
def test_values_of_no_condition_are_left_out(modality: str, method: str):
    """A model without conditions on data that have labels, as a run and an evaluation complete held-out samples."""
    config = model_config(modality, method).model_copy(update={"conditions": {}})
    model = LatentModel.build(with_given(config)).eval()
    given = given_of(model, 3)
    made = sample_rows(model, range(3), batch_of(modality, 3).values, model.config.sampling.model_copy(update=FAST), 0,
                       "fp32", given=given)  # fmt: skip
    assert made.values == {} and not made.latents.requires_grad
    assert same(model.modality.put_back(made.data, given), made.data)


@every_pair
def test_the_rate_does_not_count_what_is_given(modality: str, method: str):
    """Nothing given: the rate of whole samples, exactly. All given: a decoder has nothing left to pay."""
    model, batch = awake(modality, method), batch_of(modality, B)
    whole = model.costs(batch, streams(range(B)))
    if whole is None:
        pytest.skip("its latents have no rate")
    given = given_of(model)
    nothing = model.costs(batch, streams(range(B)), of_mask(given, False))
    everything = model.costs(batch, streams(range(B)), of_mask(given, True))
    assert nothing is not None and everything is not None
    torch.testing.assert_close(nothing.rate, whole.rate)
    torch.testing.assert_close(nothing.decoder, whole.decoder)
    assert everything.decoder.abs().max() < 1e-6 and not torch.allclose(everything.rate, whole.rate)


def test_a_normal_prior_reads_nothing_of_what_is_given(monkeypatch: pytest.MonkeyPatch):
    """So it is not encoded either, for the loss, the rate or samples."""
    torch.manual_seed(0)
    model = LatentModel.build(with_given(model_config("image", "unified_latents", prior="normal"))).eval()
    given, batch = given_of(model), batch_of("image", B)
    encoded = model.encode_clean(batch.data, streams(range(B)))
    monkeypatch.setattr(model, "encode_clean", None)
    assert model.known_latents(given, streams(range(B))) is None
    costs = model.costs(batch, streams(range(B)), given)
    assert costs is not None and costs.rate.isfinite().all() and encoded.isfinite().all()


@every_pair
def test_parts_are_refused_where_they_have_no_meaning(modality: str, method: str):
    plain = model_of(modality, method).eval()
    able = model_of(modality, method, given=True).eval()
    given = given_of(able, 2)
    cases: list[tuple[LatentModel, Given, str]] = [
        (plain, given, "trained on whole samples only"),
        (able, Given(given.data, given.mask[:, ..., :1]), "expected a mask of bools"),
        (able, Given(given.data, given.mask.float()), "expected a mask of bools"),
        (able, Given(given.data[..., :1], given.mask), "expected shape"),
        (able, given_of(able, 5), "5 values are given, but num is 4"),
    ]
    for model, parts, words in cases:
        with pytest.raises(ValueError) as error:
            sample(model, 4, given=parts, **FAST)
        assert words in str(error.value)


@pytest.mark.parametrize("modality", [a for a in available("modalities") if not find("modalities", a).given_kinds])
def test_other_modalities_refuse_the_setting(modality: str):
    with pytest.raises(ValueError, match="no part of a sample"):
        with_given(model_config(modality, "unite"))
