"""Linen layers with quantizers, chosen by a `quantizers.Quantization` policy."""

from qflax.layers.accumulation import Accumulation
from qflax.layers.activation import Activation, Quantize
from qflax.layers.conv import Conv, ConvTranspose
from qflax.layers.cost import COST, LayerCost, cost_function, layer_costs, sizes, sown_costs
from qflax.layers.dense import Dense, DenseGeneral, Einsum
from qflax.layers.norm import BatchNorm
from qflax.layers.pool import AveragePool, MaxPool
from qflax.layers.product import Product
from qflax.layers.residual import Add

__all__ = [
    "COST",
    "Accumulation",
    "Activation",
    "Add",
    "AveragePool",
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "Einsum",
    "LayerCost",
    "MaxPool",
    "Product",
    "Quantize",
    "cost_function",
    "layer_costs",
    "sizes",
    "sown_costs",
]
