"""Training: everything from a configuration to a workdir with checkpoints, logs and a result."""

from qflax.training.loop import train
from qflax.training.workdir import evaluate_workdir

__all__ = ["evaluate_workdir", "train"]
