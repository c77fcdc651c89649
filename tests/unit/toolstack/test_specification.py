"""SPECIFICATION.md: what it promises is tied to tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(?:\w+::)?(\w+)`")


def test_each_promise_names_a_test_that_exists() -> None:
    """A test that was renamed or dropped takes its promise with it, or this fails."""
    text = (ROOT / "SPECIFICATION.md").read_text(encoding="utf-8")
    references = REFERENCE.findall(text)
    assert len(references) > 20
    missing = [
        f"{file}::{name}"
        for file, name in references
        if not (ROOT / file).exists()
        or not re.search(
            rf"^\s*(?:async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    assert missing == []


def test_each_promise_has_a_test() -> None:
    """Every item of a list in it names at least one."""
    text = (ROOT / "SPECIFICATION.md").read_text(encoding="utf-8")
    items = re.split(r"^- ", text, flags=re.MULTILINE)[1:]
    assert [item for item in items if not REFERENCE.search(item)] == []


def test_each_dependency_has_its_reason() -> None:
    """pyproject.toml and docs/decisions/0002-dependencies.md name the same packages."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    page = (ROOT / "docs" / "decisions" / "0002-dependencies.md").read_text(encoding="utf-8")
    names = [re.split(r"[<>=\[ ]", requirement)[0] for requirement in wanted]
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", page)] == []


def test_each_decision_is_in_the_index_under_a_number_of_its_own() -> None:
    """docs/decisions/index.md names every record, and no two have one number."""
    records = sorted(path.name for path in (ROOT / "docs/decisions").glob("0*.md"))
    index = (ROOT / "docs/decisions/index.md").read_text(encoding="utf-8")
    assert [name for name in records if f"]({name})" not in index] == []
    assert len({name[:4] for name in records}) == len(records)
