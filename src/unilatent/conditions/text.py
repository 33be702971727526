"""A text: its bytes read by a small transformer that is trained along, or the output of a frozen, pretrained encoder.

Values are UTF-8 bytes (B, W) uint8 with zeros behind (`types.encode_texts`). The empty text is "no condition", exactly:
both are one learned token and one learned vector, so that neither encoding pictures nor sampling without a text needs
the pretrained encoder.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..nets.byte_encoder import ByteEncoder, count_pieces
from ..nets.layers import RMSNorm, linear
from ..nets.text_encoder import Description, TextEncoder, describe, text_encoder
from ..types import Conditioning, decode_texts, encode_texts, move
from .base import Condition, ConditionConfig, listed

SHOWN = 60
"""Characters of a text that an error quotes."""


class TextConfig(ConditionConfig):
    """Texts, under the keyword `prompts`.

    max_length: tokens that are read of a text, pieces of its bytes (`nets.byte_encoder`: words of up to eight bytes,
        and marks) or those of the pretrained encoder. Captions of the data are cut there; a longer prompt is refused.
    width, depth, heads: of the byte-level transformer.
    encoder: a folder or hub id of a T5, CLIP or other text model of the `transformers` package, used in place of the
        byte-level one; never trained, never part of a checkpoint. revision: of the hub id.
    cache: keep what the encoder makes of each text on disk, float32, 4 bytes x encoder_width x tokens a text.
    encoder_width, encoder_hash: what the encoder gives and which one it is, found when training starts.
    examples: texts shown where nobody asks for any; those of the data if left empty.
    """

    name: Literal["text"] = "text"
    max_length: int = Field(default=128, ge=1)
    width: int = Field(default=128, ge=2)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    encoder: str | None = None
    revision: str | None = None
    cache: bool = True
    encoder_width: int | None = Field(default=None, ge=1)
    encoder_hash: str | None = None
    examples: tuple[str, ...] = ()

    @classmethod
    def small(cls) -> Self:
        texts = ("a red circle", "two blue squares", "a star", "ein grünes Dreieck", "a small dot")
        return cls(max_length=24, width=32, depth=1, heads=2, examples=texts)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not divisible by heads {self.heads}")
        return self

    def example(self) -> Self:
        """Without looking at the encoder: as wide as a T5-base."""
        return self if not self.encoder or self.encoder_width else self.model_copy(update={"encoder_width": 768})

    def with_data(self, **facts: Any) -> Self:
        """With the data's `examples`, if they name any, and what the pretrained encoder gives; ValueError says why it
        cannot be had, or that it is not the one it was."""
        found: dict[str, Any] = {"examples": self.examples or tuple(facts.get("examples", ()))}
        if self.encoder is not None:
            encoder = self.described()
            found |= {"encoder_width": encoder.width, "encoder_hash": encoder.hash}
        return self.model_copy(update=found)

    def described(self) -> Description:
        """The pretrained encoder; ValueError if it is not there, not the one it was, or reads less than max_length."""
        assert self.encoder is not None
        found = describe(self.encoder, self.revision)
        if self.encoder_hash not in (None, found.hash):
            raise ValueError(
                f"conditions.text.encoder: {self.encoder} is not the one this model was trained with; give that one, "
                "or set encoder_width and encoder_hash to null and train anew"
            )
        if found.most_tokens is not None and self.max_length > found.most_tokens:
            raise ValueError(
                f"conditions.text.max_length: {self.max_length}, but {self.encoder} reads {found.most_tokens} tokens; "
                f"set conditions.text.max_length={found.most_tokens}"
            )
        return found


class Text(Condition):
    """Values are texts as bytes (B, W) uint8. Gives max_length tokens, most of them padding, and their mean."""

    Config = TextConfig
    argument = "prompts"

    def __init__(self, config: TextConfig, dim: int):
        super().__init__(config, dim)
        if config.encoder is not None and config.encoder_width is None:
            raise ValueError("conditions.text.encoder_width: not known yet; it is found when training starts")
        width = config.encoder_width if config.encoder is not None else config.width
        assert width is not None
        trained = config.encoder is None
        self.bytes = ByteEncoder(width, config.depth, config.heads) if trained else None
        self.token_norm, self.vector_norm = RMSNorm(width), RMSNorm(width)
        self.token_out, self.vector_out = linear(width, dim), linear(width, dim)
        nn.init.normal_(self.vector_out.weight, std=0.02)
        self.null_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.null_vector = nn.Parameter(torch.randn(dim) * 0.02)

    @property
    def gives_tokens(self) -> bool:
        return True

    @property
    def encoder(self) -> TextEncoder:
        """The pretrained one, shared by all models of this process."""
        self.config.described()
        return text_encoder(self.config.encoder, self.config.revision, self.config.max_length, self.config.cache)

    @property
    def reads_on_cpu(self) -> bool:
        """To look up what is kept of them."""
        return self.bytes is None

    def prepare(self) -> None:
        """ValueError says what is missing of the pretrained encoder."""
        if self.bytes is None:
            self.encoder.prepare()

    def embed(self, values: Tensor) -> Conditioning:
        """(B, W) bytes, any W -> tokens (B, max_length, D), their mask, and a vector (B, D)."""
        device, most = self.null_token.device, self.config.max_length
        some = move((values != 0).any(1), device)  # (B,)
        if self.bytes is not None:
            features, mask, pooled = self.bytes(values.to(device), most)
        else:
            features, mask, pooled = self.encoder(values, device)
        tokens = self.token_out(self.token_norm(features)).float() * mask[..., None]  # (B, L, D), L <= max_length
        vector = self.vector_out(self.vector_norm(pooled)).float()
        said = Conditioning(vector, tokens, mask).padded(most)
        return said.where(some & mask.any(1), self.null(len(values)))

    def null(self, n: int) -> Conditioning:
        vector, token = (part.expand(n, -1) for part in (self.null_vector, self.null_token))
        return Conditioning(vector, token[:, None]).padded(self.config.max_length)

    def example(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The configured texts, over and over; without any, the empty one."""
        texts = self.config.examples or ("",)
        return encode_texts([texts[i % len(texts)] for i in range(n)])

    def parse(self, value: Any) -> Tensor:
        """A text, a list of them, or values; ValueError on what is none, and on one that is longer than is read."""
        if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 2 and len(value):
            return value
        texts = listed(value)
        if not texts:
            raise ValueError("prompts: empty; give at least one text")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"prompts: {str(text)[:SHOWN]!r} is a {type(text).__name__}; give texts")
            self._refuse_longer(text)
        return encode_texts(texts)

    def options(self, value: Any) -> list[str]:
        """Each text by an option of its own, whatever commas it has."""
        return [word for text in decode_texts(self.parse(value)) for word in ("--prompt", text)]

    def _refuse_longer(self, text: str) -> None:
        most, unit = self.config.max_length, "words and marks" if self.bytes is not None else "tokens"
        if len(text.encode(errors="replace")) <= most:
            return  # no tokeniser makes more tokens than there are bytes, but for one or two around them
        length = count_pieces(text) if self.bytes is not None else self.encoder.length(text)
        if length > most:
            raise ValueError(
                f"prompts: {text[:SHOWN]!r}... has {length} {unit}, this model reads {most} (its "
                "conditions.text.max_length); shorten it"
            )

    def describe(self, values: Tensor) -> list[str]:
        return decode_texts(values)
