"""Class names from a file (`data.class_names_file`), for data whose class folders are named by codes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...plain_text import composed, count_of, decode, split_lines

SYNSET = re.compile(r"n\d{8}")
"""A class folder of ImageNet: the number of a noun in WordNet 3.0."""
WAY_OUT = (
    "give their names with data.class_names_file: a text file with one name per line in the order of the sorted "
    "classes, or `{} name` per line (such as ImageNet's LOC_synset_mapping.txt)"
)


def refuse_codes(classes: Sequence[str]) -> None:
    """ValueError if captions would contain codes: one of ImageNet's, or if all class names are numbers."""
    code = next(filter(SYNSET.fullmatch, classes), None)
    if code is None and classes and all(name.isdecimal() for name in classes):
        code = classes[0]
    if code is not None:
        raise ValueError(
            f"data.caption_template: classes are called {code}, which does not describe an image; "
            f"{WAY_OUT.format(code)}"
        )


def read_class_names(path: str | Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Read the names of the data's classes (sorted).

    The file has one name per line in this order, or `class name` or `class<tab>name` per line in any order, possibly
    with other classes. ValueError names the line, or the class without a name.
    """
    field, path = f"data.class_names_file: {path}", Path(path).expanduser()
    if not classes:
        raise ValueError(f"{field}: the data has no classes to name; leave it out")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{field}: {error.strerror or 'cannot be read'}; give a text file") from None
    text = decode(raw, field)
    lines = [(number, line.strip()) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    known = set(classes)
    by_composed = {composed(name): name for name in sorted(classes)}
    pairs = []
    for number, key, name in ((number, *_pair(line)) for number, line in lines):
        pairs.append((number, key if key in known else by_composed.get(composed(key), key), name))
    if any(name and key in known for _, key, name in pairs):
        names = _names_by_class(pairs, classes, field)
    elif len(lines) == len(classes):
        names = lines
    else:
        raise ValueError(
            f"{field}: {count_of(len(lines), 'name')}, but the data has "
            f"{count_of(len(classes), 'class')}, {classes[0]} the first; write one "
            f"line per class, or `{classes[0]} name`"
        )
    first: dict[str, int] = {}
    for number, name in sorted(names):
        if name in first:
            raise ValueError(
                f"{field}, line {number}: {name!r}, as in line {first[name]}; give the two classes different names"
            )
        first[name] = number
    return tuple(name for _, name in names)


def _pair(line: str) -> tuple[str, str]:
    """Split a line at the tab, or else at the first space."""
    key, _, name = line.partition("\t") if "\t" in line else line.partition(" ")
    return key.strip(), name.strip()


def _names_by_class(pairs: Sequence[tuple[int, str, str]], classes: Sequence[str], field: str) -> list[tuple[int, str]]:
    """Return line number and name of each class, from (line number, class, name) in any order."""
    known = set(classes)
    names: dict[str, tuple[int, str]] = {}
    for number, key, name in pairs:
        if key in known:
            if not name:
                raise ValueError(f"{field}, line {number}: {key} has no name; write `{key} name`")
            if key in names:
                raise ValueError(f"{field}, line {number}: {key} has a name already, in line {names[key][0]}")
            names[key] = number, name
    missing = [key for key in classes if key not in names]
    if missing:
        raise ValueError(
            f"{field}: no name for {count_of(len(missing), 'class')}, for example {missing[0]}; add `{missing[0]} name`"
        )
    return [names[key] for key in classes]
