"""What was trained as files that others execute, and the means to run and to check them."""

from qflax.deploy.exporting import FORMATS, Export, export
from qflax.deploy.graph import Constant, Graph, Node
from qflax.deploy.lowering import lower
from qflax.deploy.packed import load
from qflax.deploy.runner import IntegerRunner

__all__ = ["FORMATS", "Constant", "Export", "Graph", "IntegerRunner", "Node", "export", "load", "lower"]
