"""Image classification data: loading, order of the training stream, augmentation."""

from qflax.data.crop import Crop
from qflax.data.dataset import DATASETS, Batch, DataFormat, Dataset, data_format, load, load_training

__all__ = ["DATASETS", "Batch", "Crop", "DataFormat", "Dataset", "data_format", "load", "load_training"]
