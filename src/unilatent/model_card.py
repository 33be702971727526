"""What a stored model says of itself: `record.json` with all that is known, and the model card that people read."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .files import read_json, write_json, write_text
from .tables import ARROWS, marked

RECORD = "record.json"
CARD = "README.md"
FORMAT = 1
SHARPENED = "sharpened"
"""Under which the training of a record has the settings of each `finetune-decoder`."""
PICTURES = {
    "samples.png": "New samples, not chosen among others.",
    "reconstructions.png": "Held-out originals, each above or left of its reconstruction.",
}
"""Images of a model folder -> what they show."""
LIMITS = (
    "## Limits\n\nThe numbers are of one training run; runs with other seeds differ. Nothing was measured on other "
    "data, at other sizes or with other settings than those above."
)
UNTOUCHED = "<!-- written by unilatent {digest}; without this line, later evaluations leave the card as it is -->"
MARK = re.compile(r"\n?<!-- written by unilatent (\w+);[^\n]*-->\n?\Z")


@dataclass(frozen=True)
class ModelRecord:
    """What is known of a model besides its weights and its configuration, as plain data.

    fingerprint: of the model that was evaluated; numbers are shown only of a model that still has it. evaluations:
    contents of the files that `unilatent evaluate` and runs write. pictures: name in PICTURES -> file.
    """

    fingerprint: str
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    licence: str | None = None

    @property
    def numbers(self) -> list[Mapping[str, Any]]:
        """All numbers; of one under the same key, the last that was measured."""
        return list({number["key"]: number for each in self.evaluations for number in each["numbers"]}.values())

    def plain(self) -> dict[str, Any]:
        """Return all but the pictures as JSON has it."""
        return {
            "format_version": FORMAT, "fingerprint": self.fingerprint, "licence": self.licence,
            "training": dict(self.training), "data": dict(self.data), "evaluations": list(self.evaluations),
        }  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """What a card says of the model itself.

    stored: type of the stored weights, e.g. float16. tags, task: as the hub names them. source: what `unilatent.load`
    takes.
    """

    name: str
    parameters: int
    latent_channels: int
    precision: str
    stored: str
    tags: Sequence[str]
    task: str = ""
    source: str = "FOLDER_OR_HUB_ID"


def read_record(folder: Path) -> ModelRecord | None:
    """Return the record of a model folder; None without one, or if it is of another version or damaged."""
    if not (folder / RECORD).is_file():
        return None
    try:
        content = read_json(folder / RECORD, "")
        if content["format_version"] != FORMAT:
            return None
        record = ModelRecord(
            str(content["fingerprint"]), dict(content["training"]), dict(content["data"]), list(content["evaluations"]),
            {name: folder / name for name in PICTURES if (folder / name).is_file()}, content["licence"],
        )  # fmt: skip
        _numbers_of(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def write_record(folder: Path, record: ModelRecord | None) -> None:
    """Write the record and the pictures of a model; without a record, remove those that are there."""
    for name in (RECORD, *PICTURES):
        source = None if record is None else record.pictures.get(name)
        if source is not None and source.resolve() == (folder / name).resolve():
            continue
        (folder / name).unlink(missing_ok=True)
        if source is not None:
            shutil.copyfile(source, folder / name)
    if record is not None:
        write_json(folder / RECORD, record.plain())


def write_card(folder: Path, card: ModelCard) -> None:
    """Write a card, unless one is there that somebody else wrote or changed."""
    path = folder / CARD
    if path.is_file() and not is_untouched(path):
        return
    content = str(card).rstrip() + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    write_text(path, f"{content}\n{UNTOUCHED.format(digest=digest)}\n")


def is_untouched(path: Path) -> bool:
    """Whether a card is as `write_card` wrote it, or empty."""
    text = path.read_text(encoding="utf-8", errors="replace")
    mark = MARK.search(text)
    if mark is None:
        return not text
    return hashlib.sha256(text[: mark.start()].encode()).hexdigest()[:16] == mark[1]


def card_of(facts: ModelFacts, record: ModelRecord | None) -> ModelCard:
    """Return the card of a model. record: None if nothing is known besides the model."""
    record = record or ModelRecord("")
    sections = [
        f"# {facts.name}",
        _about(facts),
        *_pictures(record),
        f'```python\nimport unilatent\n\nmodel = unilatent.load("{facts.source}")\n'
        "samples = unilatent.sample(model, num=16)\nlatents = model.encode(data)\n```",
        *_numbers(record),
        *_training(record),
        *_data(record),
        LIMITS,
        _licence(record),
    ]
    head = _head(facts, record).to_yaml()
    return ModelCard(f"---\n{head}\n---\n\n" + "\n\n".join(sections) + "\n")


def _head(facts: ModelFacts, record: ModelRecord) -> ModelCardData:
    data_name = str(record.data.get("path") or "own data")
    results = [
        EvalResult(
            task_type=facts.task or "other", dataset_type=data_name, dataset_name=data_name,
            metric_type=str(number["metric"]), metric_value=number["value"], metric_name=str(number["key"]),
        )
        for number in record.numbers
        if number.get("headline", True)
    ]  # fmt: skip
    return ModelCardData(
        library_name="unilatent", tags=list(facts.tags), license=record.licence, pipeline_tag=facts.task or None,
        model_name=facts.name if results else None, eval_results=results or None,
    )  # fmt: skip


def _about(facts: ModelFacts) -> str:
    precision = ", trained in bf16" if facts.precision == "bf16" else ""
    stored = "" if facts.stored == "float32" else f", stored as {facts.stored}"
    return (
        f"{facts.parameters / 1e6:.2f} M parameters, {facts.latent_channels} latent channels{precision}{stored}. All "
        "settings are in `config.json`."
    )


def _pictures(record: ModelRecord) -> list[str]:
    return [f"![{PICTURES[name]}]({name})\n\n{PICTURES[name]}" for name in PICTURES if name in record.pictures]


def _numbers_of(record: ModelRecord) -> list[str]:
    """The lines of the table of numbers, and of their protocols."""
    protocols: dict[str, None] = {}
    rows = ["| metric | value | compare with | protocol |", "| --- | ---: | --- | --- |"]
    for number in record.numbers:
        protocols.setdefault(str(number.get("outline") or number["key"]))
        place = list(protocols).index(str(number.get("outline") or number["key"])) + 1
        spread = "" if number["spread"] is None else f" ± {number['spread']:.4g}"
        beside = ", ".join(f"{name} {value:.4g}" for name, value in number["beside"].items())
        cautions = "".join(f", {caution}" for caution in marked(number["cautions"]))
        rows.append(
            f"| {ARROWS[number['better']]} {_cell(number['name'])} | {number['value']:.4g}{spread} "
            f"{_cell(number['unit'])} | {_cell(beside)} | `{number['key']}` ({place}{_cell(cautions)}) |"
        )
    return [*rows, "", *(f"{i}. {_cell(protocol)}" for i, protocol in enumerate(protocols, 1))]


def _numbers(record: ModelRecord) -> list[str]:
    if not record.numbers:
        return ["## Numbers\n\nThis model was not evaluated with the weights that are stored here."]
    return [
        "## Numbers",
        "↑ higher is better, ↓ lower is better, = closer to what it is compared with is better. A number holds under "
        f"its protocol alone; `{RECORD}` has every protocol in full.",
        "\n".join(_numbers_of(record)),
        f"Measured with exactly these weights (fingerprint `{record.fingerprint[:16]}`).",
    ]


def _training(record: ModelRecord) -> list[str]:
    t = record.training
    if not t:
        return []
    rows = [
        ("preset", t.get("preset")), ("seed", t.get("seed")), ("steps", t.get("steps")),
        ("samples per step", t.get("batch_size")), ("precision", t.get("precision")),
        ("device", t.get("gpu") or t.get("device")), ("processes", t.get("processes")),
        ("versions", ", ".join(f"{name} {value}" for name, value in dict(t.get("versions") or {}).items())),
    ]  # fmt: skip
    for s in t.get(SHARPENED, []):
        weight = s.get("adversarial_weight")
        adversary = f"with an adversary of weight {weight:g}" if weight else "without an adversary"
        length = f"{s.get('steps')} steps of {s.get('batch_size')}"
        changes = "".join(f", {c['setting']} {c['to']} from step {c['step']}" for c in s.get("changes", []))
        rows.append(("decoder", f"trained alone (`finetune-decoder`) for {length}, {adversary}{changes}"))
    lines = [f"- {name}: {_cell(value)}" for name, value in rows if value not in (None, "")]
    return ["## Training", "\n".join(lines)]


def _data(record: ModelRecord) -> list[str]:
    d = record.data
    if not d:
        return []
    samples = f", {d['training_samples']:,} training samples" if isinstance(d.get("training_samples"), int) else ""
    origin = _cell(
        d.get("origin") or "Data of the model's owner: their origin and their licence are not recorded here."
    )
    return ["## Data", f"`{d.get('path') or 'own data'}`{samples}. {origin}"]


def _licence(record: ModelRecord) -> str:
    own = f"The weights: {record.licence}." if record.licence else "The licence of the weights is not stated."
    return (
        f"## Licences\n\n{own} The data keep their own licence. Feature networks that numbers were measured with are "
        "not part of this folder and keep theirs."
    )


def _cell(text: object) -> str:
    """A text inside a line of Markdown."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
