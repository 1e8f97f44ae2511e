"""The book's tables of equivalents, row by row, and what can be said of its pages without building them."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
PAGES = sorted(BOOK.glob("*.md"))


def load_equivalents():
    spec = importlib.util.spec_from_file_location("equivalents", BOOK / "equivalents.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


equivalents = load_equivalents()


def flat(value):
    """A value, or a tuple of them, as a list of NumPy arrays."""
    if isinstance(value, (tuple, list)):
        return [array for part in value for array in flat(part)]
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    elif hasattr(value, "numpy"):
        value = value.numpy()
    return [np.asarray(value)]


def assert_same(theirs, ours):
    """float32 sums of 160 samples of |x| < 16 in other orders leave 2e-5 at most; a wrong convention leaves 1e-2."""
    theirs, ours = flat(theirs), flat(ours)
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore")  # deprecations inside other people's libraries are theirs
@pytest.mark.parametrize("row", equivalents.ROWS, ids=lambda row: f"{row.library}: {row.what}")
def test_the_row_says_the_same_in_both_libraries(row):
    needed = equivalents.NEEDS[row.library]
    if needed == "keras":  # it computes with one of these, and asks for TensorFlow if nobody chooses
        backends = [name for name in ("jax", "torch", "tensorflow") if importlib.util.find_spec(name)]
        os.environ.setdefault("KERAS_BACKEND", backends[0] if backends else "jax")
    pytest.importorskip(needed, reason=f"{row.library} is not installed")
    names = {}
    exec(equivalents.SETUP[row.library], names)
    theirs, ours = (equivalents.value(code, names) for code in (row.theirs, row.ours))
    if theirs is np:
        assert ours is np
    else:
        assert_same(theirs, ours)


def test_a_wrong_row_would_be_seen():
    names = {}
    exec(equivalents.COMMON, names)
    right = equivalents.value("cubn.batch_norm(x_last, channel_axis=-1, eps=1e-5)[0]", names)
    for wrong in (
        "cubn.batch_norm(x_last, channel_axis=1)[0]",
        "cubn.batch_norm(x_last, channel_axis=-1, eps=0.1)[0]",
        "cubn.batch_norm(x, channel_axis=1)[0]",
    ):
        with pytest.raises(AssertionError):
            assert_same(right, equivalents.value(wrong, names))
    with pytest.raises(AssertionError):  # biased for unbiased
        assert_same(names["x"].var(axis=(0, 2, 3)), names["x"].var(axis=(0, 2, 3), ddof=1))


def test_every_library_has_rows_and_every_table_is_on_the_page():
    libraries = {row.library for row in equivalents.ROWS}
    assert libraries == set(equivalents.SETUP) == set(equivalents.NEEDS)
    page = (BOOK / "coming-from.md").read_text(encoding="utf-8")
    assert set(re.findall(r'table\("([^"]+)"\)', page)) == libraries


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_loads_nothing_from_the_network(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"!\[[^]]*\]\(https?:|<(?:img|script|link|iframe)[^>]+https?:", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_drawing_says_in_words_what_it_shows(page):
    cells = re.findall(r"```\{code-cell\}.*?```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for cell in cells:
        for meaning in re.findall(r'show\(\s*fig,\s*(?:f?"{1,3})(.*?)"{1,3}\s*\)', cell, flags=re.DOTALL):
            assert len(meaning.split()) >= 15
        assert len(re.findall(r"show\(\s*fig,", cell)) == len(re.findall(r"figure:\n    name: fig-", cell)), cell[:200]


def test_every_page_is_in_the_table_of_contents():
    toc = (BOOK / "_toc.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:file|root): ([\w-]+)", toc))
    assert listed == {page.stem for page in PAGES}


def test_the_reference_has_every_public_name():
    import cubn

    page = (BOOK / "reference.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"auto\w+:: cubn\.([\w.]+)", page))
    modules = {name for name in cubn.__all__ if isinstance(getattr(cubn, name), type(cubn))}
    assert set(cubn.__all__) - modules <= documented
    assert all(any(name.startswith(f"{module}.") for name in documented) for module in modules)
