"""Imported once by the fork server: what takes long, and starts no thread."""

from importlib import import_module

import lightning_efficient
from lightning_efficient.demos import load_corpus
from tests.helpers.processes import look_only_at_what_comes

_LATE = (
    "functorch.compile",
    "lightning.pytorch.cli",
    "psutil",
    "pytest",
    "tests.helpers.fitting",
    "tests.helpers.models",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.experimental",
    "torch.profiler",
)
"""What tests import, and what torch and Lightning do when it is first used: else each process would, for a second."""

for module in _LATE:
    import_module(module)
for name in lightning_efficient.__all__:
    getattr(lightning_efficient, name)
load_corpus()
look_only_at_what_comes()
