"""Optimizer state divided among ranks: each updates its share of the parameters, and sends them to the others."""
