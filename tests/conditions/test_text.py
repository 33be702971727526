"""Texts as a condition: their values, padding that is never read, an effect on the networks, and unusual input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unilatent.batches import collate
from unilatent.conditions.base import Conditions
from unilatent.conditions.text import Text, TextConfig
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.model_config import ModelConfig
from unilatent.nets import branches
from unilatent.nets.backbones import UViTConfig, ViTConfig, make_backbone
from unilatent.nets.byte_encoder import count_pieces
from unilatent.nets.layers import Repeated
from unilatent.registry import find
from unilatent.sampling import sample, sample_batches
from unilatent.types import Batch, Conditioning, decode_texts, encode_texts, grid_layout, join_values

D = 32
PICTURES = find("modalities", "image")(find("modalities", "image").Config.small())
PROMPTS = ["a", "a small red circle", "", "日本 ✓", "two blue squares"]
METHODS = ["unite", "unified_latents", "latent_diffusion"]
FAST: dict[str, Any] = {"num_inference_steps": 2, "decoder_steps": 2, "solver": "euler"}


def conditions_of(dim: int = D, **changes: Any) -> Conditions:
    torch.manual_seed(0)
    return Conditions({"text": TextConfig.small().model_copy(update=changes)}, dim)


def awake(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights where initialisation has zeros, so that nothing is trivially equal."""
    for p in module.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return module


def model_with(method: str, *names: str, seed: int = 0, **changes: Any) -> LatentModel:
    """Images of digits; `names`: conditions, in their small sizes; changes: to the text's."""
    own = find("methods", method).Config.small()
    if "tokenizer_model" in type(own).model_fields:
        tokenizer = ModelConfig(modality=PICTURES.config, method=find("methods", "unite").Config.small())
        own = own.model_copy(update={"tokenizer_model": tokenizer.plain()})
    configs = {name: find("conditions", name).Config.small() for name in names}
    if "text" in configs:
        configs["text"] = configs["text"].model_copy(update=changes)
    torch.manual_seed(seed)
    model = LatentModel.build(ModelConfig(modality=PICTURES.config, conditions=configs, method=own))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return model


def batch_with(n: int, prompts: list[str] = PROMPTS) -> Batch:
    splits = PICTURES.splits(PICTURES.DataConfig.small())
    samples = [(splits.train[i][0], {"prompts": prompts[i % len(prompts)], "labels": i % 10}) for i in range(n)]
    return collate(samples, PICTURES)


# ---- values --------------------------------------------------------------------------------------------------------


def test_texts_are_bytes_with_zeros_behind():
    values = encode_texts(PROMPTS)
    assert values.dtype == torch.uint8 and values.shape == (5, 18)
    assert values[0].tolist() == [97] + [0] * 17 and not values[2].any()
    assert decode_texts(values) == PROMPTS
    assert encode_texts(["", ""]).shape == (2, 1)
    assert decode_texts(encode_texts(["a\0b", "x\ud800"])) == ["a b", "x?"]
    assert decode_texts(encode_texts(["日本"])[:, :4]) == ["日"]


def test_collate_and_join_take_texts_of_any_length():
    batch = batch_with(4)
    assert decode_texts(batch.values["prompts"]) == PROMPTS[:4] and batch.values["labels"].tolist() == [0, 1, 2, 3]
    joined = join_values([encode_texts(["ab", "c"]), encode_texts(["defg"])])
    assert decode_texts(joined) == ["ab", "c", "defg"]


# ---- embedding -----------------------------------------------------------------------------------------------------


def rows(cond: Conditioning, i: int) -> list[Tensor]:
    """The vector, tokens and mask of a row, padded to 40 tokens."""
    cond = cond.padded(40)
    assert cond.tokens is not None and cond.mask is not None
    return [cond.vector[i], cond.tokens[i], cond.mask[i]]


def test_the_empty_text_is_no_condition_exactly():
    conditions = awake(conditions_of())
    values = {"prompts": encode_texts(PROMPTS)}
    cond, null = conditions(values), conditions.null(5)
    for i, text in enumerate(PROMPTS):
        equal = all(torch.equal(a, b) for a, b in zip(rows(cond, i), rows(null, i), strict=True))
        assert equal == (text == "")


def test_a_batch_of_unequal_texts_equals_them_one_by_one_and_padding_is_not_seen():
    text = awake(conditions_of())["text"]
    cond = text.embed(encode_texts(PROMPTS))
    wider = text.embed(torch.nn.functional.pad(encode_texts(PROMPTS), (0, 100)))
    for i, prompt in enumerate(PROMPTS):
        alone = text.embed(encode_texts([prompt]))
        assert rows(cond, i)[2].sum() == max(1, count_pieces(prompt))
        for one, same, padded in zip(rows(alone, 0), rows(cond, i), rows(wider, i), strict=True):
            torch.testing.assert_close(one, same, atol=1e-5, rtol=0)
            torch.testing.assert_close(one, padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("words", "length"), [(0, 16), (3, 16), (16, 16), (17, 32), (39, 40), (60, 40)])
def test_tokens_are_as_many_as_the_longest_text_has_in_steps(words: int, length: int):
    text = conditions_of(max_length=40)["text"]
    cond = text.embed(encode_texts(["a b", "word " * words]))
    assert cond.tokens is not None and cond.tokens.shape == (2, length, D)
    assert cond.mask is not None and cond.mask.sum(1).tolist() == [2, min(max(words, 1), 40)]
    assert text.null(2).tokens.shape == (2, 1, D)


def test_bytes_and_their_order_matter():
    text = awake(conditions_of())["text"]
    a, b, c = (text.embed(encode_texts([t])).vector for t in ("red blue", "blue red", "red blua"))
    assert min((x - y).abs().max() for x, y in ((a, b), (a, c), (b, c))) > 1e-3


def test_captions_are_cut_and_longer_prompts_refused():
    text = conditions_of(max_length=3)["text"]
    long, short = text.embed(encode_texts(["one two three four"])), text.embed(encode_texts(["one two three"]))
    assert torch.equal(long.vector, short.vector)
    assert text.parse("one two three").shape == (1, 13)
    with pytest.raises(ValueError, match=r"four'... has 4 words and marks, but this model reads at most 3"):
        text.parse("one two three four")


@pytest.mark.parametrize("wrong", [3, [3], None, [None], [["a"]]], ids=repr)
def test_only_texts_are_prompts(wrong: Any):
    with pytest.raises(ValueError, match=r"^prompts: .*give strings"):
        conditions_of()["text"].parse(wrong)


def test_examples_come_from_the_data():
    assert TextConfig().with_data(examples=["a", "b"]).examples == ("a", "b")
    assert TextConfig(examples=("c",)).with_data(examples=["a"]).examples == ("c",)
    assert Text(TextConfig(), D).example(2).tolist() == [[0], [0]]


def test_only_texts_give_tokens():
    assert conditions_of().give_tokens and not Conditions({}, D).give_tokens


# ---- networks ------------------------------------------------------------------------------------------------------

BACKBONES = {
    "vit": ViTConfig(width=D, depth=2, heads=2),
    "uvit": UViTConfig(channels=(16, D), blocks=(1, 2), transformers=2, patch=1, strides=(2,), heads=4, dropout=0.0),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_networks_hear_texts_and_not_their_padding(kind: str, monkeypatch: pytest.MonkeyPatch):
    conditions = awake(conditions_of())
    network = awake(make_backbone(BACKBONES[kind], 3, 2, reads_tokens=True))
    layout, z, t = grid_layout((4, 4)), torch.randn(5, 16, 3), torch.rand(5)
    cond = conditions({"prompts": encode_texts(PROMPTS)})
    out = network(z, layout, t, cond)
    assert out.shape == z.shape
    for i in range(5):
        one = conditions({"prompts": encode_texts(PROMPTS[i : i + 1])})
        torch.testing.assert_close(network(z[i : i + 1], layout, t[i : i + 1], one)[0], out[i], atol=1e-5, rtol=0)
    said = Conditioning(cond.vector, cond.tokens.flip(0), cond.mask.flip(0))  # the same vectors, other tokens
    assert (network(z, layout, t, said) - out).abs().amax((1, 2))[[0, 1, 3, 4]].min() > 1e-5
    shouted = Conditioning(cond.vector, cond.tokens.masked_fill(~cond.mask[..., None], 9.0), cond.mask)
    monkeypatch.setattr(branches, "on_cpu", lambda x: False)  # as on a GPU: padding is not trimmed
    torch.testing.assert_close(network(z, layout, t, shouted), out, atol=1e-5, rtol=0)


def test_a_network_without_tokens_has_no_weights_for_them():
    for config in BACKBONES.values():
        plain, told = (dict(make_backbone(config, 3, 2, reads_tokens=a).named_parameters()) for a in (False, True))
        assert plain.keys() <= told.keys() and all(".tokens." in key for key in told.keys() - plain.keys())
        with pytest.raises(AssertionError):
            make_backbone(config, 3, 2)(torch.randn(1, 16, 3), grid_layout((4, 4)), torch.rand(1),
                                        conditions_of().null(1))  # fmt: skip


# ---- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_class_and_text_together_train_every_weight(method: str):
    model, batch = model_with(method, "class_label", "text"), batch_with(20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        parts = []
        for part in model.loss(batch, Streams(("train", 0), range(20))):
            part.value.backward()
            part.close()
            parts.append(part.value.item())
        silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert step or not silent, "weights that nothing trains"
        optimizer.step()
        losses.append(sum(parts))
    assert all(math.isfinite(loss) for loss in losses) and len(set(losses)) == 3


def test_losses_in_bfloat16_and_recomputed_are_near_the_exact_ones():
    model, batch = model_with("unite", "text"), batch_with(6)

    def loss() -> float:
        return sum(part.value.item() for part in model.loss(batch, Streams(("train", 0), range(6))))

    exact = loss()
    for module in model.modules():
        if isinstance(module, Repeated):
            module.recompute = True
    with torch.autocast("cpu", torch.bfloat16):
        assert loss() == pytest.approx(exact, rel=0.03)
    assert loss() == exact


@pytest.mark.parametrize("method", METHODS)
def test_samples_follow_prompts_one_by_one_and_lead_away_from_negative_ones(method: str):
    model = model_with(method, "class_label", "text").eval()
    asked = {"labels": [3], "prompts": PROMPTS, "guidance_scale": 2.0, **FAST}
    whole = sample(model, 5, **asked)
    for i in range(5):
        (alone,) = sample_batches(model, 5, start=i, stop=i + 1, **asked)
        torch.testing.assert_close(alone.data[0], whole[i], atol=1e-5, rtol=0)
    other = sample(model, 5, **{**asked, "prompts": ["a", "a small green circle", "", "日本 ✓", "two blue squares"]})
    assert ((whole - other).abs().amax((1, 2, 3)) > 1e-5).tolist() == [False, True, False, False, False]
    assert torch.equal(sample(model, 5, negative_prompts="", **asked), whole)
    away = sample(model, 5, negative_prompts=["grey", "a"], **asked)
    assert (whole - away).abs().amax((1, 2, 3)).min() > 1e-5
    unguided = {**asked, "guidance_scale": 1.0}
    assert torch.equal(sample(model, 5, negative_prompts="grey", **unguided), sample(model, 5, **unguided))


def test_prompts_of_a_model_that_has_none_are_refused():
    model = model_with("unite", "class_label").eval()
    for keyword in ("prompts", "negative_prompts"):
        with pytest.raises(ValueError, match=f"{keyword}: this model has no such condition; it takes labels"):
            sample(model, 1, **{keyword: "a"})


ODD = {
    "nothing": "", "one letter": "x", "emoji": "🟥👩‍👩‍👧🏽", "right to left": "دائرة حمراء",
    "both ways": "a \u202eb\u202c c",
    "control": "\a\b\t\n\x1b[31m\x7f\0", "half a pair": "\ud83d", "no character": "\uffff\ufeff",
}  # fmt: skip


def test_c_whatever_people_write_is_sampled():
    model = model_with("unite", "text", max_length=40).eval()
    made = sample(model, len(ODD), prompts=list(ODD.values()), guidance_scale=2.0, **FAST)
    assert made.isfinite().all() and len(made) == len(ODD)


def test_c_ten_thousand_letters_are_one_line():
    with pytest.raises(ValueError, match="has 1250 words and marks, but this model reads at most 24") as error:
        sample(model_with("unite", "text").eval(), 1, prompts="é" * 5000, **FAST)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    huge = batch_with(2, ["x" * 10_000, "y"])
    parts = list(model_with("unite", "text").loss(huge, Streams(("train", 0), range(2))))
    assert all(part.value.isfinite() for part in parts)


def test_reconstruction_does_not_depend_on_texts():
    """The tokenizer is unconditional: its latents do not depend on the prompts of a batch."""
    model = model_with("unite", "text").eval()
    data = batch_with(3).data
    assert torch.equal(model.encode(data)[:1], model.encode(data)[:1])
    torch.testing.assert_close(model.encode(data[1:], start=1), model.encode(data)[1:], atol=1e-5, rtol=0)


# ---- what is cut ---------------------------------------------------------------------------------------------------


def test_texts_that_lose_their_ends_are_counted():
    text = conditions_of(max_length=4)["text"]
    assert text.remarks([]) == text.remarks(["one two three four", "", "a, b, "]) == []
    (line,) = text.remarks(["one two three four five", "one", "x" * 33, "x" * 32])  # pieces of eight letters
    assert line == (
        "prompts: 2 of 4 captions looked at (50 %) have more than the 4 words and marks that the model reads, up to 5; "
        "their ends are cut. Raise conditions.text.max_length in a new run, or shorten them"
    )
    assert find("conditions", "class_label")(find("conditions", "class_label").Config.small(), D).remarks([1, 2]) == []
