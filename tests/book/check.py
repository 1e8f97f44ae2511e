"""Open every page of the built book in headless Chromium and say what is wrong with it.

    python tests/book/check.py book/_build/html --axe book/node_modules/axe-core/axe.min.js

Needs `pip install playwright==1.65.2` and a Chromium (Debian: chromium, fonts-dejavu-core); no browser is downloaded.
Every request that does not go to this script's own loopback server is refused and is a fault.  For each page: maths
rendered, pictures loaded and described, nothing on the console, links and anchors lead somewhere, no sideways
scrolling at 375 pixels, nothing serious from axe, in the light and the dark theme.  And the search finds a word.
Prints the faults, one a line; exit status 1 if there are any.
"""

import argparse
import functools
import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

CHROMIUM = "/usr/bin/chromium"
GENERATED = {"genindex.html", "search.html", "py-modindex.html"}
LOOK = r"""() => {
  const article = document.querySelector('article') || document.body;
  const raw = article.cloneNode(true);
  raw.querySelectorAll('.katex, pre, code, svg, script').forEach(e => e.remove());
  return {
    sources: document.querySelectorAll('.math').length,
    maths: document.querySelectorAll('.katex').length,
    bad: document.querySelectorAll('.katex-error, .math-error').length,
    raw: /\\\(|\\\[|\$\$|\\frac|\\begin\{/.test(raw.textContent),
    images: [...document.images].map(i => [i.getAttribute('src'), i.naturalWidth, i.alt]),
    drawings: [...document.querySelectorAll('.bn-picture')].map(d => {
      const svg = d.querySelector('svg'), box = svg && svg.getBoundingClientRect();
      return [svg ? (svg.getAttribute('aria-label') || '') : null, box ? box.width * box.height : 0];
    }),
    fonts: [...document.fonts].filter(f => f.status === 'error').map(f => f.family),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    links: [...document.querySelectorAll('a[href]')].map(e => e.href),
    language: document.documentElement.lang,
    headings: [...document.querySelectorAll('h1')].filter(h => h.getClientRects().length).length,
  };
}"""
AXE = """() => axe.run('article', {resultTypes: ['violations']}).then(r => r.violations
  .filter(v => v.impact === 'serious' || v.impact === 'critical')
  .map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 140)]))"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not write a line for each file."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """A browser that leaves a page while it still loads is no fault."""

    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of a loopback server of this folder."""
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def check(root: Path, *, axe: Path | None = None, word: str = "variance", min_pages: int = 1, shots: Path | None = None,
          chromium: str = CHROMIUM) -> tuple[list[str], int]:  # fmt: skip
    """The faults of the book under `root`, and how many pages were looked at."""
    from playwright.sync_api import sync_playwright

    pages = sorted(p for p in root.rglob("*.html") if "_static" not in p.parts and p.name not in GENERATED)
    faults = [] if len(pages) >= min_pages else [f"{len(pages)} pages, but at least {min_pages} are expected"]
    script = axe.read_text(encoding="utf-8") if axe else None
    refused: list[str] = []
    anchors: dict[str, set[str]] = {}
    links: list[tuple[str, str]] = []
    with served(root) as base, sync_playwright() as playwright:

        def gate(route) -> None:
            if route.request.url.startswith((base, "data:", "blob:")):
                route.continue_()
            else:
                refused.append(route.request.url)
                route.abort()

        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            context.route("**/*", gate)
            page = context.new_page()
            said: list[str] = []
            page.on("console", lambda m, said=said: said.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e, said=said: said.append(str(e)))
            page.on("response", lambda r, said=said: said.append(f"{r.status} {r.url}") if r.status >= 400 else None)
            for file in pages:
                name = file.relative_to(root).as_posix()
                where = f"{name} ({scheme})"
                said.clear()
                page.set_viewport_size({"width": 1280, "height": 900})
                page.goto(urljoin(base, name), wait_until="load")
                page.evaluate("() => document.fonts.ready")
                seen = page.evaluate(LOOK)
                anchors[name] = set(seen["ids"])
                if scheme == "light":
                    links += [(name, link) for link in seen["links"]]
                    faults += structure(where, seen)
                faults += [f"{where}: console: {line[:200]}" for line in said]
                if script:
                    page.evaluate(script)
                    faults += [f"{where}: axe {rule}, {n} times, first {html}" for rule, n, html in page.evaluate(AXE)]
                if shots:
                    shots.mkdir(parents=True, exist_ok=True)
                    page.wait_for_timeout(500)
                    page.screenshot(path=str(shots / f"{file.stem}-{scheme}-wide.png"), full_page=True)
                page.set_viewport_size({"width": 375, "height": 700})
                page.wait_for_timeout(500)  # side bars slide away, what scrolls becomes a tab stop
                if shots:
                    page.screenshot(path=str(shots / f"{file.stem}-{scheme}-narrow.png"), full_page=True)
                if script and scheme == "light":
                    found = page.evaluate(AXE)
                    faults += [f"{where}, on a phone: axe {rule}, {n} times, first {html}" for rule, n, html in found]
                over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                if over > 1:
                    faults.append(f"{where}: {over} pixels wider than a phone")
            if scheme == "light" and word:
                page.goto(f"{base}search.html?q={word}")
                try:
                    page.wait_for_selector("#search-results li a", timeout=8000)
                except Exception:  # whatever the browser calls it, there is no result
                    faults.append(f"the search finds nothing for {word!r}")
            context.close()
        browser.close()
        faults += dead(root, base, links, anchors)
    return faults + [f"a page asks for {url}" for url in sorted(set(refused))], len(pages)


def structure(where: str, seen: dict) -> list[str]:
    """Faults of one page that do not depend on its colours."""
    faults = []
    if seen["sources"] and not seen["maths"]:
        faults.append(f"{where}: maths did not render")
    if seen["bad"]:
        faults.append(f"{where}: {seen['bad']} formulas with errors")
    if seen["raw"]:
        faults.append(f"{where}: raw TeX in the text")
    for source, width, alt in seen["images"]:
        if not width:
            faults.append(f"{where}: picture does not load: {source}")
        if not alt:
            faults.append(f"{where}: picture without a text alternative: {source}")
    for meaning, area in seen["drawings"]:
        if not area:
            faults.append(f"{where}: an empty drawing")
        if not meaning:
            faults.append(f"{where}: a drawing without a text alternative")
    faults += [f"{where}: font does not load: {family}" for family in seen["fonts"]]
    if not seen["language"]:
        faults.append(f"{where}: no language")
    if seen["headings"] != 1:
        faults.append(f"{where}: {seen['headings']} first-level headings")
    return faults


def dead(root: Path, base: str, links: list[tuple[str, str]], anchors: dict[str, set[str]]) -> list[str]:
    """Links into the book that lead nowhere."""
    faults = []
    for name, link in links:
        address, fragment = urldefrag(link)
        if not address.startswith(base):
            continue
        path = unquote(urlsplit(address).path).lstrip("/") or "index.html"
        if not (root / path).is_file():
            faults.append(f"{name}: dead link {path}")
        elif fragment and path in anchors and unquote(fragment) not in anchors[path]:
            faults.append(f"{name}: no anchor {path}#{fragment}")
    return sorted(set(faults))


def main() -> int:
    """Read the command line, check, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("root", type=Path, help="folder of the built pages")
    parser.add_argument("--axe", type=Path, help="axe.min.js")
    parser.add_argument("--word", default="variance", help="what the search must find (default: %(default)s)")
    parser.add_argument("--min-pages", type=int, default=14)
    parser.add_argument(
        "--shots", type=Path, help="folder for a picture of every page, wide and narrow, light and dark"
    )
    parser.add_argument("--chromium", default=CHROMIUM)
    given = parser.parse_args()
    started = time.monotonic()
    faults, pages = check(given.root, axe=given.axe, word=given.word, min_pages=given.min_pages, shots=given.shots,
                          chromium=given.chromium)  # fmt: skip
    for fault in faults:
        print(fault)
    print(json.dumps({"pages": pages, "faults": len(faults), "seconds": round(time.monotonic() - started)}))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
