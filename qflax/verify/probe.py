"""What the trained network answered for inputs that everybody can make."""

import dataclasses
import hashlib
import math
import typing
from collections.abc import Sequence

import numpy as np

from qflax.verify.packed_attributes import whole


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Inputs and the outputs for them.

    Attributes:
      low, high: of the inputs.
      outputs: of the trained network, float32 [examples, outputs].
      sums: index of a node -> sum of the integers that it gave for all examples.
    """

    low: float
    high: float
    outputs: np.ndarray
    sums: dict[int, int]

    @classmethod
    def from_json(cls, fields: dict[str, typing.Any]) -> "Probe":
        """The probe in a file's metadata; ValueError, KeyError or TypeError if it is none."""
        count, low, high = fields["count"], float(fields["low"]), float(fields["high"])
        with np.errstate(over="ignore"):
            outputs = np.array(fields["outputs"], np.float32)
        if not (outputs.ndim == 2 and len(outputs) == count and outputs.size and np.isfinite(outputs).all()):
            raise ValueError("outputs must be a list of numbers for every example")
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("low and high must be numbers")
        sums = {whole(index): whole(value) for index, value in fields.get("sums", [])}
        return cls(low=low, high=high, outputs=outputs, sums=sums)


def probe_inputs(count: int, shape: Sequence[int], low: float, high: float) -> np.ndarray:
    """float32 [count, *shape]: bytes of SHA-256 of counters, spread over `low ... high`."""
    size = count * math.prod(shape)
    blocks = (hashlib.sha256(b"qflax" + k.to_bytes(8, "little")).digest() for k in range(-(-size // 32)))
    return spread(np.frombuffer(b"".join(blocks), np.uint8)[:size].reshape(count, *shape), low, high)


def spread(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32: 0 ... 255 spread over `low ... high`."""
    with np.errstate(all="ignore"):
        return (low + (high - low) * pixels.astype(np.float64) / 255).astype(np.float32)
