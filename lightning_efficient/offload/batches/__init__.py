"""Batches in parts, as memory demands."""
