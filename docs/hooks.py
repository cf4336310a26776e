"""MkDocs hook: pages that are a file of the repository, and links between files turned into links between pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results": "benchmarks.md",
    "notebooks": "notebooks.md",
}
INCLUDE = re.compile(r"^<!-- include (?P<path>\S+) -->$", re.M)
LINK = re.compile(r"\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def page_of(path: str) -> str | None:
    """The page, below docs, that shows a file or folder of the repository; None if there is none."""
    if path in PAGES:
        return PAGES[path]
    if card := re.fullmatch(r"lightning_efficient/(\w+)/README\.md", path):
        return f"techniques/{card[1]}.md"
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    return page_of(posixpath.dirname(path)) if path.startswith(("benchmarks/results/", "notebooks/")) else None


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace ``<!-- include PATH -->`` by that file, and links to files by links to pages.

    What is in the repository but on no page is named, not linked.
    """
    own = page.file.src_uri

    def linked(text: str, source: str) -> str:
        def link(found: re.Match[str]) -> str:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["target"]))
            if shown := page_of(target):
                return f"]({posixpath.relpath(shown, posixpath.dirname(own) or '.')}{found['anchor'] or ''})"
            return f"](repository:{target})" if (ROOT / target).exists() else "]()"

        return LINK.sub(link, text)

    before, *rest = INCLUDE.split(markdown)
    parts = [linked(before, f"docs/{own}")]
    for path, after in zip(rest[::2], rest[1::2], strict=True):
        parts += [linked((ROOT / path).read_text(encoding="utf-8"), path), linked(after, f"docs/{own}")]
    return re.sub(r"\[([^\]]*)\]\(repository:([^)]*)\)", r"\1 (`\2`)", "".join(parts))
