"""Image classification data: loading, order of the training stream, augmentation."""

from qflax.data.dataset import DATASETS, DataFormat, Dataset, data_format, load, load_training

__all__ = ["DATASETS", "DataFormat", "Dataset", "data_format", "load", "load_training"]
