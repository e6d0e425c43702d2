"""The site in a real browser: Chromium, headless, every page at two widths.

    python -m tools.browse_site
    python -m tools.browse_site --screenshots build/screenshots

opens each page of ``build/site`` (``python -m tools.build_site`` makes it), as wide as
a desk's screen and as a phone's, cut off from the network. It fails on: an error in
the console, a picture that does not load, a formula that is not set, a page wider than
the screen, a search without the right hit. Where there is no Chromium and it may
install one (root on Debian or its kin), it does; else it says why it was left out.
"""

import argparse
from collections.abc import Iterator
import contextlib
import functools
import http.server
import json
import os
from pathlib import Path
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 390)
# What is searched for, and the page that must be among the first hits.
SEARCHES = {
    "stochastic_rounding": "api/precision.html",
    "cliff": "which_radius.html",
    "radius": "radius.html",
    "worst_case": "api/sharpness.html",
    "davda54": "coming_from/davda54.html",
}
PICTURED = (
    "index.html", "start.html", "your_loop.html", "which_method.html",
    "which_radius.html", "coming_from/optax.html", "api/doors.html", "cost.html",
)
FRAME = """<!doctype html><meta charset="utf-8"><title>check</title>
<body style="margin: 0"><iframe style="border: 0"></iframe>
<script src="/driver.js"></script>"""
SHOWN = """<!doctype html><meta charset="utf-8"><title>check</title>
<body style="margin: 0"><iframe style="border: 0; width: {width}px; height: 1500px"
src="/{page}"></iframe>"""
# First in each page's head: what goes wrong is kept, whoever tells it.
HOOK = b"""<script>
window.noted = [];
addEventListener("error", (event) => noted.push(
  event.message || "not loaded: " + (event.target.src || event.target.href)), true);
addEventListener("unhandledrejection", (event) => noted.push(String(event.reason)));
for (const kind of ["error", "warn"]) {
  const told = console[kind];
  console[kind] = (...words) => {
    noted.push(kind + ": " + words.map(String).join(" "));
    told.apply(console, words);
  };
}
</script>"""


def chromium() -> str | None:
  """The browser's path, installed where that is possible; or None."""
  for name in NAMES:
    if path := shutil.which(name):
      return path
  if os.geteuid() == 0 and shutil.which("apt-get"):
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends",
                               "chromium", "fonts-dejavu-core"]):
      subprocess.run(
          ["apt-get", "-q", *words], env=environment, check=False, capture_output=True
      )
  return shutil.which("chromium")


class _Handler(http.server.SimpleHTTPRequestHandler):
  """The site's files, with the hook in each page; the driver's plan and report."""

  plan: dict[str, Any]
  reports: "queue.Queue[dict[str, Any]]"

  def log_message(self, format: str, *args: Any) -> None:
    del format, args

  def do_GET(self) -> None:
    path, _, query = self.path.partition("?")
    if path == "/check":
      self._send(FRAME.encode(), "text/html")
    elif path == "/shown":
      width, page = query.split("&")
      self._send(SHOWN.format(width=width, page=page).encode(), "text/html")
    elif path == "/plan":
      self._send(json.dumps(self.plan).encode(), "application/json")
    elif path == "/driver.js":
      self._send(Path(__file__).with_suffix(".js").read_bytes(), "text/javascript")
    elif path == "/favicon.ico":
      self._send(b"", "image/x-icon")
    elif path.endswith(".html"):
      file = Path(self.translate_path(path))
      if file.is_file():
        page = file.read_bytes().replace(b"<head>", b"<head>" + HOOK, 1)
        self._send(page, "text/html")
      else:
        self.send_error(404)
    else:
      super().do_GET()

  def do_POST(self) -> None:
    body = self.rfile.read(int(self.headers["Content-Length"]))
    self.reports.put(json.loads(body))
    self._send(b"", "text/plain")

  def _send(self, body: bytes, kind: str) -> None:
    self.send_response(200)
    self.send_header("Content-Type", f"{kind}; charset=utf-8")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request: Any, client_address: Any) -> None:
    """A browser that leaves before it has all of a page is no error."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)


@contextlib.contextmanager
def served(site: Path, plan: dict[str, Any]) -> Iterator[tuple[str, "queue.Queue"]]:
  """The address of the site on this machine, and where reports arrive."""
  reports: queue.Queue = queue.Queue()
  handler = type("Handler", (_Handler,), {"plan": plan, "reports": reports})
  make = functools.partial(handler, directory=str(site))
  with _Server(("127.0.0.1", 0), make) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", reports
    server.shutdown()


def browser(path: str, folder: str, *options: str) -> list[str]:
  """The command that starts it, cut off from all other hosts."""
  sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
  return [
      path, "--headless=new", *sandbox, "--disable-gpu", "--hide-scrollbars",
      "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={folder}",
      "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *options,
  ]


def profile() -> "tempfile.TemporaryDirectory[str]":
  """The browser's own folder; its helpers may write there after it has ended."""
  return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def visit(path: str, site: Path) -> dict[str, Any]:
  """What the driver saw in all pages."""
  pages = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
  pages = [p for p in pages if not p.startswith("_") and p != "search.html"]
  plan = {"pages": pages, "widths": WIDTHS, "words": list(SEARCHES)}
  with served(site, plan) as here, profile() as folder:
    address, reports = here
    process = subprocess.Popen(
        browser(path, folder, "--window-size=1400,1000", f"{address}/check"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
      return reports.get(timeout=600)
    except queue.Empty:
      return {"failed": "no report in ten minutes"}
    finally:
      process.terminate()
      process.wait()


def complaints(report: dict[str, Any]) -> list[str]:
  """What is wrong, a line each."""
  if "failed" in report:
    return [report["failed"]]
  lines = []
  for page in report["pages"]:
    where = f"{page['page']} at {page['width']} px"
    lines += [f"{where}: {error}" for error in page["errors"]]
    lines += [f"{where}: no picture {source}" for source in page["broken"]]
    if page["flat"] or page["raw"]:
      lines.append(f"{where}: {page['flat'] + page['raw']} formulas are not set")
    if page["overflow"] > 1:
      lines.append(f"{where}: {page['overflow']} px too wide, by {page['widest']}")
    if not page["titled"]:
      lines.append(f"{where}: no title")
  if not any(page["formulas"] for page in report["pages"]):
    lines.append("no page has a formula")
  for search in report["searches"]:
    word, hits = search["word"], search["hits"]
    lines += [f"search for {word}: {error}" for error in search["errors"]]
    if not any(SEARCHES[word] in hit for hit in hits[:5]):
      lines.append(f"search for {word}: {SEARCHES[word]} is not among {hits[:5]}")
  return lines


def photograph(path: str, site: Path, target: Path) -> None:
  """Pictures of the main pages, for people to look at."""
  target.mkdir(parents=True, exist_ok=True)
  with served(site, {}) as (address, _), profile() as folder:
    for page in PICTURED:
      for width in WIDTHS:
        name = page.removesuffix(".html").replace("/", "_")
        subprocess.run(
            browser(path, folder, f"--window-size={max(width, 500)},1500",
                    "--virtual-time-budget=5000",
                    f"--screenshot={target.resolve() / f'{name}_{width}.png'}",
                    f"{address}/shown?{width}&{page}"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
        )


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--folder", type=Path, default=ROOT / "build/site")
  parser.add_argument("--screenshots", type=Path)
  options = parser.parse_args()
  if not (options.folder / "index.html").exists():
    sys.exit(f"{options.folder}: no site; run python -m tools.build_site")
  path = chromium()
  if path is None:
    print("no Chromium, and none may be installed here: the site was not opened")
    return
  report = visit(path, options.folder)
  lines = complaints(report)
  if options.screenshots is not None:
    photograph(path, options.folder, options.screenshots)
  if lines:
    sys.exit("\n".join(lines))
  formulas = sum(page["formulas"] for page in report["pages"])
  print(f"{len(report['pages'])} pages opened, {formulas} formulas, no complaint")


if __name__ == "__main__":
  main()
