"""Post-training quantization: algorithms on a model, its variables and batches of its inputs."""

from qflax.ptq.bias_correction import correct_biases, correct_biases_analytically
from qflax.ptq.equalization import equalize
from qflax.ptq.folding import fold_norms
from qflax.ptq.norm_reestimation import reestimate_norms
from qflax.ptq.ranges import set_ranges

__all__ = [
    "correct_biases",
    "correct_biases_analytically",
    "equalize",
    "fold_norms",
    "reestimate_norms",
    "set_ranges",
]
