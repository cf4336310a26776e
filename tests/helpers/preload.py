"""Imported once by the fork server: what takes long, and starts no thread."""

from lightning_efficient.demos import load_corpus

load_corpus()
