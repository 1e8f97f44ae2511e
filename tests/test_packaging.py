"""The package as users get it: wheel, editable install and bare checkout, each with the kernels."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import cubn, numpy as np
from cubn.machines.cuda.source import kernel_folder, translation_unit
assert "struct Moments" in translation_unit("moments.cuh")
y, _ = cubn.batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
assert y.tolist() == [[-1.0], [1.0]]
print(cubn.__file__, kernel_folder(), sep="\\n")
"""


def probe(python_path, cwd):
    """(package, kernels) as a fresh interpreter finds them with only `python_path` in front."""
    environment = {**os.environ, "PYTHONPATH": str(python_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    package, kernels = done.stdout.split("\n")[:2]
    return Path(package).parent, Path(kernels)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by pip from this checkout."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the tests run without the sources of the package")
    pytest.importorskip("hatchling", reason="building a wheel without the network needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (built,) = folder.glob("cubn-*.whl")
    return built


def test_a_bare_checkout_finds_its_kernels(tmp_path):
    package, kernels = probe(ROOT, tmp_path)
    assert package == ROOT / "cubn"
    assert kernels == ROOT / "kernels"


def test_the_wheel_carries_its_kernels(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    package, kernels = probe(tmp_path, tmp_path)
    assert package == tmp_path / "cubn"
    assert kernels == tmp_path / "cubn" / "kernels"
    shipped = {path.name for path in kernels.iterdir()}
    assert shipped == {path.name for path in (ROOT / "kernels").iterdir() if path.is_file()}
    assert (package / "py.typed").is_file()


def test_the_wheel_holds_nothing_but_the_package_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2
    assert "cubn" in tops
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert "Requires-Dist: numpy" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(required) == 2, "numpy and array-api-compat are all that is required"


def test_an_editable_install_finds_its_kernels(tmp_path):
    """What `pip install -e` leaves in site-packages is a path to this checkout."""
    pth = tmp_path / "site"
    pth.mkdir()
    (pth / "_cubn.pth").write_text(f"{ROOT}\n")
    code = f"import site; site.addsitedir({str(pth)!r})\n" + PROBE
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[1]) == ROOT / "kernels"


def test_missing_kernels_are_named(monkeypatch, tmp_path):
    from cubn.machines.cuda import source

    monkeypatch.setattr(source, "__file__", str(tmp_path / "a" / "b" / "c" / "source.py"))
    source.kernel_folder.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="install it again"):
            source.kernel_folder()
    finally:
        source.kernel_folder.cache_clear()


def test_the_readmes_code_prints_what_it_says():
    import doctest

    outcome = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted >= 8
    assert outcome.failed == 0
