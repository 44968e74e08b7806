"""The training step of `benchmarks.step_time`, written with other packages.

Each `*_peers` module has `CONTENDERS`: row -> function of a `Problem` to its training. Packages are imported
when a training is built, so that one that is missing is missed there and not before.
"""
