"""Find the repeated layers of a network, by name or by structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from torch import nn

__all__ = ["LayerStack", "find_stacks", "signature"]

Signature = tuple[object, ...]


@dataclass(frozen=True)
class LayerStack:
    """A run of consecutive, structurally equal children of one module.

    Attributes:
        parent: Path of the module that holds the layers; empty for the root.
        keys: Their names in it, in order of execution.
    """

    parent: str
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, index: int) -> str:
        """The full path of one layer."""
        return f"{self.parent}.{self.keys[index]}" if self.parent else self.keys[index]

    def __str__(self) -> str:
        where = f"{self.parent}." if self.parent else ""
        return f"{where}{{{self.keys[0]}..{self.keys[-1]}}} ({len(self)} layers)"


def signature(module: nn.Module) -> Signature:
    """What must agree for the weights of one module to fit another: classes, names and shapes, all the way down."""
    return (
        type(module).__qualname__,
        tuple((name, None if p is None else tuple(p.shape)) for name, p in module._parameters.items()),
        tuple((name, None if b is None else tuple(b.shape)) for name, b in module._buffers.items()),
        tuple((name, None if child is None else signature(child)) for name, child in module._modules.items()),
    )


def find_stacks(module: nn.Module, layers: str | Sequence[str] | None = None) -> list[LayerStack]:
    """The repeated layers that a pattern names, or, without one, the longest run of equal siblings.

    Args:
        module: The network.
        layers: Glob patterns of layer paths, component by component: ``"blocks.*"`` matches every child of every
            module called ``blocks``, at any depth, and nothing below those children. None: the longest run that is
            not inside another run's layer; one in an ``nn.ModuleList``, ``nn.Sequential`` or ``nn.ModuleDict`` before
            others, and of equally long ones that with the most parameters. Frozen networks (teachers) come last.

    Returns:
        One stack for each module that holds matching layers; exactly one where ``layers`` is None.

    Raises:
        ValueError: If nothing matches, or the matching siblings are not consecutive and structurally equal.
    """
    runs = list(_runs(module, ""))
    if layers is None:
        if not runs:
            raise ValueError(
                f"No repeated layers were found in {type(module).__name__}: no module has two or more consecutive "
                "children of equal structure that hold parameters. If it has such layers elsewhere, name them, e.g. "
                "layers='encoder.layer.*' (layers that are built in `setup` come too late, build them in __init__ or "
                "`configure_model`); if it has none, leave GrowAndUnshareCallback out."
            )
        trained = [run for run in runs if _is_trained(module, run)]
        return [max(trained or runs, key=lambda run: (_in_a_list(module, run), len(run), _parameters_in(module, run)))]

    patterns = [layers] if isinstance(layers, str) else list(layers)
    matched: dict[str, list[str]] = {}
    first_path: dict[int, str] = {}  # a list that is registered under two names is one
    for path, _ in module.named_modules(remove_duplicate=False):
        if path and any(_matches(path, pattern) for pattern in patterns):
            parent, _, key = path.rpartition(".")
            if first_path.setdefault(id(module.get_submodule(parent)), parent) == parent:
                matched.setdefault(parent, []).append(key)
    if not matched:
        found = "; ".join(str(run) for run in runs) or "none"
        raise ValueError(
            f"layers={layers!r} matches no module of {type(module).__name__}. "
            f"Runs of equal siblings in it: {found}. A pattern has one component for each level, e.g. 'blocks.*'."
        )
    return [_checked(module, parent, keys) for parent, keys in matched.items()]


def _checked(module: nn.Module, parent: str, keys: list[str]) -> LayerStack:
    stack = LayerStack(parent, tuple(keys))
    container = module.get_submodule(parent)
    if len(keys) < 2:
        inside = len(container.get_submodule(keys[0])._modules)
        hint = f" Did you mean the {inside} modules in it, '{stack.path(0)}.*'?" if inside > 1 else ""
        raise ValueError(
            f"layers matches only one layer, '{stack.path(0)}'; sharing and growth need at least two.{hint}"
        )
    children = list(container._modules)
    first = children.index(keys[0])
    if children[first : first + len(keys)] != keys:
        raise ValueError(f"The layers matched in '{parent}' are not consecutive children of it: {keys}.")
    reference = signature(container.get_submodule(keys[0]))
    for index, key in enumerate(keys):
        other = signature(container.get_submodule(key))
        if other != reference:
            raise ValueError(
                f"'{stack.path(index)}' differs in structure from '{stack.path(0)}' "
                f"({_difference(reference, other)}); layers that share or exchange weights must be equal in class, "
                "names and shapes. Give a pattern that matches equal layers only."
            )
    return stack


def _difference(one: Signature, other: Signature) -> str:
    if one[0] != other[0]:
        return f"{other[0]} instead of {one[0]}"
    for kind, a, b in zip(("parameters", "buffers"), one[1:3], other[1:3], strict=True):
        if a != b:
            return f"{kind} {b} instead of {a}"
    children, others = dict(one[3]), dict(other[3])  # type: ignore[call-overload]
    for name in [*children, *others]:
        if children.get(name) != others.get(name):
            if children.get(name) and others.get(name):
                return f"in '{name}': {_difference(children[name], others[name])}"
            return f"child '{name}' is in only one of them"
    return "unknown"


def _runs(module: nn.Module, path: str) -> Iterator[LayerStack]:
    """Runs of equal siblings with parameters, outermost only."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    for _, group in groupby(children, key=lambda item: signature(item[1])):
        members = list(group)
        if len(members) > 1 and any(True for _ in members[0][1].parameters()):
            yield LayerStack(path, tuple(name for name, _ in members))
        else:
            for name, child in members:
                yield from _runs(child, f"{path}.{name}" if path else name)


def _is_trained(module: nn.Module, stack: LayerStack) -> bool:
    return any(p.requires_grad for i in range(len(stack)) for p in module.get_submodule(stack.path(i)).parameters())


def _in_a_list(module: nn.Module, stack: LayerStack) -> bool:
    return isinstance(module.get_submodule(stack.parent), nn.ModuleList | nn.Sequential | nn.ModuleDict)


def _parameters_in(module: nn.Module, stack: LayerStack) -> int:
    return sum(p.numel() for i in range(len(stack)) for p in module.get_submodule(stack.path(i)).parameters())


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    tail = parts[len(parts) - len(wanted) :]
    return len(parts) >= len(wanted) and all(fnmatchcase(a, b) for a, b in zip(tail, wanted, strict=True))
