"""One page about several runs: a table, plots, and what each network learned."""

from qflax.report.page import write_report

__all__ = ["write_report"]
