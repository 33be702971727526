"""An evaluation for readers: one page that needs nothing else, or a section of a model card."""

from __future__ import annotations

import os
from pathlib import Path

from .contents import Contents, gather
from .evaluate import Evaluation, Evaluator, Measured
from .page import page
from .table import ARROWS, LEGEND, beside, counts, outline, protocols, value

SUFFIXES = (".html", ".htm", ".md")


def check_report(path: Path) -> None:
    """ValueError if a report cannot be written there; asked before hours of work."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--report: {path.name!r} is neither a page nor Markdown; end it in .html or .md")
    if path.is_dir():
        raise ValueError(f"--report: {path} is a folder; give a file in it")


def write_report(
    path: Path, evaluator: Evaluator, evaluation: Evaluation, title: str, source: str | None = None
) -> list[Path]:
    """The files written: a page with the same as Markdown beside it, or Markdown with its pictures beside it.

    source: the run, model folder or hub id that was evaluated; a run's curves are shown. Each file appears whole or not
    at all, the main one last. ValueError on another suffix.
    """
    check_report(path)
    contents = gather(evaluator, evaluation, title, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() != ".md":
        card = path.with_suffix(".md")
        files = {card: markdown(contents).encode(), path: page(contents).encode(errors="backslashreplace")}
    else:
        pictures = _pictures(contents, path.stem)
        files = {path.with_name(name): png for name, (png, _) in pictures.items()}
        files[path] = markdown(contents, {name: text for name, (_, text) in pictures.items()}).encode()
    for target, content in files.items():
        _write(target, content)
    return list(files)


def markdown(contents: Contents, pictures: dict[str, str] | None = None) -> str:
    """A section of a model card. pictures: file beside it -> what it shows."""
    numbers = contents.evaluation.numbers
    listed = protocols(numbers)
    lines = [f"## Evaluation: {_text(contents.title)}", ""]
    lines += [f"- {name}: {_text(fact)}" for name, fact in contents.facts]
    lines += [f"- {_text(note)}" for note in contents.notes]
    lines += ["", "| measure | value | beside it | of how many | protocol |", "| --- | ---: | --- | --- | --- |"]
    lines += [_row(measured, listed.index(measured.protocol) + 1) for measured in numbers]
    lines += ["", LEGEND, "", "Protocols:", ""]
    lines += [f"{i}. {_text(outline(protocol))}" for i, protocol in enumerate(listed, 1)]
    for name, text in (pictures or {}).items():
        lines += ["", _text(text), "", f"![{_text(text)}]({name})"]
    lines += ["", "Made again by", "", "```bash", contents.command, "```", ""]
    return "\n".join(lines)


def _row(measured: Measured, place: int) -> str:
    row, protocol = measured.row, measured.protocol
    how_many = "; ".join(protocol.cautions()) or counts(protocol)
    parts = [f"{ARROWS[row.better]} {row.name}", value(row), beside(row), how_many]
    return "| " + " | ".join([*map(_text, parts), f"`{measured.key}` ({place})"]) + " |"


def _text(text: str) -> str:
    """As it stands, whatever it holds."""
    for mark in "\\`*_[]|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


def _pictures(contents: Contents, stem: str) -> dict[str, tuple[bytes, str]]:
    """File name -> PNG and what it shows."""
    found = {}
    if contents.samples is not None:
        last = len(contents.samples.pictures) - 1
        about = f"Uncurated: samples 0 to {last} of seed {contents.seed}"
        found[f"{stem}-samples.png"] = (contents.samples.png, about)
    if contents.reconstructions is not None:
        about = "Uncurated: the first held-out originals, each above its reconstruction"
        found[f"{stem}-reconstructions.png"] = (contents.reconstructions.png, about)
    if contents.curves_png is not None:
        found[f"{stem}-curves.png"] = (contents.curves_png, "Training")
    return found


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
