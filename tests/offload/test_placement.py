"""Where tensors go: a pure function (O1, O2, O3, O5)."""

from __future__ import annotations

import pytest

from lightning_efficient.core.buffers import PAGE
from lightning_efficient.offload.placement import KINDS, Attribute, Room, Rules, keep_or_replan, plan

FREE = Rules({})


def attributes(sizes: dict[str, int], *, layers: int = 3) -> list[Attribute]:
    """``sizes`` in MiB."""
    return [
        Attribute(kind, f"blocks.{layer}.weight", nbytes << 20, position=layer)  # type: ignore[arg-type]
        for kind, nbytes in sizes.items()
        for layer in range(layers)
    ]


def test_every_kind_says_when_it_is_used_o1() -> None:
    uses = {kind: (Attribute(kind, "w", 1).first_use, Attribute(kind, "w", 1).last_use) for kind in KINDS}
    assert uses["parameter"] == ("forward", "update")
    assert uses["gradient"] == ("backward", "update")
    assert uses["optimizer_state"] == ("update", "update")
    assert uses["activation"] == ("forward", "backward")
    assert uses["input_batch"] == ("load", "forward")
    assert uses["checkpoint"] == ("save", "save")


def test_all_fits_all_stays_o2() -> None:
    found = plan(attributes(dict.fromkeys(KINDS, 10)), [Room("host", None), Room("disk", None)], FREE)
    assert {row.tier for row in found.rows} == {"host"}


def test_what_moves_most_stays_then_state_and_gradients_o5() -> None:
    rooms = [Room("device", 90 << 20), Room("host", 60 << 20), Room("disk", None)]
    found = plan(attributes({"activation": 10, "optimizer_state": 20, "gradient": 10, "parameter": 10}), rooms, FREE)
    tiers = {(row.attribute.kind, row.attribute.position): row.tier for row in found.rows}
    assert {tiers["parameter", layer] for layer in range(3)} == {"device"}
    assert {tiers["optimizer_state", layer] for layer in range(3)} == {"device"}
    assert {tiers["gradient", layer] for layer in range(3)} == {"host"}
    assert {tiers["activation", layer] for layer in range(3)} == {"host"}


def test_the_first_layers_state_stays_o5() -> None:
    found = plan(attributes({"optimizer_state": 10}), [Room("host", 20 << 20), Room("disk", None)], FREE)
    assert [row.tier for row in found.rows] == ["host", "host", "disk"]
    assert found.rows[2].why == "no room in host"


def test_rules_the_most_specific_counts_o2() -> None:
    rules = Rules({"blocks.*": "host", "optimizer_state": "disk", "optimizer_state:blocks.1.*": "numa:0"})
    found = plan(
        attributes({"optimizer_state": 10, "parameter": 10}), [Room("device", None), Room("host", None)], rules
    )
    tiers = {(row.attribute.kind, row.attribute.position): row.tier for row in found.rows}
    assert [tiers["optimizer_state", layer] for layer in range(3)] == ["disk", "numa:0", "disk"]
    assert [tiers["parameter", layer] for layer in range(3)] == ["host"] * 3
    assert found.rows[1].why == "place['optimizer_state:blocks.1.*']"


def test_a_function_decides_or_leaves_it_to_others_o2() -> None:
    asked: list[str] = []

    def large_state(attribute: Attribute) -> str | None:
        asked.append(attribute.kind)
        large = attribute.kind == "optimizer_state" and attribute.nbytes > 1 << 20
        return "disk" if large and attribute.name != "blocks.1.weight" else None

    items = attributes({"optimizer_state": 10, "parameter": 10, "input_batch": 1})
    rooms = [Room("device", None), Room("host", None), Room("disk", None)]
    rows = plan(items, rooms, Rules({"*": large_state})).rows
    assert [row.tier for row in rows] == ["disk", "device", "disk", *["device"] * 6]
    assert rows[0].why.startswith("place['*'], test_a_function")
    assert "input_batch" not in asked  # nobody moves it
    assert plan(items, rooms, Rules({"optimizer_state": large_state, "*": "host"})).rows[1].tier == "host"
    assert plan(items, rooms, Rules({"*": lambda _: "device"}, fastest="host")).rows[0].tier == "host"


def test_a_tier_that_a_function_makes_up_is_refused_by_name_o2() -> None:
    rules = Rules({"optimizer_state": lambda attribute: "cloud"})
    with pytest.raises(
        ValueError, match=r"place\['optimizer_state'\], .*<lambda>: 'cloud', for the optimizer_state of"
    ):
        plan(attributes({"optimizer_state": 1}), [Room("host", None)], rules)


def test_of_two_patterns_that_fit_the_first_counts_o2() -> None:
    items = attributes({"parameter": 1})
    rules = Rules({"blocks.*": "host", "blocks.1.*": "disk"})
    assert {rules.find(one) for one in items} == {("place['blocks.*']", "host")}


def test_a_pattern_may_be_the_end_of_a_name() -> None:
    assert Rules({"blocks.*": "disk"}).unused(["model.blocks.0.weight"]) == []
    assert Rules({"block.*": "disk", "gradient": "disk"}).unused(["model.blocks.0.weight"]) == ["block.*"]


def test_room_that_a_rule_takes_is_taken_o2() -> None:
    items = [*attributes({"parameter": 10}, layers=1), *attributes({"optimizer_state": 10}, layers=1)]
    found = plan(items, [Room("host", 10 << 20), Room("disk", None)], Rules({"optimizer_state": "host"}))
    assert [row.tier for row in found.rows] == ["disk", "host"]


def test_a_plan_is_kept_until_it_does_not_fit_or_much_is_gained_o5() -> None:
    items = attributes({"optimizer_state": 10}, layers=10)
    rooms = [Room("host", 50 << 20), Room("disk", None)]
    first = plan(items, rooms, FREE)
    assert first.used("host") == 50 << 20
    assert keep_or_replan(first, items, [Room("host", 62 << 20), rooms[1]], FREE, slack=0.2) is first
    grown = keep_or_replan(first, items, [Room("host", 80 << 20), rooms[1]], FREE, slack=0.2)
    assert grown.used("host") == 60 << 20
    shrunk = keep_or_replan(first, items, [Room("host", 49 << 20), rooms[1]], FREE)
    assert shrunk.used("host") == 40 << 20


def test_what_went_to_the_last_tier_comes_back_to_the_one_before_o5() -> None:
    """Where the fastest memory is full, the next one may have got room; and what is there already stays there."""
    items = attributes({"optimizer_state": 10}, layers=10)
    rooms = [Room("device", 30 << 20), Room("host", 20 << 20), Room("disk", None)]
    first = plan(items, rooms, FREE)
    assert [first.used(tier) >> 20 for tier in ("device", "host", "disk")] == [30, 20, 50]
    assert keep_or_replan(first, items, rooms, FREE) is first
    better = keep_or_replan(first, items, [rooms[0], Room("host", 40 << 20), rooms[2]], FREE)
    assert [better.used(tier) >> 20 for tier in ("device", "host", "disk")] == [30, 30, 40]
    faster = keep_or_replan(first, items, [Room("device", 50 << 20), *rooms[1:]], FREE)
    assert [faster.used(tier) >> 20 for tier in ("device", "host", "disk")] == [40, 20, 40]


def test_the_table_says_what_is_where_and_why_o1_o3() -> None:
    items = [*attributes({"optimizer_state": 2, "parameter": 1}), Attribute("activation", "*", 0)]
    rooms = [Room("host", 3 << 20), Room("disk", None)]
    lines = plan(items, rooms, Rules({"activation": "disk"})).table().splitlines()
    assert lines[2:] == [
        "| parameter | forward to update | host | 3 | 3 MiB | fits in host |",
        "| optimizer_state | update to update | disk | 3 | 6 MiB | no room in host |",
        "| activation | forward to backward | disk | 1 | not known yet | place['activation'] |",
    ]


def test_records_have_whole_pages_where_tensors_are_not_used_o5() -> None:
    items = [Attribute("optimizer_state", f"{i}.bias", 128, i) for i in range(5)]
    found = plan(items, [Room("device", 128), Room("host", 2 * PAGE), Room("disk", None)], FREE)
    assert [row.tier for row in found.rows] == ["device", "host", "host", "disk", "disk"]
    assert [found.used(tier) for tier in ("device", "host", "disk")] == [128, 2 * PAGE, 2 * PAGE]
