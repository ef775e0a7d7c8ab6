"""Every source that code, configurations and tests name can be looked up: pages and headings of
this repository, decisions, papers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.hygiene.source import ROOT, files, name

METHOD = ROOT / "Causal_rCM.md"
PAPERS = ROOT / "docs" / "reference" / "README.md"
# docs/reference/wan.md#sizes, #tensors: a page, then any number of its headings; a line may end
# between them
PAGE = re.compile(r"\b(docs/[\w/]+\.md)(#[\w-]+(?:,[\s#]+#[\w-]+|,\s+#[\w-]+)*)?")
SECTION = re.compile(r"\bCausal_rCM\.md,? sections? (\d+(?:(?:, | and )\d+)*)")
DECISION = re.compile(r"\b[Dd]ecision (A\d+)\b")
PAPER = re.compile(r"\barXiv[: ](\d{4}\.\d{5})")
ELSEWHERE = re.compile(r"\bspec/|\b[Ss]pec \w*(?:\.md )?\d+(?:\.\d+)?\b|\.md section \D")


@cache
def texts() -> dict[str, str]:
    """Files that cite, by name; this one names what it looks for."""
    paths = [*files("rcm", "scripts", "tests", "examples"), *(ROOT / "configs").rglob("*.yaml")]
    return {name(p): p.read_text() for p in sorted(paths) if p.name != Path(__file__).name}


def pages() -> dict[str, str]:
    """What is written about the package, and may cite as well."""
    return {name(p): p.read_text() for p in (ROOT / "README.md", METHOD, *sorted((ROOT / "docs").rglob("*.md")))}


@cache
def headings(page: Path) -> frozenset[str]:
    """Anchors of a page's headings: lower case, spaces as hyphens, punctuation gone."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found)


@cache
def sections() -> frozenset[str]:
    """Numbers of the sections of Causal_rCM.md."""
    return frozenset(re.findall(r"^## (\d+)\. ", METHOD.read_text(), re.MULTILINE))


def page_problems(text: str) -> Iterator[str]:
    """Pages and headings that `text` cites and that are not there."""
    for page, anchors in PAGE.findall(text):
        if not (ROOT / page).is_file():
            yield f"no page {page}"
            continue
        for anchor in re.findall(r"#([\w-]+)", anchors):
            if anchor not in headings(ROOT / page):
                yield f"{page} has no heading {anchor}"


def method_problems(text: str) -> Iterator[str]:
    """Sections and decisions of Causal_rCM.md that `text` cites and that are not there; a line may
    end inside a citation.
    """
    flat = re.sub(r"\s+(?:# )?", " ", text)
    for numbers in SECTION.findall(flat):
        yield from (f"Causal_rCM.md has no section {n}" for n in re.findall(r"\d+", numbers) if n not in sections())
    yield from (f"no decision {mark}" for mark in DECISION.findall(flat) if f"| ({mark}) " not in METHOD.read_text())


def paper_problems(text: str) -> Iterator[str]:
    """Papers cited by number that the list of papers lacks."""
    listed = set(re.findall(r"\b\d{4}\.\d{5}\b", PAPERS.read_text()))
    yield from (f"{paper} is not in {name(PAPERS)}" for paper in PAPER.findall(text) if paper not in listed)


def broken(check) -> list[str]:
    """Findings of `check` in all files, with their place."""
    return [f"{path}: {problem}" for path, text in (texts() | pages()).items() for problem in check(text)]


def test_pages_and_their_headings_exist() -> None:
    assert len(PAGE.findall("".join(texts().values()))) > 50, "no citations found: the rules here would pass on nothing"
    assert not broken(page_problems)
    good, bad = "docs/reference/wan.md#sizes, #tensors", "docs/reference/wan.md#sizes,\n    #tensor; docs/reference/vae.md"
    assert not [*page_problems(good)]
    assert [*page_problems(bad)] == ["docs/reference/wan.md has no heading tensor", "no page docs/reference/vae.md"]


def test_sections_and_decisions_of_the_method_exist() -> None:
    assert len(sections()) > 10
    assert not broken(method_problems)
    assert not [*method_problems("Causal_rCM.md sections 5,\n    8, decision A7")]
    assert [*method_problems("Causal_rCM.md sections 5,\n    80; decision A77")] == ["Causal_rCM.md has no section 80", "no decision A77"]


def test_papers_are_listed() -> None:
    assert not broken(paper_problems)
    assert [*paper_problems("arXiv 9901.00001")]


def test_nothing_outside_the_repository_is_cited() -> None:
    assert not [f"{path}: {match[0]}" for path, text in (texts() | pages()).items() for match in ELSEWHERE.finditer(text)]
    assert all(map(ELSEWHERE.search, ("spec/wan 7", "(spec 2.1, 2.3)", "Spec wan.md 4.2", "docs/data.md section four")))
