"""Metrics files, the report and plots of a run. Reads files; never trains."""

from rwkv7_jax.reports.html_report import report_page, write_report
from rwkv7_jax.reports.metric_writers import MetricFiles
from rwkv7_jax.reports.system_info import peak_memory, system

__all__ = ["MetricFiles", "peak_memory", "report_page", "system", "write_report"]
