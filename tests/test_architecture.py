"""The rooms and their arrows, read from the source: infra -> tuning -> pipeline -> mpc, no circle between modules."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("mpc", "pipeline", "tuning", "infra")
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}
PURE = ("mpc.losses", "mpc.pseudo", "mpc.step", "mpc.model", "mpc.method")


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; `from a import b` yields both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_load(path: Path) -> Iterator[str]:
    """Modules of this project that a file needs while it is loaded: not those inside functions or TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in names if name in SOURCES]
            yield from inner or [node.module]


def room_of(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_arrows(module: str) -> None:
    allowed = ROOMS[: ROOMS.index(room_of(module)) + 1]
    upward = [name for name in imports_of(SOURCES[module]) if room_of(name) in ROOMS and room_of(name) not in allowed]
    assert not upward, f"{module} imports {upward}, against infra -> tuning -> pipeline -> mpc"


def test_no_circles() -> None:
    graph = {module: {name for name in imports_at_load(path) if name in SOURCES} for module, path in SOURCES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [name for name in SOURCES if room_of(name) == "mpc"])
def test_the_method_knows_no_infrastructure(module: str) -> None:
    found = {room_of(name) for name in imports_of(SOURCES[module])} & {"ray", "mlflow", "boto3", "pyarrow"}
    assert not found, f"{module} imports {found}; the method runs without them"


@pytest.mark.parametrize("module", PURE)
def test_the_step_needs_torch_and_timm_alone(module: str) -> None:
    allowed = {"torch", "timm", "mpc", *sys.stdlib_module_names}
    assert {room_of(name) for name in imports_of(SOURCES[module])} <= allowed


def test_the_package_of_the_method_imports_nothing() -> None:
    assert not list(imports_of(SOURCES["mpc"]))


def test_one_place_starts_ray() -> None:
    starters = [
        module
        for module, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"
    ]
    assert set(starters) == {"pipeline.runtime"}


def test_nothing_is_unpickled() -> None:
    for module, path in SOURCES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "cloudpickle", "dill", "joblib"} & {room_of(name) for name in imports_of(path)}, module
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only")
                assert safe == "True", f"{module}:{call.lineno} loads without weights_only=True"
