"""Documents say what is there: modules in the glossary, folders and registries in CONTRIBUTING, and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ecotone.experiments.plugins import registries

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/operations.md",
    "docs/glossary.md",
    "docs/security.md",
    "SECURITY.md",
)
PLACE = re.compile(
    r"`((?:experiments|search|fitness|merging|populations|ecotone|tests|deploy|docs|benchmarks)/[\w./-]+)`"
)


def rows(document: str) -> list[list[str]]:
    """The cells of a document's table rows, headings left out."""
    lines = [line for line in (ROOT / document).read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def test_the_glossary_is_alphabetical_and_each_word_stands_once() -> None:
    words = [word for word, *_ in rows("docs/glossary.md")[1:]]
    assert len(words) > 40
    assert words == sorted(set(words), key=str.lower)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_are_there(document: str) -> None:
    written = {"docs/fields.md"}  # by `make docs`
    named = set(PLACE.findall((ROOT / document).read_text())) - written
    assert [place for place in sorted(named) if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_contributing_names_every_sort_of_kind_with_its_entry_points() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    groups = {registry.group for registry in registries().values()}
    assert groups == set(re.findall(r"\| `(ecotone\.\w+)` \|", text))
