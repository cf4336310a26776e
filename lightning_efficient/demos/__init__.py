"""The demo task: a byte-level language model on the sources of Python's own standard library."""

from lightning_efficient.demos.corpus import load_corpus
from lightning_efficient.demos.data import StdlibDataModule
from lightning_efficient.demos.language_model import ByteLanguageModel
from lightning_efficient.demos.model import ByteTransformer

__all__ = ["ByteLanguageModel", "ByteTransformer", "StdlibDataModule", "load_corpus"]
