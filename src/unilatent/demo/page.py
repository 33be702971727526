"""The page in Gradio. It has a control for everything that the model's conditions and layouts take, and a tab for each
thing that can be done; what is done is in `workbench`."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, wraps
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..maths.solvers import SOLVERS
from ..plain_text import count_of
from . import markup
from .jobs import Jobs, StopFlag
from .workbench import MOST_POINTS, MOST_SAMPLES, MOST_STEPS, Asked, Drawing, DrawnMap, Film, News, Workbench

try:
    import gradio as gr
except ImportError:  # `server.served` says what to install
    gr = None

ONE_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""Everything that computes waits in one queue."""
MOST_WAITING = 20
"""Requests that may wait; further ones are refused with a message."""
STEPS_SHOWN = 200
"""Right end of the slider of solver steps, at least."""
MOST_SEED = 2**31
Work = Callable[[StopFlag, Callable[[Any], None]], Any]
"""What is done until a stop is asked for, and tells of its progress."""
CHOOSE = """
element.addEventListener("click", (event) => {
  const cell = event.target.closest("[data-index]");
  if (cell) trigger("select", { index: Number(cell.dataset.index) });
});
"""
PLACE = """
element.addEventListener("click", (event) => {
  const map = event.target.closest("svg");
  if (!map) return;
  const box = map.getBoundingClientRect(), side = map.viewBox.baseVal.width;
  const across = (event.clientX - box.left) / box.width * side, down = (event.clientY - box.top) / box.height * side;
  const here = map.querySelector(".here")
    || map.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "circle"));
  here.setAttribute("class", "here");
  for (const [name, value] of Object.entries({ cx: across, cy: down, r: 16 })) here.setAttribute(name, value);
  const [left, top, scale] = ["left", "top", "scale"].map((name) => Number(map.dataset[name]));
  trigger("select", { x: left + scale * across, y: top - scale * down });
});
"""


class Page:
    """Builds the page of one workbench. `blocks` is the application; `close` ends its jobs."""

    def __init__(self, bench: Workbench):
        self.bench, self.jobs = bench, Jobs()
        self.stops: dict[tuple[str, str], StopFlag] = {}
        """(session, tab) -> the flag of the newest work there."""
        self.controls = bench.controls
        self.blocks = self._build()

    def close(self) -> None:
        """End all jobs."""
        for stop in self.stops.values():
            stop.set()
        self.jobs.close()

    # ---- layout

    def _build(self) -> Any:
        bench = self.bench
        with gr.Blocks(
            analytics_enabled=False, title=f"{bench.name} · unilatent", delete_cache=(600, 3600), fill_width=True
        ) as blocks:
            facts = escape(" · ".join(bench.facts()))
            gr.HTML(f'<h1 class="name">{escape(bench.name)}</h1><p class="facts">{facts}</p>')
            self.drawing = gr.State(None, time_to_live=3600)
            self.map = gr.State(None, time_to_live=3600)
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._settings()
                with gr.Column(scale=3, min_width=420), gr.Tabs():
                    with gr.Tab("Sample"):
                        self._sampling()
                    with gr.Tab("Reconstruct"):
                        self._reconstructing()
                    with gr.Tab("Interpolate"):
                        self._interpolating()
                    with gr.Tab("Denoise"):
                        self._denoising()
                    with gr.Tab("Latent map"):
                        self._mapping()
                    if bench.is_completing:
                        with gr.Tab("Complete"):
                            self._completing()
            self._choosing()
            blocks.unload(self._left)
        blocks.queue(api_open=False, max_size=MOST_WAITING, default_concurrency_limit=1)
        return blocks

    def _settings(self) -> None:
        """What is sampled, and how."""
        sampling, guided = self.bench.model.config.sampling, self.bench.is_guided
        self.entered = {name: self._control(name) for name in self.controls}
        choices = [len(c.choices) for c in self.controls.values() if 1 < len(c.choices) <= 20]
        num = min(40, 4 * choices[0]) if len(choices) == 1 else 16
        self.num = gr.Slider(1, MOST_SAMPLES, num, step=1, label="Samples")
        with gr.Row(equal_height=True):
            self.seed = gr.Number(0, precision=0, minimum=0, label="Seed", scale=3, elem_id="seed")
            other = gr.Button("other seed", size="sm", scale=1, min_width=90)
        other.click(lambda: random.randrange(MOST_SEED), None, self.seed, queue=False, api_visibility="private")
        most = min(MOST_STEPS, max(STEPS_SHOWN, sampling.num_inference_steps))
        self.steps = gr.Slider(1, most, sampling.num_inference_steps, step=1, label="Steps")
        self.scale = gr.Slider(
            0, max(10.0, sampling.guidance_scale), sampling.guidance_scale, step=0.1, label="Guidance", visible=guided,
            info="1: the condition as it was learned; above: followed more closely",
        )  # fmt: skip
        with gr.Accordion("More", open=False):
            low, high = sampling.guidance_interval
            self.low = gr.Slider(0, 1, low, step=0.01, label="Guide from t =", visible=guided, info="0 is clean")
            self.high = gr.Slider(0, 1, high, step=0.01, label="Guide up to t =", visible=guided, info="1 is noise")
            self.solver = gr.Dropdown(list(SOLVERS), value=sampling.solver, label="Solver")
        self.inputs = [self.num, self.seed, self.steps, self.solver, self.scale, self.low, self.high,
                       *self.entered.values()]  # fmt: skip

    def _control(self, name: str) -> Any:
        control = self.controls[name]
        shared = {"label": control.title, "info": control.hint or None, "elem_id": f"control-{name}"}
        if control.choices:
            return gr.Dropdown(list(control.choices), value=[], multiselect=True, **shared)
        box = gr.Textbox(
            lines=3 if control.lines else 1, placeholder="\n".join(control.examples[:3]) or None, max_length=20_000,
            **shared,
        )  # fmt: skip
        if control.lines and control.examples:
            gr.Examples([[text] for text in control.examples], box, label="Examples", api_visibility="private")
        return box

    def _sampling(self) -> None:
        with gr.Row():
            start, stop = self._buttons("Sample")
        line = gr.HTML("", elem_classes="line", elem_id="sample-line")
        self.grid = gr.HTML("", js_on_load=CHOOSE, elem_id="sample-grid")
        viewer = gr.HTML("", elem_id="sample-viewer")
        archive = gr.DownloadButton("Download", visible=False, size="sm")
        outputs = [line, self.grid, viewer, archive, self.drawing]
        self._long("sample", start, stop, self._sample, self.inputs, outputs, line)
        self.sample_line = line

    def _reconstructing(self) -> None:
        source = self._upload("Your own", "reconstruct-file")
        start = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct-start")
        shown = gr.HTML("", elem_id="reconstruct-shown")
        viewer = gr.HTML("")
        for event in (start.click, source.upload):
            event(self._reconstruct, [source, self.seed], [shown, viewer], api_visibility="private",
                  show_progress="minimal", **ONE_QUEUE)  # fmt: skip

    def _interpolating(self) -> None:
        gr.Markdown("Between two samples (click them in the Sample tab, or give their numbers), or two of your own.")
        with gr.Row():
            self.ends, files = [], []
            for title, number in (("First", 0), ("Second", 1)):
                with gr.Column():
                    self.ends.append(gr.Number(number, precision=0, minimum=0, label=f"{title}: sample number"))
                    files.append(self._upload(f"{title}: your own instead", f"{title.lower()}-file", height=180))
        start = gr.Button("Interpolate", variant="primary", elem_id="interpolate-start")
        shown = gr.HTML("", elem_id="interpolate-shown")
        start.click(
            self._interpolate, [*self.ends, *files, self.seed, self.drawing], shown, api_visibility="private",
            show_progress="minimal", **ONE_QUEUE,
        )  # fmt: skip

    def _denoising(self) -> None:
        gr.Markdown("One sample on its way from noise to data, with the settings on the left.")
        with gr.Row(equal_height=True):
            self.followed = gr.Number(0, precision=0, minimum=0, label="Sample number")
            start, stop = self._buttons("Watch")
        line = gr.HTML("", elem_classes="line", elem_id="denoise-line")
        shown = gr.HTML("", elem_id="denoise-shown")
        self._long("denoise", start, stop, self._denoise, [self.followed, *self.inputs], [line, shown], line)

    def _mapping(self) -> None:
        gr.Markdown("Samples with the settings on the left, where their latents lie in the two directions of greatest "
                    "variance.")  # fmt: skip
        with gr.Row(equal_height=True):
            points = gr.Slider(10, MOST_POINTS, 100, step=10, label="Samples")
            pictures = gr.Checkbox(False, label="draw the samples themselves")
            start, stop = self._buttons("Draw map")
        line = gr.HTML("", elem_classes="line", elem_id="map-line")
        with gr.Row():
            with gr.Column(scale=3):
                shown = gr.HTML("", js_on_load=PLACE, elem_id="map-shown")
            with gr.Column(scale=2):
                decoded = gr.HTML("", elem_id="map-decoded")
        self._long("map", start, stop, self._draw_map, [points, pictures, *self.inputs], [line, shown, self.map], line)
        pictures.change(self._show_map, [pictures, self.map], shown, queue=False, api_visibility="private")
        shown.select(
            self._decode_at, self.map, decoded, api_visibility="private", show_progress="minimal", **ONE_QUEUE
        )  # fmt: skip

    def _completing(self) -> None:
        most = self.bench.model.modality.given_frames_most
        gr.Markdown("The model is given a part of a file and makes the rest, as often as samples are set on the left.")
        with gr.Row():
            source = self._upload("A file of which a part is given", "complete-file")
            with gr.Column():
                frames = gr.Number(1 if most else None, precision=0, minimum=1, visible=bool(most),
                                   label=f"Frames that are given, 1 to {most}")  # fmt: skip
                mask = picture(
                    sources=["upload", "clipboard"], height=180,
                    label="Mask: a picture that is white where the model is to paint",
                )  # fmt: skip
        with gr.Row():
            start, stop = self._buttons("Complete")
        line = gr.HTML("", elem_classes="line", elem_id="complete-line")
        shown = gr.HTML("", elem_id="complete-shown")
        self._long("complete", start, stop, self._complete, [source, mask, frames, *self.inputs], [line, shown], line)

    def _choosing(self) -> None:
        """A click on a sample makes it the one that is followed, and the second end of an interpolation."""
        self.grid.select(
            self._choose, [self.ends[1], self.drawing], [*self.ends, self.followed, self.sample_line], queue=False,
            api_visibility="private",
        )  # fmt: skip

    def _upload(self, label: str, name: str, height: int = 260) -> Any:
        if self.bench.takes_pictures:
            return picture(
                sources=["upload", "clipboard", "webcam"], label=label, height=height,
                elem_id=name, buttons=[],
            )  # fmt: skip
        kinds = ", ".join(self.bench.model.modality.readable)
        return gr.File(label=f"{label} ({kinds})", elem_id=name, height=height)

    def _buttons(self, title: str) -> tuple[Any, Any]:
        name = title.lower().replace(" ", "-")
        start = gr.Button(title, variant="primary", elem_id=f"{name}-start", scale=3, min_width=120)
        return start, gr.Button("Stop", interactive=False, elem_id=f"{name}-stop", scale=1, min_width=80)

    def _long(
        self, tab: str, start: Any, stop: Any, work: Callable[..., Any], inputs: Sequence[Any],
        outputs: Sequence[Any], line: Any,
    ) -> None:  # fmt: skip
        """Connect the buttons of work that takes long: it waits in the queue, and can be stopped there too. Each
        tab has a stop of its own."""
        where = gr.State(tab)
        quick = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        begun = start.click(self._begin, where, [start, stop, line], **quick)
        done = begun.then(
            work, [where, *inputs], list(outputs), api_visibility="private", show_progress="hidden", **ONE_QUEUE
        )  # fmt: skip
        done.then(lambda: (gr.Button(interactive=True), gr.Button(interactive=False)), None, [start, stop], **quick)
        stop.click(self._stop, where, line, **quick)

    # ---- what events call

    def _begin(self, request: gr.Request, tab: str) -> tuple[Any, Any, str]:
        self.stops[_session(request), tab] = StopFlag()
        return gr.Button(interactive=False), gr.Button(interactive=True), "waiting for its turn"

    def _stop(self, request: gr.Request, tab: str) -> str:
        if (stop := self.stops.get((_session(request), tab))) is not None:
            stop.set()
        return "stopping"

    def _left(self, request: gr.Request) -> None:
        """The page was closed."""
        for key in [key for key in self.stops if key[0] == _session(request)]:
            self.stops.pop(key).set()

    def _follow(self, request: gr.Request, tab: str, work: Work) -> Iterator[Any]:
        """Run work and yield what it tells; its warnings become messages, each text once."""
        stop = self.stops.setdefault((_session(request), tab), StopFlag())
        shown: set[str] = set()
        for news in self.jobs.follow(lambda tell: work(stop, tell), stop):
            for text in getattr(news, "warnings", ()):
                if text not in shown:
                    shown.add(text)
                    gr.Warning(escape(text))
            yield news

    def _asked(self, values: Sequence[Any]) -> Asked:
        num, seed, steps, solver, scale, low, high, *entered = values
        return Asked(num, seed, steps, solver, scale, (low, high), dict(zip(self.entered, entered, strict=True)))

    def _columns(self, values: Sequence[Any]) -> int:
        """Columns of a grid: one for each class, as far as they fit."""
        chosen = [value for value in values if isinstance(value, list) and value]
        if not chosen:
            return self.bench.model.conditions.columns
        return len(chosen[0]) * max(1, markup.COLUMNS // len(chosen[0]))

    def _sample(self, request: gr.Request, tab: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        asked, columns = self._asked(values), self._columns(values)
        news: News
        yield "", "", "", gr.DownloadButton(visible=False), None
        with messages():
            for news in self._follow(request, tab, lambda stop, tell: self.bench.sample(asked, stop, tell)):
                drawing = news.drawing
                if drawing is None:
                    yield news.line, gr.skip(), gr.skip(), gr.skip(), gr.skip()
                    continue
                shown = markup.grid(drawing, address, columns)
                viewer = markup.frame(drawing.viewer) if drawing.viewer else ""
                archive = gr.DownloadButton(value=drawing.archive, visible=True) if drawing.archive else gr.skip()
                yield escape(news.line), shown, viewer, archive, replace(drawing, viewer=None)

    def _choose(self, second: Any, drawing: Drawing | None, event: gr.EventData) -> tuple[Any, ...]:
        index = event._data.get("index")
        if drawing is None or not isinstance(index, int) or not 0 <= index < len(drawing.pictures):
            return (gr.skip(),) * 4
        caption = drawing.captions[index]
        line = f"sample #{index}{', ' + caption if caption else ''}: see it denoise, or click another to interpolate"
        first = second if isinstance(second, int) and second != index else index
        return first, index, index, escape(line)

    def _reconstruct(self, source: str | None, seed: Any) -> tuple[str, str]:
        with messages():
            made = self.jobs.run(partial(self.bench.reconstruct, _path(source), seed))
            return markup.pairs(made, address), markup.frame(made.viewer) if made.viewer else ""

    def _interpolate(
        self, first: Any, second: Any, first_file: str | None, second_file: str | None, seed: Any,
        drawing: Drawing | None,
    ) -> str:  # fmt: skip
        with messages():
            ends = [
                _path(file) or _sample_of(drawing, number, title)
                for file, number, title in ((first_file, first, "first"), (second_file, second, "second"))
            ]
            return markup.player(self.jobs.run(partial(self.bench.interpolate, ends[0], ends[1], seed)))

    def _denoise(self, request: gr.Request, tab: str, index: Any, *values: Any) -> Iterator[tuple[Any, ...]]:
        asked = self._asked(values)
        yield "", ""
        with messages():
            for news in self._follow(request, tab, _telling(partial(self.bench.denoise, asked, index))):
                film = isinstance(news, Film)
                yield escape(news.line), markup.player(news) if film else gr.skip()

    def _draw_map(
        self, request: gr.Request, tab: str, points: Any, pictures: bool, *values: Any
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        asked = self._asked(values)
        yield "", "", None
        with messages():
            for news in self._follow(request, tab, _telling(partial(self.bench.draw_map, asked, points))):
                if isinstance(news, DrawnMap):
                    yield count_of(len(news.captions), "sample"), markup.scatter(news, address, pictures), news
                else:
                    yield escape(news.line), gr.skip(), gr.skip()

    def _show_map(self, pictures: bool, drawn: DrawnMap | None) -> Any:
        return gr.skip() if drawn is None else markup.scatter(drawn, address, pictures)

    def _decode_at(self, drawn: DrawnMap | None, event: gr.EventData) -> str:
        with messages():
            if drawn is None:
                raise ValueError("map: there is none any more; draw it again")
            film = self.jobs.run(partial(self.bench.decode_at, drawn, event._data.get("x"), event._data.get("y")))
            return markup.frame(film.viewer, "22rem") if film.viewer else markup.figures(film, address)

    def _complete(
        self, request: gr.Request, tab: str, source: str | None, mask: str | None, frames: Any, *values: Any
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        asked = self._asked(values)
        yield "", ""
        with messages():
            work = partial(self.bench.complete, asked, _path(source), _path(mask), frames)
            for news in self._follow(request, tab, work):
                shown = gr.skip() if news.drawing is None else markup.grid(news.drawing, address, markup.COLUMNS)
                yield escape(news.line), shown


class messages:
    """Turn errors into messages on the page: those of users as they are, all others as such, with a traceback in the
    terminal."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | FloatingPointError):
            raise gr.Error(escape(str(error)), duration=None, print_exception=False) from None
        if isinstance(error, Exception) and not isinstance(error, gr.Error):
            traceback.print_exception(error)
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise gr.Error(f"this failed ({escape(what)}); the terminal has more", print_exception=False) from None


def _telling(work: Work) -> Work:
    """Let work tell its result as its last news; "stopped" if it has none."""

    @wraps(work)
    def told(stop: StopFlag, tell: Callable[[Any], None]) -> None:
        result = work(stop, tell)
        tell(News("stopped", ended=True) if result is None else result)

    return told


def picture(**settings: Any) -> Any:
    """Return an input for a picture that is dropped, pasted or taken. Its value is the file as it came, which the
    modality reads."""
    component = gr.Image(type="filepath", image_mode=None, **settings)
    component.preprocess = lambda payload: None if payload is None or not payload.path else str(payload.path)
    return component


def address(path: Path) -> str:
    """Return where the browser finds a file below the workbench's folder."""
    return f"gradio_api/file={quote(str(path))}"


def _path(source: str | None) -> Path | None:
    return None if not source else Path(source)


def _sample_of(drawing: Drawing | None, number: Any, title: str) -> Path:
    """Return the file of a sample of the grid; ValueError if there is no such one."""
    if drawing is None or not drawing.files:
        raise ValueError(f"{title}: no samples yet; press Sample in the Sample tab, or give a file of your own")
    if not isinstance(number, int) or not 0 <= number < len(drawing.files):
        raise ValueError(f"{title}: there is no sample {number}; give 0 to {len(drawing.files) - 1}")
    return drawing.files[number]


def _session(request: gr.Request) -> str:
    return str(request.session_hash or "")
