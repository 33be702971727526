"""What reading files of molecules and of crystals has in common."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Sequence

from ..maths.streams import seed_of

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MEMBER_BYTES = 2**30
"""What one file of an archive may unpack to."""
Progress = Callable[[str, int, int], None]
"""Called with what is being made, how many more are done, and how many there will be."""

LATTICE = re.compile(rb"\bLattice\s*=", re.IGNORECASE)
PBC = re.compile(rb"\bpbc\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|(\S+))", re.IGNORECASE)


def is_periodic(frame: bytes) -> bool:
    """Whether the first frame of an .xyz has a lattice that it repeats in: `Lattice=` on its second line, and no `pbc=`
    that denies all three axes."""
    comment = [*frame.splitlines()[:2], b"", b""][1]
    if not LATTICE.search(comment):
        return False
    denied = PBC.search(comment)
    return denied is None or b"T" in (denied[1] or denied[2] or denied[3] or b"").upper()


def unpacked(name: str, content: bytes) -> bytes:
    """Of a file whose name ends in .gz, what it holds; ValueError where it is broken."""
    if not name.lower().endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot be unpacked ({error}); copy it again") from None


def share_of(held_out: float, total: int, most: int, what: str) -> int:
    """How many of `total` are held out: a count, or below 1 a share; ValueError above `most`."""
    count = round(held_out * total) if held_out < 1 else int(held_out)
    if count > most:
        raise ValueError(f"data.held_out: {held_out:g}, but there are only {total} {what}; hold out fewer")
    return count


def by_hash(names: Sequence[str]) -> list[int]:
    """Rows by the hash of their names: the first of them are held out, so that more rows move few others."""
    return sorted(range(len(names)), key=lambda row: (seed_of("held_out", names[row]), row))
