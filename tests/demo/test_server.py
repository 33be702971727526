"""The page's server over HTTP, without a browser: limits, what it refuses, what it sends, and whom it asks (nobody)."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from page_process import serving

from unilatent.cli import main
from unilatent.demo import server
from unilatent.demo.server import POLICY

MB = 2**20
JSON = {"Content-Type": "application/json"}
LONG = [None, 100, 0, 200, "heun", 1, 0, 1, []]
"""What the page sends for the longest sampling of the digits that its sliders allow: its tab, then the settings."""


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    with serving(run_folder, "--upload-mb", "1") as served:
        yield served


def ask(
    url: str, data: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 120
) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of an answer, whatever it is."""
    request = urllib.request.Request(url, data, headers or {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def uploaded(address: str, name: str, content: bytes, kind: str = "image/png") -> tuple[int, bytes]:
    boundary = "xyz-boundary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
    body = f"{head}Content-Type: {kind}\r\n\r\n".encode() + content + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return ask(f"{address}gradio_api/upload", body, headers)[:2]


def config(address: str) -> dict[str, Any]:
    return json.loads(ask(f"{address}config")[1])


def event(address: str, label: str) -> int:
    """The number of what a button begins."""
    found = config(address)
    button = next(c["id"] for c in found["components"] if c["props"].get("value") == label)
    return next(d["id"] for d in found["dependencies"] if [button, "click"] in d["targets"])


def joined(address: str, number: int, data: list[Any], session: str) -> tuple[int, bytes]:
    content = {"data": data, "fn_index": number, "session_hash": session, "trigger_id": None, "event_data": None}
    return ask(f"{address}gradio_api/queue/join", json.dumps(content).encode(), {"Content-Type": "application/json"})[
        :2
    ]


def outcome(address: str, session: str) -> dict[str, Any]:
    """The last message of a session's stream of events."""
    request = urllib.request.Request(f"{address}gradio_api/queue/data?session_hash={session}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=300) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                if message["msg"] in ("process_completed", "close_stream"):
                    return message
    raise AssertionError("the stream ended without an outcome")


def following(address: str, number: int) -> int:
    """The number of what comes after another event."""
    return next(d["id"] for d in config(address)["dependencies"] if d["trigger_after"] == number)


def stop(address: str, session: str) -> None:
    """Press Stop in the first tab, as the window of a session."""
    content = {"data": [None], "fn_index": event(address, "Stop"), "session_hash": session}
    assert ask(f"{address}gradio_api/run/predict", json.dumps(content).encode(), JSON)[0] == 200


def reconstruction(address: str, path: str, session: str) -> dict[str, Any]:
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": Path(path).name}, 0]
    assert joined(address, event(address, "Reconstruct"), data, session)[0] == 200
    return outcome(address, session)


def test_it_listens_on_this_machine_only(page: tuple[str, Callable[[], str]]):
    """Whatever Gradio's own variables say (the server runs with GRADIO_SHARE and GRADIO_SERVER_NAME set)."""
    address, output = page
    assert address.startswith("http://127.0.0.1:") and "gradio.live" not in output()
    port = urllib.parse.urlsplit(address).port
    others = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {"127.0.0.1"}
    for other in others:
        if other.startswith("127."):
            continue
        with pytest.raises(OSError):
            socket.create_connection((other, port), timeout=3).close()


def test_every_answer_says_what_a_browser_may_load(page: tuple[str, Callable[[], str]]):
    status, body, headers = ask(page[0])
    assert status == 200 and headers["content-security-policy"] == POLICY and "default-src 'self'" in POLICY
    assert "http:" not in POLICY and "https:" not in POLICY and "*" not in POLICY
    known = json.loads(body.decode().split("window.gradio_config = ", 1)[1].split(";</script>", 1)[0])
    assert known["analytics_enabled"] is False and known["api_prefix"] == "/gradio_api"
    assert not [sheet for sheet in known.get("stylesheets") or [] if "//" in sheet]


@pytest.mark.parametrize("path", [
    "gradio_api/file=http://example.com/x.png", "gradio_api/file=https://example.com/",
    "gradio_api/proxy=https://example.com/", "gradio_api/file=https%3A//example.com/",
])  # fmt: skip
def test_the_server_fetches_nothing_for_others(page: tuple[str, Callable[[], str]], path: str):
    assert ask(page[0] + path)[0] == 403


@pytest.mark.parametrize("path", [
    "/etc/passwd", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/proc/self/environ", "C:/Windows/win.ini",
    str(Path(__file__)),
])  # fmt: skip
def test_f40_files_outside_its_folder_are_not_served(page: tuple[str, Callable[[], str]], path: str):
    """Addresses of files elsewhere, by any way of writing them, are refused."""
    status, body, _ = ask(f"{page[0]}gradio_api/file={path}")
    assert status in (403, 404) and b"root:" not in body


def test_f40_what_was_not_uploaded_is_not_read(page: tuple[str, Callable[[], str]], tmp_path: Path):
    """A path in place of an upload is refused before the model sees it, also that of a sound picture."""
    (tmp_path / "own.png").write_bytes(_png())
    for number, path in enumerate([str(tmp_path / "own.png"), "/etc/passwd", "/proc/self/environ"]):
        message = reconstruction(page[0], path, f"path{number}")
        assert message["success"] is False and "not uploaded" in message["output"]["error"], message


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_f40_what_a_client_names_by_address_is_not_fetched(page: tuple[str, Callable[[], str]], name: str):
    """An address in place of an upload: no request leaves, and the client is told why."""
    with counting() as (port, asked):
        message = reconstruction(page[0], f"http://{name}:{port}/own.png", f"address-{name}")
        assert message["success"] is False and "fetches nothing" in message["output"]["error"], message
        assert asked == []


@contextmanager
def counting() -> Iterator[tuple[int, list[str]]]:
    """Serve a picture on this machine; yields the port and what it was asked for."""
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(_png())

        def log_message(self, *_: object) -> None: ...

    answering = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=answering.serve_forever, daemon=True).start()
    yield answering.server_port, asked
    answering.shutdown()
    answering.server_close()


def test_nothing_is_fetched_while_a_page_is_served():
    """Every function of Gradio that would download the value of a component refuses, and is put back afterwards."""
    utils = pytest.importorskip("gradio.processing_utils", reason="Gradio is not installed")
    before = [getattr(utils, name) for name in server.DOWNLOADS]
    with server._fetching_nothing():
        for name in server.DOWNLOADS:
            with pytest.raises(ValueError, match="fetches nothing"):
                getattr(utils, name)("http://127.0.0.1:9/x.png", cache_dir="")
    assert [getattr(utils, name) for name in server.DOWNLOADS] == before


def test_f40_a_huge_upload_is_refused(page: tuple[str, Callable[[], str]]):
    """Above the limit a body is refused before it is read, with and without a declared length; below it is taken."""
    address = page[0]
    assert uploaded(address, "x.png", b"\0" * (MB // 2))[0] == 200
    assert is_refused(lambda: uploaded(address, "x.png", b"\0" * (MB + MB // 2))[0])
    assert is_refused(lambda: uploaded(address, "x.png", b"\0" * (5 * MB))[0])
    assert is_refused(lambda: ask(f"{address}gradio_api/queue/join", b"[" * (3 * MB), JSON)[0])
    assert is_refused(lambda: undeclared(address, 50 * MB))
    assert ask(address)[0] == 200


def is_refused(send: Callable[[], int]) -> bool:
    """Whether a body is refused; what is still on its way then may reset the connection before the answer is read."""
    try:
        return send() in (400, 413)
    except (urllib.error.URLError, OSError) as error:
        return isinstance(getattr(error, "reason", error), ConnectionError)


def undeclared(address: str, size: int) -> int:
    """Send a body in chunks without a length, and return the status."""
    url = urllib.parse.urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=120) as connection:
        connection.sendall(b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(size // 65536):
            try:
                connection.sendall(chunk)
            except OSError:
                break
        return int(connection.recv(64).split()[1])


def test_f40_an_upload_of_another_kind_is_a_message(page: tuple[str, Callable[[], str]]):
    """What is no picture, whatever its name and type say, ends in one line that names the file, not in a traceback."""
    address, output = page
    before = len(output())
    for number, (name, content) in enumerate(
        [("x.png", b"GIF89a"), ("x.png", b"<svg onload='x'/>"), ("y.jpg", b"\xff\xd8")]
    ):
        status, body = uploaded(address, name, content)
        assert status == 200
        message = reconstruction(address, json.loads(body)[0], f"odd{number}")
        assert message["success"] is False and name in message["output"]["error"], message
    assert "Traceback" not in output()[before:]


def test_f40_a_hundred_requests_at_once(page: tuple[str, Callable[[], str]]):
    """Behind one that takes long, a few wait, the others are refused, and the page answers afterwards."""
    address = page[0]
    status, body = uploaded(address, "own.png", _png())
    assert status == 200
    path, number = json.loads(body)[0], event(address, "Reconstruct")
    assert joined(address, following(address, event(address, "Sample")), LONG, "long")[0] == 200
    ended: list[dict[str, Any]] = []
    listener = threading.Thread(target=lambda: ended.append(outcome(address, "long")))  # else it would be dropped
    listener.start()
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "own.png"}, 0]
    answers: list[int] = []

    def send(i: int) -> None:
        answers.append(joined(address, number, data, f"many{i}")[0])

    threads = [threading.Thread(target=send, args=(i,)) for i in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not ended, f"the long one ended before the others had come: {ended}"
    stop(address, "long")
    listener.join()
    assert ended[0]["success"] is True, ended
    assert len(answers) == 100 and set(answers) <= {200, 429, 503}, set(answers)
    assert answers.count(200) <= 20, "one is computed, and twenty wait"
    until = time.monotonic() + 120
    while (status := joined(address, number, data, "afterwards")[0]) != 200:  # those that wait are computed first
        assert status in (429, 503) and time.monotonic() < until
        time.sleep(0.1)
    assert outcome(address, "afterwards")["success"] is True  # it is the last: nothing waits any more


def test_f40_a_client_that_leaves_in_the_middle(page: tuple[str, Callable[[], str]]):
    """Work that nobody waits for ends, and the next client is served."""
    address = page[0]
    status, body = uploaded(address, "own.png", _png())
    url = urllib.parse.urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
                           b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")  # fmt: skip
    message = reconstruction(address, json.loads(body)[0], "after")
    assert status == 200 and message["success"] is True and "PSNR" in str(message["output"]["data"])


def _png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (8, 8), 120).save(buffer, "PNG")
    return buffer.getvalue()


def test_json_has_the_address_before_the_page_ends(run_folder: Path):
    with serving(run_folder, "--json") as (address, output):
        assert json.loads(output()) == {"address": address, "shared": None} and ask(address)[0] == 200


def test_a_port_that_is_taken_is_an_error_of_the_user(
    run_folder: Path, page: tuple[str, Callable[[], str]], capsys: pytest.CaptureFixture[str]
):
    port = urllib.parse.urlsplit(page[0]).port
    with pytest.raises(SystemExit) as stop:
        main(["demo", str(run_folder), "--port", str(port)])
    assert stop.value.code == 2 and f"port {port}" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        main(["demo", str(run_folder)])
    assert stop.value.code == 2 and "pip install 'unilatent[demo]'" in capsys.readouterr().err


def test_a_source_that_is_none_is_refused_as_by_every_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit) as stop:
        main(["demo", str(tmp_path / "nothing")])
    assert stop.value.code == 2 and "nothing" in capsys.readouterr().err
