"""Write an evaluation as a report: a self-contained HTML page, or a Markdown section of a model card."""

from __future__ import annotations

import os
from pathlib import Path

from ..tables import ARROWS, marked
from .contents import ReportContents, gather
from .evaluate import EvaluatedMetric, Evaluation, Evaluator
from .page import page
from .table import LEGEND, distinct_protocols, format_baselines, format_counts, format_value, outline

SUFFIXES = (".html", ".htm", ".md")
IMAGES = SAMPLES, RECONSTRUCTIONS, CURVES = ("samples", "reconstructions", "curves")
"""Ends of the names of a Markdown report's images."""


def check_report(path: Path) -> None:
    """ValueError if a report cannot be written to this path; called before the evaluation."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--report: {path.name!r} has an unknown suffix; use .html or .md")
    if path.is_dir():
        raise ValueError(f"--report: {path} is a folder; give a file in it")


def report_names(path: Path) -> list[str]:
    """Return the names of all files that a report may have, in the folder of `path`."""
    if path.suffix.lower() == ".md":
        return [path.name, *(f"{path.stem}-{what}.png" for what in IMAGES)]
    return [path.name, path.with_suffix(".md").name]


def write_report(
    path: Path, evaluator: Evaluator, evaluation: Evaluation, title: str, source: str | None = None
) -> list[Path]:
    """Write the report and return its files: an HTML page and its Markdown, or Markdown and its images.

    source: the evaluated run, model folder or hub id; a run's curves are shown. Each file is written atomically, the
    main one last. ValueError on another suffix.
    """
    check_report(path)
    contents = gather(evaluator, evaluation, title, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() != ".md":
        card = path.with_suffix(".md")
        files = {card: markdown(contents).encode(), path: page(contents).encode(errors="backslashreplace")}
    else:
        images = _images(contents, path.stem)
        files = {path.with_name(name): png for name, (png, _) in images.items()}
        files[path] = markdown(contents, {name: text for name, (_, text) in images.items()}).encode()
    for target, content in files.items():
        _write(target, content)
    return list(files)


def markdown(contents: ReportContents, images: dict[str, str] | None = None) -> str:
    """Return a section of a model card. images: file in the same folder -> its description."""
    numbers = contents.evaluation.numbers
    protocols = distinct_protocols(numbers)
    lines = [f"## Evaluation: {_text(contents.title)}", ""]
    lines += [f"- {name}: {_text(fact)}" for name, fact in contents.facts]
    lines += [f"- {_text(note)}" for note in contents.notes]
    lines += ["", "| metric | value | baselines | samples | protocol |", "| --- | ---: | --- | --- | --- |"]
    lines += [_row(result, protocols.index(result.protocol) + 1) for result in numbers]
    lines += ["", LEGEND, "", "Protocols:", ""]
    lines += [f"{i}. {_text(outline(protocol))}" for i, protocol in enumerate(protocols, 1)]
    for name, text in (images or {}).items():
        lines += ["", _text(text), "", f"![{_text(text)}]({name})"]
    lines += ["", "Reproduce with", "", "```bash", contents.command, "```", ""]
    return "\n".join(lines)


def _row(result: EvaluatedMetric, place: int) -> str:
    row, protocol = result.row, result.protocol
    samples = "; ".join(marked(protocol.cautions())) or format_counts(protocol)
    parts = [f"{ARROWS[row.better]} {row.name}", format_value(row), format_baselines(row), samples]
    return "| " + " | ".join([*map(_text, parts), f"`{result.key}` ({place})"]) + " |"


def _text(text: str) -> str:
    """Escape a text for Markdown."""
    for mark in "\\`*_[]|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


def _images(contents: ReportContents, stem: str) -> dict[str, tuple[bytes, str]]:
    """Return file name -> PNG and its description."""
    images = {}
    if contents.samples is not None:
        about = f"Uncurated: {contents.samples.about}"
        images[f"{stem}-{SAMPLES}.png"] = (contents.samples.png, about)
    if contents.reconstructions is not None:
        about = f"Uncurated: {contents.reconstructions.about}"
        images[f"{stem}-{RECONSTRUCTIONS}.png"] = (contents.reconstructions.png, about)
    if contents.curves_png is not None:
        images[f"{stem}-{CURVES}.png"] = (contents.curves_png, "Training")
    return images


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
