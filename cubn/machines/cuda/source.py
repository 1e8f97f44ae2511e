"""From the name of a kernel file to one self-contained translation unit.  Text in, text out; no CuPy.

Headers are pasted in rather than found with -I because CuPy's cubin cache hashes the text it is given and not
the files that text includes: with -I, an edited header would leave yesterday's kernel in the cache.  `#line`
marks make a compiler's message name the file and the line in the editor.
"""

import re
from functools import lru_cache
from pathlib import Path

_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"\s*')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\s*")


@lru_cache(maxsize=1)
def kernel_folder() -> Path:
    """Where the CUDA sources lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "scalar.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"the CUDA sources are neither in {package / 'kernels'} nor in {package.parent / 'kernels'}, but cubn "
        f"ships with them; install it again."
    )


def translation_unit(file: str) -> str:
    """The text of a kernel file with its own headers pasted in, each once, where it is first included.

    Parameters
    ----------
    file : str
        Name in the kernel folder, such as "moments.cuh".

    Examples
    --------
    >>> from cubn.machines.cuda.source import translation_unit
    >>> text = translation_unit("moments.cuh")
    >>> "struct Moments" in text and "typedef long long index_t" in text and '#include "' not in text
    True
    """
    return "".join(_lines(file, set()))


def _lines(file: str, pasted: set[str]) -> list[str]:
    pasted.add(file)
    lines = [f'#line 1 "{file}"\n']
    text = (kernel_folder() / file).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        include = _INCLUDE.fullmatch(line)
        if include is None:
            # A header is pasted once by this function; the pragma would be one in the main file.
            lines.append("\n" if _ONCE.fullmatch(line) else line)
            continue
        if include[1] not in pasted:
            lines += _lines(include[1], pasted)
        lines.append(f'#line {number + 1} "{file}"\n')
    return lines
