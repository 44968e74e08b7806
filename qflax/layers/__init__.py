"""Linen layers with quantizers, chosen by a `quantizers.Quantization` policy."""

from qflax.layers.activation import Activation, Quantize
from qflax.layers.conv import Conv
from qflax.layers.cost import COST, LayerCost, layer_costs
from qflax.layers.dense import Dense
from qflax.layers.pool import AveragePool
from qflax.layers.residual import Add

__all__ = [
    "COST",
    "Activation",
    "Add",
    "AveragePool",
    "Conv",
    "Dense",
    "LayerCost",
    "Quantize",
    "layer_costs",
]
