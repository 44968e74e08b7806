"""The least time that a training step can take on a device: what it must compute, and what it must move.

python -m benchmarks.limit [--model=resnet20] [--batch_size=128] [--dtype=float32]

A step's operations are those of the convolutions, three times the forward pass's; its bytes those of each
convolution's input and output, read or written once in each of the three. The rates are measured: of a large
matrix product, and of a sum with a constant, in place.
"""

import argparse
import dataclasses
import functools
import time

import numpy as np

from benchmarks.peers.problem import MODELS, Problem
from qflax import cpu

_SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # Of the matrices.
_BYTES = {"cpu": 2**28, "gpu": 2**31, "tpu": 2**31}  # That are copied.
_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a step needs, and what a device does in a second.

    Attributes:
      operations: floating-point operations of a step, products and sums.
      bytes: that a step reads and writes at least.
      operations_per_second, bytes_per_second: of one device with all its threads, the best of some rounds.
    """

    operations: float
    bytes: float
    operations_per_second: float
    bytes_per_second: float

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        return max(self.operations / self.operations_per_second, self.bytes / self.bytes_per_second)


def convolutions(problem: Problem) -> list[tuple[int, int, int, int]]:
    """(taps, input channels, output side, output channels) of each convolution; the input's side follows."""
    side, channels = 32, problem.num_filters
    found = [(9, 3, side, channels)]
    for filters, stride in problem.blocks:
        side //= stride
        found += [(9, channels, side, filters), (9, filters, side, filters)]
        channels = filters
    return found


def needs(problem: Problem) -> tuple[float, float]:
    """Operations and bytes of a step; see `Limit`."""
    size, operations, elements, before = 4 if problem.dtype == "float32" else 2, 0, 0, 32
    for taps, ins, side, outs in convolutions(problem):
        operations += 2 * taps * ins * outs * side**2
        elements += before**2 * ins + side**2 * outs
        before = side
    # The images need no gradient.
    _, ins, side, outs = convolutions(problem)[0]
    first = 2 * 9 * ins * outs * side**2
    return problem.batch_size * (3.0 * operations - first), problem.batch_size * 3.0 * elements * size


def measure(problem: Problem) -> Limit:
    """Measures a device's rates, with JAX."""
    import jax
    import jax.numpy as jnp

    platform = jax.default_backend()
    side, count = _SIDE[platform], _BYTES[platform] // 4
    # In the memory of the argument: new memory costs more to get than to fill.
    in_place = functools.partial(jax.jit, donate_argnums=0)
    product = _best(in_place(lambda a: a @ a), jnp.full((side, side), 1 / side, problem.dtype))
    copy = _best(in_place(lambda x: x + 1), jnp.ones(count, jnp.float32))
    return Limit(*needs(problem), 2 * side**3 / product, 2 * 4 * count / copy)


def _best(function, x) -> float:
    x = function(x).block_until_ready()
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        x = function(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return float(np.min(seconds))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20", choices=MODELS)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    cpu.use_huge_pages()
    limit = measure(Problem(threads=cpu.available_cores(), **vars(options)))
    print(f"{limit.operations / 1e9:.1f} GFLOP at {limit.operations_per_second / 1e9:.0f} GFLOP/s")
    print(f"{limit.bytes / 1e9:.2f} GB at {limit.bytes_per_second / 1e9:.1f} GB/s")
    print(f"at least {limit.seconds:.4f} s")


if __name__ == "__main__":
    main()
