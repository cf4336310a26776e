"""Device, host memory and disk as one memory."""

from lightning_efficient.offload.ddp import OffloadDDPStrategy
from lightning_efficient.offload.fsdp2 import OffloadFSDP2Strategy
from lightning_efficient.offload.strategy import OffloadStrategy

__all__ = ["OffloadDDPStrategy", "OffloadFSDP2Strategy", "OffloadStrategy"]
