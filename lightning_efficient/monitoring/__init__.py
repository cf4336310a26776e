"""Time, memory and throughput of a run, with a report at its end."""

from lightning_efficient.monitoring.callback import EfficiencyMonitor
from lightning_efficient.monitoring.report import EventRow, RunReport, read_report, write_report

__all__ = ["EfficiencyMonitor", "EventRow", "RunReport", "read_report", "write_report"]
