"""The probe: an input that everyone can make, and what the trained network says of it.

It is recorded in every export, so that a reader who has nothing else can tell whether the file computes what
was trained: a wrong scale or a missing zero point break no rule of a format.
"""

import hashlib
import math

import numpy as np

COUNT = 2


def probe_input(shape: tuple[int, ...], low: float, high: float, count: int = COUNT) -> np.ndarray:
    """float32 [count, *shape]: low + (high - low) b / 255 with bytes b of sha256("qflax" + 0, 1, 2, ...).

    The numbers behind the text are 8 bytes each, little endian.
    """
    size = count * math.prod(shape)
    blocks = (hashlib.sha256(b"qflax" + i.to_bytes(8, "little")).digest() for i in range(-(-size // 32)))
    stream = np.frombuffer(b"".join(blocks), np.uint8)[:size].astype(np.float64)
    return (low + (high - low) * stream / 255).astype(np.float32).reshape(count, *shape)


def probe_metadata(low: float, high: float, outputs: np.ndarray, sums: dict[int, int]) -> dict:
    """What a file records: how to make the input, outputs of the trained network, sums of codes by node."""
    # The shortest text that reads back as the same float32.
    rows = [[float(str(x)) for x in row] for row in outputs.reshape(len(outputs), -1)]
    return {"count": len(outputs), "low": low, "high": high, "outputs": rows, "sums": list(sums.items())}
