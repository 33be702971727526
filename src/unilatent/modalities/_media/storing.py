"""What is alike in storing images and videos: names, classes, captions and stamps of the files of a folder or zip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...plain_text import same_names
from ..base import Raw
from .files import FileSource
from .listing import Listing


class FilesToStore(Raw):
    """The files of a folder or zip, with the same classes and captions as in training; `check` and `encode` are of a
    kind of files."""

    def __init__(self, files: FileSource, settings: dict[str, Any]):
        """settings: those of the stored files; captions add their own."""
        self.files = files
        listing = Listing(files, "source")
        self.notes = listing.notes
        self.root, self.names, self.captions = listing.root, listing.names, listing.captions
        self.class_names, self.labels = listing.class_names, listing.labels
        self.settings = {**settings, **({} if self.captions is None else {"captions": True})}

    def stamp(self, number: int) -> str:
        stamp = self.files.stamp(self.root + self.names[number])
        return stamp if self.captions is None else f"{stamp} {self.captions.stamp(number)}"

    def adopt(self, class_names: Sequence[str]) -> None:
        """Take over the order of the same classes; no classes in place of the name of a single folder."""
        names, labels = self.class_names, self.labels
        if labels is None:
            return
        if not class_names and len(names) == 1:
            self.class_names, self.labels = (), None
        elif same := same_names(names, class_names):
            self.class_names = tuple(class_names)
            self.labels = [class_names.index(same[names[label]]) for label in labels]

    def beside(self, number: int) -> list[tuple[str, bytes]]:
        """Return a .txt with the captions, one per line; nothing without captions."""
        if self.captions is None:
            return []
        return [("txt", "\n".join(" ".join(line.split()) for line in self.captions[number]).encode())]
