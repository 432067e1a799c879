"""The table of failures and their guards for docs/operations.md: `python -m tests.faults.table`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent


def rows() -> dict[int, list[tuple[str, str, str]]]:
    """Number of the failure -> (what happened, the guard, file) of each of its tests, from their docstrings and names."""
    found: dict[int, list[tuple[str, str, str]]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = re.fullmatch(r"test_f(\d\d)_(?:f\d\d_)*(\w+)", node.name) if isinstance(node, ast.FunctionDef) else None
            if name:
                happened = " ".join((ast.get_docstring(node) or "").split())  # type: ignore[arg-type]
                found.setdefault(int(name[1]), []).append((happened, name[2].replace("_", " "), path.name))
    return dict(sorted(found.items()))


def table() -> str:
    lines = ["| | what happened | the guard that a test injects it against |", "|---|---|---|"]
    for number, tests in rows().items():
        happened = next(what for what, _, _ in tests if what)
        guards = "; ".join(f"{guard} (`{file}`)" for _, guard, file in tests)
        lines.append(f"| F{number:02d} | {happened} | {guards} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
