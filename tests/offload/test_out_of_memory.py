"""A process that really has no more memory goes on with smaller parts, and ends where it would have ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, resource, sys
import lightning.pytorch as pl, torch
from torch import nn
from torch.utils.data import DataLoader
from tests.offload.stepping import Split

torch.set_num_threads(1)
MIB = 1 << 20

class Wide(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 1), nn.Tanh())

    def training_step(self, batch, batch_idx):
        x = self.net(batch)
        for _ in range(4):  # each keeps 4 MiB for each sample
            x = (x * torch.ones(1, MIB, requires_grad=True)).tanh()[:, :1].contiguous()
        return x.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def train(strategy):
    model = Wide()
    trainer = pl.Trainer(max_steps=3, strategy=strategy, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    batch = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    trainer.fit(model, DataLoader(batch, batch_size=8))
    return [p.detach().clone() for p in model.parameters()]

whole = train(Split())
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
used = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[1]) * MIB, resource.RLIM_INFINITY))
strategy = Split(1, {"check_loss": False})
parts = train(strategy)
for a, b in zip(whole, parts):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
print("limit", strategy.control.limit)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux")
def test_o7_training_goes_on_where_memory_ends(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", PROGRAM, "150"]
    # What is freed goes back to the system, whatever the C library would keep: else the limit is met by chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    limit = int(done.stdout.split("limit ")[1])
    assert limit in (1, 2, 4)
    assert "Out of memory in a batch of 8 samples in 1 part(s)" in done.stderr
    assert "DefaultCPUAllocator" in done.stderr
