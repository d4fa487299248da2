"""The budget of the test suite: every file has one, and what a session took is printed beside it."""

from types import SimpleNamespace

import pytest

from tests.conftest import BUDGET_S, ROOT, pytest_terminal_summary, suite_of

pytestmark = pytest.mark.fast


def test_every_file_of_tests_has_a_budget_and_all_have_20_minutes_of_two_cores() -> None:
    files = [str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")]
    assert {suite_of(f"{file}::test_x") for file in files} == set(BUDGET_S)
    assert sum(BUDGET_S.values()) <= 2 * 20 * 60
    assert suite_of("tests/test_tpu_worker.py::test_x[a::b]") == "test_tpu" != suite_of("tests/test_usage.py::test_x")


def test_seconds_are_summed_over_the_parts_of_a_test_by_suite() -> None:
    def report(nodeid: str, when: str, duration: float) -> pytest.TestReport:
        return pytest.TestReport(nodeid, ("", 0, ""), {}, "passed", None, when, duration=duration)  # type: ignore[arg-type]

    stats = {
        "passed": [report("tests/losses/test_kl.py::a", "call", 1.5), report("tests/test_usage.py::a", "call", 2.0)],
        "": [report("tests/losses/test_kl.py::a", "setup", 0.25)],
        "warnings": [SimpleNamespace(message="no test")],
    }
    said: list[str] = []
    reporter = SimpleNamespace(stats=stats, section=said.append, write_line=said.append)
    pytest_terminal_summary(reporter, SimpleNamespace(option=SimpleNamespace(durations=15)))  # type: ignore[arg-type]
    assert [line.split() for line in said[1:]] == [
        ["1.8", "of", str(BUDGET_S["losses"]), "losses"],
        ["2.0", "of", str(BUDGET_S["test"]), "test"],
        ["3.8", "of", str(sum(BUDGET_S.values())), "all"],
    ]
    pytest_terminal_summary(reporter, SimpleNamespace(option=SimpleNamespace(durations=None)))  # type: ignore[arg-type]
    assert len(said) == 4
