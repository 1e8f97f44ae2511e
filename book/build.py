"""Build the book: `python book/build.py`, where cubn's extra `book`, Node and npm are installed.

Every cell of every chapter is run, every time.  A cell that fails, a reference or citation that leads nowhere, TeX
that does not parse, or any other warning fails the build.  The result, book/_build/html, needs no network to be read.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = HERE / "node_modules"
VENDOR = HERE / "_vendor" / "_static" / "katex"
PAGES = HERE / "_build" / "html"


def install_from_npm() -> None:
    """KaTeX's style sheet and fonts, and axe; only where the lock file is newer than what is there."""
    lock, installed = HERE / "package-lock.json", MODULES / ".package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(
            "the book needs Node and npm to set its equations, but npm is not on the PATH; install Node 18+."
        )
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=HERE, check=True)
    installed.touch()


def vendor_katex() -> None:
    """The style sheet must belong to the script that renders."""
    import sphinxcontrib.katex as renderer

    version = json.loads((MODULES / "katex" / "package.json").read_text())["version"]
    if version != renderer.katex_version:
        raise SystemExit(
            f"npm has KaTeX {version}, but sphinxcontrib-katex renders with {renderer.katex_version}; "
            f"write {renderer.katex_version} into book/package.json and its lock file."
        )
    shutil.rmtree(VENDOR, ignore_errors=True)
    fonts = VENDOR / "fonts"
    fonts.mkdir(parents=True)
    source = MODULES / "katex"
    for file in (source / "dist" / "katex.min.css", source / "LICENSE"):
        shutil.copy(file, VENDOR)
    for file in (source / "dist" / "fonts").glob("*.woff2"):
        shutil.copy(file, fonts)


def main() -> int:
    """Build; return the exit status of jupyter-book."""
    started = time.monotonic()
    install_from_npm()
    vendor_katex()
    shutil.rmtree(HERE / "_build", ignore_errors=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    status = subprocess.run([jupyter_book, "build", HERE, "-W", "-n", "--keep-going", "--all"], check=False).returncode
    if status == 0:
        print(f"built in {time.monotonic() - started:.0f} s: {PAGES / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
