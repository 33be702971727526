"""Frozen text encoders of the `transformers` package, tiny and with random weights, and the cache of their output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unilatent.conditions.base import Conditions
from unilatent.conditions.text import TextConfig
from unilatent.nets import text_encoder
from unilatent.nets.text_encoder import ENTRY, EmbeddingCache, TextEncoder
from unilatent.processes import Processes
from unilatent.types import Batch, decode_texts, encode_texts

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

D, WORDS = 24, ["a", "small", "red", "circle", "two", "blue", "squares", "left", "of"]
CPU = torch.device("cpu")
PROMPTS = ["a", "a small red circle left of two blue squares", "", "two squares"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clear all caches between tests."""
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    text_encoder.DESCRIBED.clear()
    text_encoder.text_encoder.cache_clear()
    return tmp_path / "cache" / "embeddings"


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as `save_pretrained` writes them."""
    from transformers import CLIPTextConfig, CLIPTextModel, Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: i for i, word in enumerate(WORDS, 3)}
    sizes: dict[str, Any] = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    torch.manual_seed(0)
    models = {
        "t5": T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **sizes)),
        "clip": CLIPTextModel(CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16,
            max_position_embeddings=12, **sizes,
        )),
        "gemma": Gemma2Model(Gemma2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, **sizes,
        )),
    }  # fmt: skip
    folders = {}
    for name, model in models.items():
        folder = folders[name] = tmp_path_factory.mktemp("encoders") / name
        model.save_pretrained(folder)
        core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
        core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        core.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
        ).save_pretrained(folder)
    return folders


def config_of(folder: Path, **changes: Any) -> TextConfig:
    return TextConfig(encoder=str(folder), max_length=12, **changes).with_data()


def conditions_of(folder: Path, **changes: Any) -> Conditions:
    torch.manual_seed(0)
    return Conditions({"text": config_of(folder, **changes)}, D)


@pytest.mark.parametrize("kind", ["t5", "clip", "gemma"])
def test_a_batch_equals_its_texts_one_by_one_and_weights_stay_outside(kind: str, encoders: dict[str, Path]):
    conditions = conditions_of(encoders[kind], cache=False)
    conditions.prepare()
    assert not any("encoder" in key or "bytes" in key for key in conditions.state_dict())
    assert sum(p.numel() for p in conditions.parameters()) == 2 * (16 + 16 * D + D + D)
    cond = conditions({"prompts": encode_texts(PROMPTS)})
    assert cond.tokens is not None and cond.mask is not None
    assert cond.tokens.shape == (4, 12, D) and cond.mask.sum(1).tolist() == [2, 10, 1, 3]
    null = conditions.null(4)
    assert torch.equal(cond.vector[2], null.vector[2]) and torch.equal(cond.tokens[2, :1], null.tokens[2])
    for i, prompt in enumerate(PROMPTS):
        one = conditions({"prompts": encode_texts([prompt])})
        torch.testing.assert_close(one.vector[0], cond.vector[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(one.tokens[0], cond.tokens[i], atol=1e-5, rtol=0)
        assert torch.equal(one.mask[0], cond.mask[i])
    assert (cond.vector[0] - cond.vector[1]).abs().max() > 1e-4


def test_e_what_is_kept_is_the_same_and_needs_no_network(encoders: dict[str, Path], own_cache: Path):
    values = encode_texts(PROMPTS)
    first = TextEncoder(str(encoders["t5"]), None, 12, cache=True)
    made = first(values, CPU)
    assert first.network is not None and list(own_cache.rglob("*.rows"))
    again = TextEncoder(str(encoders["t5"]), None, 12, cache=True)
    kept = again(values.flip(0), CPU)
    assert again.network is None, "the network was loaded although every text is kept"
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(made, kept, strict=True))
    again(encode_texts(["blue"]), CPU)
    assert again.network is not None
    other = TextEncoder(str(encoders["t5"]), None, 4, cache=True)  # another length reads other tokens
    assert other(values, CPU)[1].sum(1).max() == 4


def test_entries_that_a_kill_left_half_written_are_made_again(encoders: dict[str, Path], own_cache: Path):
    encoder = TextEncoder(str(encoders["t5"]), None, 12, cache=True)
    made = encoder(encode_texts(PROMPTS[:2]), CPU)
    assert encoder.cache is not None
    index = encoder.cache.path.with_suffix(".index")
    index.write_bytes(index.read_bytes() + b"half an entry")
    assert len(EmbeddingCache(encoder.cache.folder, 16).entries) == 2
    with encoder.cache.path.open("r+b") as file:
        file.truncate(4 * 16 * 3)  # the rows of the first text alone
    fresh = TextEncoder(str(encoders["t5"]), None, 12, cache=True)
    assert fresh.cache is not None and len(fresh.cache.entries) == 1
    for a, b in zip(fresh(encode_texts(PROMPTS[:2]), CPU), made, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert index.stat().st_size > 2 * ENTRY.size


def test_a_full_disk_costs_the_cache_and_one_warning(encoders: dict[str, Path], own_cache: Path):
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file where the folder should be")
    encoder = TextEncoder(str(encoders["t5"]), None, 12, cache=True)
    with pytest.warns(UserWarning, match="embeddings of new texts are not cached"):
        first = encoder(encode_texts(["a"]), CPU)
    again = encoder(encode_texts(["a"]), CPU)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_loading_moves_no_random_number(encoders: dict[str, Path]):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    conditions = Conditions({"text": config_of(encoders["clip"])}, D)
    torch.manual_seed(5)
    conditions({"prompts": encode_texts(["a"])})
    assert torch.equal(torch.rand(3), expected)


def test_longer_prompts_are_refused_in_tokens(encoders: dict[str, Path]):
    text = conditions_of(encoders["t5"])["text"]
    assert decode_texts(text.parse("a small red circle left of two")) == ["a small red circle left of two"]
    with pytest.raises(ValueError, match="has 10001 tokens, but this model reads at most 12") as error:
        text.parse("a " * 10_000)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNILATENT_OFFLINE", "1")
    for source in (str(tmp_path / "nowhere"), "somebody/an-encoder-that-is-not-cached"):
        with pytest.raises(ValueError, match=f"^conditions.text.encoder: {source} cannot be loaded") as error:
            TextConfig(encoder=source).with_data()
        assert "encoder=null" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"max_length: 40, .* at most 12 tokens; set conditions.text.max_length=12"):
        TextConfig(encoder=str(encoders["clip"]), max_length=40).with_data()
    monkeypatch.setitem(sys.modules, "transformers", None)
    text_encoder.DESCRIBED.clear()
    with pytest.raises(ValueError, match=r"needs the package transformers: pip install 'unilatent\[text\]'"):
        TextConfig(encoder=str(encoders["t5"])).with_data()


def test_an_incomplete_or_another_encoder_is_refused(encoders: dict[str, Path], tmp_path: Path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(encoders["t5"], tmp_path / "t5"))
    config = config_of(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.final_layer_norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text_encoder.DESCRIBED.clear()
    with pytest.raises(ValueError, match="is not the one this model was trained with"):
        Conditions({"text": config}, D).prepare()
    text_encoder.DESCRIBED.clear()
    with pytest.raises(ValueError, match=r"lacks 1 tensor, for example encoder.final_layer_norm.weight"):
        Conditions({"text": config_of(folder)}, D).prepare()


def test_weights_in_pickles_are_refused_before_a_pickle_is_opened(encoders: dict[str, Path], tmp_path: Path):
    """Two folders that differ only in pytorch_model.bin would have the same hash and share a cache."""
    import shutil

    from safetensors.torch import load_file

    folder = Path(shutil.copytree(encoders["t5"], tmp_path / "t5"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    encoder = TextEncoder(str(folder), None, 12, cache=True)
    with pytest.raises(
        ValueError, match=r"has no model.safetensors, and weights in other formats are not read"
    ) as told:
        encoder.prepare()
    assert "save_pretrained" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json"])
def test_what_is_missing_is_named_before_training_though_texts_are_kept(
    lost: str, encoders: dict[str, Path], tmp_path: Path
):  # fmt: skip
    import shutil

    folder = Path(shutil.copytree(encoders["t5"], tmp_path / "t5"))
    first = TextEncoder(str(folder), None, 12, cache=True)
    first(encode_texts(["a"]), CPU)
    again = TextEncoder(str(folder), None, 12, cache=True)
    again.prepare()
    assert again.network is None, "weights were loaded although a text is kept"
    (folder / lost).unlink()
    again.tokenizer = None
    with pytest.raises(ValueError, match=r"^conditions.text.encoder: .*t5 (has no model.safetensors|cannot be loaded)"):
        again.prepare()


def test_a_lost_part_of_weights_is_named(encoders: dict[str, Path], tmp_path: Path):
    import shutil

    folder = Path(shutil.copytree(encoders["t5"], tmp_path / "t5"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ValueError, match=r"has no model-00001-of-00002.safetensors; copy it there"):
        TextEncoder(str(folder), None, 12, cache=False).prepare()


def test_a_model_is_built_and_encodes_without_its_encoder(encoders: dict[str, Path], tmp_path: Path):
    config = config_of(encoders["t5"]).model_copy(update={"encoder": str(tmp_path / "moved")})
    conditions = Conditions({"text": config}, D)
    assert conditions.null(2).tokens is not None
    with pytest.raises(ValueError, match="moved cannot be loaded"):
        conditions({"prompts": encode_texts(["a"])})
    with pytest.raises(ValueError, match="encoder_width: unknown"):
        Conditions({"text": TextConfig(encoder="x/y")}, D)
    assert TextConfig(encoder="x/y").example().encoder_width == 768


def test_a_step_can_be_estimated_without_reading_a_text(encoders: dict[str, Path]):
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = config_of(encoders["t5"])
    with FakeTensorMode():
        cond = Conditions({"text": config}, D)({"prompts": torch.empty(3, 9, dtype=torch.uint8)})
    assert cond.tokens is not None and cond.tokens.shape == (3, 12, D)
    assert text_encoder.text_encoder(config.encoder, None, 12, True).network is None


def test_texts_that_are_kept_go_to_a_device_and_never_come_back(encoders: dict[str, Path]):
    """The meta device cannot be copied from, so it detects copies that would synchronise with a GPU."""
    conditions = conditions_of(encoders["t5"])
    batch = Batch(torch.rand(4, 3), {"prompts": encode_texts(PROMPTS), "labels": torch.arange(4)})
    conditions(batch.values)
    assert conditions.on_cpu == {"prompts"} and not Conditions({"text": TextConfig()}, D).on_cpu
    batch = batch.to("meta", staying=conditions.on_cpu)
    assert batch.data.is_meta and batch.values["labels"].is_meta and not batch.values["prompts"].is_meta
    cond = conditions.to("meta")(batch.values)
    assert cond.tokens is not None and cond.tokens.is_meta and cond.vector.shape == (4, D)


def test_many_files_at_rest_become_one(tmp_path: Path):
    def rows_of(i: int) -> np.ndarray:
        return np.full((2 + i % 3, 16), i, np.float32)

    for i in range(12):
        EmbeddingCache(tmp_path, 16).add({f"text {i}": rows_of(i)})
    for name in ("mine.rows", "mine.index", "1-backup.rows", "merged-old.rows"):
        (tmp_path / name).write_bytes(b"x" * 640)
    living = EmbeddingCache(tmp_path, 16)  # a process that writes, rests, and writes again
    living.add({"text 12": rows_of(12)})
    assert len(list(tmp_path.glob("*.rows"))) == 13 + 3 and len(EmbeddingCache(tmp_path, 16).entries) == 13, (
        "young files stay"
    )
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    merged = EmbeddingCache(tmp_path, 16)
    assert len(merged.entries) == 13 and len(list(tmp_path.iterdir())) == 2 + 4, "files of others stay"
    for kept in (merged, EmbeddingCache(tmp_path, 16)):
        for i in range(13):
            found = kept.get(f"text {i}")
            assert found is not None and np.array_equal(found, rows_of(i))
    assert living.get("text 3") is None, "what is gone for a process is made again, no error"
    living.add({"text 3": rows_of(3), "text 13": rows_of(13)})
    late = EmbeddingCache(tmp_path, 16)
    for kept in (living, late):
        found = kept.get("text 13")
        assert found is not None and np.array_equal(found, rows_of(13))
    assert np.array_equal(late.get("text 12"), rows_of(12))


@pytest.mark.parametrize("is_shared", [True, False])
def test_each_machine_reads_its_own_cache_unless_it_is_one(tmp_path: Path, is_shared: bool) -> None:
    """Two processes; the second gets what the first one found, if it can read its files."""
    first, other = (EmbeddingCache(tmp_path / name, 16) for name in ("a", "a" if is_shared else "b"))
    for number, cache in enumerate((first, other)):
        cache.folder.mkdir(exist_ok=True)
        EmbeddingCache(cache.folder, 16).add({f"text {number}": np.full((3, 16), number, dtype=np.float32)})

    class Other(Processes):
        def from_main(self, find: Callable[[], Any]) -> Any:
            return seen

    seen = first.entries
    if not is_shared:  # on a machine that has no such files
        first.folder.rename(tmp_path / "elsewhere")
    other.share(Other.alone())
    assert (other.entries is seen) == is_shared
    assert other.get("text 1") is not None and (other.get("text 0") is not None) == is_shared
