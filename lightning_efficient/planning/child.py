"""``python -m lightning_efficient.planning.child JOB``: one short run in a process of its own.

Its peak of memory is its own, and so is its end: what the user's code raises, or a process that the system kills, is
told to the process that planned it, as a sentence.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_efficient.core.hardware import hardware
from lightning_efficient.core.memory_meter import MemoryMeter
from lightning_efficient.monitoring.memory import nested_tensors, parameter_size, tensor_bytes
from lightning_efficient.planning.batches import (
    ChosenBatches,
    Scan,
    as_in_fit,
    batch_bytes,
    load_batches,
    save_batches,
    scan,
)
from lightning_efficient.planning.callback import StepWatch
from lightning_efficient.planning.facts import Profile, ShortRun
from lightning_efficient.planning.job import Job
from lightning_efficient.planning.trainer import ShortCLI, save_interval

__all__ = ["main"]

_LAYERS = 40  # that are told
_STACKS = 256 << 20  # of threads, which count as taken though next to nothing of them is used
_TAKEN = {
    "ActivationCompressionPlugin": "activation",
    "GrowAndUnshareCallback": "growth",
    "AsyncCheckpointIO": "checkpoint",
}
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class _Run:
    """One short run: its parts are called by the hooks of a LightningCLI."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.meter = MemoryMeter()
        self.base = 0
        self.scan = Scan()
        self.held = 0
        self.prefetches = False
        self.watch = StepWatch(
            meter=self.meter, warm_up=job.warm_up, batches=job.batches, seconds=job.seconds, detail=job.profile,
            saves=Path(job.folder) if job.saves else None,
        )  # fmt: skip

    def go(self) -> dict[str, Any]:
        """Train, and return what was measured."""
        cli = ShortCLI(
            configs=self.job.configs,
            folder=self.job.folder,
            least_steps=2 * (self.job.warm_up + self.job.batches),
            watch=self.watch,
            before_model=self._before_model,
            before_fit=self._before_fit,
        )
        if not self.watch.samples:
            raise ValueError(
                f"The training ended before a batch could be timed, of which {self.job.warm_up} come first to warm up. "
                "Give a configuration that trains for longer (trainer.max_epochs, trainer.limit_train_batches)."
            )
        run = ShortRun(
            base_bytes=self.base,
            peak_bytes=max(self.watch.peak - self.held, 1),
            samples=tuple(self.watch.samples),
            yardstick=self.watch.yardstick,
            values=self.watch.values,
            save_seconds=self.watch.save_seconds,
            accumulate=cli.trainer.accumulate_grad_batches,
        )
        return self._profile(cli, run).to_json() if self.job.profile else run.to_json()

    def _before_model(self) -> None:
        self.meter.start()
        self.base = self.meter.start_bytes
        if not torch.cuda.is_available():
            _limit_memory(self.job.limit or int(psutil.virtual_memory().available))

    def _before_fit(self, cli: ShortCLI) -> None:
        trainer = cli.trainer
        if trainer.world_size > 1:
            raise ValueError(
                f"The configuration trains on {trainer.world_size} devices, and a plan is for one. Give "
                "trainer.devices: 1; what a technique saves on one device it saves on each."
            )
        if trainer.strategy.root_device.type == "cuda":
            self.meter = MemoryMeter(trainer.strategy.root_device)
            self.meter.start()
            self.base = 0
            self.watch.set_meter(self.meter)
        if self.job.chosen:
            owner: Any = cli.datamodule
            if owner is None or not is_overridden("train_dataloader", owner, pl.LightningDataModule):
                owner = cli.model
            own = owner.train_dataloader
            owner.train_dataloader = lambda: self._choose(own())

    def _choose(self, given: Any) -> ChosenBatches:
        loader, length, self.prefetches = as_in_fit(given)
        if self.job.profile or not self.job.chosen_file.exists():
            self.scan = scan(loader)
            if not self.scan.kept:
                raise ValueError("The training data have no batch. Give a configuration whose data have some.")
            batches = self.scan.by_turns(self.job.batches)
            save_batches(self.job.chosen_file, batches)
        else:
            batches = load_batches(self.job.chosen_file)
        sizes = [batch_bytes(batch) for batch in batches]
        if not self.meter.on_device:
            self.held = sum(sizes) - max(sizes)  # an ordinary run has one at a time
        self.watch.set_sizes(len(batches))
        return ChosenBatches(batches, length)

    def _profile(self, cli: ShortCLI, run: ShortRun) -> Profile:
        watch, module, trainer = self.watch, cli.model, cli.trainer
        state = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]  # an offload's is elsewhere
        parameters = list(module.parameters())
        epoch, total = trainer.num_training_batches, trainer.estimated_stepping_batches
        return Profile(
            run=run,
            module=type(module).__name__,
            device=trainer.strategy.root_device.type,
            hardware=hardware(trainer.strategy.root_device),
            threads=torch.get_num_threads(),
            memory=self.meter.source,
            parameters=parameter_size(module).bytes + tensor_bytes(module.buffers()),
            gradients=sum(p.nbytes for p in parameters if p.requires_grad),
            optimizer_state=sum(tensor_bytes(nested_tensors(part)) for part in state),
            saved=watch.saved,
            update_peak=max(watch.update_peak - self.held, 0),
            checkpoint=watch.save_bytes,
            checkpoint_peak=max(watch.save_peak - self.held, 0),
            largest_parameter=max((p.nbytes for p in parameters), default=0),
            largest_module=max(sum(p.nbytes for p in part.parameters(recurse=False)) for part in module.modules()),
            layers=watch.account.layers()[:_LAYERS] if watch.account else (),
            sizes=tuple(self.scan.sizes),
            all_batches=self.scan.complete,
            data_seconds=self.scan.seconds,
            prefetches=self.prefetches,
            save_interval=save_interval(
                cli, 0 if math.isinf(epoch) else int(epoch), statistics.fmean(each.wall for each in run.samples)
            ),
            batches=0 if math.isinf(total) else int(total * run.accumulate),
            precision=str(trainer.precision),
            taken=_taken(cli),
        )


def _limit_memory(nbytes: int) -> None:
    """From now on the process gets no more: what does not fit is then an error, before the system ends somebody."""
    most = psutil.Process().memory_info().data + nbytes + _STACKS  # as RLIMIT_DATA counts
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _taken(cli: ShortCLI) -> dict[str, str]:
    """What stands where a technique would."""
    trainer = cli.trainer
    names = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    taken = {_TAKEN[name]: name for name in names if name in _TAKEN}
    if (strategy := type(trainer.strategy)) is not SingleDeviceStrategy:
        taken["offload"] = strategy.__name__
    if cli.plugins:
        taken["precision"] = ", ".join(type(plugin).__name__ for plugin in cli.plugins)
    return taken


def _sentence(error: BaseException) -> dict[str, str]:
    """What went wrong, for a person: where in the user's code, if it was there."""
    text = str(error).strip() or type(error).__name__
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in _OUT_OF_MEMORY)
    libraries = (str(Path(torch.__file__).parent), str(Path(pl.__file__).parent.parent), str(Path(__file__).parents[1]))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*libraries, "<", sys.prefix, sys.base_prefix))
    ]
    if "arguments are required" in text and "fit." in text:  # a file for a command line that knows its classes
        text += (
            ". A plan makes the module and the data by their names, whatever command line of yours the file is for: "
            "give model: {class_path: my_package.MyModule} in it, and data likewise"
        )
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return {"kind": "memory" if memory else type(error).__name__, "message": f"{text}{where}"}


def main(path: str) -> int:
    """Do the job in a file; leaves its result, or what went wrong, in the job's folder."""
    job = Job.from_file(path)
    warnings.simplefilter("ignore")
    try:
        found = _Run(job).go()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        traceback.print_exc()
        found = {"error": _sentence(error)}
    job.result.write_text(json.dumps(found), encoding="utf-8")
    return 0 if "error" not in found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
