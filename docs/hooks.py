"""MkDocs hook: pages that are a file of the repository, with its links turned into links between pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "lightning_efficient/growth/README.md": "techniques/growth.md",
    "lightning_efficient/offload/README.md": "techniques/offload.md",
    "lightning_efficient/precision/README.md": "techniques/precision.md",
    "lightning_efficient/monitoring/README.md": "techniques/monitoring.md",
    "docs/architecture.md": "architecture.md",
    "docs/growth-recipe.md": "growth-recipe.md",
    "docs/your-own-model.md": "your-own-model.md",
    "docs/api.md": "api.md",
    "benchmarks/results/growth_cpu-x86_64.md": "benchmarks.md",
}
INCLUDE = re.compile(r"^<!-- include (?P<path>\S+) -->$", re.M)
LINK = re.compile(r"\]\((?P<target>[^)#:\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace ``<!-- include PATH -->`` by that file."""
    here = posixpath.dirname(page.file.src_uri)

    def include(match: re.Match[str]) -> str:
        source = match["path"]

        def link(found: re.Match[str]) -> str:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["target"]))
            if target in PAGES:
                return f"]({posixpath.relpath(PAGES[target], here or '.')})"
            return "]()" if not (ROOT / target).exists() else f"](repository:{target})"

        return LINK.sub(link, (ROOT / source).read_text(encoding="utf-8"))

    # What is in the repository but on no page is named, not linked.
    return re.sub(r"\[([^\]]*)\]\(repository:([^)]*)\)", r"\1 (`\2`)", INCLUDE.sub(include, markdown))
