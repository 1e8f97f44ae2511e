"""KaTeX at build time: TeX that does not parse stops the build."""

import sphinxcontrib.katex as katex


def setup(app):
    katex.KATEX_DEFAULT_OPTIONS.update(throwOnError=True, strict="error")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
