"""Float ResNet-18 on CIFAR-10, the starting point of the accumulator-aware ones.

python train.py --config=configs/resnet18_float_cifar10.py

Both operands of a residual addition are rectified, as in the quantized ones. Measured so far, shortened:
50.95 % after 2 of 200 epochs.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.model = "resnet18"
    config.shortcut = "B"
    config.residual = "unsigned"
    config.num_epochs = 200.0
    config.weight_decay = 5e-4
    return config
