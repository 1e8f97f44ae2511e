"""The browser check has been seen to fail: one broken page for each thing that it looks at."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
HERE = Path(__file__).parent
AXE = HERE.parents[1] / "book" / "node_modules" / "axe-core" / "axe.min.js"


def load_check():
    spec = importlib.util.spec_from_file_location("book_check", HERE / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


book = load_check()
if not Path(book.CHROMIUM).exists():
    pytest.skip("there is no Chromium at " + book.CHROMIUM, allow_module_level=True)

GOOD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>a page</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"></head>
<body><article><h1 id="top">A page</h1>{}</article></body></html>"""
SEARCH = (
    "<!doctype html><html lang='en'><link rel='icon' href='data:,'><title>s</title><div id='search-results'>{}</div>"
)


def write(folder, name, body):
    (folder / f"{name}.html").write_text(GOOD.format(body), encoding="utf-8")


BROKEN = {
    "maths did not render": "<span class='math'>x^2</span>",
    "formulas with errors": "<span class='math'><span class='katex'></span><span class='katex-error'>x</span></span>",
    "raw TeX": r"<p>\frac{1}{2}</p>",
    "picture does not load": "<img src='missing.png' alt='a picture'>",
    "picture without a text alternative": "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>",
    "an empty drawing": "<div class='bn-picture'></div>",
    "a drawing without a text alternative": "<div class='bn-picture'><svg width='9' height='9'></svg></div>",
    "console": "<script>console.error('no')</script>",
    "404": "<script src='missing.js'></script>",
    "dead link": "<a href='nowhere.html'>a link</a>",
    "no anchor": "<a href='#nowhere'>a link</a>",
    "pixels wider than a phone": "<div style='width: 600px'>wide</div>",
    "2 first-level headings": "<h1>Again</h1>",
    "no language": "<script>document.documentElement.removeAttribute('lang')</script>",
    "axe color-contrast": "<p style='color: #ccc; background: #fff'>hardly to be read</p>",
    "axe svg-img-alt": "<svg role='img' width='9' height='9'></svg>",
}
"""A fault, and what brings it about."""

WELL = "<p>Text, <a href='#top'>a link</a>, <span class='math'><span class='katex'>x</span></span>.</p>"


@pytest.fixture(scope="module")
def axe():
    if not AXE.exists():
        pytest.skip("npm has not installed axe; build the book once")
    return AXE


@pytest.fixture(scope="module")
def seen(tmp_path_factory, axe):
    """All faults of a book in which every page but the first has one."""
    folder = tmp_path_factory.mktemp("broken")
    write(folder, "index", WELL + "<script src='https://example.org/a.js'></script>")
    for number, body in enumerate(BROKEN.values()):
        write(folder, f"page{number}", body)
    (folder / "search.html").write_text(SEARCH.format(""), encoding="utf-8")
    return book.check(folder, axe=axe, min_pages=99)[0]


def test_a_good_book_has_no_fault(tmp_path, axe):
    write(tmp_path, "index", WELL)
    found = "<li><a href='index.html'>variance</a></li>"
    (tmp_path / "search.html").write_text(SEARCH.format(found), encoding="utf-8")
    assert book.check(tmp_path, axe=axe) == ([], 1)


@pytest.mark.parametrize("fault", BROKEN)
def test_the_fault_is_seen_on_its_page(seen, fault):
    page = f"page{list(BROKEN).index(fault)}.html"
    assert any(line.startswith(page) and fault in line for line in seen)


@pytest.mark.parametrize(
    "fault",
    [
        "17 pages, but at least 99 are expected",
        "the search finds nothing for 'variance'",
        "a page asks for https://example.org/a.js",
    ],
)
def test_the_fault_of_the_whole_book_is_seen(seen, fault):
    assert fault in seen
