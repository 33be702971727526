"""Text prompts, embedded by a small byte-level transformer that is trained with the model, or by a frozen encoder.

Values are UTF-8 bytes (B, W) uint8, padded with zeros (`types.encode_texts`). The empty text is exactly "no condition":
one learned token and one learned vector. Encoding images and unconditional sampling thus need no pretrained encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..controls import Control
from ..nets.byte_encoder import ByteEncoder, count_pieces
from ..nets.layers import RMSNorm, linear
from ..nets.text_encoder import EncoderDescription, TextEncoder, describe, share_description, text_encoder
from ..processes import Processes
from ..types import Conditioning, decode_texts, encode_texts, move
from .base import Condition, ConditionConfig, as_list

MULTIPLE = 16
"""Numbers of tokens are multiples of this, so that compiled networks meet few of them."""
EXAMPLES = 6
"""Texts that an interface offers to start from."""
SHOWN = 60
"""Characters of a text that an error message quotes."""


class TextConfig(ConditionConfig):
    """Text prompts, under the keyword `prompts`.

    max_length: tokens per text. Tokens are chunks of its bytes (`nets.byte_encoder`: words of up to eight bytes, and
        punctuation marks) or those of the pretrained encoder. Captions of the data are truncated; a longer prompt is an
        error.
    width, depth, heads: of the byte-level transformer.
    encoder: folder or hub id of a T5, CLIP or other text model of the `transformers` package, which replaces the
        byte-level transformer; frozen, and not part of checkpoints.
    revision: branch, tag or commit of the hub id.
    cache: store the encoder's output for each text on disk, float32, 4 bytes x encoder_width x tokens per text.
    encoder_width, encoder_hash: output width and SHA-256 of the encoder, determined when training starts.
    examples: texts for samples without prompts; taken from the data if left empty.
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
        """Return a copy with the encoder width of T5-base, without reading the encoder."""
        return self if not self.encoder or self.encoder_width else self.model_copy(update={"encoder_width": 768})

    def with_data(self, **facts: Any) -> Self:
        """Return a copy with the data's `examples`, if any, and width and hash of the pretrained encoder.

        ValueError if the encoder is missing or has changed.
        """
        update: dict[str, Any] = {"examples": self.examples or tuple(facts.get("examples", ()))}
        if self.encoder is not None:
            encoder = self.described()
            update |= {"encoder_width": encoder.width, "encoder_hash": encoder.hash}
        return self.model_copy(update=update)

    def described(self) -> EncoderDescription:
        """Describe the pretrained encoder; ValueError if it is missing, has changed, or reads less than max_length."""
        assert self.encoder is not None
        description = describe(self.encoder, self.revision)
        if self.encoder_hash not in (None, description.hash):
            raise ValueError(
                f"conditions.text.encoder: {self.encoder} is not the one this model was trained with; use that one, "
                "or set encoder_width and encoder_hash to null and train from the start"
            )
        if description.max_tokens is not None and self.max_length > description.max_tokens:
            raise ValueError(
                f"conditions.text.max_length: {self.max_length}, but {self.encoder} reads at most "
                f"{description.max_tokens} tokens; set conditions.text.max_length={description.max_tokens}"
            )
        return description


class Text(Condition):
    """Values are texts as bytes (B, W) uint8; embedded as at most max_length tokens, padded, and a pooled vector."""

    Config = TextConfig
    argument = "prompts"
    given_by = (
        "for images: a .txt beside each, or a table metadata.csv, .tsv or .jsonl with the columns file_name and text"
    )

    def __init__(self, config: TextConfig, dim: int):
        super().__init__(config, dim)
        if config.encoder is not None and config.encoder_width is None:
            raise ValueError("conditions.text.encoder_width: unknown; it is determined when training starts")
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
        """The pretrained encoder, shared by all models of this process."""
        self.config.described()
        return text_encoder(self.config.encoder, self.config.revision, self.config.max_length, self.config.cache)

    @property
    def reads_on_cpu(self) -> bool:
        """True for a pretrained encoder: its cache is looked up by text."""
        return self.bytes is None

    def prepare(self, processes: Processes | None = None) -> None:
        """Load the pretrained encoder, if any; ValueError names what is missing."""
        if self.config.encoder is not None:
            if processes is not None:
                share_description(self.config.encoder, self.config.revision, processes)
            self.encoder.prepare(processes)

    def embed(self, values: Tensor) -> Conditioning:
        """Embed bytes (B, W), any W, as tokens (B, L, D), their mask, and a vector (B, D).

        L is the number of tokens of the longest text, as far as it is known without a wait for the device, rounded up
        to a multiple of `MULTIPLE`: attention does not read max_length tokens of which most are padding.
        """
        device, max_length = self.null_token.device, self.config.max_length
        has_text = move((values != 0).any(1), device)  # (B,)
        if self.bytes is not None:
            features, mask, pooled = self.bytes(values.to(device), max_length)
        elif type(values) is not Tensor:  # a FakeTensor, whose memory is being estimated: only shapes matter
            features, mask, pooled = self._shapes(len(values), device)
        else:
            features, mask, pooled = self.encoder(values, device)
        tokens = self.token_out(self.token_norm(features)).float() * mask[..., None]  # (B, L, D), L <= max_length
        vector = self.vector_out(self.vector_norm(pooled)).float()
        length = min(max_length, -(-tokens.shape[1] // MULTIPLE) * MULTIPLE)
        embedded = Conditioning(vector, tokens, mask).padded(length)
        return embedded.where(has_text & mask.any(1), self.null(len(values)))

    def _shapes(self, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """What the pretrained encoder gives for n texts of max_length tokens, without their values."""
        length, width = self.config.max_length, self.config.encoder_width
        assert width is not None
        mask = torch.ones(n, length, dtype=torch.bool, device=device)
        return torch.zeros(n, length, width, device=device), mask, torch.zeros(n, width, device=device)

    def null(self, n: int) -> Conditioning:
        vector, token = (part.expand(n, -1) for part in (self.null_vector, self.null_token))
        return Conditioning(vector, token[:, None])

    def example(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the configured texts, cycled; the empty text if there are none."""
        texts = self.config.examples or ("",)
        return encode_texts([texts[i % len(texts)] for i in range(n)])

    def parse(self, value: Any) -> Tensor:
        """Parse a text, a list of texts, or values; ValueError on another type, or a text above max_length tokens."""
        if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 2 and len(value):
            return value
        texts = as_list(value)
        if not texts:
            raise ValueError("prompts: empty; give at least one text")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"prompts: {str(text)[:SHOWN]!r} is a {type(text).__name__}; give strings")
            if length := self._too_long(text):
                raise ValueError(
                    f"prompts: {text[:SHOWN]!r}... has {length} {self._unit}, but this model reads at most "
                    f"{self.config.max_length} (its conditions.text.max_length); shorten it"
                )
        return encode_texts(texts)

    def remarks(self, values: Sequence[str]) -> list[str]:
        """Return how many of these texts are longer than max_length and lose their ends."""
        lengths = [length for text in values if (length := self._too_long(text))]
        if not lengths:
            return []
        share = 100 * len(lengths) / len(values)
        return [
            f"prompts: {len(lengths):,} of {len(values):,} captions looked at ({share:.3g} %) have more than the "
            f"{self.config.max_length} {self._unit} that the model reads, up to {max(lengths):,}; their ends are cut. "
            "Raise conditions.text.max_length in a new run, or shorten them"
        ]

    def options(self, value: Any) -> list[str]:
        """Return one option per text, since texts may contain commas."""
        return [word for text in decode_texts(self.parse(value)) for word in ("--prompt", text)]

    def control(self) -> Control:
        """Lines of text, one prompt each."""
        hint = "one prompt per line; empty: prompts of the training data"
        return Control("Prompt", lines=True, examples=self.config.examples[:EXAMPLES], hint=hint, negative=True)

    @property
    def _unit(self) -> str:
        return "words and marks" if self.bytes is not None else "tokens"

    def _too_long(self, text: str) -> int:
        """Return the length of a text that has more than max_length tokens; 0 for others."""
        most = self.config.max_length
        if len(text.encode(errors="replace")) <= most:
            return 0  # no tokeniser yields more tokens than bytes, apart from one or two special tokens
        length = count_pieces(text) if self.bytes is not None else self.encoder.length(text)
        return length if length > most else 0

    def describe(self, values: Tensor) -> list[str]:
        return decode_texts(values)
