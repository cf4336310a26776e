"""The check before the first weight update: does the wide model compute what the narrow one does?"""

from __future__ import annotations

from typing import Any

import pytest

from lightning_efficient.growth.engine import GrowingModule
from lightning_efficient.growth.verify import WidthCheck
from lightning_efficient.growth.width import WidthError
from tests.growth.test_width_twin import Holder, filled, narrowed
from tests.growth.wide_networks import NanoGpt, tokens


def checked(growing: GrowingModule) -> None:
    check = WidthCheck(growing)
    check.listen()
    growing.module(tokens())
    check.verify()


def test_the_check_passes_where_the_function_is_preserved_g4() -> None:
    growing = filled(narrowed(Holder()))
    checked(growing)
    assert growing.width == "narrow"
    assert not growing.module._forward_pre_hooks


@pytest.mark.parametrize("options", [{"name": "mixed"}, {"tie": "functional"}])
def test_the_check_catches_what_cannot_be_seen_in_the_shapes_g4(options: dict[str, Any]) -> None:
    module = NanoGpt(16, 2, **options)
    growing = filled(narrowed(module, build=lambda: NanoGpt(8, 1, **options)))
    with pytest.raises(WidthError, match="does not compute what the narrow one does: outputs differ by"):
        checked(growing)
    assert growing.width == "narrow"


def test_the_check_says_so_where_it_saw_no_forward_g4() -> None:
    check = WidthCheck(narrowed(Holder()))
    check.listen()
    with pytest.warns(UserWarning, match="could not be verified"):
        check.verify()
