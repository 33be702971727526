"""Networks that the first process reads, fits or loads for all, and work that processes take from one list (gloo)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from building import batch_of, model_of, splits_of
from gloo_ranks import run_in_ranks
from torch import nn

from unilatent.config import ConfigError
from unilatent.evaluation.evaluate import fit, prepare
from unilatent.modalities._media import losses
from unilatent.modalities.base import Space
from unilatent.modalities.image.spaces import ClassifierSpace, Pixels
from unilatent.nets.text_encoder import DESCRIBED, TextEncoder, describe, share_description
from unilatent.pretrained import fingerprint
from unilatent.processes import Processes
from unilatent.records import MemoryRows

CPU = torch.device("cpu")


class Odd(nn.Module):
    """Weights that two names share, of several types and layouts; buffers that are not stored; a tag."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Linear(40, 40), nn.Linear(40, 40)
        self.two.weight = self.one.weight
        self.one.weight.uses_muon = True
        self.short = nn.Parameter(torch.randn(3, 8, 2, 2, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last), requires_grad=False)  # fmt: skip
        self.large = nn.Parameter(torch.randn(600, 600))
        self.register_buffer("table", torch.randint(9, (5,)), persistent=False)
        self.register_buffer("empty", torch.empty(0), persistent=False)
        self.register_buffer("counter", torch.tensor(seed))


def networks(processes: Processes) -> dict[str, Any]:
    """What `share` gives of a network alone and in a dict; rank 1 would make other ones."""
    made = []

    def make() -> dict[str, Any]:
        made.append(Odd(7 + processes.rank))
        return {"network": made[-1], "name": "odd", "numbers": torch.arange(3)}

    found = processes.share(make)
    alone = processes.share(lambda: Odd(3 + processes.rank))
    network = found["network"]
    assert processes.is_main == (network is (made[0] if made else None))
    return {
        "made": len(made), "hash": fingerprint(network), "alone": fingerprint(alone), "rest": (found["name"],
        found["numbers"].tolist(), network.table.tolist(), int(network.counter)), "tied": network.two.weight is
        network.one.weight, "tag": network.one.weight.uses_muon, "frozen": not network.short.requires_grad,
        "last": network.short.is_contiguous(memory_format=torch.channels_last), "device": str(network.large.device),
    }  # fmt: skip


def test_a_network_is_the_first_process_s_in_all(tmp_path: Path) -> None:
    first, other = run_in_ranks("test_shared_networks:networks", 2, tmp_path)
    assert (first.pop("made"), other.pop("made")) == (1, 0) and first == other
    assert first["hash"] == fingerprint(Odd(7)) and first["alone"] == fingerprint(Odd(3))
    assert first["tied"] and first["tag"] and first["frozen"] and first["last"] and first["device"] == "cpu"


def test_a_network_stays_where_it_is_in_a_single_process() -> None:
    network = Odd(1)
    assert Processes.alone().share(lambda: network) is network


def failing(processes: Processes) -> list[str]:
    """What each process is told of a network that the first one cannot read, and of what comes after."""

    def fail() -> nn.Module:
        raise ValueError("weights: torn; copy them again")

    told = []
    try:
        processes.share(fail)
    except ValueError as error:
        told += [type(error).__name__, str(error)]
    return [*told, fingerprint(processes.share(lambda: Odd(5 + processes.rank)))]


def test_a_network_that_cannot_be_read_is_refused_in_all(tmp_path: Path) -> None:
    told = run_in_ranks("test_shared_networks:failing", 2, tmp_path)
    reason = ["weights: torn; copy them again", fingerprint(Odd(5))]
    assert told == [["ValueError", *reason], [ConfigError.__name__, *reason]]


# ---- what an evaluation and a loss load ------------------------------------------------------------------------------


class Loaded(Space):
    """An extractor with weights that are downloaded."""

    name = "loaded"
    needs_download = True
    loaded = ("network",)

    def __init__(self) -> None:
        self.times = 0

    def prepare(self, device: torch.device) -> None:
        self.times += 1
        self.network = Odd(11).to(device)
        self.weights = fingerprint(self.network)

    def __call__(self, data: Any) -> dict[str, torch.Tensor]:
        return {"loaded": self.network.one(data)}


def evaluated(processes: Processes) -> dict[str, Any]:
    """Two extractors and the perceptual network, of which each process says how often it loaded or fitted them."""
    loaded, classifier, fitted = Loaded(), ClassifierSpace(), []
    pixels = Pixels()
    prepare([loaded, classifier], CPU, processes)
    data = batch_of("image", 60)
    rows = MemoryRows({**pixels(data.data), "labels": data.values["labels"]})
    original = ClassifierSpace.fit

    def counted(space: ClassifierSpace, train: Any) -> None:
        fitted.append(len(train))
        original(space, train)

    with mock.patch.object(ClassifierSpace, "fit", counted):
        for space in (pixels, classifier):
            fit(space, rows, CPU, processes)
    read = []

    def load(path: str | None) -> nn.Module:
        read.append(path)
        return Odd(2)

    with mock.patch("unilatent.nets.lpips.LPIPS.load", load):
        for _ in range(2):
            losses.prepare("weights.pth", CPU, processes)
    perceptual = losses.lpips("weights.pth", CPU)
    return {
        "loaded": loaded.times, "fitted": fitted, "read": read, "features": classifier(data.data),
        "hashes": (loaded.weights, fingerprint(loaded.network), classifier.weights, fingerprint(perceptual)),
        "kept": perceptual is losses.LOADED["weights.pth", CPU, torch.float32],
    }  # fmt: skip


def test_one_process_loads_and_fits_the_extractors_and_the_perceptual_network(tmp_path: Path) -> None:
    first, other = run_in_ranks("test_shared_networks:evaluated", 2, tmp_path)
    assert (first.pop("loaded"), first.pop("fitted"), first.pop("read")) == (1, [60], ["weights.pth"])
    assert (other.pop("loaded"), other.pop("fitted"), other.pop("read")) == (0, [], [])
    alone, data = ClassifierSpace(), batch_of("image", 60)
    alone.fit(MemoryRows({**Pixels()(data.data), "labels": data.values["labels"]}))
    for features in (first.pop("features"), other.pop("features")):
        for name, values in alone(data.data).items():
            assert torch.equal(features[name], values), name
    assert first == other and first["kept"]
    assert first["hashes"] == (*[fingerprint(Odd(11))] * 2, alone.weights, fingerprint(Odd(2)))


@pytest.mark.parametrize("modality", ["image", "video", "molecule", "crystal", "joint"])
def test_what_extractors_find_out_is_all_that_another_process_needs(modality: str) -> None:
    """Each is fitted here, and an untouched one that adopts its state gives the same features."""
    kind = type(model_of(modality, "unite").modality)
    data = batch_of(modality, 12)
    spaces, others = (kind(model_of(modality, "unite").modality.config).spaces() for _ in range(2))
    known: dict[str, torch.Tensor] = dict(data.values)
    for space, other in zip(spaces, others, strict=True):
        if space.needs_download or space.on_request:
            continue
        space.prepare(CPU)
        other.prepare(CPU)
        space.fit(MemoryRows(known))
        other.adopt(space.state(space.fitted), CPU)
        assert (space.weights, space.silent) == (other.weights, other.silent), space.name
        if space.silent or space.compares:
            continue
        features = space(data.data)
        for name, values in other(data.data).items():
            torch.testing.assert_close(values, features[name], rtol=0, atol=0, equal_nan=True)
        known |= features
    assert splits_of(modality).train


# ---- models and text encoders ----------------------------------------------------------------------------------------


def models(processes: Processes) -> dict[str, Any]:
    """A model of each process's own weights, and what it makes of the same latents after it was shared."""
    torch.manual_seed(processes.rank)
    model = processes.share(lambda: model_of("image", "unified_latents", awake=True).eval())
    return {"hash": model.fingerprint(), "latents": model.encode(batch_of("image", 4).data, seed=1),
            "precision": model.precision, "training": model.training}  # fmt: skip


def test_a_model_is_the_first_process_s_in_all(tmp_path: Path) -> None:
    first, other = run_in_ranks("test_shared_networks:models", 2, tmp_path)
    assert torch.equal(first.pop("latents"), other.pop("latents")) and first == other
    assert not first["training"]


def text_encoders(processes: Processes, folder: str) -> dict[str, Any]:
    """What each process reads of a pretrained encoder, and the embeddings that it gives."""
    from unilatent.nets import text_encoder
    from unilatent.types import encode_texts

    read: list[str] = []
    load = text_encoder._load

    def counted(what: str, *arguments: Any) -> Any:
        read.append(what)
        return load(what, *arguments)

    with mock.patch.object(text_encoder, "_load", counted):
        share_description(folder, None, processes)
        encoder = TextEncoder(folder, None, 12, cache=True)
        encoder.prepare(processes)
        known = len(encoder.cache.entries)
    return {"read": read, "hash": describe(folder).hash, "same": DESCRIBED[folder, None].width, "known": known,
            "tokens": encoder(encode_texts(["a red circle"]), CPU)[0]}  # fmt: skip


def test_one_process_reads_a_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("UNILATENT_CACHE", str(tmp_path / "cache"))
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5}
    folder = tmp_path / "t5"
    transformers.T5EncoderModel(transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=6, pad_token_id=0, eos_token_id=1,
    )).save_pretrained(folder)  # fmt: skip
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder
    )
    first, other = run_in_ranks("test_shared_networks:text_encoders", 2, tmp_path, str(folder))
    assert sorted(first.pop("read")) == ["AutoConfig", "AutoTokenizer", "text model"] and other.pop("read") == []
    assert torch.equal(first.pop("tokens"), other.pop("tokens")) and first == other and first["known"] == 0
    again, beside = run_in_ranks("test_shared_networks:text_encoders", 2, tmp_path, str(folder))
    assert sorted(again["read"]) == ["AutoConfig", "AutoTokenizer"] and beside["read"] == [], "the text is kept"
    assert again["known"] == beside["known"] == 1, "under one key, whichever process kept it"


# ---- shared work -----------------------------------------------------------------------------------------------------


def taken(processes: Processes) -> dict[str, Any]:
    """Items that this process takes of two lists and of a fixed share; the second process takes none of the second."""
    first, second = processes.shared(range(40)), processes.shared(range(9))
    fixed = processes.shared(range(7), fixed=True)
    mine = [item for item in first if first.add(2) >= 2]
    processes.wait()
    if processes.rank == 1:
        rest: list[int] = []
    else:
        rest = list(second)
    processes.wait()
    third = processes.shared(range(30))
    if processes.is_main:
        third.stop()
    processes.wait()
    return {"first": mine, "done": first.add(0), "second": rest, "third": list(third), "fixed": list(fixed)}


def test_each_item_is_taken_by_one_process(tmp_path: Path) -> None:
    first, other = run_in_ranks("test_shared_networks:taken", 2, tmp_path)
    assert sorted(first["first"] + other["first"]) == list(range(40)) and first["done"] == other["done"] == 80
    assert first["second"] == list(range(9)) and other["second"] == []
    assert first["third"] == other["third"] == []
    assert (first["fixed"], other["fixed"]) == ([0, 2, 4, 6], [1, 3, 5])


def test_a_single_process_takes_all_items() -> None:
    work = Processes.alone().shared(range(3))
    assert list(work) == [0, 1, 2] and work.add(5) == 5 and list(work) == []
