"""Open a chapter in JupyterLab as a reader would, run all its cells, and say whether one failed.

    python tests/book/lab.py dense

Needs the extra `book`, playwright and a Chromium, as `check.py` does.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BOOK = Path(__file__).parents[2] / "book"
CHROMIUM = "/usr/bin/chromium"
READY = "() => window.jupyterapp && window.jupyterapp.shell.currentWidget?.content?.widgets?.length > 1"
KERNEL = "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
STATE = """() => window.jupyterapp.shell.currentWidget.content.widgets
  .filter(c => c.model.type === 'code')
  .map(c => [c.model.executionCount, c.model.sharedModel.getOutputs().filter(o => o.output_type === 'error')
    .map(o => o.ename + ': ' + o.evalue)])"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(chapter: str, *, chromium: str, patience: float, shot: Path | None) -> int:
    """Run the chapter; return how many of its cells failed or did not run."""
    from playwright.sync_api import sync_playwright

    port = free_port()
    lab = Path(sys.executable).with_name("jupyter-lab")
    options = [f"--ServerApp.port={port}", "--no-browser", "--IdentityProvider.token=", "--allow-root",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]  # fmt: skip
    own = tempfile.TemporaryDirectory()  # Jupyter keeps work spaces and marks beside its settings
    settings = shutil.copytree(BOOK / "lab", Path(own.name) / "lab")
    options.append(f"--FileCheckpoints.checkpoint_dir={own.name}")
    server = subprocess.Popen(
        [lab, BOOK, *options],
        env=os.environ | {"JUPYTER_CONFIG_DIR": str(settings), "JUPYTER_PREFER_ENV_PATH": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        base = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{base}/api", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(f"{base}/lab/tree/{chapter}.md?reset")
            page.wait_for_function(READY, timeout=patience * 1000)
            page.wait_for_function(KERNEL, timeout=patience * 1000)
            page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
            cells = page.evaluate(STATE)
            if shot:
                page.screenshot(path=str(shot))
            browser.close()
    finally:
        server.terminate()
        server.wait()
        own.cleanup()
    failed = [(number, count, errors) for number, (count, errors) in enumerate(cells, 1) if errors or not count]
    for number, _, errors in failed:
        print(f"{chapter}: code cell {number}: {'; '.join(errors) if errors else 'was not run'}")
    print(f"{chapter}: {len(cells) - len(failed)} of {len(cells)} code cells ran in JupyterLab")
    return len(failed) if cells else 1


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("chapter", nargs="?", default="dense", help="name of a page (default: %(default)s)")
    parser.add_argument("--chromium", default=CHROMIUM)
    parser.add_argument("--patience", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--shot", type=Path, help="save a picture of the notebook")
    given = parser.parse_args()
    return bool(run(given.chapter, chromium=given.chromium, patience=given.patience, shot=given.shot))


if __name__ == "__main__":
    sys.exit(main())
