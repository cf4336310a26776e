"""Which tier each tensor of a training task belongs to: a pure function of what it is and when it is used.

(Rajbhandari et al. 2021, "ZeRO-Infinity", 5 and 8: where a tensor lives follows from how often its bytes are moved in a
step and how large the tiers are.)
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_efficient.core.buffers import round_up
from lightning_efficient.core.units import human_bytes

__all__ = [
    "KINDS",
    "NOT_PLACED",
    "SMALL",
    "Attribute",
    "Kind",
    "PlaceFunction",
    "Placement",
    "Room",
    "Row",
    "Rules",
    "Where",
    "is_tier",
    "keep_or_replan",
    "plan",
]

Kind = Literal["parameter", "gradient", "optimizer_state", "master_weight", "activation", "input_batch", "checkpoint"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NOT_PLACED: Mapping[str, str] = {
    "master_weight": "values in full precision lie with the optimizer state of their parameter; place optimizer_state",
    "input_batch": "batches are where the DataLoader and the Trainer put them",
    "checkpoint": "checkpoints are where the Trainer's checkpoint_io writes them",
}
"""Kinds that a plan knows, and does not decide about; and who does."""

SMALL = 64 << 10
"""Bytes of a parameter below which only a rule moves it: fetching it takes longer than computing with it."""

# Kind -> made or first used in, last used in, how often a step moves it if it lives away from where it is used.
_USES: dict[Kind, tuple[str, str, int]] = {
    "parameter": ("forward", "update", 3),  # in for forward and for backward, out behind the update
    "gradient": ("backward", "update", 2),
    "optimizer_state": ("update", "update", 2),
    "master_weight": ("update", "update", 2),
    "activation": ("forward", "backward", 2),
    "input_batch": ("load", "forward", 1),
    "checkpoint": ("save", "save", 1),
}


@dataclass(frozen=True)
class Attribute:
    """What there is to know of a tensor, or of all tensors of a kind, before it is placed.

    Attributes:
        kind: The type of its data.
        name: Of the parameter that it belongs to; ``*`` for all of the kind.
        nbytes: Its size; 0 where it is not known yet.
        position: Of its parameter in the order of forward.
    """

    kind: Kind
    name: str
    nbytes: int
    position: int = 0

    @property
    def first_use(self) -> str:
        """The phase of a step in which it is made or first read."""
        return _USES[self.kind][0]

    @property
    def last_use(self) -> str:
        """The phase behind which it is not needed, until the next step."""
        return _USES[self.kind][1]

    @property
    def transfers(self) -> int:
        """How often a step moves it, if it is not where it is used."""
        return _USES[self.kind][2]


@dataclass(frozen=True)
class Room:
    """A tier, as far as a plan needs to know it.

    Attributes:
        tier: Its name: ``device``, ``host``, ``disk`` or ``numa:N``.
        nbytes: How much may be there; None: as much as one likes.
    """

    tier: str
    nbytes: int | None


@dataclass(frozen=True)
class Row:
    """One line of a placement."""

    attribute: Attribute
    tier: str
    why: str


PlaceFunction = Callable[[Attribute], str | None]
"""Names a tier, or returns None where others are to decide."""
Where = str | PlaceFunction


def is_tier(name: object) -> bool:
    """Whether this is the name of a tier."""
    kind, _, node = name.partition(":") if isinstance(name, str) else ("", "", "")
    return name in ("device", "host", "disk") or (kind == "numa" and node.isdigit())


class Rules:
    """Where the user wants what.

    Args:
        place: From a kind, a pattern of parameter names, or ``kind:pattern`` to a tier, or to a function. The most
            specific one counts: ``kind:pattern``, then a kind, then a pattern, and of those that are alike the first;
            where a function answers None, the next.
        fastest: What ``device`` stands for.
    """

    def __init__(self, place: Mapping[str, Where], *, fastest: str = "device") -> None:
        self._place, self._fastest = dict(place), fastest

    def find(self, attribute: Attribute) -> tuple[str, str] | None:
        """The rule that counts for it, for messages, and its tier; None if there is none.

        Raises:
            ValueError: If a function names what is no tier.
        """
        for rule, where in self._that_fit(attribute):
            said = f"place[{rule!r}]"
            if isinstance(where, str):
                return said, self._named(where)
            if attribute.kind in NOT_PLACED or (tier := where(attribute)) is None:
                continue
            said = f"{said}, {getattr(where, '__qualname__', type(where).__name__)}"
            if not is_tier(tier):
                raise ValueError(
                    f"{said}: {tier!r}, for the {attribute.kind} of {attribute.name!r}, is no tier. Return device, "
                    "host, disk, numa:N with the number of a node, or None where the plan is to decide."
                )
            return said, self._named(tier)
        return None

    def _named(self, tier: str) -> str:
        return self._fastest if tier == "device" else tier

    def _that_fit(self, attribute: Attribute) -> list[tuple[str, Where]]:
        """The most specific first."""
        ranked = []
        for rule, where in self._place.items():
            kind, _, pattern = rule.rpartition(":")
            if kind:
                rank, fits = 0, kind == attribute.kind and _fits(pattern, attribute.name)
            elif rule in KINDS:
                rank, fits = 1, rule == attribute.kind
            else:
                rank, fits = 2, _fits(rule, attribute.name)
            if fits:
                ranked.append((rank, rule, where))
        return [(rule, where) for _, rule, where in sorted(ranked, key=lambda found: found[0])]

    def unused(self, names: Sequence[str]) -> list[str]:
        """The rules whose pattern fits none of the parameters' ``names``."""
        patterns = {rule: rule.split(":", 1)[-1] for rule in self._place if rule not in KINDS}
        return [rule for rule, pattern in patterns.items() if not any(_fits(pattern, name) for name in names)]


def _fits(pattern: str, name: str) -> bool:
    """Whether the name, or an end of it that begins with a whole part, fits."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))


@dataclass(frozen=True)
class Placement:
    """Where everything goes.

    Attributes:
        rows: One for each attribute.
        rooms: The tiers, fastest first.
    """

    rows: tuple[Row, ...]
    rooms: tuple[Room, ...]

    def tier(self, kind: Kind, name: str) -> str | None:
        """Where the tensor of this kind of a parameter goes; None if it was not asked for."""
        return self._index.get((kind, name)) or self._index.get((kind, "*"))

    @property
    def _index(self) -> dict[tuple[str, str], str]:
        if "_cached" not in self.__dict__:
            self.__dict__["_cached"] = {(row.attribute.kind, row.attribute.name): row.tier for row in self.rows}
        return self.__dict__["_cached"]

    def used(self, tier: str) -> int:
        """Bytes that are taken there: whole pages, but where tensors are used."""
        first = self.rooms[0].tier if self.rooms else tier
        return sum(_taken(row.attribute, tier == first) for row in self.rows if row.tier == tier)

    def table(self) -> str:
        """In Markdown, one line for the tensors of a kind that go to one tier for one reason."""
        totals: dict[tuple[str, str, str, str], list[int]] = {}
        for row in sorted(self.rows, key=lambda row: KINDS.index(row.attribute.kind)):
            if row.attribute.name == "*" and not row.attribute.nbytes and row.tier == self.rooms[0].tier:
                continue  # of which nothing is known, and which nobody moves
            uses = f"{row.attribute.first_use} to {row.attribute.last_use}"
            totals.setdefault((row.attribute.kind, uses, row.tier, row.why), []).append(row.attribute.nbytes)
        lines = ["| kind | used | tier | parameters | bytes | why |", "|---|---|---|---|---|---|"]
        for (kind, uses, tier, why), sizes in totals.items():
            amount = human_bytes(sum(sizes)) if any(sizes) else "not known yet"
            lines.append(f"| {kind} | {uses} | {tier} | {len(sizes)} | {amount} | {why} |")
        return "\n".join(lines)


def plan(attributes: Sequence[Attribute], rooms: Sequence[Room], rules: Rules) -> Placement:
    """Place every tensor.

    What a rule names goes where the rule says. The rest is taken in the order of what it would cost to have it
    elsewhere, each to the fastest tier with room: first what a step moves most often, then optimizer state and
    gradients, then the others, and of the same kind first what the forward uses first, whose update comes last in
    backward and is needed soonest.

    Args:
        attributes: What there is.
        rooms: The tiers, fastest first; the last one takes what fits nowhere else.
        rules: Of the user.
    """
    left = {room.tier: room.nbytes for room in rooms}
    placed: dict[int, Row] = {}
    for index, attribute in enumerate(attributes):
        if found := rules.find(attribute):
            rule, tier = found
            placed[index] = Row(attribute, tier, rule)
        elif attribute.kind == "parameter" and 0 < attribute.nbytes < SMALL:
            placed[index] = Row(attribute, rooms[0].tier, "too small to be worth its way")
        if index in placed and (free := left.get(placed[index].tier)) is not None:
            left[placed[index].tier] = free - _taken(attribute, placed[index].tier == rooms[0].tier)
    rank = {"optimizer_state": 0, "gradient": 1, "master_weight": 2}
    waiting = sorted(
        (index for index in range(len(attributes)) if index not in placed),
        key=lambda i: (-attributes[i].transfers, rank.get(attributes[i].kind, 3), attributes[i].position),
    )
    for index in waiting:
        attribute = attributes[index]
        for number, room in enumerate(rooms):
            free, taken = left[room.tier], _taken(attribute, number == 0)
            if free is None or taken <= free or number == len(rooms) - 1:
                if free is not None:
                    left[room.tier] = free - taken
                why = f"fits in {room.tier}" if number == 0 else f"no room in {rooms[number - 1].tier}"
                placed[index] = Row(attribute, room.tier, why)
                break
    return Placement(tuple(placed[index] for index in range(len(attributes))), tuple(rooms))


def _taken(attribute: Attribute, used_there: bool) -> int:
    """The memory that it takes: records, which what is elsewhere is kept in, have whole pages."""
    return attribute.nbytes if used_there else round_up(attribute.nbytes)


def keep_or_replan(
    current: Placement, attributes: Sequence[Attribute], rooms: Sequence[Room], rules: Rules, *, slack: float = 0.1
) -> Placement:
    """A new placement when the room has changed, or the current one where that is not worth it.

    It is replaced if it does not fit any more, or if more would fit into the faster tiers (the fastest, the two
    fastest, and so on to the last but one) with ``slack`` of their room left free by what comes: so that memory that
    comes and goes a little moves nothing.
    """
    fast = rooms[:-1]
    used = [current.used(room.tier) for room in fast]
    over = any(room.nbytes is not None and taken > room.nbytes for room, taken in zip(fast, used, strict=True))
    with_slack = [
        Room(r.tier, None if r.nbytes is None else max(int(r.nbytes * (1 - slack)), 0 if over else taken))
        for r, taken in zip(fast, used, strict=True)
    ]
    better = plan(attributes, [*with_slack, rooms[-1]], rules)
    gained = list(itertools.accumulate(better.used(room.tier) for room in fast))
    return better if over or gained > list(itertools.accumulate(used)) else current
