"""The command line: ``python -m lightning_efficient fit --config my.yaml``, or ``lightning-efficient fit ...``.

A LightningCLI (fit, validate, test, predict) for the demo task and for your own classes: give them in YAML by
``class_path``. Importing this package first is what makes the strategies' strings known. Beside it,
``plan`` measures a few batches of a configuration and writes what to add to it, and ``report RUN [RUN ...]`` shows runs
side by side.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

_DESCRIPTION = (
    "Lightning's command line for your own classes. Beside what is listed here: `lightning-efficient plan --config "
    "my.yaml` says which techniques fit your memory, `lightning-efficient report RUN ...` shows runs side by side; "
    "each has a --help."
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Instead of those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--version"]:
        from lightning_efficient import __version__

        print(f"lightning-efficient {__version__}")
        return
    if given[:1] == ["report"]:
        from lightning_efficient.monitoring.command import main as report

        sys.exit(report(given[1:]))
    try:
        import jsonargparse  # noqa: F401
    except ImportError:
        sys.exit("The command line needs jsonargparse: pip install 'jsonargparse[signatures]>=4.40'")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not see your own package there, `python -m` does
    if given[:1] == ["plan"]:
        from lightning_efficient.planning.command import main as plan

        sys.exit(plan(given[1:]))
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningCLI

    import lightning_efficient

    for name in lightning_efficient.__all__:
        getattr(lightning_efficient, name)  # only classes that have been imported can be given by their name alone

    LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-efficient", "description": _DESCRIPTION},
        args=arguments,
    )


if __name__ == "__main__":
    main()
