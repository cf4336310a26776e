"""Triton's, imported where there is a tensor for them, not before."""

from lightning_efficient.precision.device.kernels.codes import encode, measure
from lightning_efficient.precision.device.kernels.decisions import decide
from lightning_efficient.precision.device.kernels.products import again, finish, look

__all__ = ["again", "decide", "encode", "finish", "look", "measure"]
