"""When a node may compute in low bits (P4, P10)."""

from __future__ import annotations

import pytest

from lightning_efficient.precision.status import ReturnPolicy, Run, Status

POLICY = ReturnPolicy(return_after=5, retry_rate=0.1)


def nodes(number: int) -> tuple[Run, list[Status]]:
    return Run(), [Status(POLICY) for _ in range(number)]


def passing(run: Run, graph: list[Status], *, failing: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    """One pass through the graph: for each node ``l``, ``h``, or ``R`` where low bits were retried."""
    done = ""
    for number, node in enumerate(graph):
        if not node.allows_low(run):
            node.computed_high(run)
            done += "h"
        elif number in failing:
            node.failed("a sign", run)
            done += "R"
        else:
            node.computed_low()
            done += "l"
    return done


def test_without_a_sign_everything_is_low_p1() -> None:
    run, graph = nodes(4)
    assert passing(run, graph) == "llll"
    assert [(node.low, node.high, node.retries) for node in graph] == [(1, 0, 0)] * 4


def test_nodes_that_were_always_well_return_at_once_p4_p10() -> None:
    """One that fails is computed again in high bits; the next one has no retries, and returns."""
    run, graph = nodes(4)
    for _ in range(20):
        passing(run, graph)
    assert passing(run, graph, failing={1}) == "lRll"
    assert graph[1].reason == "a sign"
    assert passing(run, graph) == "llll", "one retry in twenty is less than one in ten"


def test_nodes_that_are_often_retried_wait_for_high_bits_to_be_repeated_p4_p10() -> None:
    run, graph = nodes(6)
    for node in graph[1:]:
        for _ in range(3):
            node.failed("before", run)
        node._left = 0  # the wait of each is over, its rate of retries is not
    run.high_in_a_row = 0
    assert passing(run, graph, failing={0}) == "Rhhhhl", "the fifth in a row is the first that may return"


def test_a_node_that_fails_again_and_again_stays_high_longer_and_comes_back_p10() -> None:
    run, [node] = nodes(1)
    done = "".join(passing(run, [node], failing={0}) for _ in range(60))
    first, *others = [len(part) for part in done.strip("h").split("R")[1:-1]]
    assert first == 5
    assert set(others) == {10}, "twice as long, and not more"
    healed = "".join(passing(run, [node]) for _ in range(40))
    assert healed.index("l") <= 10
    assert set(healed[healed.index("l") :]) == {"l"}


def test_a_good_time_makes_the_wait_short_again_p10() -> None:
    run, [node] = nodes(1)
    for _ in range(30):
        passing(run, [node], failing={0})
    for _ in range(40):
        passing(run, [node])
    while node.retry_rate >= POLICY.retry_rate or not node.retries:
        passing(run, [node])
    done = "".join(passing(run, [node], failing={0}) for _ in range(30))
    waits = [len(part) for part in done.split("R")[1:-1]]
    assert next(wait for wait in waits if wait) == 5


def test_the_rate_forgets_p10() -> None:
    run, [node] = nodes(1)
    node.failed("once", run)
    assert node.retry_rate == 1
    for _ in range(300):
        node.computed_low()
    assert node.retry_rate < 0.01
    assert node.retries == 1, "the counters of the map do not"


def test_the_state_goes_on() -> None:
    run, [node] = nodes(1)
    for step in range(17):
        passing(run, [node], failing={0} if step % 3 else set())
    other = Status(POLICY)
    other.load_state_dict(node.state_dict())
    again = Run()
    again.high_in_a_row = run.high_in_a_row
    for step in range(40):
        failing = {0} if step % 5 == 0 else set()
        assert passing(run, [node], failing=failing) == passing(again, [other], failing=failing)
    assert other.state_dict() == node.state_dict()


@pytest.mark.parametrize("number", [1, 5])
def test_counters_count_every_operation_p10(number: int) -> None:
    run, graph = nodes(number)
    for step in range(50):
        passing(run, graph, failing={step % number} if step % 4 == 0 else set())
    for node in graph:
        assert node.low + node.high == 50
        assert node.retries <= node.high
