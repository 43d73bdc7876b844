"""Pages in a real browser: Debian's chromium, headless, each page in frames of several sizes, by day and by night."""

from __future__ import annotations

import base64
import functools
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEWS = [(width, height, scheme) for width, height in ((360, 740), (1280, 800)) for scheme in ("light", "dark")]
_OPTIONS = (
    *("--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"),
    # The network is off: no name but this machine's is found.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# A frame has the size that it is given, where a window has a least one, and takes its scheme from its element.
_OUTSIDE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">
<title>views</title></head><body style="margin: 0">%s<pre id="found"></pre><script>%s</script></body></html>"""
_FRAME = '<iframe src="%s" style="width: %dpx; height: %dpx; border: 0; color-scheme: %s" title="view"></iframe>'
_EXAMINE = (Path(__file__).parent / "browser.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page in each of `VIEWS` (see ``browser.js``), and what it said and asked for."""

    views: list[dict[str, Any]]
    console: list[str]
    requests: list[str]


def chromium() -> str | None:
    """The browser's path; None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


def pictures_of(page: str) -> list[str]:
    """The SVGs that a page's images are made of."""
    return [base64.b64decode(data).decode() for data in re.findall(r'src="data:image/svg[+]xml;base64,([^"]*)"', page)]


def examine(page: Path, folder: Path) -> Seen:
    """Open a page, which lies in a folder of its own, in all of `VIEWS`; `folder` is for what that takes."""
    root = folder / "served"
    root.mkdir()
    shutil.copy(page, root / "page.html")
    frames = "".join(_FRAME % ("page.html", *view) for view in VIEWS)
    (root / "views.html").write_text(_OUTSIDE % (frames, _EXAMINE), encoding="utf-8")
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/views.html"
        out, err = _run("--window-size=1280,3200", "--virtual-time-budget=10000", "--dump-dom", address)
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r'<pre id="found">(.*?)</pre>', out, re.DOTALL)
    assert found and found[1], f"the browser examined nothing:\n{err[-3000:]}"
    # What Chromium itself says, of D-Bus for example, is no message of the page's.
    console = [line for line in err.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(found[1])), console, asked)


def screenshot(page: Path, picture: Path, width: int = 1280, height: int = 800, *, dark: bool = False) -> None:
    """A PNG of the page, opened as a file."""
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    _run(*scheme, f"--window-size={width},{height}", f"--screenshot={picture}", page.absolute().as_uri())


def _run(*arguments: str) -> tuple[str, str]:
    program = chromium()
    assert program is not None
    # Chromium's sandbox refuses to start under root.
    root = ("--no-sandbox",) if os.geteuid() == 0 else ()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [program, *_OPTIONS, *root, f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return done.stdout, done.stderr
