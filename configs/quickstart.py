"""A small ResNet with learned bit widths on handwritten digits that come with scikit-learn.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart

After a quarter of the run size targets make weights shrink to 28 KiB and activations to 24 KiB, less than 3
bits on average; then the widths freeze. Two to three minutes on two CPU cores, about 99 % of the 360
held-out digits.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.model = "resnet8"
    config.dataset = "digits"
    config.validation_examples = 200
    config.mean = (0.3, 0.3, 0.3)
    config.std = (0.35, 0.35, 0.35)
    config.augmentation.crop_padding = 2
    config.augmentation.flip = False
    config.weights = default.mixed_precision(bits=4)
    config.activations = default.mixed_precision(bits=6)
    config.rules = (default.integer_input(),)
    config.size_targets.weight_kib = 28.0
    config.size_targets.activation_kib_sum = 24.0
    config.size_ramp = (0.25, 0.5)
    config.freeze_widths_after = 0.6
    config.batch_size = 64
    config.num_epochs = 40.0
    config.warmup_epochs = 2.0
    config.quantizer_learning_rate = 0.01
    config.log_every_steps = 100
    config.eval_every_epochs = 5.0
    return config
