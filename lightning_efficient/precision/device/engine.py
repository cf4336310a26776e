"""Guarded products on a device: launched, not waited for. What ``engine.py`` of a CPU does, in the device's order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_efficient.precision.device.codes import Codes, Encoder, forms_of, in_a_graph
from lightning_efficient.precision.device.gate import Gate
from lightning_efficient.precision.device.late import Copies, Copy
from lightning_efficient.precision.device.layouts import Product
from lightning_efficient.precision.device.probes import PLACES
from lightning_efficient.precision.device.rows import (
    FLAG,
    IN_A_ROW,
    LEFT,
    LOW,
    RETRIES,
    ROWS,
    WIDTH,
    load_node,
    product_row,
    reason_of,
    run_row,
    store_node,
)
from lightning_efficient.precision.device.verdict import Seen
from lightning_efficient.precision.formats import AtRandom
from lightning_efficient.precision.nodes import ROLES, Node
from lightning_efficient.precision.retry import Retry

if TYPE_CHECKING:
    from lightning_efficient.precision.engine import Engine

__all__ = ["DeviceEngine"]

_NODES = 64  # that a table has room for, to begin with


class DeviceEngine:
    """Decides for each product of tensors of a device, there.

    Attributes:
        device: Where all is.
        operations: The kernels, or the eager code.
        codes: Of the tensors of a step.

    Args:
        host: Says which phase it is, and hears, a step later, what was computed again.
        device: Where all is.
        operations: ``kernels`` or ``eager``.
        stochastic: What is rounded up or down at random.
        protect: Whether signs of failure are looked for.
        seed: Of the rounding.
        gate: Says which products few bits pay for; None: for all.

    Raises:
        ValueError: If a GPU multiplies no numbers of the host's format.
    """

    def __init__(
        self,
        host: Engine,
        device: torch.device,
        operations: Any,
        *,
        stochastic: AtRandom,
        protect: bool,
        seed: int,
        gate: Gate | None = None,
    ) -> None:
        forms = forms_of(host.low)
        if forms is None:
            raise ValueError(
                f"low={host.low.name!r}: there are no kernels on {device} for it; for int8 and fp8 there are."
            )
        self.host, self.device, self.operations = host, device, operations
        self.codes = Encoder(device, forms, operations, stochastic=stochastic, seed=seed)
        self._protect, self._gate = protect, gate
        self._table = torch.zeros(0, WIDTH, dtype=torch.float64, device=device)
        self._probes = torch.zeros(PLACES, 2, device=device)
        self._first: dict[Node, int] = {}  # row of each node
        self._launched: dict[int, int] = {}  # decisions, by row of the product
        self._by_host: set[Node] = set()  # of whose forward products one was in high bits without asking the device
        self._forwards: dict[Node, int] = {}  # the step in which a node had its last forward product
        self._earlier: dict[Node, Tensor] = {}  # of nodes with several in it: whether one before the last was high
        self._copies = Copies()
        self._known: Copy | None = None
        self._left: dict[int, int] = {}  # how long products waited when that was known, by row
        self._loaded: dict[int, int] = {}  # the same, of nodes that go on from a checkpoint: their first copy
        self._before: Mapping[int, int] = {}  # decisions until then, likewise
        self._told: dict[int, int] = {}  # retries that the host has heard of, likewise
        self._told_low: dict[int, int] = {}  # products in low bits, likewise

    def learns(self, node: Node) -> bool:
        """Whether it is in high bits, and what is seen is healthy."""
        return self.host.learning or not node.learning.done

    def begin(self, seed: int) -> None:
        """A step begins: weights may have changed, and what the device knew a step ago has arrived."""
        self.codes.begin(seed)
        if self._first and not in_a_graph(self.device):
            copy = self._copies.take(self._used(), self._launched)
            if copy is None:
                self._left = self._loaded
            else:
                self._known, self._before = copy, copy.launched
                self._left = _waiting(copy)
                self._tell(copy.table)
                if any(not node.learning.done for node in self._first):
                    self.refresh()  # whether limits still grow is looked at there

    def compute(self, node: Node, product: Product) -> Tensor:
        """One product ``[M, N]``; what is decided of it is in the table, and the result is right by then."""
        known, learns = node.products[product.role], self.learns(node)
        self.host.work += node.work
        if known.low_pays is None and learns and self._gate is not None and not in_a_graph(self.device):
            known.low_pays = self._gate.low_pays(self, node, product)
        if self.host.force_high or known.low_pays is False:
            return product.high()
        row = product_row(self.first_row(node), product.role)
        held = not learns and self._is_held(row)
        if product.role == "forward":
            self._note_forward(node, row, held=held)
        if held:
            result = product.high()
            self._decide(node, product, (0, 0, 0), (1, 1), 0)
            return result
        one, other = product.encoded()
        slots = one.slot, other.slot, self.codes.slot()
        probed = min(product.rows, PLACES) if product.role == "forward" else 0
        if learns:
            result = product.high()
            looked_at = product.low(one, other) if probed else result
            self._look(product, looked_at, slots[2], result)
        else:
            result = product.low(one, other)
            if self._protect:
                self._look(product, result, slots[2], result)
        self._decide(node, product, slots, (one.numel, other.numel), probed)
        if not learns:
            product.again(result, self._table, row)
        return result

    def recompute(self, node: Node, product: Product) -> Tensor:
        """A product of a part of the network that is computed again in backward: as its first time.

        Which one of a node that had several in this step is not known: one in high bits is for all.
        """
        if self.host.force_high or self.learns(node) or node.products[product.role].low_pays is False:
            return product.high()
        if node in self._by_host:
            return product.high()
        result = product.low(*product.encoded())
        row, earlier = product_row(self.first_row(node), product.role), self._earlier.get(node)
        if earlier is None:
            product.again(result, self._table, row)
        else:
            table = self._table[row : row + 1].clone()
            table[0, FLAG] = torch.maximum(table[0, FLAG], earlier)
            product.again(result, table, 0)
        return result

    def rehearse(self, node: Node, product: Product, one: Codes, other: Codes, table: Tensor) -> None:
        """What a healthy product in low bits launches, but on a table of zeros: for a gate that times it."""
        slots = one.slot, other.slot, self.codes.slot()
        probed = min(product.rows, PLACES) if product.role == "forward" else 0
        result = product.low(one, other)
        self._look(product, result, slots[2], result)
        seen = Seen(self.first_row(node), product.role, slots, (one.numel, other.numel), probed)
        self.operations.decide(table, self.codes.measured, self._probes, seen)
        product.again(result, table, 0)  # a row without a flag

    def scratch(self, node: Node) -> Tensor:
        """A table of zeros that has room for a node."""
        self.first_row(node)
        return torch.zeros_like(self._table)

    def first_row(self, node: Node) -> int:
        """Of a node in the table; it gets there what the host knows of it, the first time."""
        first = self._first.get(node)
        if first is None:
            first = self._first[node] = 1 + ROWS * len(self._first)
            if first + ROWS > self._table.shape[0]:
                self._grow(node)
            self._table[first : first + ROWS] = store_node(node).to(self.device)
            for role in ROLES:
                row, product = product_row(first, role), node.products[role]
                self._told[row], self._told_low[row] = product.status.retries, product.status.low
                self._left[row] = product.known_wait
                self._loaded[row] = product.status.state_dict()["left"]
        return first

    def refresh(self, *, wait: bool = False) -> None:
        """Bring all nodes up to date with what the host knows; ``wait``: with what the device has done until now.

        To have waited changes no result: what the host leaves to itself still follows from what it knew before.
        """
        if wait and self._first:
            table = self._used().cpu()
            self._tell(table)
        elif self._known is not None:
            table = self._known.table
        else:
            return
        copy = self._copies.under_way
        left = _waiting(copy) if copy is not None else self._left
        before = copy.launched if copy is not None else self._before
        for node, first in self._first.items():
            if first + ROWS > table.shape[0]:
                continue
            load_node(table[first : first + ROWS], node)
            for role in ROLES if wait else ():
                row = product_row(first, role)
                since = self._launched.get(row, 0) - before.get(row, 0)
                node.products[role].known_wait = max(0, left.get(row, 0) - since)

    def put_back(self) -> None:
        """Nodes are other than the table says; what was copied of it is forgotten."""
        first, self._first, self._copies, self._known = list(self._first), {}, Copies(), None
        self._table, self._launched, self._before = self._table[:0], {}, {}
        for node in first:
            self.first_row(node)

    def _note_forward(self, node: Node, row: int, *, held: bool) -> None:
        """For those that compute it again; its flag is still that of the product before."""
        if self._forwards.get(node) != self.codes.step:
            self._forwards[node] = self.codes.step
            self._earlier.pop(node, None)
            self._by_host.discard(node)
        else:
            flag, earlier = self._table[row, FLAG].clone(), self._earlier.get(node)
            self._earlier[node] = flag if earlier is None else torch.maximum(earlier, flag)
        if held:
            self._by_host.add(node)

    def _is_held(self, row: int) -> bool:
        """Whether the device will certainly say that this product is to wait, in high bits."""
        since = self._launched.get(row, 0) - self._before.get(row, 0)
        return self._left.get(row, 0) > since and not in_a_graph(self.device)

    def _look(self, product: Product, looked_at: Tensor, slot: int, result: Tensor) -> None:
        at = self.codes.next() + self.host.batch if product.role == "forward" else None
        self.operations.look(
            looked_at, product.a, product.b, product.bias, self.codes.measured, slot, self._probes, at, result
        )

    def _decide(
        self, node: Node, product: Product, slots: tuple[int, int, int], numels: tuple[int, int], probed: int
    ) -> None:
        seen = Seen(
            self.first_row(node), product.role, slots, numels, probed, learning=self.learns(node),
            fixed=not node.learns, protect=self._protect,
        )  # fmt: skip
        self.operations.decide(self._table, self.codes.measured, self._probes, seen)
        row = seen.rows[2]
        self._launched[row] = self._launched.get(row, 0) + 1

    def _tell(self, table: Tensor) -> None:
        """What was computed again since the last time, and where the pass through the graph stands."""
        self.host.run.high_in_a_row = int(table[0, IN_A_ROW])
        retries, lows = table[:, RETRIES].tolist(), table[:, LOW].tolist()
        for node, first in self._first.items():
            for role in ROLES:
                row = product_row(first, role)
                if row >= len(retries):
                    continue
                self.host.low_work += (int(lows[row]) - self._told_low[row]) * node.work
                self._told_low[row] = int(lows[row])
                new = int(retries[row]) - self._told[row]
                if new > 0:
                    retry = Retry(node.name, role, reason_of(table[row].tolist(), role))
                    node.products[role].status.saw(retry.reason, new)
                    self.host.retries += [retry] * new
                    self._told[row] += new

    def _used(self) -> Tensor:
        return self._table[: 1 + ROWS * len(self._first)]

    def _grow(self, node: Node) -> None:
        size = max(1 + ROWS * _NODES, 2 * self._table.shape[0])
        table = torch.zeros(size, WIDTH, dtype=torch.float64, device=self.device)
        if self._table.shape[0]:
            table[: self._table.shape[0]] = self._table
        else:
            table[0] = run_row(node.policy, self.host.run).to(self.device)
        self._table = table


def _waiting(copy: Copy) -> dict[int, int]:
    """Products that have to wait, by row, and how long."""
    left = copy.table[:, LEFT]
    rows = left.nonzero().flatten().tolist()
    return {row: int(left[row]) for row in rows}
