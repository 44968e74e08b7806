"""ResNet-20 with 8-bit floating-point weights and activations (e4m3), fine-tuned from the float one.

python train.py --config=configs/resnet20_e4m3_cifar10.py --config.init_from=runs/fp32

Weights are scaled by their largest magnitude per channel, activations are not scaled.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    e4m3 = dict(exponent_bits=4, mantissa_bits=3, specials="nan")
    config.weights = default.minifloat(scale="statistic", granularity="per_channel", **e4m3)
    config.activations = default.minifloat(**e4m3)
    config.learning_rate = 0.01
    config.ptq.recipe = ("equalization", "ranges", "bias_correction")  # 8 bits need no learned rounding.
    return config
