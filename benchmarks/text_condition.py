"""What reading texts costs a training step: a class, the same class in words through kept embeddings of a frozen
encoder, and through the byte-level transformer; each read in context and by cross-attention.

python benchmarks/text_condition.py                       pictures of 64 x 64, 256 tokens, width 128, on the CPU
python benchmarks/text_condition.py --width 768 --depth 12 --batch 64 --device cuda

The encoder is a T5 of t5-small's size with random weights and one token a word: its speed is that of the real one.
Cases take turns, so that whatever else the machine does hits all of them; times are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from unilatent.conditions.class_label import ClassLabelConfig
from unilatent.conditions.text import TextConfig
from unilatent.maths.streams import Streams
from unilatent.methods.base import LatentModel, ModelConfig
from unilatent.methods.unite import DecoderConfig, GenerativeEncoderConfig, UNITEConfig
from unilatent.modalities.image import ImageConfig
from unilatent.training.config import OptimizerConfig
from unilatent.training.optimizer import Optimizers
from unilatent.types import Batch, encode_texts

CLASSES = 1000
TEMPLATES = ("a photo of a {}", "a bad photo of a {}", "a drawing of a {} on a white wall", "one large {}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNILATENT_CACHE"] = f"{folder}/cache"
        encoder = str(make_encoder(Path(folder) / "t5"))
        kept = TextConfig(encoder=encoder, max_length=32).with_data()
        conditions = {
            "class": {"class_label": ClassLabelConfig(num_classes=CLASSES)},
            "frozen encoder, in context": {"text": kept},
            "frozen encoder, cross": {"text": kept.model_copy(update={"token_attention": "cross"})},
            "bytes, in context": {"text": TextConfig(max_length=64)},
            "bytes, cross": {"text": TextConfig(max_length=64, token_attention="cross")},
        }
        cases = {name: make_case(options, chosen) for name, chosen in conditions.items()}
        for step, _ in cases.values():
            step(0)  # what is not kept yet is embedded here
        times: dict[str, list[float]] = {name: [] for name in cases}
        embedding: dict[str, list[float]] = {name: [] for name in cases}
        for repeat in range(options.repeat):
            for name, (step, embed) in cases.items():
                embedding[name].append(timed(embed, options.device))
                times[name].append(timed(lambda step=step, repeat=repeat: step(repeat), options.device))
        base = statistics.median(times["class"])
        print("| condition | embedding ms | step s | over a class |\n| --- | --- | --- | --- |")
        for name, found in times.items():
            own, alone = statistics.median(found), 1e3 * statistics.median(embedding[name])
            print(f"| {name} | {alone:.2f} | {own:.3f} | {100 * own / base - 100:+.1f} % |")


def make_case(
    options: argparse.Namespace, conditions: dict[str, object]
) -> tuple[Callable[[int], None], Callable[[], object]]:
    """A training step on always the same samples, and the embedding of their conditions alone."""
    width, depth, heads = options.width, options.depth, options.width // 64
    encoder = GenerativeEncoderConfig(width=width, depth=depth, heads=heads, in_context_tokens=8, in_context_start=1)
    decoder = DecoderConfig(width=width, depth=depth, heads=heads, mlp_width=4 * width)
    method = UNITEConfig(latent_channels=32, generative_encoder=encoder, decoder=decoder)
    torch.manual_seed(0)
    model = LatentModel.build(
        ModelConfig(modality=ImageConfig(size=64, patch_size=4), conditions=conditions, method=method)
    ).to(options.device)
    optimizers = Optimizers(model, OptimizerConfig())
    labels = torch.arange(options.batch) * 97 % CLASSES
    texts = [TEMPLATES[i % len(TEMPLATES)].format(f"class{label}") for i, label in enumerate(labels.tolist())]
    batch = Batch(torch.rand(options.batch, 3, 64, 64), {"labels": labels, "prompts": encode_texts(texts)})
    batch = batch.to(options.device)

    def step(number: int) -> None:
        streams = Streams([("train", 0, number * options.batch + i) for i in range(options.batch)], options.device)
        for part in model.loss(batch, streams):
            part.value.backward(retain_graph=part.retain)
        optimizers.step()
        optimizers.zero_grad()

    return step, lambda: model.conditions(batch.values)


def timed(what: Callable[[], object], device: str) -> float:
    """Seconds; on a CPU those of its own work, whatever else the machine does."""
    clock = time.perf_counter if torch.device(device).type == "cuda" else time.process_time
    start = clock()
    what()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def make_encoder(folder: Path) -> Path:
    """A T5 encoder with random weights, and a tokenizer that knows the templates' words and classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {word for template in TEMPLATES for word in template.split()} | {f"class{i}" for i in range(CLASSES)}
    known = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    sizes = T5Config(vocab_size=len(known), d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)
    T5EncoderModel(sizes).save_pretrained(folder)
    core = Tokenizer(models.WordLevel(known, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
