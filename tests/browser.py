"""Pages in headless Chromium, without a driver: a page beside the report frames it, measures it, and is dumped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

# scripts are forbidden in the report itself, so they look at it from outside
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>frame</title>
<iframe id="page" style="width: %(width)dpx; height: 900px; border: 0" src="%(page)s"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  page.querySelectorAll("details").forEach(one => one.open = true);
  const outside = [], cut = [];
  for (const one of page.body.querySelectorAll("*")) {
    const said = one.textContent.trim().slice(0, 40), box = one.getBoundingClientRect();
    const hidden = one.classList.contains("unseen");
    if (!one.closest(".scroll") && box.width && (box.right > view.innerWidth + 1 || box.left < -1))
      outside.push(one.tagName + ": " + said);
    if (!one.classList.contains("scroll") && !hidden && view.getComputedStyle(one).overflow != "visible"
        && (one.scrollWidth > one.clientWidth + 1 || one.scrollHeight > one.clientHeight + 1))
      cut.push(one.tagName + ": " + said);
  }
  document.getElementById("found").textContent = JSON.stringify({
    width: view.innerWidth, needed: root.scrollWidth, outside, cut,
    images: [...page.images].map(one => one.complete && one.naturalWidth > 0 && one.clientWidth > 0),
    resources: view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    background: view.getComputedStyle(page.body).backgroundColor, ink: view.getComputedStyle(page.body).color,
    title: page.title, text: page.body.innerText.length,
  });
};
</script>
"""


def look(page: Path, width: int, scratch: Path, dark: bool = False) -> dict[str, Any]:
    """What a browser makes of a page in a window so wide: its measures, console lines, and requests that it made."""
    frame, log = scratch / "frame.html", scratch / "net.json"
    frame.write_text(FRAME % {"width": width, "page": page.resolve().as_uri()}, encoding="utf-8")
    log.unlink(missing_ok=True)
    assert CHROMIUM
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *(
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-extensions",
            ),
            *("--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"),
            *(f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={log}", "--virtual-time-budget=20000"),
            *(
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--window-size={max(width, 800) + 100},1000",
            ),
            *("--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found and found[1], done.stderr[-2000:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(text) | {"console": console, "requests": _requests(log)}


def _requests(log: Path) -> list[str]:
    """URLs that left for the network on behalf of a page; the browser's own errands are not the page's."""
    text = log.read_text(encoding="utf-8", errors="replace").rstrip().rstrip(",")
    events = json.loads(text if text.endswith("}") else text + "]}")["events"]
    asked = [event.get("params", {}) for event in events]
    own = [p for p in asked if p.get("initiator", "not an origin") != "not an origin"]
    return [p["url"] for p in own if str(p.get("url", "")).startswith("http")]
