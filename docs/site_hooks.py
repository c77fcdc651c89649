"""Hooks of mkdocs (its documentation, "Hooks"): files of the project beside docs/ become part of the site.

A page says `../SPECIFICATION.md`, which is right where the repository is read; on the site that file is
`project/SPECIFICATION.md`. Files that are no pages (an example's source) are copied as they are.
"""

import re
from pathlib import Path
from posixpath import dirname, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that no page of docs/ needs to link to.
ALWAYS = ("SPECIFICATION.md", "CHANGELOG.md", "guests/README.md")
_OUTSIDE = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)")


def _outside_links(page: Path) -> list[str]:
    """Paths below the repository's root, outside docs/, that a page of docs/ links to."""
    found = []
    for match in _OUTSIDE.finditer(page.read_text()):
        target = (page.parent / match["up"] / match["path"]).resolve()
        if target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs") and target.is_file():
            found.append(str(target.relative_to(ROOT)))
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to."""
    wanted = set(ALWAYS)
    for page in Path(config.docs_dir).rglob("*.md"):
        wanted.update(_outside_links(page))
    for path in sorted(wanted):
        files.append(File.generated(config, f"project/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ into links to `project/`, and those of such files into docs/ to the pages."""
    uri = page.file.src_uri
    inside = uri.removeprefix("project/")
    if inside != uri:  # a file of the project: its links are relative to its own place
        here = dirname(inside)
        return re.sub(
            r"\]\((?!https?:|#)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)",
            lambda match: _moved(match, (ROOT / here / match["path"]).resolve(), dirname(uri)),
            markdown,
        )
    source = Path(config.docs_dir) / dirname(uri)
    return _OUTSIDE.sub(
        lambda match: _moved(match, (source / match["up"] / match["path"]).resolve(), dirname(uri)), markdown
    )


def _moved(match: re.Match[str], target: Path, here: str) -> str:
    """A link to `target` from a page in the site's folder `here`; as it was where that is no file of ours."""
    if not target.is_relative_to(ROOT):
        return match[0]
    if target.is_relative_to(ROOT / "docs"):
        place = str(target.relative_to(ROOT / "docs"))
    else:
        place = f"project/{target.relative_to(ROOT)}"
    return f"]({relpath(place, here or '.')}{match['anchor'] or ''})"
