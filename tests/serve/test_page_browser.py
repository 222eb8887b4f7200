"""The status page in a real browser: it renders, shows names as text, and asks nobody else for anything.

With ``DFAISS_SCREENSHOT=docs/assets/status-page.png`` in the environment, the picture in the documentation is made
anew.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from lance_dfaiss.serve.page import StatusPort
from lance_dfaiss.serve.page_html import CONTENT_POLICY
from lance_dfaiss.serve.status import ServerStatus
from tests.serve.status_example import index, port, status, troubled

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--no-proxy-server", "--hide-scrollbars", "--enable-logging=stderr", "--log-level=0",
)  # fmt: skip
WIDE, NARROW = (1280, 1360), (420, 900)
HOSTILE = '<img src="http://127.0.0.1:9/stolen" onerror="console.error(1)"><script>console.error(2)</script>'


def browse(folder: Path, url: str, *arguments: str, size: tuple[int, int] = WIDE) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = folder / f"profile{len(list(folder.iterdir()))}"
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", *arguments, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    return done


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page has brought into the browser's console."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def url_of(opened: StatusPort) -> str:
    host, number = opened.address
    return f"http://{host}:{number}/"


def pixels(picture: Path) -> tuple[int, int, set[bytes]]:
    """Width, height and the different rows of bytes of a PNG."""
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    at, packed = 8, b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    raw = zlib.decompress(packed)
    step = len(raw) // height
    return width, height, {raw[row * step : (row + 1) * step] for row in range(height)}


def hostile() -> ServerStatus:
    made = index(0, name=HOSTILE, dataset=HOSTILE, problem=HOSTILE, loading=HOSTILE)
    return status(reason=HOSTILE, ready=False, indexes=[made])


@pytest.mark.parametrize("make", [troubled, hostile])
def test_the_browser_shows_it_without_a_complaint(make: Callable[[], ServerStatus], tmp_path: Path) -> None:
    with port(make) as opened:
        done = browse(tmp_path, url_of(opened), "--dump-dom")
    assert said(done) == []
    # The name of another kind of element would mean that a name was read as HTML.
    assert set(re.findall(r"<([a-z0-9]+)", done.stdout)) <= {
        "html", "head", "meta", "title", "link", "style", "body", "header", "div", "p", "h1", "h2", "h3", "span",
        "main", "ul", "li", "b", "section", "small", "svg", "rect", "line", "dl", "dt", "dd", "code", "table", "thead",
        "tbody", "tr", "th", "td", "a", "footer",
    }  # fmt: skip
    assert ">Server 1 <" in done.stdout
    assert ("&lt;script&gt;" in done.stdout) is (make is hostile)


def test_it_is_drawn_with_its_style_wide_and_narrow(tmp_path: Path) -> None:
    wanted = os.environ.get("DFAISS_SCREENSHOT")
    with port() as opened:
        for size in (WIDE, NARROW):
            picture = tmp_path / f"{size[0]}.png"
            assert said(browse(tmp_path, url_of(opened), f"--screenshot={picture}", size=size)) == []
            width, height, rows = pixels(picture)
            assert (width, height) == size
            assert len(rows) > 100  # lines of text and cards, not an empty sheet
        if wanted:
            shutil.copy(tmp_path / f"{WIDE[0]}.png", wanted)


def test_a_complaint_would_be_heard(tmp_path: Path) -> None:
    """Show that a style sheet which the policy does not let in is told in the console, so silence means it is."""
    bare = tmp_path / "bare.html"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY.partition(";")[0]}">'
    bare.write_text(f"{policy}<style>p {{}}</style>", encoding="utf-8")
    assert len(said(browse(tmp_path, bare.as_uri(), "--dump-dom"))) == 1


def test_nothing_is_asked_of_anybody_else(tmp_path: Path) -> None:
    """Count connections to another port that hostile names, had they become HTML, would make the browser ask."""
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.05)
        number = trap.getsockname()[1]
        done = threading.Event()

        def listen() -> None:
            while not done.is_set():
                try:
                    trap.accept()[0].close()
                except TimeoutError:
                    continue
                asked.set()

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            lure = f'"><img src=http://127.0.0.1:{number}/a><style>@import "http://127.0.0.1:{number}/b"</style>'
            with port(lambda: status(reason=lure, indexes=[index(0, name=lure)])) as opened:
                browse(tmp_path, url_of(opened), "--dump-dom")
            assert not asked.is_set()
            # The trap works: a page that does ask is seen.
            bare = tmp_path / "lured.html"
            bare.write_text(lure, encoding="utf-8")
            browse(tmp_path, bare.as_uri(), "--dump-dom")
            assert asked.wait(10)
        finally:
            done.set()
            listener.join()
