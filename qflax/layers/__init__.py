"""Linen layers with quantizers, chosen by a `quantizers.Quantization` policy."""

from qflax.layers.accumulation import Accumulation
from qflax.layers.activation import Activation, Quantize
from qflax.layers.conv import Conv
from qflax.layers.cost import COST, LayerCost, layer_costs, sizes, sown_costs
from qflax.layers.dense import Dense
from qflax.layers.norm import BatchNorm
from qflax.layers.pool import AveragePool, MaxPool
from qflax.layers.residual import Add

__all__ = [
    "COST",
    "Accumulation",
    "Activation",
    "Add",
    "AveragePool",
    "BatchNorm",
    "Conv",
    "Dense",
    "LayerCost",
    "MaxPool",
    "Quantize",
    "layer_costs",
    "sizes",
    "sown_costs",
]
