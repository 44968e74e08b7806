"""ResNet-20 with learned bit widths, fine-tuned from the float one: weights of 70 KiB, activations of at most
8 KiB.

python train.py --config=configs/resnet20_mixed_cifar10.py --workdir=runs/mixed --config.init_from=runs/fp32
python train.py --config=configs/resnet20_mixed_cifar10.py

Measured so far, shortened: 83.34 % at 65.60 KiB and 8.00 KiB after 8 epochs from a float network at 83.95 %,
see docs/results.md. The second command above starts from random weights, for which
--config.learning_rate=0.1 is more to the point; that was not measured.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.weights = default.mixed_precision(bits=4)
    config.activations = default.mixed_precision(bits=6)
    config.rules = (default.integer_input(),)
    config.size_targets.weight_kib = 70.0
    config.size_targets.activation_kib_max = 8.0
    config.allocate_widths = True
    config.size_ramp = (0.0, 0.25)
    config.learning_rate = 0.01
    config.quantizer_learning_rate = 0.001
    return config
