"""What classes are called, where their folders have codes: `data.class_names_file`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SYNSET = re.compile(r"n\d{8}")
"""A folder of ImageNet: the number of a noun in WordNet 3.0."""
WAY_OUT = (
    "give their names with data.class_names_file: a text file with one a line in the order of the sorted classes, or "
    "`{} name` a line (ImageNet's LOC_synset_mapping.txt is such a one)"
)


def refuse_codes(found: Sequence[str]) -> None:
    """ValueError where captions would be made of codes that say nothing: one of ImageNet's, or numbers alone."""
    code = next(filter(SYNSET.fullmatch, found), None)
    if code is None and found and all(name.isdecimal() for name in found):
        code = found[0]
    if code is not None:
        raise ValueError(
            f"data.caption_template: classes are called {code}, which says nothing of a picture; {WAY_OUT.format(code)}"
        )


def read_class_names(path: str | Path, found: Sequence[str]) -> tuple[str, ...]:
    """Names for the classes that data has (sorted): a line each, or `class name` or `class<tab>name` in any order,
    where other classes may stand in between. ValueError names the line, or the class that is missing."""
    field, path = f"data.class_names_file: {path}", Path(path).expanduser()
    if not found:
        raise ValueError(f"{field}: the data has no classes to name; leave it out")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{field}: {error.strerror or 'cannot be read'}; give a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    said = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    known = set(found)
    pairs = [(number, *_pair(line)) for number, line in said]
    if any(name and key in known for _, key, name in pairs):
        named: dict[str, tuple[int, str]] = {}
        for number, key, name in pairs:
            if key in known:
                if not name:
                    raise ValueError(f"{field}, line {number}: {key} has no name; write `{key} name`")
                if key in named:
                    raise ValueError(f"{field}, line {number}: {key} has a name already, in line {named[key][0]}")
                named[key] = number, name
        missing = [key for key in found if key not in named]
        if missing:
            raise ValueError(
                f"{field}: no name for {len(missing)} classes, {missing[0]} for one; add `{missing[0]} name`"
            )
        chosen = [named[key] for key in found]
    else:
        if len(said) != len(found):
            raise ValueError(
                f"{field}: {len(said)} names, but the data has {len(found)} classes, {found[0]} the first; write one "
                f"line for each, or `{found[0]} name`"
            )
        chosen = said
    first: dict[str, int] = {}
    for number, name in sorted(chosen):
        if name in first:
            raise ValueError(f"{field}, line {number}: {name!r}, as in line {first[name]}; tell the two classes apart")
        first[name] = number
    return tuple(name for _, name in chosen)


def _pair(line: str) -> tuple[str, str]:
    """Before and after the tab, or the first blank."""
    key, _, name = line.partition("\t") if "\t" in line else line.partition(" ")
    return key.strip(), name.strip()
