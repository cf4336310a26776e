"""The moment right before an optimizer changes the weights.

Lightning runs forward and backward within ``Optimizer.step``, as its closure, and torch's pre-hooks come before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["right_before_update"]


def right_before_update(action: Callable[[], None], args: Any, kwargs: dict[str, Any]) -> Any:
    """In a pre-hook of ``Optimizer.step``: run ``action`` behind the closure, or now if there is none.

    Args:
        action: What has to happen after backward and clipping.
        args: Of the step, the optimizer first, as the hook was given them.
        kwargs: Likewise.

    Returns:
        What the hook must return.
    """
    itself, *given = args
    closure = given[0] if given else kwargs.get("closure")
    if closure is None:
        action()
        return None

    def closure_then_action() -> Any:
        result = closure()
        action()
        return result

    return (itself, *given[1:]), {**kwargs, "closure": closure_then_action}
