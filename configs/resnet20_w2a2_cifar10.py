"""ResNet-20 with 2-bit weights and activations, learned scales, 8-bit stem and classifier.

python train.py --config=configs/resnet20_w2a2_cifar10.py --config.init_from=runs/fp32

The float network is the teacher, too. Not measured yet.
"""

from configs import resnet20_w3a3_cifar10


def get_config():
    """Returns the configuration."""
    config = resnet20_w3a3_cifar10.get_config()
    config.weights.bits = 2
    config.activations.bits = 2
    return config
