"""Code blocks of README.md, CONTRIBUTING.md and docs/, and how tests run them: as they are printed, but small.

A block in a language of `RUN` is run. A comment `<!-- not run: REASON -->` in the line above keeps it from being run;
then its commands are only checked. Blocks in a language of `SHOWN` are output, equations and the like.

python tests/runs/documents.py prints how many there are.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
RUN = ("bash", "python", "yaml")
SHOWN = ("text", "math", "mermaid", "bibtex", "{toctree}", "{include}")
FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>(?:(?!-->).)+) -->\n)?"
    r"^(?P<indent> *)(?P<ticks>```+)(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block; `reason` says why it is not run."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.reason is None

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command line of a bash block."""
        if self.language != "bash":
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page."""
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(
            page, text.count("\n", 0, found.start("ticks")) + 1, found["language"].strip(),
            re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE), found["reason"],
        )
        for found in FENCE.finditer(text)
    ]  # fmt: skip


def outside(page: str) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))


def unilatent(words: list[str]) -> list[str] | None:
    """Return the arguments of `unilatent` in a command line, also below a launcher; None for another program."""
    if "unilatent" not in words or words[0] not in ("unilatent", "torchrun", "accelerate"):
        return None
    return words[words.index("unilatent") + 1 :]


# ---- small ones ------------------------------------------------------------------------------------------------------

PLACEHOLDERS = {"RUN": "runs/digits", "PRESET": "digits", "SEED": "0", "BEST": "1.5"}
"""Words in capitals that stand for something of the reader's."""
LAST = re.compile(r"step_00000\d{3}")
"""A checkpoint at the end of a run."""
TRAINING = (
    "training.steps=2", "training.batch_size=4", "training.micro_batch_size=null", "training.checkpoint_every=0",
    "training.sample_every=0", "training.evaluate_samples=0", "training.evaluate_every=0", "training.workers=0",
    "training.threads=1", "training.schedule.decays=[]",
)  # fmt: skip
DATA = {
    "molecules": ["data.num=48", "data.held_out=8"],
    "molecules-qm9-like": ["data.num=48", "data.held_out=8"],
    "molecules-two-stage": ["data.num=48", "data.held_out=8"],
    "crystals": ["data.num=48", "data.held_out=8"],
    "crystals-prototypes": ["data.num=48", "data.held_out=8"],
    "joint": [f"data.parts.{kind}.{few}" for kind in ("molecule", "crystal") for few in ("num=48", "held_out=8")],
    "scenes-unite": ["data.num_samples=64", "data.held_out=8"],
    "scenes-ul": ["data.num_samples=64", "data.held_out=8"],
    "bouncing-unite": ["data.num_samples=64", "data.held_out=8"],
    "bouncing-ul": ["data.num_samples=64", "data.held_out=8"],
    "bouncing-two-stage": ["data.num_samples=64", "data.held_out=8"],
}  # fmt: skip
"""Smaller sets of generated data, by preset."""
VIT = "{kind: vit, width: 64, depth: 1, heads: 4}"
THIN = {
    "unite": [
        "method.generative_encoder={width: 64, depth: 1, heads: 4, in_context_tokens: 0, in_context_start: 0}",
        "method.decoder={width: 64, depth: 1, heads: 4, mlp_width: 64}",
    ],
    "unified_latents": [f"method.{part}={VIT}" for part in ("encoder", "prior", "decoder")],
    "latent_diffusion": [f"method.base={VIT}"],
}
"""Networks of presets that are meant for GPUs, by method."""


def filled(word: str) -> str:
    """Return a word with its placeholders replaced."""
    return re.sub(r"\b[A-Z]{3,}\b", lambda name: PLACEHOLDERS.get(name[0], name[0]), LAST.sub("step_00000002", word))


def small(arguments: list[str]) -> list[str]:
    """Return the arguments of a command that does the same in a second or two."""
    words = [filled(word) for word in arguments]
    name = words[0]
    if name in ("train", "plan", "calibrate", "sweep"):
        return [*words, *SMALLER[name](words)]
    if name in ("sample", "evaluate", "search"):
        return drawing(words)
    if name == "data" and words[1].startswith("make-"):
        return with_option(words, "--num", "40")
    if name == "data" and "--workers" in words:
        return with_option(words, "--workers", "1")
    return [*words, *SMALL_OPTIONS.get(name, [])]


SMALL_OPTIONS = {
    "analyze": ["--num", "24", "--draws", "1"],
    "finetune-decoder": ["steps=4", "start=2", "batch_size=4", "sample_every=0", "threads=1"],
}


def preset_of(words: list[str]) -> str:
    """Return the preset that a command names, or that its file changes."""
    if not words[1].endswith(".yaml"):
        return words[1]
    return (re.findall(r"^preset: (\S+)$", Path(words[1]).read_text(), flags=re.MULTILINE) or ["custom"])[0]


def thin(name: str) -> list[str]:
    """Return the settings that make the model of a preset for GPUs thin; none for other presets."""
    from unilatent.presets import preset, presets

    if name not in presets() or not presets()[name].gpus:
        return []
    config = preset(name)
    first = [f"tokenizer.{setting}" for setting in THIN[config.tokenizer.method.name]] if config.tokenizer else []
    classes = ["conditions.class_label.num_classes=null"] if "class_label" in config.conditions else []
    loss = ["modality.perceptual_weight=0"] if hasattr(config.modality, "perceptual_weight") else []
    return [*first, *THIN[config.method.name], *classes, *loss]


def small_run(words: list[str]) -> list[str]:
    """Settings of a run of two steps; of a preset for GPUs, a check takes the place of training."""
    from unilatent.presets import preset, presets

    name = preset_of(words)
    stages = ["", "tokenizer."] if name in presets() and preset(name).tokenizer is not None else [""]
    data = [] if any(word.startswith("data.") for word in words) else DATA.get(name, [])
    training = [stage + setting for stage in stages for setting in TRAINING]
    if "--resume" in words:
        training.append("training.steps=3")  # something is left to be trained
    return [*data, *training, *thin(name), *(["--dry-run"] if thin(name) else [])]


SMALLER = {
    "train": small_run,
    "plan": lambda words: thin(preset_of(words)),
    "calibrate": lambda words: ["--steps", "2", "--trials", "1", "--num", "8"],
    "sweep": lambda words: ["--dry-run"],
}


def drawing(words: list[str]) -> list[str]:
    """Few samples, in two steps."""
    if "--compare" in words or "--samples" in words:
        return words
    most = {"sample": 10, "evaluate": 12, "search": 12}[words[0]]
    several = words.count("--prompt") > 1 or "--prompts" in words
    given = int(words[words.index("--num") + 1]) if "--num" in words else most
    if not several or "--num" in words:
        words = with_option(
            words, "--num", str(most if given >= 300 else min(most - 2 * (words[0] != "sample"), given))
        )
    if words[0] == "evaluate":
        words = [*words, "--num-held-out", "12"]
    if "num_inference_steps" not in words:
        words = with_option(words, "--steps", "2")
    return words


def with_option(words: list[str], option: str, value: str) -> list[str]:
    """Return the words with an option of one value replaced or added."""
    if option in words:
        place = words.index(option) + 1
        return [*words[:place], value, *words[place + 1 :]]
    return [*words, option, value]


PYTHON = (
    (r"\bnum=\d{2,}", "num=10"),
    (r"\b400\b", "40"),
    (r"\b300\b", "20"),
    (r"\bcount = 1200\b", "count = 40"),
    (r"num_inference_steps=\d+", "num_inference_steps=2"),
    (r'"training\.steps=\d+"', ", ".join(f'"{setting}"' for setting in TRAINING)),
)


def small_python(code: str) -> str:
    """Return a Python block that does the same in a second or two."""
    for pattern, text in PYTHON:
        code = re.sub(pattern, text, code)
    return code


# ---- counts ----------------------------------------------------------------------------------------------------------


def counts() -> dict[str, Counter[str]]:
    """Return of each page how many blocks are run, not run, and only shown."""
    kinds = {page: Counter(kind(block) for block in blocks(page)) for page in PAGES}
    return {page: count for page, count in kinds.items() if count}


def kind(block: Block) -> str:
    return "run" if block.runs else "not run" if block.language in RUN else "shown"


def report() -> Iterator[str]:
    """Yield lines with the counts, and the reasons of what is not run."""
    total: Counter[str] = Counter()
    for page, count in counts().items():
        total += count
        yield f"{page:36} {count['run']:4} run {count['not run']:4} not run {count['shown']:4} shown"
    yield f"{'all':36} {total['run']:4} run {total['not run']:4} not run {total['shown']:4} shown"
    for page in PAGES:
        for block in blocks(page):
            if block.reason:
                yield f"not run: {block.place}: {' '.join(block.reason.split())}"


if __name__ == "__main__":
    print("\n".join(report()))
