"""The byte-level text encoder: pieces, hashing, and the convolution over neighbours."""

from __future__ import annotations

import pytest
import torch

from unilatent.nets.byte_encoder import ByteEncoder, count_pieces, pieces
from unilatent.types import encode_texts


def cut(text: str) -> list[str]:
    """Return the pieces of a text as strings."""
    rows = pieces(encode_texts([text]))[0]
    return [bytes(row[row != 0].tolist()).decode(errors="replace") for row in rows if row.any()]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a small red circle", ["a", "small", "red", "circle"]),
        ("  two,\n\tblue  squares. ", ["two", ",", "blue", "squares", "."]),
        ("photosynthesis!!", ["photosyn", "thesis", "!", "!"]),
        ("x" * 17 + " y", ["x" * 8, "x" * 8, "x", "y"]),
        ("grünes Dreieck", ["grünes", "Dreieck"]),
        (" \n\x07 ", []),
        ("", []),
    ],
)
def test_pieces_are_runs_of_eight_bytes_and_punctuation_marks(text: str, want: list[str]):
    assert cut(text) == want and count_pieces(text) == len(want)


@pytest.mark.parametrize("text", ["日本語のテキスト", "🙂🙃 שלום עולם", "e\u0301a\u200bb"])
def test_no_byte_of_other_scripts_is_lost(text: str):
    found = pieces(encode_texts([text]))
    assert bytes(found[found != 0].tolist()) == text.replace(" ", "").encode()


def test_texts_are_independent_and_further_pieces_are_dropped():
    texts = ["a b c d", "", "photosynthesis is slow"]
    together = pieces(encode_texts(texts))
    for text, row in zip(texts, together, strict=True):
        alone = pieces(encode_texts([text]))[0]
        assert torch.equal(row[: len(alone)], alone) and not row[len(alone) :].any()
    assert torch.equal(pieces(encode_texts(texts), 2), together[:, :2])
    assert pieces(encode_texts(texts), 9).shape == together.shape


def test_words_differ_by_spelling_and_by_hash():
    """Equal words have equal embeddings at any position; words with swapped, other or fewer letters differ."""
    torch.manual_seed(0)
    net = ByteEncoder(16, 1, 2)
    vectors = net._embed(pieces(encode_texts(["left felt left lef t"])).long())[0]
    assert torch.equal(vectors[0], vectors[2])
    apart = torch.cdist(vectors, vectors)[[0, 0, 0, 1], [1, 3, 4, 3]]
    assert apart.min() > 1
    net.hashed.weight.data.zero_()
    assert (torch.cdist(*(2 * [net._embed(pieces(encode_texts(["left felt"])).long())[0]]))[0, 1]) > 0.5


def test_the_convolution_reads_two_neighbours_on_each_side():
    """And nothing after the last piece. Without blocks, the convolution is all that mixes pieces."""
    torch.manual_seed(0)
    encoder = ByteEncoder(16, depth=0, heads=2)

    def read(text: str) -> torch.Tensor:
        return encoder(encode_texts([text, "one two three four five six seven eight nine"]), most=16)[0][0]

    one, other = read("a small red circle left of it"), read("a small red square left of it")
    changed = (one != other).any(-1).nonzero().flatten().tolist()
    assert changed == [1, 2, 3, 4, 5]
    assert torch.equal(read("red circle")[:2], encoder(encode_texts(["red circle"]), most=2)[0][0])
