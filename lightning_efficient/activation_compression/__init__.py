"""Saved activations in few bits."""

from lightning_efficient.activation_compression.callback import ActivationCompressionPlugin

__all__ = ["ActivationCompressionPlugin"]
