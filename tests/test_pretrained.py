"""Weights come from a path, the cache or a download, and are checked; errors are one line."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from unilatent.pretrained import WeightFile, cache_folder, fetch

CONTENT = bytes(range(256)) * 9000  # more than two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/whole/ sends the file, /cut/ half of the announced length, /slow/ the file after a delay, else 404."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.server.requests.append(self.path)
        if kind not in ("whole", "cut", "slow"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        half = len(CONTENT) // 2
        self.wfile.write(CONTENT[:half])
        if kind == "slow":
            time.sleep(0.2)
        if kind != "cut":
            self.wfile.write(CONTENT[half:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "weights"
    monkeypatch.setenv("UNILATENT_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("UNILATENT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def weights_at(server, kind="whole", sha256=SHA256):
    url = f"http://127.0.0.1:{server.server_port}/{kind}/net-1.pth"
    return WeightFile("toy net", url, sha256, len(CONTENT), "CC0", way_out="toy.path=PATH takes a file")


def refusal(weights, path=None):
    with pytest.raises(ValueError) as caught:
        fetch(weights, path)
    message = str(caught.value)
    assert message.startswith("toy net: ") and weights.way_out in message and weights.url in message
    assert "\n" not in message
    return message


def test_download_then_cache(server, cache):
    weights = weights_at(server)
    path = fetch(weights)
    assert path == cache / "net-1.pth" and path.read_bytes() == CONTENT
    assert fetch(weights) == path
    assert len(server.requests) == 1
    assert [entry.name for entry in cache.iterdir()] == ["net-1.pth"]


def test_file_url(tmp_path, cache):
    source = tmp_path / "a net.pth"
    source.write_bytes(CONTENT)
    weights = WeightFile("toy net", source.as_uri(), SHA256, len(CONTENT), "CC0", way_out="")
    assert fetch(weights) == cache / "a net.pth"


def test_published_prefix_is_enough_and_is_checked(server, cache):
    assert fetch(weights_at(server, sha256=SHA256[:8])).is_file()
    wrong = "0" * 8 if SHA256[0] != "0" else "1" * 8
    assert wrong + "..." in refusal(weights_at(server, sha256=wrong))


def test_wrong_download_is_refused_and_not_kept(server, cache):
    message = refusal(weights_at(server, sha256="0" * 64))
    assert SHA256 in message and "0" * 64 in message
    assert list(cache.iterdir()) == []


def test_truncated_download(server, cache):
    message = refusal(weights_at(server, "cut"))
    assert f"{len(CONTENT) // 2} of {len(CONTENT)} bytes" in message and str(cache) in message
    assert list(cache.iterdir()) == []


def test_missing_at_the_source(server, cache):
    assert "404" in refusal(weights_at(server, "nowhere"))


def test_nobody_listens(server, cache):
    server.server_close()
    assert "failed" in refusal(weights_at(server))


def test_cache_that_cannot_be_written(server, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert str(cache) in refusal(weights_at(server))


@pytest.mark.parametrize("variable", ["UNILATENT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_never_asks_the_network(server, cache, monkeypatch, variable):
    weights = weights_at(server)
    monkeypatch.setenv(variable, "1")
    message = refusal(weights)
    assert f"{variable}=1" in message and str(cache / "net-1.pth") in message
    assert server.requests == []
    cache.mkdir(parents=True)
    (cache / "net-1.pth").write_bytes(CONTENT)
    assert fetch(weights) == cache / "net-1.pth"


def test_zero_is_not_offline(server, cache, monkeypatch):
    monkeypatch.setenv("UNILATENT_OFFLINE", "0")
    assert fetch(weights_at(server)).is_file()


def test_corrupt_cache_is_named_and_not_used(server, cache):
    cache.mkdir(parents=True)
    corrupt = cache / "net-1.pth"
    corrupt.write_bytes(CONTENT[:-1])
    message = refusal(weights_at(server))
    assert str(corrupt) in message and SHA256 in message
    assert hashlib.sha256(CONTENT[:-1]).hexdigest() in message
    assert corrupt.exists() and server.requests == []


def test_cached_folder_is_no_file(server, cache):
    (cache / "net-1.pth").mkdir(parents=True)
    assert "cannot be read" in refusal(weights_at(server))


def test_explicit_path_wins(server, cache, tmp_path):
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"converted, so of another hash")
    assert fetch(weights_at(server), str(own)) == own
    assert server.requests == [] and not cache.exists()


@pytest.mark.parametrize("path", ["absent.pth", ""])
def test_explicit_path_that_is_no_file(server, cache, tmp_path, path):
    assert str(tmp_path / path) in refusal(weights_at(server), str(tmp_path / path))
    assert server.requests == []


def test_two_at_once(server, cache):
    weights = weights_at(server, "slow")
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(fetch, [weights, weights]))
    assert len(server.requests) == 2  # both really downloaded
    assert paths[0] == paths[1] and paths[0].read_bytes() == CONTENT
    assert os.listdir(cache) == ["net-1.pth"]


def test_default_cache_is_under_home(monkeypatch, tmp_path):
    monkeypatch.delenv("UNILATENT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "unilatent" / "weights"


def test_records_are_checked():
    good = WeightFile("n", "https://example.org/n.pth?x=1", "0123abcd", 1, "CC0", "")
    assert good.file == "n.pth"
    for change in ({"sha256": "0123"}, {"sha256": "0123ABCD"}, {"url": "https://example.org/"}):
        with pytest.raises(AssertionError):
            replace(good, **change)
