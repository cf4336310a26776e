"""Optimizer state and gradients that are elsewhere, and the updates that bring them together."""
