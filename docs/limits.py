"""Writes docs/limits.md: of each limit that a method card names, the first sentence.

The cards are where limits are written down; ``python docs/limits.py`` after a change to one, or a test fails.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "limits.md"
BEGIN, END = "<!-- of the cards: begin -->\n", "<!-- of the cards: end -->\n"
CARDS = {
    "growth": "Grow and unshare",
    "checkpointing": "Asynchronous checkpoints",
    "activation_compression": "Compressed activations",
    "offload": "Offload",
    "precision": "Low bits",
    "monitoring": "EfficiencyMonitor",
    "planning": "Plan",
}
SECTIONS = ("Composes with, refuses", "Refuses", "Limits")


def anchor(heading: str) -> str:
    """Where a link to a heading leads, on GitHub and in the documentation."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def sections(markdown: str) -> dict[str, str]:
    """The text below each heading of the second level."""
    parts = re.split(r"^## (.+)\n", markdown, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def first_sentences(text: str) -> list[str]:
    """The first sentence of each item of the lists in ``text``, on one line."""
    items = re.findall(r"^- (.+(?:\n  .+)*)", text, flags=re.M)
    lines = [" ".join(item.replace("**", "").split()) for item in items]
    return [re.split(r"(?<=[.?!]) (?=[A-Z`(])", line)[0].rstrip(".;") for line in lines]


def limits() -> str:
    """The part of the page that is made of the cards."""
    page = []
    for folder, title in CARDS.items():
        path = f"lightning_efficient/{folder}/README.md"
        found = sections((ROOT / path).read_text(encoding="utf-8"))
        page.append(f"## {title}\n")
        for name in SECTIONS:
            if lines := first_sentences(found.get(name, "")):
                verb = "Limits" if name == "Limits" else "Refused by name"
                page.append(f"{verb}, [more in the card](../{path}#{anchor(name)}):\n")
                page.append("".join(f"- {line}\n" for line in lines))
    return "\n".join(page)


def written() -> str:
    """The whole page, with that part made anew."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{limits()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
