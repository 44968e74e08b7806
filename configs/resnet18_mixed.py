"""ResNet-18 on ImageNet with learned bit widths: weights of 5.40 MB, activations of at most 0.38 MB.

python train.py --config=configs/resnet18_mixed.py --config.init_from=runs/resnet18_fp32

The strengths are those of ResNet-20 on CIFAR-10 divided by the squared ratio of the targets. Not measured on
the full data set.
"""

from configs import default, resnet18_int4


def get_config():
    """Returns the configuration."""
    config = resnet18_int4.get_config()
    config.weights = default.mixed_precision(bits=4)
    config.activations = default.mixed_precision(bits=6)
    config.size_targets.weight_kib = 5.40e6 / 1024
    config.size_targets.activation_kib_max = 0.38e6 / 1024
    config.size_strengths.weight_kib = 1.76e-5
    config.size_strengths.activation_kib_max = 4.6e-5
    config.size_ramp = (0.0, 0.25)
    config.quantizer_learning_rate = 0.001
    return config
