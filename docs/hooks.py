"""MkDocs hook: pages that are a file of the repository, and links between files turned into links between pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results": "benchmarks.md",
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
    if path.startswith("notebooks/"):
        return path
    if path.startswith("benchmarks/results/"):
        return PAGES["benchmarks/results"]
    return "notebooks.md" if path == "notebooks" else None


def section_of(path: str) -> str:
    """Where on its page a file is included: the anchor of its heading."""
    result = re.fullmatch(r"benchmarks/results/([a-z]+)_cpu-x86_64\.md", path)
    return f"#benchmark-{result[1]}" if result else ""


@event_priority(100)  # before the plugin that makes pages of notebooks looks for them
def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the notebooks, which are beside the folder of pages."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        where = f"notebooks/{path.name}"
        files.append(File(where, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace ``<!-- include PATH -->`` by that file, and links to files by links to pages.

    What is in the repository but on no page is named, not linked.
    """
    own = page.file.src_uri

    def linked(text: str, source: str) -> str:
        def link(found: re.Match[str]) -> str:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["target"]))
            if shown := page_of(target):
                page_there = posixpath.relpath(shown, posixpath.dirname(own) or ".")
                return f"]({page_there}{found['anchor'] or section_of(target)})"
            return f"](repository:{target})" if (ROOT / target).exists() else "]()"

        return LINK.sub(link, text)

    before, *rest = INCLUDE.split(markdown)
    parts = [linked(before, f"docs/{own}")]
    for path, after in zip(rest[::2], rest[1::2], strict=True):
        text = (ROOT / path).read_text(encoding="utf-8")
        if before.lstrip().startswith("# "):  # the page has a title already
            text = re.sub(r"^(#+ )", r"#\1", text, flags=re.M)
        parts += [linked(text, path), linked(after, f"docs/{own}")]
    return re.sub(r"\[([^\]]*)\]\(repository:([^)]*)\)", named, "".join(parts))


def named(found: re.Match[str]) -> str:
    """A file that is on no page."""
    text, path = found.groups()
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"
