"""Settings that image and video data have in common."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from ...config import Config

HUB = "hf:"
"""Prefix of the path of a Hugging Face data set: "hf:OWNER/NAME", or "hf:FOLDER" of parquet or arrow files."""


class MediaData(Config):
    """Source of the samples, number of held-out samples, captions and class names."""

    hub_fields: ClassVar[tuple[str, ...]] = (
        "split", "held_out_split", "label_column", "revision", "streaming", "lanes", "shuffle_buffer",
    )  # fmt: skip
    """Fields that only a Hugging Face data set has."""
    generated: ClassVar[tuple[str, ...]] = ()
    """Values of `path` that select generated data, whose size is `num_samples`."""

    path: str | None = None
    """Where the samples are: a folder, zip, array, shards or data set; the list is above this table."""
    held_out: float = Field(default=0, ge=0)
    """Number of samples that are not trained on; below 1, a fraction. Equal numbers are taken from each class."""
    captions: bool = True
    """Read captions if there are any: from files next to the samples, metadata.csv or .jsonl, members of shards, or a
    text column. False ignores them."""
    caption_template: str | tuple[str, ...] | None = None
    """One or more templates for captions from class names, which replace all other captions: "a photo of a {}"."""
    class_names_file: str | None = None
    """Class names that replace the folder or column names: a text file with one name per line, in the order of the
    classes, or `class name` per line. They are used in labels, figures and caption templates."""
    caption_column: str | None = None
    """Caption column of metadata.csv, metadata.jsonl or a Hugging Face data set; None: text, caption, captions or
    prompt."""
    cache: bool = True
    """Cache decoded samples in memory when all of them take at most 256 MB."""
    split: str = "train"
    """The split of a Hugging Face data set to train on."""
    held_out_split: str | None = None
    """The split of the held-out samples; None: taken from `split`, which is not possible for a stream."""
    label_column: str | None = None
    """The column of class labels; None: the only one, if there is one."""
    revision: str | None = None
    """A branch, tag or commit of a data set on the hub."""
    streaming: bool = False
    """Read the data in order during training, without a local copy; shuffled by shards and within a buffer."""
    num_samples: int | None = Field(default=None, ge=1)
    """Samples per epoch of a stream whose size is unknown; number of training samples of generated data."""
    lanes: int | None = Field(default=None, ge=1)
    """Number of interleaved shard streams; None: the largest power of two up to 64 and the number of files."""
    shuffle_buffer: int = Field(default=4096, ge=1)
    """Size of the shuffle buffer of a stream in samples, over all lanes."""

    @model_validator(mode="after")
    def _fields_of_the_path(self) -> Self:
        fields = type(self).model_fields
        changed = [name for name in fields if name in self.hub_fields and getattr(self, name) != fields[name].default]
        if self.num_samples is not None and self.path not in self.generated:
            changed.append("num_samples")
        if changed and not (self.path or "").startswith(HUB):
            raise ValueError(
                f"{changed[0]}: for a data.path that starts with {HUB!r}, not for {self.path!r}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> Self:
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(
                    f'caption_template: {template!r} has no {{}} for the class name; write "a photo of a {{}}"'
                )
        return self

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.caption_template,) if isinstance(self.caption_template, str) else self.caption_template or ()
