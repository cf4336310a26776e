"""``docs/compatibility.md``, made of what is recorded: tables for a phone, and each refusal with its reason."""

from __future__ import annotations

from pathlib import Path

from tests.matrix.cells import ALL, CELLS, OTHERS, PLACES, PRECISIONS, STEPS, Cell, combinations
from tests.matrix.exclusions import EXCLUSIONS
from tests.matrix.record import PATH, Record

__all__ = ["PAGE", "page", "write_page"]

PAGE = PATH.with_suffix(".md")
_NAMES = {
    "stack": "growth (`stack`)",
    "share": "growth (`share`)",
    "checkpoint": "checkpoints",
    "activations": "activations",
    "offload": "offload",
    "precision": "low bits",
}
_MISSING = "not run"
_WAYS = [(compiled, precision) for compiled in (False, True) for precision in PRECISIONS]


def write_page(record: Record, path: Path = PAGE) -> None:
    """Make it anew."""
    path.write_text(page(record), encoding="utf-8")


def page(record: Record) -> str:
    """Its text in Markdown."""
    reasons: dict[str, int] = {}  # with their numbers
    rows = [_row(techniques, record, reasons) for techniques in combinations()]
    dates = sorted({entry["date"] for entry in record.values()})
    versions = sorted({entry["versions"] for entry in record.values()})
    states = [record.get(cell.name, {"state": _MISSING})["state"] for cell in CELLS]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(["green", "refused", *states]))
    lines = [
        "<!-- made by `python -m tests.matrix` from compatibility.json; do not edit -->",
        "# What goes together",
        "",
        "Each technique alone, each pair, and all five: on one device, with DDP and with FSDP2 on two ranks, eager and "
        f"compiled, in fp32 and bf16-mixed. Of {len(CELLS)} combinations: {counts}.",
        "",
        "- **✓** green in all four ways (eager and compiled, fp32 and bf16-mixed): it trains, every technique is at "
        "work, and runs that are resumed from the middle end with the same bits in weights and optimizer state. What "
        "must not change a result (checkpoints, offload) was held to the bits of the run without it.",
        "- **–** and a number: refused by name before the first step; the reason is below.",
        "",
        f"| | {' | '.join(PLACES)} |",
        f"|---|{'---|' * len(PLACES)}",
        *rows,
        "",
        "## Refused, and what to do",
        "",
        *(f"{number}. {_as_markdown(reason)}" for reason, number in reasons.items()),
        "",
        "## Settings that exclude each other",
        "",
        "The techniques go together, these settings of them do not. Each is refused before the first step:",
        "",
    ]
    for exclusion in EXCLUSIONS:
        reason = record.get(exclusion.name, {}).get("reason", "not recorded")
        lines += [f"- {exclusion.name}: “{_as_markdown(reason)}”"]
    lines += [
        "",
        "## How it was shown",
        "",
        f"`make matrix` ran the cells with gloo on a CPU ({'; '.join(versions)}; "
        f"{' to '.join(sorted({*dates[:1], *dates[-1:]}))}): {STEPS} steps of a byte-level language model of two "
        "layers, resumed from steps 3 and 7 (compiled: from 7), and compared bit for bit.",
        "",
        "- Compiled is `torch.compile(self.model)` with inductor inside the LightningModule; with FSDP2, each block "
        "before it is sharded.",
        "- bf16-mixed is Lightning's `MixedPrecision`, which `RollbackPrecision` has as its `inner` plugin.",
        "- With FSDP2 checkpoints are single files (`save_distributed_checkpoint=False`), and offload is "
        "`OffloadFSDP2Strategy`; with DDP it is `OffloadDDPStrategy`.",
        "- Whether few bits pay for a product is measured while it learns, and then kept in the checkpoint: a run that "
        "is resumed before that may choose otherwise, unless `only_if_faster=False`, as here.",
        "- The settings are those of `tests/technique_settings.py`. Each run's outcome, versions and date is in "
        "`docs/compatibility.json`; `make test` repeats all refusals and some of the runs.",
        "",
        PAGE.with_name("versions.md").read_text(encoding="utf-8"),
    ]
    return "\n".join(lines)


def _row(techniques: tuple[str, ...], record: Record, reasons: dict[str, int]) -> str:
    name = " + ".join(_NAMES[one] for one in techniques)
    if techniques == OTHERS:
        name = "**all but growth**"
    if techniques in ALL:
        name = f"**all five**, {_NAMES[techniques[0]]}"
    return f"| {name} | {' | '.join(_entry(techniques, place, record, reasons) for place in PLACES)} |"


def _entry(techniques: tuple[str, ...], place: str, record: Record, reasons: dict[str, int]) -> str:
    entries = [record.get(Cell(techniques, place, *way).name, {"state": _MISSING}) for way in _WAYS]
    marks = [_mark(entry, reasons) for entry in entries]
    if len(set(marks)) == 1:
        return marks[0]
    eager, compiled = set(marks[:2]), set(marks[2:])
    if len(eager) == len(compiled) == 1:
        return f"eager {eager.pop()}, compiled {compiled.pop()}"
    ways = [f"{'compiled' if compiled else 'eager'} {precision}" for compiled, precision in _WAYS]
    return ", ".join(f"{way} {mark}" for way, mark in zip(ways, marks, strict=True))


def _mark(entry: dict[str, str], reasons: dict[str, int]) -> str:
    if entry["state"] == "refused":
        return f"– {reasons.setdefault(entry['reason'], len(reasons) + 1)}"
    return "✓" if entry["state"] == "green" else entry["state"]


def _as_markdown(message: str) -> str:
    return message.replace("*", r"\*").replace("<", r"\<")
