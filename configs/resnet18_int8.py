"""ResNet-18 on ImageNet with 8-bit weights and activations in all layers: 11.68 MB.

python train.py --config=configs/resnet18_int8.py --config.init_from=runs/resnet18_fp32

Not measured on the full data set.
"""

from configs import resnet18_int4


def get_config():
    """Returns the configuration."""
    config = resnet18_int4.get_config()
    config.weights.bits = 8
    config.activations.bits = 8
    return config
