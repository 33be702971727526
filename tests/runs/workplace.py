"""A reader's folder, in which the commands and the code of documents run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from documents import PAGES, Block, blocks, small, small_python, unilatent
from PIL import Image


def class_folders(folder: Path, size: int = 32, each: int = 12) -> None:
    """Two classes of colour noise."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / name / f"{i}.png")


def captioned(folder: Path) -> None:
    class_folders(folder)
    for image in folder.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"one of the {image.parent.name}\na photo of noise\n")


def grey(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)).save(path)


def mask(path: Path) -> None:
    Image.fromarray(np.uint8(255 * (np.indices((16, 16))[1] > 8))).save(path)


def clip(path: Path) -> None:
    from modalities.video_files import moving, video

    video(moving(24, 16, 16), path)


def clips(folder: Path) -> None:
    for name in ("cats/1.mp4", "cats/2.mp4", "dogs/1.mp4", "dogs/2.mp4"):
        clip(folder / name)


def molecules(folder: Path) -> None:
    """An .sdf with 40 molecules, each with a number."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    folder.mkdir(parents=True)
    with Chem.SDWriter(str(folder / "batch.sdf")) as file:
        for i in range(40):
            molecule = Chem.AddHs(Chem.MolFromSmiles("C" * (1 + i % 5) + "ON"[i % 2]))
            AllChem.EmbedMolecule(molecule, randomSeed=i)
            molecule.SetProp("solubility", str(i / 10))
            file.write(molecule)


PROVIDED: dict[str, Callable[[Path], None]] = {
    "my_images": class_folders,
    "photos": lambda folder: class_folders(folder, size=300, each=4),
    "imagenet": class_folders,
    "imagenet/train": class_folders,
    "captioned": captioned,
    "prompts.txt": lambda path: path.write_text("a red star\ntwo green squares\n") and None,
    "image.png": grey,
    "mask.png": mask,
    "clip.mp4": clip,
    "videos": clips,
    "my_molecules": molecules,
}
"""Files and folders of a reader's own, by the name that pages give them."""
RUNS = {
    "runs/scenes": ["scenes-unite"],
    "runs/molecules": ["molecules"],
    "runs/qm9-like": ["molecules-qm9-like"],
    "runs/joint": ["joint"],
    "runs/bouncing": ["bouncing-unite"],
    "runs/ul": ["digits-ul"],
    "runs/lf4": ["digits-ul"],
    "runs/lf8": ["digits-ul"],
    "runs/lf16": ["digits-ul"],
}
"""Runs that pages take for granted, by name; others are of the digits."""


class Workplace:
    """A reader's folder: what a page takes for granted is put there when its name comes up."""

    def __init__(self, folder: Path, run: Path, cli: Callable[..., Any], trained: dict[tuple[str, ...], Path]):
        self.folder, self.digits, self.cli, self.trained = folder, run, cli, trained

    def provide(self, text: str) -> None:
        """Put files and folders that `text` names and that are not there into the folder."""
        for name, make in PROVIDED.items():
            path = self.folder / name
            if re.search(rf"(?<![\w/.]){re.escape(name)}(?![\w])", text) and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                make(path)

    def provide_runs(self, text: str) -> None:
        """Put runs that `text` names and that are not there into the folder."""
        for name in re.findall(r"(?<![\w/.])runs/[\w-]+", text):
            if name in RUNS and not (self.folder / name).exists():
                self.command("a page that needs it", ["train", *RUNS[name], "--out", name])
            elif not (self.folder / name).exists():
                shutil.copytree(self.digits, self.folder / name)

    def command(self, place: str, arguments: list[str], later: str = "", code: int = 0) -> None:
        """Run a command line, small; one that trains what was trained before takes that.

        later: text that follows on the page. What it does not name is not trained: the run is only checked.
        code: the exit code.
        """
        arguments = [word for given in small(arguments) for word in self.matches(given)]
        training = arguments[0] == "train"
        out = after(arguments, "--out") if "--out" in arguments else f"runs/{arguments[1]}" if arguments[1:] else ""
        written = out if arguments[0] in ("train", "finetune-decoder") else None
        read = " ".join(word for word in arguments[1:] if word != written)
        self.provide(read)
        self.provide_runs(read if arguments != ["runs"] else "runs/digits")
        if arguments[0] == "demo" and find_spec("gradio") is None:
            return
        if training and later and out not in later and "--dry-run" not in arguments:
            arguments.append("--dry-run")
        key = tuple(word for word in arguments if word != out)
        new = training and "--dry-run" not in arguments and not (self.folder / out).exists()
        if new and key in self.trained:
            shutil.copytree(self.trained[key], self.folder / out)
            return
        self.done(place, arguments, code)
        if new and "--resume" not in arguments:
            copy = self.digits.parent / f"trained-{len(self.trained)}"
            self.trained[key] = shutil.copytree(self.folder / out, copy)

    def matches(self, word: str) -> list[str]:
        """What a shell makes of a word with an asterisk."""
        if "*" not in word or "=" in word:
            return [word]
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(word)) or [word]

    def done(self, place: str, arguments: list[str], code: int = 0) -> None:
        done = self.cli(*arguments)
        assert done.code == code, f"{place}: unilatent {' '.join(arguments)}\n{done.out}{done.err}"

    def python(self, block: Block) -> None:
        self.provide(block.text)
        self.provide_runs(" ".join(re.findall(r'load\("([^"]+)"', block.text)))
        exec(compile(small_python(block.text), block.place, "exec"), {})

    def yaml(self, block: Block) -> None:
        """A YAML block is the file of a run, whose name is in its first line."""
        name = re.match(r"# ([\w.-]+\.yaml)\n", block.text)
        assert name, f"{block.place}: begin with a comment that names the file"
        (self.folder / name[1]).write_text(block.text)
        done = self.cli("config", "show", name[1])
        assert done.code == 0, f"{block.place}: {done.err}"

    def page(self, page: str) -> None:
        """Run every block of a page, from the top."""
        text = PAGES[page].read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        for block in blocks(page):
            if not block.runs:
                continue
            below = "".join(lines[block.line + block.text.count("\n") :])
            for i, words in enumerate(block.commands):
                arguments = unilatent(words)
                assert arguments, f"{block.place}: {words[0]}: cannot be run here; mark the block"
                rest = " ".join(word for words in block.commands[i + 1 :] for word in words)
                self.command(block.place, arguments, f"{rest} {below} ")
            if block.language == "python":
                self.python(block)
            elif block.language == "yaml":
                self.yaml(block)


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]
