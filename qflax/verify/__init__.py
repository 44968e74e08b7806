"""Reads exported networks and proves what they promise, independently of the rest of qflax.

Nothing of qflax but its errors and the limits of files is imported: the formats of files and
numbers and the arithmetic are written anew, in NumPy, so that a mistake in an export cannot hide in code that
both sides share. ONNX files need the package `onnx`; they are executed with the package `qonnx` too where
that is installed.
"""

from qflax.verify.checks import load, verify
from qflax.verify.executor import run
from qflax.verify.network import Network
from qflax.verify.report import LayerReport, Report, table

__all__ = ["LayerReport", "Network", "Report", "load", "run", "table", "verify"]
