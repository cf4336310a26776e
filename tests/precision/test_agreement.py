"""Ranks take of each number the most careful one."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from lightning_efficient.precision.agreement import Agreement
from lightning_efficient.precision.learning import Learning
from lightning_efficient.precision.nodes import Node
from lightning_efficient.precision.signs import Measured, Probe
from lightning_efficient.precision.status import ReturnPolicy, Run


class Ranks:
    """Two, each in a thread, that meet where they reduce and gather."""

    def __init__(self) -> None:
        self.barrier, self.said = threading.Barrier(2, timeout=10), [None, None]
        self.nodes: list[dict[str, Node]] = [{}, {}]
        self.runs = [Run(), Run()]
        self.gathered = 0
        self.agreements = [Agreement(node(), self.reduce(rank), self.gather(rank)) for rank in range(2)]

    def meet(self, rank: int, value: object) -> list:
        self.said[rank] = value
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        return said

    def reduce(self, rank: int):
        return lambda numbers: torch.stack(self.meet(rank, numbers)).amax(0)

    def gather(self, rank: int):
        def gathered(names: list[str]) -> list[list[str]]:
            self.gathered += rank
            return self.meet(rank, names)

        return gathered

    def agree(self) -> None:
        failed: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                self.agreements[rank](self.nodes[rank], self.runs[rank])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def node() -> Node:
    return Node("a", "linear", ReturnPolicy(20), learning=Learning(2))


def test_a_failure_on_one_rank_counts_on_all() -> None:
    ranks = Ranks()
    ranks.nodes = [{"a": node(), "b": node()}, {"a": node(), "b": node()}]
    ranks.agree()
    assert ranks.gathered == 1  # they did not know that they have the same nodes
    for rank, run in enumerate(ranks.runs):
        for name, found in ranks.nodes[rank].items():
            found.begin(0)
            found.learn("forward", Measured(3 + rank, underflow=0.02 * rank), Measured(5), 4, Probe(0.01, 1.0))
            status = found.products["forward"].status
            status.computed_low()
            if rank and name == "b":
                status.failed("made up", run)
                status.computed_high(run)
    assert ranks.runs[0].high_in_a_row == 0
    ranks.agree()
    one, other = (rank["b"].state_dict() for rank in ranks.nodes)
    assert one["products"]["forward"]["status"].pop("reason") == ""
    assert other["products"]["forward"]["status"].pop("reason") == "made up"
    assert one["learning"].pop("limits") == other["learning"].pop("limits")
    assert one == other
    assert ranks.nodes[0]["b"].products["forward"].status.held
    assert not ranks.nodes[0]["a"].products["forward"].status.held
    assert [run.high_in_a_row for run in ranks.runs] == [2, 2]
    assert list(ranks.nodes[0]["a"].tensors["input"]._exponents) == [3]
    assert ranks.nodes[0]["a"].tensors["input"].limits.underflow > 0.2
    assert ranks.gathered == 1


def test_nodes_that_one_rank_has_not_are_left_to_the_other() -> None:
    ranks = Ranks()
    ranks.nodes = [{"a": node()}, {"a": node(), "b": node()}]
    ranks.agree()
    ranks.nodes[1]["b"].products["forward"].status.computed_low()
    ranks.nodes[1]["a"].products["forward"].status.computed_low()
    ranks.agree()
    assert ranks.nodes[0]["a"].products["forward"].status.low == 1
    assert ranks.nodes[1]["b"].products["forward"].status.low == 1
    assert list(ranks.nodes[0]) == ["a"]
    ranks.nodes[0]["b"] = node()
    ranks.agree()
    assert ranks.nodes[0]["b"].state_dict() == ranks.nodes[1]["b"].state_dict()


def test_the_numbers_are_the_largest_of_each() -> None:
    def same(numbers: Tensor) -> Tensor:
        return numbers

    known = {"a": node()}
    agreement = Agreement(node(), same, lambda names: [names])
    run = Run()
    known["a"].products["grad_input"].status.failed("made up", run)
    known["a"].tensors["weight"].learn(Measured(-3))
    agreement(known, run)
    before = known["a"].state_dict()
    agreement(known, run)
    assert known["a"].state_dict() == before
    assert run.high_in_a_row == 1
