"""ResNet-18 in 5-bit floating point (e3m1): images, weights, outputs of convolutions, activations.

python train.py --config=configs/resnet18_w5a5_e3m1_cifar10.py --config.init_from=runs/resnet18_fp32_cifar10

Scales are powers of two, of weights one per channel: without any, most weights of such a network are nearer
to 0 than to the smallest number, 1/8. Products stay exact, and a format that is scaled so differs from the
plain one in its exponent bias only. Measured so far, shortened: 49.30 % after 1 of 90 epochs, from a float
network at 51.98 %.
"""

from configs import resnet18_w8a8_e4m3_cifar10


def get_config():
    """Returns the configuration."""
    config = resnet18_w8a8_e4m3_cifar10.get_config()
    for role in ("weights", "activations", "outputs"):
        config[role].update(exponent_bits=3, mantissa_bits=1, specials="none", power_of_two=True)
    config.weights.update(scale="statistic", granularity="per_channel")
    config.activations.update(scale="static", statistic="mse")
    config.outputs.update(scale="static", statistic="mse")
    config.num_epochs = 90.0
    return config
