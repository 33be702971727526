"""What reading texts costs an epoch of training: a class, captions through kept embeddings of a frozen encoder, and
captions through the byte-level transformer.

python benchmarks/text_condition.py                       2,000 images of 32 x 32, batch 64, width 128, on the CPU
python benchmarks/text_condition.py --width 768 --depth 12 --size 256 --patch 16 --device cuda

The data are drawn scenes, as PNG files in class folders with a .txt of captions beside each, read and decoded for every
batch by the process that trains. Cases take turns, batch by batch, so that whatever else the machine does hits all of
them alike; on a CPU seconds are those of the process's own work. Each begins with two batches that are not counted.

Embeddings lie on disk before the epoch, as from the second epoch of a run on, and have the width of a t5-small and one
token a word; they come from a shallow one with random weights, as what makes them is not timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unilatent.batches import Plan, loader
from unilatent.conditions.class_label import ClassLabelConfig
from unilatent.conditions.text import TextConfig
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel
from unilatent.methods.unite import DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from unilatent.modalities.image import ImageConfig, ImageData, scenes
from unilatent.model_config import ModelConfig
from unilatent.training.config import OptimizerConfig
from unilatent.training.optimizer import Optimizers
from unilatent.training.parts import differentiate
from unilatent.types import Batch

BASE = "class"
UNCOUNTED = 2
LENGTH = 32
"""Tokens, or pieces, that are read: the longest caption has 18 words and marks."""


@dataclass
class Case:
    """step: trains on a batch. batches: endless as far as this benchmark goes. Seconds of reading, and of both."""

    step: Callable[[Batch, range], None]
    batches: Generator[Any, None, None]
    reading: float = 0.0
    all: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNILATENT_CACHE"] = f"{folder}/cache"
        make_data(Path(folder) / "data", options)
        kept = TextConfig(encoder=str(make_encoder(Path(folder) / "t5")), max_length=LENGTH).with_data()
        own = TextConfig(max_length=LENGTH)
        conditions: dict[str, dict[str, Any]] = {
            BASE: {},
            "captions, kept embeddings": {"text": kept},
            "captions, bytes": {"text": own},
        }
        steps = range(UNCOUNTED + options.images // options.batch)
        cases = {name: make_case(options, f"{folder}/data", chosen, steps) for name, chosen in conditions.items()}
        for number in steps:
            for case in cases.values():
                positions = range(number * options.batch, (number + 1) * options.batch)
                read, both = turn(case, positions, options.device)
                if number >= UNCOUNTED:
                    case.reading += read
                    case.all += both
        print(f"| condition | reading s | epoch s | over a {BASE} |\n| --- | --- | --- | --- |")
        for name, case in cases.items():
            print(f"| {name} | {case.reading:.1f} | {case.all:.1f} | {case.all / cases[BASE].all:.3f} x |")


def make_case(options: argparse.Namespace, path: str, conditions: dict[str, Any], steps: range) -> Case:
    """A model of one condition, and the batches that it sees; without one, of the class."""
    width, depth, heads = options.width, options.depth, max(1, options.width // 64)
    copies = 0 if conditions else 8  # of the class's vector, which as in the presets join where a text's tokens would
    encoder = GenerativeEncoderConfig(
        width=width, depth=depth, heads=heads, in_context_tokens=copies, in_context_start=1
    )
    decoder = DecoderConfig(width=width, depth=depth, heads=heads, mlp_width=4 * width)
    method = UNITEConfig(latent_channels=32, generative_encoder=encoder, decoder=decoder)
    image = ImageConfig(size=options.size, patch_size=options.patch, flip=False)
    data = ImageData(path=path, captions=bool(conditions), cache=False)
    torch.manual_seed(0)
    classes = {"class_label": ClassLabelConfig(num_classes=len(scenes.COLOURS) * len(scenes.SHAPES))}
    model = LatentModel.build(ModelConfig(modality=image, conditions=conditions or classes, method=method))
    model.to(options.device)
    train = model.modality.splits(data).train
    plan = Plan(steps, options.batch)
    for condition in model.conditions.all:
        if condition.reads_on_cpu:  # what is not kept yet is embedded here
            for batch, _ in loader(train, model.modality, plan, seed=0):
                condition.embed(batch.values[condition.argument])
    optimizers = Optimizers(model, OptimizerConfig())

    def step(batch: Batch, positions: range) -> None:
        batch = batch.to(options.device, staying=model.conditions.on_cpu)
        streams = Streams(("train", 0), positions, options.device)
        differentiate(model, batch, streams, "fp32")
        optimizers.step()
        optimizers.zero_grad()

    return Case(step, loader(train, model.modality, plan, seed=0))


def turn(case: Case, positions: range, device: str) -> tuple[float, float]:
    """Seconds of reading a batch, and of that and a step on it."""
    gpu = torch.device(device).type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    start = clock()
    batch, _ = next(case.batches)
    read = clock()
    case.step(batch, positions)
    if gpu:
        torch.cuda.synchronize()
    return read - start, clock() - start


def make_data(folder: Path, options: argparse.Namespace) -> None:
    """Scenes in folders by the first of their shapes, every caption of each beside it."""
    for number in range(options.images):
        drawn = scenes.scene(number, False)
        first = drawn.description.objects[0]
        file = folder / f"{first.colour}_{first.shape}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.draw(drawn, options.size, options.size)).save(file)
        file.with_suffix(".txt").write_text("\n".join(scenes.captions(drawn.description)))


def make_encoder(folder: Path) -> Path:
    """A shallow T5 encoder with random weights, and a tokenizer that knows the words of scenes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    said = [caption for number in range(500) for caption in scenes.captions(scenes.scene(number, False).description)]
    words = {word for caption in said for word in caption.replace(",", " ,").split()}
    known = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    sizes = T5Config(vocab_size=len(known), d_model=512, d_kv=64, d_ff=256, num_layers=1, num_heads=8)
    T5EncoderModel(sizes).save_pretrained(folder)
    core = Tokenizer(models.WordLevel(known, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
