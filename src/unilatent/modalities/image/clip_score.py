"""CLIP score: agreement of images and captions, from CLIP's image and text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...plain_text import count_of
from ...pretrained import offline
from ...types import decode_texts
from .._media.captions import ARGUMENT
from ..base import Evidence, Metric, Row

PUBLISHED = "openai/clip-vit-"
"""Prefix of the hub ids of OpenAI's published models."""
BATCH = 64
SHIFT = 1
"""Offset of the captions for the chance baseline: each image with the caption of the next one."""


class ClipScore(Metric):
    """Mean of 100 max(cosine, 0) between image and caption over all samples (Hessel et al. 2021, arXiv:2104.08718, with
    the factor 100 that papers on generation use).

    Baselines: held-out real images, and samples with each other's captions. The key is `clip_score` for OpenAI's
    published models and `clip_folder_score` for weights from a folder, which the protocol identifies by fingerprint.
    """

    space = "clip"

    def __init__(self, source: str):
        self.source = source
        published = source.startswith(PUBLISHED) and not Path(source).exists()
        self.key = "clip_score" if published else "clip_folder_score"
        self.gives = (self.key,)

    def __call__(self, evidence: Evidence) -> list[Row]:
        samples, real = evidence.samples, evidence.held_out
        if samples is None or "clip" not in samples or ARGUMENT not in samples or len(samples) < 2:
            return []
        encoder = _TextEncoder(self.source)
        images, texts = samples["clip"], encoder(decode_texts(samples[ARGUMENT]))
        baselines = {"chance": score(images, texts.roll(SHIFT, 0))}
        if real is not None and len(real) and "clip" in real and ARGUMENT in real:
            baselines["held-out real"] = score(real["clip"], encoder(decode_texts(real[ARGUMENT])))
        name = "CLIP score" if self.key == "clip_score" else f"agreement of images and captions, by {self.source}"
        return [Row(self.key, name, score(images, texts), "", "higher", baselines)]


def score(images: Tensor, texts: Tensor) -> float:
    """Return the mean over rows (B, D) of 100 max(cosine, 0)."""
    return float(100 * torch.cosine_similarity(images.double(), texts.double()).clamp(min=0).mean())


class _TextEncoder:
    """CLIP's text encoder. ValueError if it cannot be loaded or lacks weights."""

    network: Any

    def __init__(self, source: str):
        try:
            from transformers import AutoTokenizer, CLIPTextModelWithProjection
        except ImportError:
            raise ValueError("the CLIP score needs the package transformers: pip install 'unilatent[eval]'") from None
        options: dict[str, Any] = {"local_files_only": offline() is not None}
        way_out = "give a folder or hub id of a complete CLIP with its tokenizer"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
            cls: Any = CLIPTextModelWithProjection
            self.network, report = cls.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the text encoder of {source} cannot be loaded ({reason}); {way_out}") from None
        if missing := sorted(map(str, report["missing_keys"])):
            raise ValueError(
                f"the text encoder of {source} lacks {count_of(len(missing), 'tensor')}, for example {missing[0]}; "
                f"{way_out}"
            )
        self.network.eval().requires_grad_(False)
        self.length = int(self.network.config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Return the projected embeddings (B, D), not normalised. Texts are truncated to the encoder's length."""
        parts = []
        for first in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                texts[first : first + BATCH], padding="max_length", truncation=True, max_length=self.length,
                return_tensors="pt",
            )  # fmt: skip
            parts.append(self.network(**tokens).text_embeds.float())
        return torch.cat(parts)
