"""Names of the Linen variable collections that quantizers own.

Weights stay in `params` and batch norm's statistics in `batch_stats`, as everywhere in Flax.
A forward pass in which `PARAMETERS` is mutable is a calibration pass (see `calibration`).
"""

PARAMETERS = "quantizer_params"  # Trained: scales, ranges, offsets.
STATISTICS = "quantizer_stats"  # Observed: calibrated or averaged ranges, number of observations.
