"""The page for a person confused about axes: its numbers, its text, its HTML."""

from html.parser import HTMLParser

import numpy as np
import pytest

import cubn


@pytest.mark.parametrize(
    ("shape", "channel_axis", "averaged", "m", "c"),
    [
        ((4, 50), 1, (0,), 4, 50),
        ((32, 30, 28, 28), 1, (0, 2, 3), 25_088, 30),
        ((32, 28, 28, 30), -1, (0, 1, 2), 25_088, 30),
        ((32, 30, 28, 28), (1, 2, 3), (0,), 32, 23_520),
        ((32, 30, 28, 28), (2, 3), (0, 1), 960, 784),
        ((7,), 0, (), 1, 7),
        ((2, 3, 5, 7, 11), (-1, 1), (0, 2, 3), 70, 33),
        ((0, 3, 4), 1, (0, 2), 0, 3),
        ((4, 0), 1, (0,), 4, 0),
        ((6, 3), (), (0, 1), 18, 1),
    ],
)
def test_the_numbers_are_those_of_the_shape(shape, channel_axis, averaged, m, c):
    e = cubn.explain(shape, channel_axis=channel_axis)
    assert (e.shape, e.averaged_axes, e.samples_per_channel, e.channels) == (shape, averaged, m, c)
    assert sorted(e.averaged_axes + e.channel_axes) == list(range(len(shape)))
    assert e.parameter_shape == tuple(shape[axis] for axis in e.channel_axes)
    assert (e.learned, e.tracked) == (2 * c, 2 * c)


@pytest.mark.parametrize(("shape", "census"), [((64, 50), "4 * 50 = 200"), ((32, 30, 28, 28), "4 * 30 = 120")])
def test_four_numbers_for_each_channel_are_in_the_text_and_in_the_html(shape, census):
    e = cubn.explain(shape)
    half = shape[1] * 2
    for page in (str(e), e._repr_html_()):
        assert f"{census}: {half} learned (gamma, beta), {half} tracked" in page
    assert e.learned + e.tracked == int(census.partition("= ")[2])


@pytest.mark.parametrize("channel_axis", [1, -1, (1, 2, 3), (2, 3), (0, 2)])
def test_what_it_says_is_what_batch_norm_does(channel_axis):
    x = np.random.default_rng(0).normal(size=(4, 3, 5, 6))
    e, found = cubn.explain(x, channel_axis=channel_axis), cubn.moments(x, channel_axis=channel_axis)
    assert found.count == e.samples_per_channel
    assert found.mean.shape == e.parameter_shape
    names = {"x": x}
    exec(e.numpy.replace("; ", "\n"), names)  # it is meant to be pasted
    np.testing.assert_allclose(found.mean, names["mean"].reshape(e.parameter_shape), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.var, names["var"].reshape(e.parameter_shape), rtol=1e-12)


def test_an_array_and_its_shape_are_explained_alike():
    assert cubn.explain(np.ones((4, 3, 2))) == cubn.explain((4, 3, 2)) == cubn.explain([4, np.int64(3), 2])


def candidates(text):
    """channel_axis -> (M, parameter shape), and the marked one, from the table in the text."""
    lines = text.partition("The candidates for this shape:")[2].splitlines()[2:]
    rows = [[cell for cell in line.strip().split("  ") if cell.strip()] for line in lines]
    marked = [row[1].strip() for row in rows if row[0].strip() == "->"]
    rows = [row[1:] if row[0].strip() == "->" else row for row in rows]
    return {row[0].strip(): (int(row[2]), row[3].strip()) for row in rows}, marked


@pytest.mark.parametrize(
    ("shape", "channel_axis", "wanted"),
    [
        (
            (32, 30, 28, 20),
            1,
            {"(2, 3)": (960, "(28, 20)"), "(1, 2, 3)": (32, "(30, 28, 20)"), "1": (17_920, "(30,)")},
        ),
        (
            (32, 28, 20, 30),
            -1,
            {"(1, 2)": (960, "(28, 20)"), "(1, 2, 3)": (32, "(28, 20, 30)"), "3": (17_920, "(30,)")},
        ),
        ((8, 5, 3), (1, 2), {"2": (40, "(3,)"), "(1, 2)": (8, "(5, 3)"), "1": (24, "(5,)")}),
    ],
)
def test_all_three_methods_are_listed_and_the_chosen_one_is_marked(shape, channel_axis, wanted):
    e = cubn.explain(shape, channel_axis=channel_axis)
    found, marked = candidates(str(e))
    assert found == wanted
    chosen = e.channel_axes
    assert marked == [str(chosen[0]) if len(chosen) == 1 else str(chosen)]
    assert e._repr_html_().count("<strong>") == 1 + 5  # the title, and the five cells of the chosen row


def test_a_dense_batch_has_no_other_candidates():
    e = cubn.explain((64, 50))
    assert "candidates" not in str(e)
    assert "candidates" not in e._repr_html_()


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (1, 3, 1, 1)])
def test_too_few_samples_to_train_on_are_pointed_out(shape):
    assert "training needs two at least" in str(cubn.explain(shape))
    assert "training needs two at least" not in str(cubn.explain((2, *shape[1:])))


class Balanced(HTMLParser):
    """Raises on a tag that is closed out of turn; collects the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("shape", [(64, 50), (32, 30, 28, 28), (4, 0, 2), (0, 3)])
def test_the_html_is_balanced_and_says_what_the_text_says(shape):
    e, page = cubn.explain(shape), Balanced()
    page.feed(e._repr_html_())
    page.close()
    assert page.open == []
    shown = "".join(page.text)
    for label, text in e._rows():
        assert label in shown
        assert text in shown
    assert e.numpy in shown


def test_what_is_put_into_the_html_is_escaped(monkeypatch):
    monkeypatch.setattr(cubn.Explanation, "_rows", lambda self: [("<b>", "1 < 2 & 3")])
    monkeypatch.setattr(cubn.Explanation, "numpy", property(lambda self: "a < b"))
    page = cubn.explain((2, 3))._repr_html_()
    assert "&lt;b&gt;" in page
    assert "1 &lt; 2 &amp; 3" in page
    assert "<code>a &lt; b</code>" in page


def test_the_text_fits_a_terminal_for_ordinary_shapes():
    for shape, axis in (((32, 30, 28, 28), 1), ((64, 50), 1), ((128, 56, 56, 256), -1)):
        widest = max(map(len, str(cubn.explain(shape, channel_axis=axis)).splitlines()))
        assert widest <= 130, widest


def test_printing_and_displaying_show_the_same_text():
    e = cubn.explain((32, 30, 28, 28))
    assert repr(e) == str(e)
