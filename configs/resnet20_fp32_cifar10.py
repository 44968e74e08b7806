"""Float ResNet-20 on CIFAR-10, the starting point of the quantized ones.

python train.py --config=configs/resnet20_fp32_cifar10.py --workdir=runs/fp32

Measured so far, shortened: 88.64 % after 15 epochs, 33 minutes on two CPU cores; the command is in
docs/results.md.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    return default.get_config()
