"""Names of the Linen variable collections that quantizers own.

Weights stay in `params` and batch norm's statistics in `batch_stats`, as everywhere in Flax.
"""

PARAMETERS = "quantizer_params"  # Trained: scales, ranges, offsets, widths.
# Observed or set: calibrated ranges, counts, frozen and accumulator widths, records of oscillations.
STATISTICS = "quantizer_stats"

# Reported by a forward pass in which they are mutable.
CONSTRAINTS = "quantizer_constraints"  # What `PARAMETERS` must satisfy after every update.
PENALTIES = "quantizer_penalties"  # Terms for the loss.
DEVIATIONS = "quantizer_deviations"  # Squared distances of weights from their grids, summed.
# Kernels that layers put in the place of theirs: those that accumulators allow, and those with frozen weights
# on their points.
PROJECTED = "projected_weights"
HELD = "held_weights"
OBSERVED = "quantizer_inputs"  # What the ranges of activations are chosen from, in a calibration pass.

# Role -> collection whose being mutable makes a forward pass calibrate the quantizers of that role. They
# stay empty.
CALIBRATION = {"weights": "calibrate_weights", "activations": "calibrate_activations"}

# Read by a calibration pass: a quantizer's range, in place of that of its batch, and the weight of a new
# batch in the running average of ranges, in place of their mean.
GIVEN = "calibration_given"
