"""Kernels for the executor's own tests: planted bugs that a macro BUG switches on, and right ones."""

from pathlib import Path

from ..executor import Kernel

FOLDER = Path(__file__).parent
SCHEDULES = (0, 1, 5, 6)
"""Ascending, descending, two random ones."""


def sample_text(file: str) -> str:
    """A sample file, with a mark so that faults name it."""
    return f'#line 1 "{file}.cu"\n' + (FOLDER / f"{file}.cu").read_text()


def sample(file: str, name: str, arch: int = 80, checked: bool = True, **defines: object) -> Kernel:
    """The kernel `name` of a sample file."""
    return Kernel(sample_text(file), name, defines, arch, checked)
