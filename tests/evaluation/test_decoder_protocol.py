"""The steps of a decoder are part of the protocol of its numbers; a decoder in one pass has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unilatent.conditions.class_label import ClassLabelConfig
from unilatent.evaluation.comparison import compare, read_evaluation
from unilatent.evaluation.evaluate import Evaluation, EvaluationRequest, Evaluator
from unilatent.evaluation.table import outline, write_evaluation
from unilatent.methods.base import LatentModel
from unilatent.methods.unified_latents import UnifiedLatentsConfig
from unilatent.methods.unite import UNITEConfig
from unilatent.modalities.image import ImageConfig, ImageData
from unilatent.model_config import ModelConfig
from unilatent.sampling import decoder_rows, encode, reconstruct

IMAGE = ImageConfig(size=8, patch_size=2, channels=1, flip=False)


def stepped(**fields: Any) -> LatentModel:
    """Return an untrained model; its decoder is a diffusion model by default."""
    method = UnifiedLatentsConfig.small().model_copy(update=fields)
    return LatentModel.build(ModelConfig(modality=IMAGE, method=method)).eval()


def evaluated(model: LatentModel, folder: Path, metrics: tuple[str, ...], **settings: Any) -> Evaluation:
    request = EvaluationRequest(metrics=metrics, num_samples=4, num_held_out=3, num_reference=8)
    splits = model.modality.splits(ImageData(path="digits", held_out=20))
    return Evaluator(model, splits, folder, request, **settings).run()


def test_two_numbers_of_decoder_steps_are_not_ranked(tmp_path: Path) -> None:
    """Reconstructions and samples in one folder of records: each number of steps has its own records and keys."""
    model, found = stepped(), []
    for steps in (2, 5):
        settings = {"decoder_steps": steps, "num_inference_steps": 3, "solver": "ddim"}
        found.append(evaluated(model, tmp_path, ("psnr", "frechet_pixels"), **settings))
    a, b = ({measured.row.key: measured for measured in one.numbers} for one in found)
    assert a["psnr"].key == "psnr3/adm/decoder-ddim-2" and b["psnr"].key == "psnr3/adm/decoder-ddim-5"
    assert a["frechet_pixels"].key == "frechet_pixels4/adm/ddim-3/cfg1/decoder-ddim-2"
    assert a["psnr"].row.value != b["psnr"].row.value, "the second took the first's records"
    for one, steps in ((a, 2), (b, 5)):
        assert one["psnr"].protocol.nfe == steps + 1, "a step each and the last clean estimate"
        assert one["frechet_pixels"].protocol.nfe == 3 + steps + 1
    assert f"{2 + 1} evaluations of the decoder per sample" in outline(a["psnr"].protocol)
    assert f"{3 + 2 + 1} evaluations of the denoiser and the decoder" in outline(a["frechet_pixels"].protocol)
    for name, one in zip("ab", found, strict=True):
        write_evaluation(one, tmp_path / f"{name}.json", {}, 0.0)
    for comparison in compare(*(read_evaluation(tmp_path / f"{name}.json") for name in "ab")):
        assert comparison.verdict.startswith("not comparable: ")
        assert ("decoding.decoder_steps", 2, 5) in comparison.differences


@pytest.mark.parametrize("kind", ["unite", "one pass"])
def test_a_decoder_in_one_pass_has_no_steps_to_tell(tmp_path: Path, kind: str) -> None:
    """Its keys and records do not contain steps, and the setting has no effect."""
    if kind == "unite":
        conditions = {"class_label": ClassLabelConfig(num_classes=10)}
        config = ModelConfig(modality=IMAGE, conditions=conditions, method=UNITEConfig.small())
        model = LatentModel.build(config).eval()
    else:
        model = stepped(decoder_loss="mse")
    one, other = (evaluated(model, tmp_path, ("psnr",), decoder_steps=n).find("psnr") for n in (2, 5))
    assert one == other and one.key == "psnr3/adm" and one.protocol.decoding is one.protocol.nfe is None
    (records,) = tmp_path.glob("reconstructions-*")
    assert "decoding" not in json.loads((records / "header.json").read_text())


def test_only_the_decoder_s_own_rows_are_counted() -> None:
    model = stepped()
    data = model.modality.splits(ImageData(path="digits")).train[0][0][None].repeat(3, 1, 1, 1)
    with decoder_rows(model) as seen:
        encode(model, data)
        assert seen["rows"] == 0
        reconstruct(model, data, decoder_steps=4, decoder_solver="heun")
    assert seen["rows"] == 3 * (2 * 4 + 1)
    reconstruct(model, data)
    assert seen["rows"] == 3 * (2 * 4 + 1), "counted on after the block"
