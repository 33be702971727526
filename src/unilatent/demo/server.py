"""Serves the page: on this machine only unless told otherwise, without a request to any other one."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..methods.base import LatentModel
from ..signals import StopRequest

EXTRA = "pip install 'unilatent[demo]'"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
UPLOAD_MB = 32
"""Default limit of an uploaded file, in MiB."""
STYLE = Path(__file__).with_name("page.css")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""What the browser may load: only what this server sends, so that no request leaves for another one."""
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
FORBIDDEN = ("/proxy=", "/file=http:", "/file=https:", "/file=%68ttp")
"""Addresses at which Gradio would fetch something from elsewhere."""
DOWNLOADS = ("async_ssrf_protected_download", "ssrf_protected_download", "save_url_to_cache")
"""Functions of `gradio.processing_utils` that do so for the values of components."""
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware: no fetching from elsewhere, no request body above `limit` bytes, and POLICY on every answer."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = False

        async def with_policy(message: MutableMapping[str, Any]) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = True
                headers = [*message.get("headers", []), (b"content-security-policy", POLICY.encode()),
                           (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]  # fmt: skip
                message = {**message, "headers": headers}
            await send(message)

        async def refuse(status: int, text: str) -> None:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await with_policy({"type": "http.response.start", "status": status, "headers": headers})
            await with_policy({"type": "http.response.body", "body": text.encode()})

        if any(part in scope["path"].replace(" ", "").lower() for part in FORBIDDEN):
            await refuse(403, "this server fetches nothing from elsewhere")
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.limit:
            await refuse(413, f"more than {self.limit} bytes")
            return
        received = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise _TooLarge
            return message

        try:
            await self.app(scope, limited, with_policy)
        except _TooLarge:
            if not sent:
                await refuse(413, f"more than {self.limit} bytes")


class _TooLarge(Exception):
    """The body of a request is above the limit."""


@dataclass(frozen=True)
class Served:
    """A page that is being served at `address`, and outside this machine at `shared`."""

    address: str
    shared: str | None = None


@contextmanager
def served(
    model: LatentModel, name: str, *, precision: str = "fp32", host: str = "127.0.0.1", port: int | None = None,
    upload_mb: int = UPLOAD_MB, share: bool = False, browse: bool = False,
) -> Iterator[Served]:  # fmt: skip
    """Serve the page of a model inside the context.

    port: None takes the first free one from 7860 on. upload_mb: the largest file that is taken, in MiB. share: give it
    a public address too, through Gradio's tunnel. browse: open it in a browser.
    ValueError names a library that is missing, or a host or port that cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="unilatent-demo-") as temporary:
        folder = Path(temporary)
        _prepare(folder / "uploads")
        try:
            import gradio as gr
            from starlette.middleware import Middleware
        except ImportError as error:
            raise ValueError(f"demo: the page needs Gradio ({error.name} is not installed); {EXTRA}") from None
        from .page import Page
        from .workbench import Workbench

        shown = folder / "shown"
        shown.mkdir()
        page = Page(Workbench(model, name, shown, precision))
        limit = upload_mb * 2**20
        plain, mono = ([gr.themes.Font(name) for name in names] for names in FONTS)  # of the browser's machine
        theme = gr.themes.Default(font=plain, font_mono=mono)
        with _fetching_nothing():
            try:
                _, address, shared = page.blocks.launch(
                    server_name=host, server_port=port, share=share, inbrowser=browse, prevent_thread_lock=True,
                    quiet=True, show_error=True, max_file_size=limit, allowed_paths=[str(shown)], blocked_paths=None,
                    footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
                    mcp_server=False, num_workers=0, theme=theme, css=STYLE.read_text(encoding="utf-8"),
                    app_kwargs={"middleware": [Middleware(Guard, limit=limit + 2**20)]},
                )  # fmt: skip
            except OSError as error:
                page.close()
                where = "every port from 7860 to 7959" if port is None else f"port {port}"
                raise ValueError(
                    f"--host {host}, --port: {where} cannot be had ({error}); give another --port"
                ) from None
            try:
                yield Served(address, shared)
            finally:
                page.close()
                page.blocks.close(verbose=False)


@contextmanager
def _fetching_nothing() -> Iterator[None]:
    """Refuse files that a client names by an address: Gradio would download them before it calls the page."""
    from gradio import processing_utils

    def refuse(*_: object, **__: object) -> NoReturn:
        raise ValueError("file: this server fetches nothing from elsewhere; upload the file itself")

    kept = {name: getattr(processing_utils, name) for name in DOWNLOADS}
    for name in DOWNLOADS:
        setattr(processing_utils, name, refuse)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(processing_utils, name, function)


def wait() -> int:
    """Wait for Ctrl-C or another signal to end; return the exit code for it."""
    with StopRequest() as stop:
        while stop.received is None:
            time.sleep(0.2)
    return stop.exit_code


def _prepare(uploads: Path) -> None:
    """Set what Gradio reads from the environment, before it is imported: no telemetry, our folder for uploads, and no
    proxy between this process and itself."""
    uploads.mkdir()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    for name in ("NO_PROXY", "no_proxy"):
        known = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*known, *LOOPBACK]))
