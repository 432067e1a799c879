"""The rules of docs/architecture.md: which part may import which, and how large a file, a room and a function may be."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.launching import ROOT

FILES = sorted(path.relative_to(ROOT) for part in ("trainer", "data") for path in (ROOT / part).rglob("*.py"))
# module -> what of the project it may import; the longest name that fits decides.
MAY_IMPORT = {
    "data": ("data",),
    "trainer.model": ("trainer.model",),
    "trainer.checkpoint": ("trainer.checkpoint", "data.Refusal", "data.process"),
    "trainer.config_data": ("data",),
    "trainer.config": ("data", "trainer.config_data", "trainer.model.architecture"),
    "trainer.config_file": ("data", "trainer.config"),
    "trainer.engine": ("data", "trainer.config", "trainer.checkpoint"),
    "trainer.weights": ("trainer.weights", "trainer.checkpoint", "trainer.model", "trainer.config", "trainer.config_file",
                        "data.given.pickles", "data.variables"),
    "trainer.dataset": ("data", "trainer.config", "trainer.checkpoint", "trainer.model"),
    "trainer.process": ("data", "trainer.config", "trainer.config_file", "trainer.checkpoint", "trainer.engine",
                        "trainer.process"),
    "trainer.forecaster": ("data", "trainer.config", "trainer.config_file", "trainer.checkpoint", "trainer.weights",
                           "trainer.dataset", "trainer.model", "trainer.process"),
    "trainer.scores": ("data", "trainer.config", "trainer.checkpoint", "trainer.weights", "trainer.dataset",
                       "trainer.forecaster", "trainer.process", "trainer.scores"),
    "trainer.baselines": ("data", "trainer.dataset", "trainer.model"),
    "trainer.standalone": ("data", "trainer.config", "trainer.config_file", "trainer.checkpoint", "trainer.weights",
                           "trainer.dataset", "trainer.forecaster", "trainer.model", "trainer.process"),
    "trainer.verification": ("data", "trainer.baselines", "trainer.dataset", "trainer.forecaster", "trainer.process",
                             "trainer.scores", "trainer.verification"),
    "trainer.report": ("data", "trainer.forecaster", "trainer.scores", "trainer.report"),
    "trainer.run": ("data", "trainer.config", "trainer.config_file", "trainer.checkpoint", "trainer.engine", "trainer.weights",
                    "trainer.baselines", "trainer.dataset", "trainer.model", "trainer.process", "trainer.scores",
                    "trainer.run"),
    "trainer": ("data", "trainer"),
}  # fmt: skip
COMMANDS = ("data.commands", "trainer.commands", "trainer.preflight.command", "trainer.preflight.plan_command")
MOST_LINES, MOST_FILES, LONGEST_FUNCTION, MOST_SKIPS = 300, 10, 60, 20


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(source: str) -> list[str]:
    """Full names of what a file of the project imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def refused(module: str, source: str) -> list[str]:
    rule = max((part for part in MAY_IMPORT if f"{module}.".startswith(f"{part}.")), key=len)
    allowed = MAY_IMPORT[rule]
    own = [name for name in imported(source) if name.split(".")[0] in ("data", "trainer", "tests", "benchmarks")]
    wrong = [name for name in own if not any(f"{name}.".startswith(f"{part}.") for part in allowed)]
    if not module.startswith(COMMANDS):
        wrong += [name for name in own if f"{name}.".startswith(tuple(f"{c}." for c in COMMANDS))]
    return wrong


def test_a_rule_that_is_broken_is_seen() -> None:
    assert refused("data.batch", "from trainer.config import Run") == ["trainer.config.Run"]
    assert refused("trainer.model.flash", "import data.store") == ["data.store"]
    assert refused("trainer.checkpoint.store", "def f():\n    from data.strict import x") == ["data.strict.x"]
    assert "trainer.commands.status" in refused("trainer.run.start", "from trainer.commands import status")
    assert refused("trainer.checkpoint.store", "from data.process import locks\nimport torch") == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    assert refused(module_of(path), (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_and_its_functions_are_read_in_one_sitting(path: Path) -> None:
    source = (ROOT / path).read_text()
    assert len(source.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, node.name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    said = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    assert path.name == "__init__.py" or (said and len(said) > 20), said


def test_no_room_is_crowded() -> None:
    tracked = subprocess.run(["git", "ls-files", "trainer", "data"], cwd=ROOT, capture_output=True, text=True, check=True)
    rooms: dict[Path, int] = {}
    for name in tracked.stdout.split():
        if (ROOT / name).exists():
            rooms[Path(name).parent] = rooms.get(Path(name).parent, 0) + 1
    assert {str(room): count for room, count in rooms.items() if count > MOST_FILES} == {}


def test_a_package_holds_what_its_code_reads() -> None:
    """Files beside the code that pyproject.toml does not name are in an editable installation only."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    tracked = subprocess.run(["git", "ls-files", "trainer", "data"], cwd=ROOT, capture_output=True, text=True, check=True)
    own = {Path(name) for name in tracked.stdout.split() if not name.endswith(".py")}
    packed = {
        path.relative_to(ROOT) for part in named for what in named[part] for path in (ROOT / part.replace(".", "/")).glob(what)
    }
    assert own <= packed


def test_the_formatter_is_seldom_told_to_keep_out() -> None:
    files = [path for part in ("trainer", "data", "tests", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    assert sum(path.read_text().count("# fmt: " + "skip") for path in files) < MOST_SKIPS


def test_the_plan_names_every_room_and_file_it_speaks_of() -> None:
    """A room that the plan does not have is as wrong as a file that has been renamed."""
    plan = (ROOT / "docs/architecture.md").read_text()
    for path in FILES:
        assert f"{path.parent.name}/" in plan, path
    words = {word.strip("`(),;:") for word in plan.split()}
    spoken = [word for word in words if word.endswith(".py") and "/" in word]
    for word in spoken:
        assert any(str(path).endswith(word) for path in FILES) or (ROOT / word).exists(), word
