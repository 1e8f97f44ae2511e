"""A layer in an .npz file: written whole or not at all, and read without trusting it."""

import json
import os
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "cubn.BatchNorm 1"
HEADER = "cubn"
"""Name of the entry that holds the format's name and the layer's options, as JSON in UTF-8 bytes."""


def write(path: str | PathLike[str], options: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write options and arrays beside `path`, then put the file in its place in one step."""
    target = Path(path)
    header = json.dumps({"format": FORMAT, "options": dict(options)}).encode()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            entries: dict[str, Any] = {HEADER: np.frombuffer(header, np.uint8), **state}
            np.savez(file, **entries)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and state of the layer in a file; ValueError if it is not such a file or is damaged."""
    path = Path(path)
    try:
        with path.open("rb") as file:  # NumPy would leave a file that it opened itself to the garbage collector
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _UnreadableError("it is a single array")
            if HEADER not in archive.files:
                raise _UnreadableError(f"it has no entry {HEADER!r}")
            header = json.loads(bytes(archive[HEADER]))
            state = {key: archive[key] for key in archive.files if key != HEADER}
            strange = [key for key, values in state.items() if not isinstance(values, np.ndarray)]
            if strange:
                raise _UnreadableError(f"its entry {strange[0]!r} is no array")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged bytes make zipfile, zlib, NumPy and json raise a dozen classes
        raise ValueError(
            f"{path} cannot be read as a layer ({error}), but BatchNorm.load takes what BatchNorm.save has written; "
            f"pass such a file, whole and undamaged."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or not isinstance(header.get("options"), dict):
        raise ValueError(
            f"{path} is in another format than {FORMAT!r}, but this version of cubn reads no other; "
            f"write it again with the version that reads it."
        )
    options = header["options"]
    for key in ("features", "channel_axis"):
        if isinstance(options.get(key), list):
            options[key] = tuple(options[key])
    return options, state


class _UnreadableError(Exception):
    """A file that NumPy can open and that is no layer."""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
