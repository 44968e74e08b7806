"""Quantization of any Linen model by rules on the paths of its modules."""

from qflax.linen.description import Description, Place
from qflax.linen.quantized import Quantized, describe, of_policy, quantize
from qflax.linen.replacement import is_stood_in_for

__all__ = ["Description", "Place", "Quantized", "describe", "is_stood_in_for", "of_policy", "quantize"]
