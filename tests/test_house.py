"""How the package is built: floors, a quick import, documented names, and no drawer for what has no place."""

import ast
import inspect
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import cubn

PACKAGE = Path(cubn.__file__).parent

# Floors

FLOORS = (
    {"cubn.errors"},
    {"cubn.namespace"},
    {"cubn.layout", "cubn.moments", "cubn.chunks"},
    {"cubn.problem"},
    {"cubn.machines"},
    {"cubn.machines.*"},
    {"cubn.dispatch", "cubn.forms", "cubn.sync.*", "cubn.state", "cubn.archive"},
    {"cubn.prepared"},
    {"cubn.functional", "cubn.fold", "cubn.explain"},
    {"cubn.population", "cubn.layer", "cubn.warmup"},
    {"cubn"},
    {"cubn.demo.*", "cubn.interop.*", "cubn.torch.*"},
    {"cubn.__main__"},
)
"""From the ground up.  A module imports only from floors below its own; one package of a floor, as in `cubn.demo`,
may import within itself, and `cubn.machines.*` are as many packages as there are machines."""


def place(module: str) -> tuple[int, str]:
    """The floor of a module, and the package that it may move about in (itself, if there is none)."""
    for floor, names in enumerate(FLOORS):
        if module in names:
            return floor, module
        for name in names:
            package = name.removesuffix(".*")
            if name.endswith(".*") and (module + ".").startswith(package + "."):
                inside = module.removeprefix(package).split(".")[1:2]
                return floor, ".".join([package, *inside]) if package == "cubn.machines" else package
    raise AssertionError(f"{module} is on no floor; put it into FLOORS of {Path(__file__).name}")


def imports(module: str, text: str) -> set[str]:
    """The modules of cubn that a text imports, wherever the statement stands.  `if TYPE_CHECKING` counts."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            # `from cubn import x` may mean a module or a name; a module is where the file says so.
            found |= {
                one if is_module(one := f"{node.module}.{name.name}") else str(node.module) for name in node.names
            }
    return {name for name in found if name.split(".")[0] == "cubn"}


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def breaches(module: str, text: str) -> list[str]:
    """Sentences about imports that do not run downwards."""
    floor, home = place(module)
    wrong = []
    for name in sorted(imports(module, text) - {module}):
        other_floor, other_home = place(name)
        if not (other_floor < floor or (other_home == home and home != name)):
            wrong.append(f"{module} (floor {floor}) imports {name} (floor {other_floor})")
    return wrong


MODULES = {
    ".".join(["cubn", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_floors_below_it(module):
    assert breaches(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("cubn.errors", "import cubn.namespace"),
        ("cubn.layout", "from cubn.moments import Moments"),
        ("cubn.moments", "def late():\n    from cubn.layer import BatchNorm"),
        ("cubn.sync", "from cubn import functional"),
        ("cubn.functional", "from cubn import batch_norm"),
        ("cubn.machines.cpu", "from cubn.machines import reference"),
        ("cubn.machines.cpu.plan", "from cubn.machines.reference import moments"),
        ("cubn.dispatch", "import cubn"),
        ("cubn.layer", "from cubn.demo import training"),
    ],
)
def test_an_import_that_runs_upwards_is_seen(module, text):
    assert len(breaches(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("cubn.layer", "from cubn import archive"),
        ("cubn.machines.cpu.columns", "from cubn.machines.cpu.plan import plan\nfrom cubn.moments import Moments"),
        ("cubn.demo.training", "import cubn\nfrom cubn.demo.network import Network"),
    ],
)
def test_an_import_that_runs_downwards_or_stays_at_home_is_allowed(module, text):
    assert breaches(module, text) == []


def test_a_module_without_a_floor_is_seen():
    with pytest.raises(AssertionError, match=r"cubn\.gadgets is on no floor"):
        place("cubn.gadgets")


def test_no_modules_import_one_another():
    graph = {module: imports(module, path.read_text()) - {module} for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_only_the_launcher_and_the_namespace_import_cupy(module):
    """`namespace("cuda")` hands CuPy out; everything that computes with it is in one file."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    assert "cupy" not in names or module in ("cubn.machines.cuda.launch", "cubn.namespace", "cubn.__main__")


DRAWERS = {"utils", "util", "helpers", "helper", "misc", "common", "tools", "core", "base"}


def test_no_file_is_a_drawer():
    root = PACKAGE.parent
    files = [*PACKAGE.rglob("*"), *root.glob("book/*")]
    files += [file for folder in ("tests", "benchmarks", "kernels") for file in root.glob(f"{folder}/**/*")]
    assert [file for file in files if file.stem.strip("_") in DRAWERS] == []


# The import

HEAVY = (
    "cupy", "numba", "scipy", "mpi4py", "torch", "jax", "tensorflow", "keras", "tqdm", "matplotlib", "sklearn", "dask",
    "pandas", "IPython", "array_api_strict", "ml_dtypes",
)  # fmt: skip

MEASURE = """
import sys, time
start = time.process_time()
import numpy
numpy_alone = time.process_time() - start
import cubn
taken = time.process_time() - start
import json
print(json.dumps([numpy_alone, taken, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.fixture(scope="module")
def fresh_import(tmp_path_factory):
    """Import cubn in a new process: seconds for NumPy, seconds for both, and the packages loaded after it.

    Bytecode is kept from run to run, as it is for every user after the first import, but not beside the source.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def measure() -> tuple[float, float, set[str]]:
        command = [sys.executable, "-c", MEASURE]
        run = subprocess.run(command, cwd=PACKAGE.parent, env=environment, capture_output=True, text=True, check=True)
        numpy_alone, taken, loaded = json.loads(run.stdout)
        return numpy_alone, taken, set(loaded)

    measure()
    return measure


def test_the_import_loads_nothing_heavy(fresh_import):
    *_, loaded = fresh_import()
    assert loaded.intersection(HEAVY) == set()
    assert {"cubn", "numpy"} <= loaded


def test_the_import_is_quick(fresh_import):
    """Less than 0.15 s with NumPy, of which NumPy takes 0.06 s and more, on a machine that is not busy.

    The least of several runs, in processor time: other work can only add to it.  Where it slows every process down, so
    that NumPy alone takes more than 0.1 s, cubn must add less than half of that.  Stops at the first run that will do.
    """
    numpy_least = least = float("inf")
    for _ in range(20):
        numpy_alone, taken, _ = fresh_import()
        numpy_least, least = min(numpy_least, numpy_alone), min(least, taken)
        if least < max(0.15, 1.5 * numpy_least):
            return
    pytest.fail(f"import cubn takes {least:.3f} s at best, NumPy {numpy_least:.3f} s of it")


# Names and their documentation


def test_the_list_of_public_names_is_sorted_and_complete():
    public = {name for name in vars(cubn) if not name.startswith("_")}
    not_for_users = {name for name in public if isinstance(vars(cubn)[name], ModuleType)} - {"dispatch", "sync"}
    assert cubn.__all__ == sorted(cubn.__all__)
    assert set(cubn.__all__) == public - not_for_users


def test_a_star_import_gives_every_public_name():
    names = {}
    exec("from cubn import *", names)
    assert set(cubn.__all__) <= set(names)


@pytest.mark.parametrize("name", cubn.__all__)
def test_every_public_name_says_what_it_is(name):
    thing = getattr(cubn, name)
    text = inspect.getdoc(thing) or ""
    summary = text.partition("\n")[0]
    assert summary, f"{name} has no docstring"
    assert summary.endswith("."), f"{name}: the first line is no sentence: {summary}"
    inherited = inspect.isclass(thing) and thing.__doc__ is None
    assert not inherited, f"{name} has only the docstring of its base"


@pytest.mark.parametrize("name", [
    name for name in cubn.__all__
    if not (inspect.isclass(getattr(cubn, name)) and issubclass(getattr(cubn, name), Exception))
])  # fmt: skip
def test_every_public_name_that_is_not_an_exception_shows_an_example(name):
    """The examples are run as doctests.  Of a module, its functions show them; exceptions are met, not called."""
    thing = getattr(cubn, name)
    shown = [thing]
    if isinstance(thing, ModuleType):
        shown = [
            value for key, value in vars(thing).items()
            if inspect.isfunction(value)
            and (value.__module__ + ".").startswith(thing.__name__ + ".")
            and key in ("threads", "mpi", "nccl", "torch", "grid", "use_machine")
        ]  # fmt: skip
        assert shown
    for one in shown:
        assert ">>>" in (inspect.getdoc(one) or ""), f"{one} shows no example"


def parameters_of(thing) -> list[str]:
    """The parameters of a function or class, `self` and `cls` left out."""
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("name", [name for name in cubn.__all__ if inspect.isfunction(getattr(cubn, name))])
def test_every_parameter_of_a_public_function_is_documented(name):
    function = getattr(cubn, name)
    lines = (inspect.getdoc(function) or "").splitlines()
    section = lines[lines.index("Parameters") + 2 :]
    documented = {word for line in section if line[:1].strip() for word in line.partition(" : ")[0].split(", ")}
    assert set(parameters_of(function)) <= documented


def test_every_parameter_of_the_layer_is_documented():
    lines = (inspect.getdoc(cubn.BatchNorm) or "").splitlines()
    documented = {word for line in lines if " : " in line for word in line.partition(" : ")[0].split(", ")}
    assert set(parameters_of(cubn.BatchNorm)) <= documented


@pytest.mark.parametrize("name", [name for name in cubn.__all__ if inspect.isfunction(getattr(cubn, name))])
def test_options_of_public_functions_are_keyword_only(name):
    if name in ("explain", "namespace", "fold", "fold_into"):
        positional = {"explain": 1, "namespace": 1, "fold": 4, "fold_into": 6}[name]
    else:
        positional = {"batch_norm": 3, "batch_norm_backward": 2, "batch_norm_inference": 5,
                      "batch_norm_inference_backward": 6, "moments": 1, "population": 1, "warmup": 1}[name]  # fmt: skip
    kinds = [p.kind for p in inspect.signature(getattr(cubn, name)).parameters.values()]
    assert kinds[:positional] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * positional
    assert set(kinds[positional:]) <= {inspect.Parameter.KEYWORD_ONLY}


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()
