"""Float ResNet-18 on ImageNet.

python train.py --config=configs/resnet18_fp32.py

--config.model=resnet34 and resnet50 are the deeper ones. 11.69 million parameters, 46.7 MB.
Not measured on the full data set.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.model = "resnet18"
    config.stem = "7x7"
    config.shortcut = "B"
    config.dataset = "imagenet2012"
    config.mean = (0.485, 0.456, 0.406)
    config.std = (0.229, 0.224, 0.225)
    config.augmentation.crop_padding = 0
    config.batch_size = 1024
    config.num_epochs = 100.0
    config.learning_rate = 0.4
    config.weight_decay = 1e-4
    config.calibration_batch_size = 128
    config.eval_batch_size = 256
    return config
