"""docs/losses.md is what its generator writes, and the generator refuses functions without a source or a test."""

import importlib.util
from pathlib import Path

import pytest

import rljax.losses

DOCS = Path(__file__).resolve().parent.parent / "docs"

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_losses_table", DOCS / "make_losses_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_current(generator):
    assert (DOCS / "losses.md").read_text() == generator.table(), "run python docs/make_losses_table.py"


def test_a_function_without_source_and_test_is_refused(generator, monkeypatch):
    def unheard_of(x):
        """Does something to x."""

    monkeypatch.setattr(rljax.losses, "unheard_of", unheard_of, raising=False)
    monkeypatch.setattr(rljax.losses, "__all__", [*rljax.losses.__all__, "unheard_of"])
    with pytest.raises(SystemExit, match=r"unheard_of has no arXiv number.*unheard_of is mentioned by no test"):
        generator.table()


def test_a_stale_entry_is_refused(generator, monkeypatch):
    monkeypatch.setitem(generator.ELSEWHERE, "gone", "TRL `gone`")
    with pytest.raises(SystemExit, match="gone is in SOURCES or ELSEWHERE but not public"):
        generator.table()


def test_sentence_and_citation_are_read_from_the_docstring(generator):
    def loss():
        """Dr. Who: ``a − b`` (GRPO, 2402.03300, eqs. 4, 6 and 7.1), with |c|. More."""

    assert generator.equation(loss) == "Dr. Who: `a − b`, with |c|"
    assert generator.source("loss", loss) == "2402.03300, eqs. 4, 6 and 7.1"
