"""How well pictures fit their captions by CLIP, whose two towers see the picture and the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...pretrained import offline
from ...types import decode_texts
from ..base import Evidence, Metric, Row
from .captions import ARGUMENT

PUBLISHED = "openai/clip-vit-"
"""Starts the hub ids of the networks whose score is called CLIP score."""
BATCH = 64
SHIFT = 1
"""Each picture is also held against the caption of the next one: the chance beside the score."""


class ClipScore(Metric):
    """100 x the cosine between a picture and its caption, at least 0, over all samples (Hessel et al. 2021,
    arXiv:2104.08718, with the factor that papers on generation use), beside the same of held-out real pictures, and of
    samples with each other's captions.

    Only of the weights published at the hub it is `clip_score`; a folder's have the name `clip_folder_score`, and what
    they are is said by the fingerprint in the protocol.
    """

    space = "clip"

    def __init__(self, source: str):
        self.source = source
        published = source.startswith(PUBLISHED) and not Path(source).exists()
        self.key = "clip_score" if published else "clip_folder_score"
        self.gives = (self.key,)

    def __call__(self, evidence: Evidence) -> list[Row]:
        made, real = evidence.samples, evidence.held_out
        if made is None or "clip" not in made or ARGUMENT not in made or len(made) < 2:
            return []
        towers = _Texts(self.source)
        pictures, texts = made["clip"], towers(decode_texts(made[ARGUMENT]))
        beside = {"chance": score(pictures, texts.roll(SHIFT, 0))}
        if real is not None and len(real) and "clip" in real and ARGUMENT in real:
            beside["held-out real"] = score(real["clip"], towers(decode_texts(real[ARGUMENT])))
        name = "CLIP score" if self.key == "clip_score" else f"agreement of pictures and captions, by {self.source}"
        return [Row(self.key, name, score(pictures, texts), "", "higher", beside)]


def score(pictures: Tensor, texts: Tensor) -> float:
    """Mean over rows (B, D) of 100 max(cos, 0)."""
    return float(100 * torch.cosine_similarity(pictures.double(), texts.double()).clamp(min=0).mean())


class _Texts:
    """CLIP's text tower. ValueError where it cannot be had whole."""

    network: Any

    def __init__(self, source: str):
        try:
            from transformers import AutoTokenizer, CLIPTextModelWithProjection
        except ImportError:
            raise ValueError("the CLIP score needs the package transformers: pip install 'unilatent[eval]'") from None
        options: dict[str, Any] = {"local_files_only": offline() is not None}
        way_out = "give a folder or hub id of a whole CLIP, with its tokenizer"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
            tower: Any = CLIPTextModelWithProjection
            self.network, report = tower.from_pretrained(
                source, output_loading_info=True, dtype=torch.float32, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the text tower of {source} cannot be loaded ({reason}); {way_out}") from None
        if missing := sorted(map(str, report["missing_keys"])):
            raise ValueError(
                f"the text tower of {source} lacks {len(missing)} tensors, {missing[0]} for one; {way_out}"
            )
        self.network.eval().requires_grad_(False)
        self.length = int(self.network.config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """(B, D), not normalised; texts beyond what the tower reads are cut, as everywhere."""
        parts = []
        for first in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                texts[first : first + BATCH], padding="max_length", truncation=True, max_length=self.length,
                return_tensors="pt",
            )  # fmt: skip
            parts.append(self.network(**tokens).text_embeds.float())
        return torch.cat(parts)
