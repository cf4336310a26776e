"""The places where the user's module is intercepted while a run lasts; its class is not touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.growth.checks import mixed_weights
from lightning_efficient.growth.engine import GrowingModule

__all__ = ["ModuleAttachment"]

PLACES = ("on_load_checkpoint", "on_save_checkpoint", "configure_optimizers")


class ModuleAttachment:
    """Stands before ``on_load_checkpoint``, after ``on_save_checkpoint`` and around ``configure_optimizers``.

    Only the first is early enough to give a module another form before its weights are loaded. Around the second, the
    user's code sees the parameters of the full model and decides where each belongs.
    """

    def __init__(self) -> None:
        self._originals: dict[str, Any] = {}
        self._handle: RemovableHandle | None = None
        self.names: dict[int, str] = {}
        """Name of each parameter that ``configure_optimizers`` saw, by ``id``."""

    def wrap(
        self,
        module: nn.Module,
        on_load: Callable[[dict[str, Any]], None],
        on_save: Callable[[dict[str, Any]], None],
        growing: Callable[[], GrowingModule | None],
    ) -> None:
        """Take the places.

        Args:
            module: The LightningModule.
            on_load: Called with the checkpoint before the module's own hook.
            on_save: Called with the checkpoint after the module's own hook; of weights alone too.
            growing: The module's growth, once there is one.
        """
        self.unwrap(module)
        own_load: Any = module.on_load_checkpoint
        own_save: Any = module.on_save_checkpoint
        own_configure: Any = module.configure_optimizers
        self._originals = {name: module.__dict__.get(name) for name in PLACES}

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            on_load(checkpoint)
            own_load(checkpoint)

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            own_save(checkpoint)
            on_save(checkpoint)

        def configure_optimizers() -> Any:
            grower = growing()
            if grower is None:
                return own_configure()
            with grower.expanded() as names:
                result = own_configure()
            self.names = names
            return result

        def refuse_mixed_weights(
            _: nn.Module, state_dict: Any, prefix: str, metadata: Any, strict: bool, a: Any, b: Any, errors: list[str]
        ) -> None:
            grower = growing()
            layer = mixed_weights(grower.arrangement, state_dict, prefix) if grower and grower.arrangement else None
            if layer is not None:
                errors.append(f"'{layer}' shares weights with other layers now, and they differ in this state dict.")

        module.__dict__["on_load_checkpoint"] = on_load_checkpoint
        module.__dict__["on_save_checkpoint"] = on_save_checkpoint
        module.__dict__["configure_optimizers"] = configure_optimizers
        self._handle = module.register_load_state_dict_pre_hook(refuse_mixed_weights)

    def unwrap(self, module: nn.Module) -> None:
        """Give them back as they were."""
        for name, original in self._originals.items():
            if original is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = original
        self._originals = {}
        self.names = {}
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
