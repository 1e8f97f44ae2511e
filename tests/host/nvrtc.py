"""The real device compiler, without a device: ctypes on the libnvrtc that PyPI's packages carry.

    pip install nvidia-cuda-nvrtc nvidia-cuda-runtime                        CUDA 13, sm_75 and newer
    pip install nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-runtime-cu12     CUDA 12, sm_50 and newer

Both sets may be installed side by side; an architecture is compiled by the newest that still knows it.  The options
are those that CuPy 14 appends to a RawKernel's own, so that what is compiled here is what CuPy would load.  No driver
is needed, and a toolkit that happens to be on the machine is never looked at.
"""

import ctypes
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CUPY_OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")
"""What CuPy adds to every compilation (cupy/cuda/compiler.py), and the dialect that cubn asks for."""


class CompileError(RuntimeError):
    """NVRTC refused the text; the message is its log."""


@dataclass(frozen=True)
class Usage:
    """What one kernel costs on one architecture, as ptxas reports it.  Sizes in bytes, registers per thread."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    log: str

    @property
    def warnings(self) -> str:
        """The log without its informative lines: empty for a clean compilation.

        That CUDA 12 will be the last toolkit for an old architecture is news about NVIDIA, not about the kernel.
        """
        informative = re.compile(r"ptxas info\s*:|ptxas\s+\.\s+\d+ bytes|nvrtc: warning: Architectures prior to|\s*$")
        return "\n".join(line for line in self.log.splitlines() if not informative.match(line))


@dataclass(frozen=True)
class Toolkit:
    """One installed NVRTC and the headers that belong to it."""

    version: tuple[int, int]
    library: Path
    includes: tuple[Path, ...]
    architectures: tuple[int, ...]

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]}"


def _package_folders(*parts: str) -> list[Path]:
    """Every `nvidia/<parts>` on Python's path: NVIDIA's packages share one namespace package."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations or () if spec else ()
    return [folder for root in roots if (folder := Path(root, *parts)).is_dir()]


@cache
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


@cache
def toolkits() -> tuple[Toolkit, ...]:
    """The installed compilers, newest first.  CUDA 13's packages share one folder, CUDA 12's have one each."""
    layouts = (
        (("cu13", "lib"), "libnvrtc.so.13", (("cu13", "include"),)),
        (("cuda_nvrtc", "lib"), "libnvrtc.so.12", (("cuda_runtime", "include"),)),
    )
    found = []
    for folder, name, headers in layouts:
        for library in (place / name for place in _package_folders(*folder)):
            if library.is_file():
                includes = [include for parts in headers for include in _package_folders(*parts)]
                found.append(_toolkit(library, tuple(includes)))
    return tuple(found)


def _toolkit(library: Path, includes: tuple[Path, ...]) -> Toolkit:
    nvrtc = _load(library)
    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    architectures = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(architectures)
    return Toolkit((major.value, minor.value), library, includes, tuple(sorted(architectures)))


def architectures() -> tuple[int, ...]:
    """Every target of every installed toolkit, for example 75 for sm_75, ascending."""
    return tuple(sorted({arch for toolkit in toolkits() for arch in toolkit.architectures}))


def toolkit_for(arch: int) -> Toolkit:
    """The newest installed toolkit that compiles for `arch`."""
    for toolkit in toolkits():
        if arch in toolkit.architectures:
            return toolkit
    installed = ", ".join(f"{toolkit} ({toolkit.architectures})" for toolkit in toolkits()) or "none"
    raise CompileError(f"no installed NVRTC compiles for sm_{arch}; installed: {installed}.")


def compile_cubin(
    text: str, name: str, defines: Mapping[str, object], arch: int, toolkit: Toolkit | None = None
) -> Usage:
    """Compile down to machine code for sm_`arch` and say what the entry point `name` needs.

    `text` has one `extern "C"` kernel called `name`.  Raises `CompileError` with the log when it does not compile.
    """
    toolkit = toolkit or toolkit_for(arch)
    _, log = _machine_code(toolkit, text, name, defines, arch)
    match = re.search(rf"Compiling entry function '{re.escape(name)}'.*?Used \d+ registers[^\n]*", log, re.DOTALL)
    if not match:
        raise CompileError(f"{toolkit} compiled no entry point {name!r} for sm_{arch}; its log:\n{log}")

    def number(pattern: str) -> int:
        found = re.search(pattern, match[0])
        return int(found[1]) if found else 0

    return Usage(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        shared=number(r"(\d+) bytes smem"),
        log=log,
    )


def machine_code(text: str, name: str, defines: Mapping[str, object], arch: int) -> bytes:
    """The cubin for sm_`arch`, which `host.sass` can read."""
    return _machine_code(toolkit_for(arch), text, name, defines, arch)[0]


def _machine_code(
    toolkit: Toolkit, text: str, name: str, defines: Mapping[str, object], arch: int
) -> tuple[bytes, str]:
    return _compile(toolkit, text, name, [*_defines(defines), f"-arch=sm_{arch}", "--ptxas-options=-v"], "CUBIN")


def compile_ptx(text: str, name: str, defines: Mapping[str, object], arch: int, toolkit: Toolkit | None = None) -> str:
    """The PTX for compute_`arch`, with the kernel's source lines marked in it."""
    toolkit = toolkit or toolkit_for(arch)
    ptx, _ = _compile(toolkit, text, name, [*_defines(defines), f"-arch=compute_{arch}", "-lineinfo"], "PTX")
    return ptx.rstrip(b"\0").decode()


def _defines(defines: Mapping[str, object]) -> list[str]:
    return [f"-D{key}={value}" for key, value in defines.items()]


def _compile(toolkit: Toolkit, text: str, name: str, options: Sequence[str], product: str) -> tuple[bytes, str]:
    nvrtc = _load(toolkit.library)
    options = [*options, *CUPY_OPTIONS, *(f"-I{folder}" for folder in toolkit.includes)]
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    assert status == 0, status
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        log = _result(nvrtc, program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(f"{toolkit} {' '.join(options)}: error {status}\n{log}")
        return _result(nvrtc, program, product), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _result(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, content)
    return content.raw
