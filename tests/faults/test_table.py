"""Every failure of the past has a test, and the documentation says which."""

from __future__ import annotations

from tests.faults.table import rows, table
from tests.launching import ROOT


def test_all_failures_have_a_test_that_says_what_happened() -> None:
    found = rows()
    assert list(found) == list(range(1, 84))
    assert all(any(happened for happened, _, _ in tests) for tests in found.values())


def test_the_table_in_the_documentation_is_that_of_the_tests() -> None:
    """Else: python -m tests.faults.table, into docs/operations.md."""
    assert table() in (ROOT / "docs/operations.md").read_text()
