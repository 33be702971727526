"""What the page does with one model, without a web framework: sample, reconstruct, interpolate, denoise, map, complete.

It asks the model's conditions and modality what can be entered (`Control`) and lets the modality draw, so it knows no
kind of data or condition by name. Everything shown is a file below one folder; older ones are removed.
"""

from __future__ import annotations

import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.decoding import trajectory
from ..analysis.latent_map import LatentMap
from ..analysis.latents import decode_clean, interpolations
from ..conditions.base import NEGATIVE
from ..controls import Control
from ..maths.streams import Streams
from ..methods.base import LatentModel
from ..plain_text import count_of
from ..sampling import checked_int, computing, reconstruct, sample_batches, split_settings
from ..signals import Stopped
from ..types import Given, Layout, join, take
from .jobs import StopFlag

MOST_SAMPLES, MOST_STEPS, MOST_POINTS, MOST_UPLOADED = 100, 1000, 400, 8
"""The most samples of a grid, solver steps, samples of a map, and samples of one uploaded file that are used."""
MOMENTS, BETWEEN = 24, 13
"""Moments of a sample's denoising, and interpolations between two samples, that are shown."""
BATCH_SECONDS, SLOW_SECONDS, FEWEST, MOST_BATCH = 2.0, 60.0, 4, 64
"""A batch of a growing grid should take about BATCH_SECONDS. It has at least FEWEST samples, since a few take hardly
longer than one, unless these take more than SLOW_SECONDS; and at most MOST_BATCH."""
KEPT, KEPT_SECONDS = 64, 3600
"""Folders of results that are kept, and for how long; the newest ones always."""
COLOURED = 20
"""Points of a map are coloured by condition if it has at most so many different values."""


@dataclass(frozen=True)
class Asked:
    """What was asked for: the fields of the page that sampling reads. None or empty: the model's own setting.

    entered: argument of `sample` -> what was entered in its control.
    """

    num: Any = 16
    seed: Any = 0
    steps: Any = None
    solver: str | None = None
    guidance_scale: Any = None
    interval: tuple[Any, Any] | None = None
    entered: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """Samples as they are shown: one picture and one caption each.

    files: what `Modality.write` wrote of them, one each, which `read` reads. total: how many there will be.
    """

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    total: int = 0
    viewer: str | None = None
    archive: Path | None = None


@dataclass(frozen=True)
class News:
    """What a job tells: a line for people, and what there is to show so far. warnings: all so far, each text once."""

    line: str
    drawing: Drawing | None = None
    warnings: tuple[str, ...] = ()
    ended: bool = False


@dataclass(frozen=True)
class Pairs:
    """Originals, their reconstructions and the errors of each, in words."""

    originals: list[Path]
    made: list[Path]
    errors: list[str]
    names: list[str]
    viewer: str | None
    note: str


@dataclass(frozen=True)
class Film:
    """Moments of one thing, in order: pictures with captions, or a page that shows them in three dimensions."""

    pictures: list[Path]
    captions: list[str]
    viewer: str | None
    line: str


@dataclass(frozen=True)
class DrawnMap:
    """A map of latents, and what it needs to decode a place on it. layout: of the samples' data tokens.

    groups: the number of each point's group, whose names are `group_names`.
    """

    map: LatentMap
    layout: Layout
    seed: int
    captions: list[str]
    pictures: list[Path]
    groups: list[int]
    group_names: list[str]


class Workbench:
    """A model and what the page does with it.

    name: how the user named the model. folder: where everything shown is written; it belongs to the workbench.
    precision: "fp32" or "bf16".
    """

    def __init__(self, model: LatentModel, name: str, folder: Path, precision: str = "fp32"):
        self.model, self.name, self.folder, self.precision = model, name, folder, precision

    # ---- what can be entered

    @property
    def controls(self) -> dict[str, Control]:
        """Argument of `sample` -> how it is asked for: layouts first, then conditions, then what to lead away from."""
        modality, conditions = self.model.modality, self.model.conditions.all
        found = {name: modality.layout_control(name) for name in modality.layout_arguments}
        found = {**{condition.argument: condition.control() for condition in conditions}, **found}
        for condition in conditions:
            control = found[condition.argument]
            if control.negative:
                title = f"Negative {control.title[:1].lower()}{control.title[1:]}"
                found[NEGATIVE + condition.argument] = replace(
                    control, title=title, examples=(), hint="guidance leads away from it; empty: from no condition"
                )
        return found

    @property
    def is_guided(self) -> bool:
        """Whether guidance has an effect."""
        return bool(self.model.conditions.all)

    @property
    def is_completing(self) -> bool:
        """Whether parts of samples can be given."""
        return self.model.config.given is not None

    @property
    def takes_pictures(self) -> bool:
        """Whether a picture from the clipboard or a camera can be reconstructed."""
        return ".png" in self.model.modality.readable

    def facts(self) -> list[str]:
        """Return what the model is, in a few words each."""
        model = self.model
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        size = " x ".join(map(str, model.modality.resolution))
        latents = f"{model.max_latents} latents of {model.latent_channels} channels"
        return [
            type(model).__name__, f"{parameters:.3g} M parameters", f"{model.modality.config.name} {size}", latents,
            f"{model.device.type}, {self.precision}",
        ]  # fmt: skip

    def settings(self, asked: Asked) -> dict[str, Any]:
        """Return what was asked for as keywords of `sample`; ValueError names what cannot be."""
        steps = None if asked.steps is None else bounded("steps", asked.steps, 1, MOST_STEPS)
        values = {name: control.value(asked.entered.get(name)) for name, control in self.controls.items()}
        settings = {"num_inference_steps": steps, "solver": asked.solver or None, **values}
        if self.is_guided:
            interval = None if asked.interval is None else tuple(real("guidance interval", x) for x in asked.interval)
            scale = None if asked.guidance_scale is None else real("guidance", asked.guidance_scale)
            settings |= {"guidance_scale": scale, "guidance_interval": interval}
        split_settings(self.model.config.sampling, settings)
        return settings

    # ---- what can be done

    def sample(self, asked: Asked, stop: StopFlag, tell: Callable[[News], None], given: Given | None = None) -> None:
        """Generate samples in batches of about a second and tell of each; a drawing grows until it is complete.

        given: parts of samples to complete.
        """
        num = bounded("samples", asked.num, 1, MOST_SAMPLES)
        seed, settings = self._seed(asked), self.settings(asked)
        drawing, parts, values = Drawing(self._new_folder(), total=num), [], []
        steps = settings["num_inference_steps"] or self.model.config.sampling.num_inference_steps
        size, started, ended = min(FEWEST, num), time.monotonic(), False
        tell(News("starting", drawing))
        with noted_warnings() as noted, self._stoppable(stop):
            while not ended:
                done = len(drawing.pictures)
                size = min(size, num - done)
                watch = _Steps(f"sample {done + 1} to {done + size} of {num}", steps, stop, tell)
                batch_started = time.monotonic()
                try:
                    batches = sample_batches(
                        self.model, num, seed=seed, start=done, stop=done + size, batch_size=size, watch=watch,
                        precision=self.precision, all_used=True, given=given, **settings,
                    )  # fmt: skip
                    batch = next(batches)
                except Stopped:
                    break
                parts.append(batch.data)
                values.append(batch.values)
                drawing = self._grown(drawing, batch.data, batch.values, done)
                done += size
                ended = done >= num
                seconds = time.monotonic() - batch_started
                size = next_size(size, seconds)
                if not ended:
                    tell(News(f"{done} of {count_of(num, 'sample')}", drawing, noted()))
            seconds = time.monotonic() - started
            done = len(drawing.pictures)
            made = count_of(done, "sample") if ended else f"stopped: {done} of {count_of(num, 'sample')}"
            line = f"{made} in {seconds:.1f} s"
            if parts:
                drawing = self._finished(drawing, parts, values)
            tell(News(line, drawing, noted(), ended=True))

    def complete(
        self, asked: Asked, source: Path | None, mask: Path | None, frames: Any, stop: StopFlag,
        tell: Callable[[News], None],
    ) -> None:  # fmt: skip
        """Complete the given part of a file, as often as samples were asked for; as `sample`. The drawing begins with
        what is given, and ends with the whole file where it is complete."""
        if source is None:
            raise ValueError("file: none given; drop one of which the model is given a part")
        number = None if frames is None else bounded("frames", frames, 1, self.model.modality.given_frames_most or 1)
        with about(source), about(mask):
            given = self.model.modality.read_given(source, mask, number)
        known = self._pictures(self.model.modality.fill(given))
        true = self._pictures(given.data) if given.complete else []

        def told(news: News) -> None:
            if (drawing := news.drawing) is not None:
                whole = true if news.ended else []
                captions = [
                    "given",
                    *[caption or "completed" for caption in drawing.captions],
                    *["the file"] * len(whole),
                ]
                drawing = replace(
                    drawing, pictures=[*known, *drawing.pictures, *whole], captions=captions,
                    total=drawing.total + len(known) + len(whole),
                )  # fmt: skip
                news = replace(news, drawing=drawing)
            tell(news)

        self.sample(asked, stop, told, given)

    def reconstruct(self, source: Path | None, seed: Any = 0) -> Pairs:
        """Reconstruct the samples of a file, the first ones if it has many; ValueError says why it cannot be read."""
        data, names, note = self._read(source, MOST_UPLOADED)
        made = reconstruct(self.model, data, seed=whole("seed", seed), precision=self.precision)
        errors = self.model.modality.errors(made, data)
        texts = [
            ", ".join(f"{error_name(key)} {values[i]:.4g}" for key, values in errors.items()) for i in range(len(names))
        ]
        both = [take(part, slice(i, i + 1)) for i in range(len(names)) for part in (data, made)]
        captions = [what for text in texts for what in ("original", f"reconstruction: {text}")]
        viewer = self.model.modality.viewer(self.model.modality.join(both), captions)
        return Pairs(self._pictures(data), self._pictures(made), texts, names, viewer, note)

    def interpolate(self, first: Path | None, second: Path | None, seed: Any = 0) -> Film:
        """Decode what lies between the latents of two files' first samples."""
        model, modality = self.model, self.model.modality
        ends = [self._read(path, 1)[0] for path in (first, second)]
        with computing(model, self.precision):
            rows = interpolations(model, modality.join(ends), BETWEEN, whole("seed", seed), most=1)
        if not rows:
            sizes = [int(modality.pack(end).layout.real_tokens) for end in ends]
            raise ValueError(f"the two have {sizes[0]} and {sizes[1]} tokens; choose two of equal size")
        shares = [f"{100 * i / (BETWEEN - 1):.0f} %" for i in range(BETWEEN)]
        return self._film(rows[0], ["first", *shares, "second"], "from the first to the second")

    def denoise(self, asked: Asked, index: Any, stop: StopFlag, tell: Callable[[News], None]) -> Film | None:
        """Follow sample number `index` from noise to data: the decoded clean estimates on its way. None if stopped."""
        index = bounded("sample", index, 0, MOST_SAMPLES - 1)
        settings = self.settings(asked)
        steps = settings["num_inference_steps"] or self.model.config.sampling.num_inference_steps
        watch = _Steps(f"sample #{index}", steps, stop, tell)
        try:
            with self._stoppable(stop):
                course, columns = trajectory(
                    self.model, 1, self._seed(asked), start=index, most=MOMENTS, precision=self.precision, watch=watch,
                    **settings,
                )  # fmt: skip
        except Stopped:
            return None
        places = torch.linspace(0, len(course.times) - 1, len(columns)).round().int().tolist()
        captions = [f"t = {course.times[i]:.3f}" for i in places]
        line = f"sample #{index}: what the denoiser expects at each time, from noise (t = 1) to data (t = 0)"
        return self._film(self.model.modality.join(columns), captions, line)

    def draw_map(
        self, asked: Asked, points: Any, stop: StopFlag, tell: Callable[[News], None]
    ) -> DrawnMap | None:  # fmt: skip
        """Generate samples and project their latents on a plane; None if it was stopped before there were three."""
        num = bounded("points", points, 3, MOST_POINTS)
        seed, settings = self._seed(asked), self.settings(asked)
        steps = settings["num_inference_steps"] or self.model.config.sampling.num_inference_steps
        parts, folder, done = [], self._new_folder(), 0
        pictures: list[Path] = []
        try:
            with self._stoppable(stop):
                for start in range(0, num, MOST_BATCH):
                    stop.check()
                    watch = _Steps(f"{start} of {num} points", steps, stop, tell)
                    batches = sample_batches(
                        self.model, num, seed=seed, start=start, stop=start + MOST_BATCH, batch_size=MOST_BATCH,
                        watch=watch, precision=self.precision, **settings,
                    )  # fmt: skip
                    parts.append(next(batches))
                    pictures += self.model.modality.pictures(parts[-1].data, folder, done)
                    done += parts[-1].count
        except Stopped:
            if done < 3:
                return None
        layouts = [part.layout for part in parts]
        masks = [layout.mask for layout in layouts]
        shared = layouts[0].positions.shape[0] == 1
        positions = layouts[0].positions if shared else torch.cat([layout.positions for layout in layouts])
        layout = Layout(positions, None if masks[0] is None else torch.cat([m for m in masks if m is not None]),
                        layouts[0].grid)  # fmt: skip
        latent_mask = self.model.latent_layout(layout).mask
        values = join([part.values for part in parts]) if parts[0].values else {}
        captions = self.model.conditions.captions(values) or [""] * done
        names = list(dict.fromkeys(captions))
        few = 1 < len(names) <= COLOURED
        found = LatentMap.of(torch.cat([part.latents for part in parts]), latent_mask)
        return DrawnMap(
            found, layout, seed, captions, pictures, [names.index(caption) if few else 0 for caption in captions],
            names if few else [],
        )  # fmt: skip

    def decode_at(self, drawn: DrawnMap, x: Any, y: Any) -> Film:
        """Decode a place on a map: the nearest sample, then the same moved to that place."""
        place = torch.tensor([real("x", x), real("y", y)], dtype=torch.float64)
        index = drawn.map.nearest(place)
        model, device = self.model, self.model.device
        z = torch.cat([drawn.map.latents[index : index + 1], drawn.map.moved(index, place)]).to(device)
        one = drawn.layout.rows(slice(index, index + 1)).to(device)
        eps = Streams(("map", drawn.seed), [index], device).normal(*z.shape[1:])
        made = []
        with computing(model, self.precision):
            for row in z:
                clean = model.finish_latents(row[None])
                made.append(decode_clean(model, clean, one, eps, drawn.seed, index))
        about = f"#{index}" + (f", {drawn.captions[index]}" if drawn.captions[index] else "")
        data = model.modality.join(made)
        captions = [f"nearest: {about}", "moved to where you clicked"]
        viewer = model.modality.viewer(data, captions)
        return Film(self._pictures(data), captions, viewer, "decoded")

    # ---- inside

    def _seed(self, asked: Asked) -> int:
        return bounded("seed", asked.seed, 0, 2**53)

    def _read(self, source: Path | None, most: int) -> tuple[Any, list[str], str]:
        """Return the first samples of a file, their names, and what is to be said about others."""
        if source is None:
            raise ValueError("file: none given; drop one, or choose it")
        reasons: list[str] = []
        with about(source):
            try:
                data, names = next(self.model.modality.read(source, most + 1, reasons.append), (None, []))
            except ValueError as error:
                raise ValueError(reasons[0] if reasons else str(error)) from None
            if data is None or not names:
                raise ValueError(reasons[0] if reasons else f"{source}: no {self.model.modality.config.name} in it")
        more = len(names) > most
        note = f"the first {most} of the file" if more and most > 1 else ""
        return take(data, slice(most)), [Path(name).name for name in names[:most]], note

    def _film(self, data: Any, captions: list[str], line: str) -> Film:
        viewer = self.model.modality.viewer(data, captions, moving=True)
        return Film([] if viewer else self._pictures(data), captions, viewer, line)

    def _pictures(self, data: Any) -> list[Path]:
        return self.model.modality.pictures(data, self._new_folder())

    def _grown(self, drawing: Drawing, data: Any, values: dict[str, Tensor], start: int) -> Drawing:
        """Return the drawing with further samples."""
        modality = self.model.modality
        files = modality.write(data, drawing.folder / "samples", start)
        pictures = modality.pictures(data, drawing.folder / "pictures", start)
        captions = self.model.conditions.captions(values) or [""] * len(pictures)
        return replace(
            drawing, pictures=[*drawing.pictures, *pictures], captions=[*drawing.captions, *captions],
            files=[*drawing.files, *files],
        )  # fmt: skip

    def _finished(self, drawing: Drawing, parts: list[Any], values: list[dict[str, Tensor]]) -> Drawing:
        """Return the drawing with an archive of its files, and a viewer where samples have one."""
        viewer = self.model.modality.viewer(self.model.modality.join(parts), drawing.captions)
        if viewer is not None:
            (drawing.folder / "samples" / "samples.html").write_text(viewer, encoding="utf-8")
        archive = Path(shutil.make_archive(str(drawing.folder / "samples"), "zip", drawing.folder / "samples"))
        return replace(drawing, viewer=viewer, archive=archive)

    def _new_folder(self) -> Path:
        """Return a new folder that nobody can guess, and remove the oldest ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        older = sorted((path for path in self.folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        limit = time.time() - KEPT_SECONDS
        for path in older[: max(0, len(older) - KEPT)]:
            if path.stat().st_mtime < limit or len(older) > 8 * KEPT:
                shutil.rmtree(path, ignore_errors=True)
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir()
        return folder

    @contextmanager
    def _stoppable(self, stop: StopFlag) -> Iterator[None]:
        """Let a diffusion decoder stop between its steps too."""

        def check(_: nn.Module, __: Any) -> None:
            stop.check()

        decoder = self.model.stepped_decoder
        hook = None if decoder is None else decoder.register_forward_pre_hook(check)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()


class _Steps:
    """Tells how far a batch is, at most a few times a second, and stops it."""

    def __init__(self, what: str, steps: int, stop: StopFlag, tell: Callable[[News], None]):
        self.what, self.steps, self.stop, self.tell = what, steps, stop, tell
        self.times: set[float] = set()
        self.at, self.returns = 1.0, 0
        self.last = time.monotonic()

    def __call__(self, t: float, _: Tensor) -> None:
        self.stop.check()
        self.times.add(round(t, 6))
        self.returns += t > self.at  # by restarts, or by steps that an adaptive solver takes anew
        self.at = t
        if (now := time.monotonic()) - self.last > 0.3:
            self.last = now
            again = f", repeated {self.returns} times" if self.returns else ""
            self.tell(News(f"{self.what}: step {min(len(self.times), self.steps)} of {self.steps}{again}"))


@contextmanager
def noted_warnings() -> Iterator[Callable[[], tuple[str, ...]]]:
    """Collect warnings; the function that is yielded returns those so far, each text once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def noted() -> tuple[str, ...]:
            texts = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
            return tuple(dict.fromkeys(texts))

        yield noted


@contextmanager
def about(source: Path | None) -> Iterator[None]:
    """Name an uploaded file in errors as its owner does, not by where it lies here."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if source is None else text.replace(str(source), source.name)) from None


def next_size(size: int, seconds: float) -> int:
    """Return how many samples the batch after one of `size`, which took so many seconds, should have."""
    fewest = 1 if seconds * FEWEST / size > SLOW_SECONDS else FEWEST
    return max(fewest, min(MOST_BATCH, 4 * size, round(size * BATCH_SECONDS / max(seconds, 1e-3))))


def error_name(key: str) -> str:
    """Return the name of an error of `Modality.errors` for people."""
    return key.upper() if len(key) <= 4 else key.replace("_", " ")


def whole(name: str, value: Any) -> int:
    """Return a number of the page as an int; ValueError names it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == "":
        raise ValueError(f"{name}: empty; give a whole number")
    return checked_int(name, value, 0)


def bounded(name: str, value: Any, least: int, most: int) -> int:
    """Return a number of the page as an int within bounds; ValueError names it."""
    number = whole(name, value)
    if not least <= number <= most:
        raise ValueError(f"{name}: {number} is out of range; give {least} to {most}")
    return number


def real(name: str, value: Any) -> float:
    """Return a number of the page as a finite float; ValueError names it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError(f"{name}: {value!r:.40} is not a number; give one")
    return float(value)
