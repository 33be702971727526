"""The decoder sharpened by an adversary: its losses in closed form, latents bit for bit, bitwise resuming."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import unilatent
from unilatent.cli import finetune_decoder
from unilatent.config import ConfigError
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.modalities.base import Splits
from unilatent.model_card import read_record
from unilatent.presets import preset
from unilatent.registry import find
from unilatent.runs.listing import FINETUNED
from unilatent.training.config import OptimizerConfig
from unilatent.training.decoder_gan import DecoderGAN, DecoderGANConfig, adaptive_weight, hinge
from unilatent.training.optimizer import Optimizers

QUICK = {"steps": 6, "batch_size": 8, "start": 1, "log_every": 2, "sample_every": 0, "checkpoint_every": 3,
         "threads": 1, "precision": "fp32"}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the embedded digits."""
    folder = tmp_path_factory.mktemp("models") / "digits"
    torch.manual_seed(0)
    model = LatentModel.build(preset("digits").model().with_data(splits()))
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


def splits() -> Splits:
    run = preset("digits")
    return find("modalities", run.modality.name)(run.modality).splits(run.data)


def tuning(source: Path, out: Path, **changes: object) -> DecoderGAN:
    return DecoderGAN(source, out, DecoderGANConfig.parse({**QUICK, **changes}), splits(), None)


def test_losses_in_closed_form():
    real, made = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])
    assert hinge(real, made).item() == pytest.approx(((0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2 + 0.5) / 4) / 2)
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = adaptive_weight(1 * w, w.detach(), torch.full((2,), 10.0), w)  # of |w|^2 / 2 and 10 (w_1 + w_2)
    assert weight.item() == pytest.approx(5 / (10 * 2**0.5)) and not weight.requires_grad
    assert adaptive_weight(1 * w, w.detach(), torch.full((2,), 1e-12), w).item() == 1e4


def test_the_discriminator_starts_from_the_encoder_and_is_its_own(source: Path):
    model = unilatent.load(source)
    parts = model.sharpening()
    own, theirs = parts.discriminator.encoder.state_dict(), model.generative_encoder.state_dict()
    changed = [name for name in own if name not in theirs or not torch.equal(own[name], theirs[name])]
    assert set(changed) == {"transformer.out.weight", "transformer.out.bias"}
    tokens = model.modality.pack(torch.rand(3, 1, 8, 8))
    logits = parts.discriminator(tokens.values, tokens.layout)
    assert logits.shape == (3, model.max_latents) and not logits.any(), "undecided at first"
    for parameter in parts.discriminator.parameters():
        parameter.data += 1
    assert torch.equal(theirs["latent_in.weight"], model.generative_encoder.latent_in.weight)


def test_latents_stay_bit_for_bit_and_only_the_decoder_changes(source: Path, tmp_path: Path):
    before = unilatent.load(source)
    finished = tuning(source, tmp_path / "out", r1_weight=1.0, r1_every=2).fit()
    after = unilatent.load(finished)
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(before.encode(images, seed=3), after.encode(images, seed=3))
    old, new = before.state_dict(), after.state_dict()
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder"}
    settings = {"num_inference_steps": 2}
    latents = [next(unilatent.sampling.sample_batches(m, 4, **settings)).latents for m in (before, after)]  # type: ignore[attr-defined]
    assert torch.equal(*latents), "latents of samples too"
    assert not torch.equal(before.decode(latents[0]), after.decode(latents[1]))
    assert (
        before.tokenizer_fingerprint() == after.tokenizer_fingerprint() and before.fingerprint() != after.fingerprint()
    )


def test_the_discriminator_learns_before_the_decoder_does(source: Path, tmp_path: Path):
    gan = tuning(source, tmp_path / "out", start=40, discriminator_learning_rate=2e-3)
    weights = {name: value.clone() for name, value in gan.parts.decoder.state_dict().items()}
    dataset = gan.splits.train
    batch = [dataset[i] for i in range(16)]
    from unilatent.batches import collate

    data = collate(batch, gan.model.modality)
    losses = []
    for _ in range(40):
        losses.append(gan.take_step(data, range(16))["loss/discriminator"].item())
        gan.step += 1
    assert losses[0] == pytest.approx(1.0, abs=1e-3), "undecided: both margins are 1"
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(weights[name], value) for name, value in gan.parts.decoder.state_dict().items())
    numbers = gan.take_step(data, range(16))
    assert {"loss/reconstruction", "loss/adversarial", "adaptive_weight"} <= numbers.keys()
    assert any(not torch.equal(weights[name], value) for name, value in gan.parts.decoder.state_dict().items())


def test_a_discriminator_that_only_guesses_is_named_once(source: Path, tmp_path: Path):
    tuning(source, tmp_path / "out", start=0, log_every=1, discriminator_learning_rate=1e-9).fit()
    assert (tmp_path / "out" / "log.txt").read_text().count(
        "warning: the discriminator cannot tell real from made"
    ) == 1


def test_the_penalty_is_the_square_of_the_gradient(source: Path, tmp_path: Path):
    """Of a linear discriminator, |dD/dx|^2 is |w|^2, within four standard errors of 4,000 draws."""
    gan = tuning(source, tmp_path / "out", r1_weight=2.0, r1_every=1)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.full((4, 16), 0.1))

        def forward(self, values, layout):
            return (values * self.w).sum((1, 2))[:, None]

    network = Linear()
    object.__setattr__(gan.parts, "discriminator", network)
    gan.optimizers["discriminator"] = Optimizers(network, OptimizerConfig(muon=False))
    tokens = gan.model.modality.pack(torch.rand(4000, 1, 8, 8))
    streams = Streams(("penalty",), range(4000))
    numbers = gan._discriminator_step(tokens.values, tokens.values, tokens.layout, streams)
    assert numbers["r1"].item() == pytest.approx(0.64, abs=4 * 0.64 * (2 / 4000) ** 0.5)


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_fine_tuning_is_resumed_bitwise(source: Path, tmp_path: Path):
    whole = tuning(source, tmp_path / "whole", r1_weight=1.0, r1_every=2)
    assert whole.fit() == tmp_path / "whole" / "model"
    tuning(source, tmp_path / "parts", steps=3, r1_weight=1.0, r1_every=2).fit()
    (tmp_path / "parts" / "model" / "model.safetensors").unlink()
    rest = tuning(source, tmp_path / "parts", r1_weight=1.0, r1_every=2)
    assert rest.step == 3
    rest.fit()
    a, b = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name in ("discriminator", "decoder_optimizer", "discriminator_optimizer", "ema"):
        x, y = (load_file(tmp_path / run / "checkpoints" / "step_00000006" / f"{name}.safetensors")
                for run in ("whole", "parts"))  # fmt: skip
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), name


def test_fewer_steps_than_are_saved_are_named(source: Path, tmp_path: Path):
    tuning(source, tmp_path / "out", steps=3).fit()
    tuning(source, tmp_path / "out", steps=2).fit()
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("warning: steps=2, but step 3 is saved: nothing is left to train") == 1


def sharpened(run: Path) -> list[dict]:
    record = read_record(run / "model")
    assert record is not None
    return record.training["sharpened"]


def test_a_changed_rate_is_said_and_recorded(source: Path, tmp_path: Path):
    out, change = tmp_path / "out", {"step": 3, "setting": "learning_rate", "from": 2e-4, "to": 1e-3}
    tuning(source, out, steps=3).fit()
    tuning(source, out, learning_rate=1e-3, steps=5).fit()
    tuning(source, out, learning_rate=1e-3, steps=6).fit()
    assert (out / "log.txt").read_text().count("changed: learning_rate 0.0002 -> 0.001") == 1
    settings = (out / FINETUNED).read_text()
    assert settings.startswith("# from step 3: learning_rate 0.0002 -> 0.001\n") and "learning_rate: 0.001" in settings
    [record] = sharpened(out)
    assert record["changes"] == [change] and record["steps"] == 6
    tuning(source, out, learning_rate=5e-5, steps=6).fit()
    [record] = sharpened(out)
    assert record["changes"] == [change] and record["learning_rate"] == 1e-3, "no step was taken with another rate"


def test_a_sharpened_model_says_that_it_is(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    tuning(source, out, adversarial_weight=2).fit()
    [record] = sharpened(out)
    assert record["steps"] == 6 and "device" not in record and "threads" not in record
    stored = read_record(out / "model")
    assert stored is not None and stored.fingerprint == unilatent.load(out / "model").fingerprint()
    line = "- decoder: trained alone (`finetune-decoder`) for 6 steps of 8, with an adversary of weight 2"
    assert line in (out / "model" / "README.md").read_text()
    assert line in unilatent.load(out / "model").generate_model_card().text
    tuning(out / "model", tmp_path / "again", adversarial_weight=0).fit()
    assert [each["adversarial_weight"] for each in sharpened(tmp_path / "again")] == [2, 0]
    card = (tmp_path / "again" / "model" / "README.md").read_text()
    assert line in card and "for 6 steps of 8, without an adversary" in card


def test_the_help_names_every_setting():
    words = set(re.findall(r"\w+", finetune_decoder.run.__doc__ or ""))
    assert words >= DecoderGANConfig.model_fields.keys()


def test_what_cannot_be_sharpened_or_gone_on_with_is_refused(source: Path, tmp_path: Path):
    tuning(source, tmp_path / "out", steps=3).fit()
    with pytest.raises(ConfigError, match=r"adversarial_weight: 0\.3, but .* was trained with 0\.5"):
        tuning(source, tmp_path / "out", adversarial_weight=0.3)
    assert tuning(source, tmp_path / "out", learning_rate=1e-5).step == 3, "a lower rate may go on"
    other = tmp_path / "other"
    model = unilatent.load(source)
    model.decoder.out.weight.data += 1
    model.save_pretrained(other)
    with pytest.raises(ConfigError, match="are of another model"):
        tuning(other, tmp_path / "out")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a run or model; choose a folder of its own"):
        tuning(source, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run or model"):
        tuning(source, source)
    with pytest.raises(ConfigError, match="device: 'gpu' is unknown or not supported; this machine has cpu"):
        tuning(source, tmp_path / "new", device="gpu")
    stepped = tmp_path / "stepped"
    first = preset("digits-ul").first
    assert first is not None
    LatentModel.build(first.model()).save_pretrained(stepped)
    with pytest.raises(ConfigError, match="cannot be sharpened"):
        tuning(stepped, tmp_path / "new")


def test_a_step_that_is_not_finite_ends_it_and_nothing_of_it_is_saved(source: Path, tmp_path: Path):
    gan = tuning(source, tmp_path / "out", steps=4, log_every=100, checkpoint_every=1)
    whole, taken = gan.take_step, []

    def broken(batch, rows):
        result = whole(batch, rows)
        taken.append(rows)
        if len(taken) == 3:
            result["loss/discriminator"] = torch.tensor(float("nan"))
        return result

    gan.take_step = broken  # type: ignore[method-assign]
    with pytest.raises(
        FloatingPointError, match="step 3: loss/discriminator is not finite; the same command with a lower"
    ):
        gan.fit()
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]
    assert tuning(source, tmp_path / "out", steps=4, learning_rate=1e-5).step == 2
    gan.parts.decoder.out.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"decoder out\.bias is not finite"):
        gan.save()


def test_given_parts_are_shown_to_the_decoder_as_in_training(tmp_path: Path):
    run = preset("digits").override("given={}")
    torch.manual_seed(0)
    model = LatentModel.build(run.model().with_data(splits()))
    model.save_pretrained(tmp_path / "given")
    gan = tuning(tmp_path / "given", tmp_path / "out")
    images = torch.rand(64, 1, 8, 8)
    made = gan.parts.predict(images, Streams(("sharpen", 0, 0), range(64)))
    tokens = gan.model.modality.pack(images).values
    share = (made == tokens).float().mean((1, 2))
    assert (share == 0).any() and ((share > 0) & (share < 1)).any()


def test_the_noise_of_a_step_is_a_function_of_its_number(source: Path, tmp_path: Path):
    gan = tuning(source, tmp_path / "out")
    images = torch.rand(4, 1, 8, 8)
    a, b, c = (gan.parts.predict(images, Streams(("sharpen", 0, step), range(4))) for step in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
