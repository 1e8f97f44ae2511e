"""What the pages need beyond Sphinx: pictures in the page's own colours, scrollable maths, our docstrings.

Pictures.  `drawing.py` hands out SVG whose colours are CSS variables and whose text is `currentColor`.  As an
<img> such a file cannot see the page; put into the page it follows the reader's light or dark theme.  So SVG
that a cell made goes into the page itself, with its <title> as the text alternative.

Docstrings are NumPy style in plain text: an indented equation is verbatim, `name` is code, and a star is a star.
"""

import re
from pathlib import Path

from docutils import nodes


def inline_svg(self, node):
    """visit_image, except for the SVG files that cells have written."""
    path = Path(self.builder.srcdir) / node["uri"].lstrip("/")
    if path.suffix != ".svg" or "jupyter_execute" not in path.parts:
        return type(self).visit_image(self, node)
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' style="color: ?#[0-9a-f]{6};?"', "", svg, count=1)  # the page's own colour instead
    natural = re.search(r'width="([0-9.]+pt)"', svg)
    svg = svg.replace("<svg ", f'<svg style="--natural: {natural[1] if natural else "400pt"}" ', 1)
    self.body.append(f'<div class="bn-picture" tabindex="0" role="group" aria-label="figure">{svg}</div>')
    raise nodes.SkipNode


def depart(self, node):
    """Nothing to close."""


FOR_ALL_READERS = {
    # a keyboard can scroll a long equation: without a tab stop, only a mouse could
    '<div class="math': '<div tabindex="0" class="math',
    # a label that is not what the eye reads
    '<summary aria-label="Toggle hidden content">': "<summary>",
    # a list whose items are no list items
    '<div role="list" class="citation-list">': '<div class="citation-list">',
}


def for_all_readers(app, pagename, templatename, context, doctree):
    """What a keyboard or a screen reader would miss in the generated markup."""
    for written, better in FOR_ALL_READERS.items():
        context["body"] = context.get("body", "").replace(written, better)


SECTION = re.compile(r"^(Parameters|Returns|Raises|Attributes|Notes|Examples|Yields|See Also)$")


def plain_docstring(app, what, name, obj, options, lines):
    """Before napoleon: indented equations verbatim, single backticks code, stars literal."""
    out, in_section, verbatim = [], False, False
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if SECTION.match(line.strip()) and set(following.strip()) == {"-"}:
            in_section = line.strip() not in ("Notes",)
        indented = line.startswith("    ")
        if not in_section and indented and not verbatim and (not out or not out[-1].strip()):
            out += ["::", ""]
            verbatim = True
        elif verbatim and line.strip() and not indented:
            verbatim = False
        if not verbatim and not line.lstrip().startswith(">>>"):
            parts = re.split(r"(``[^`]+``)", line)
            for k, part in enumerate(parts):
                if not part.startswith("``"):
                    pieces = re.split(r"(`[^`]+`)", part)
                    parts[k] = "".join(
                        f"`{p}`" if p.startswith("`") else re.sub(r"(?<!\\)([*|])", r"\\\1", p) for p in pieces
                    )
            line = "".join(parts)
        out.append(line)
    lines[:] = out


def setup(app):
    app.add_node(nodes.image, override=True, html=(inline_svg, depart))
    app.connect("html-page-context", for_all_readers)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
