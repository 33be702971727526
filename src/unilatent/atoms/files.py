"""What kind of system a file holds, where its name does not tell."""

from __future__ import annotations

import re

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
