"""Synthetic images, and a data set made of them as TFDS stores ImageNet."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image


def encoded(width, height, mode="RGB", form="JPEG", seed=0, **options):
    """Returns a compressed image of smooth random colours."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def training_images():
    """Returns 11 images, of odd sizes, modes and formats."""
    odd = [(37, 29, "L"), (40, 31, "CMYK"), (1, 90, "RGB"), (90, 1, "RGB"), (300, 200, "RGB")]
    images = [encoded(*image, seed=i) for i, image in enumerate(odd)]
    images.append(encoded(33, 21, form="PNG", seed=5))
    return images + [encoded(24 + i, 35 - i, seed=i) for i in range(6, 11)]


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Image i of 'train' has the label 90 * i, of 'validation' 100 * i; its last but one is truncated."""

    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        validation = [encoded(30 + i, 40, seed=100 + i) for i in range(6)]
        validation[4] = validation[4][:-20]
        return {
            "train": self._generate_examples("n{}.JPEG", training_images(), 90),
            "validation": self._generate_examples("ILSVRC2012_val_{}.JPEG", validation, 100),
        }

    def _generate_examples(self, name, images, stride):
        for i, image in enumerate(images):
            yield i, {"image": io.BytesIO(image), "label": stride * i, "file_name": name.format(i)}


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory):
    tfds.disable_progress_bar()
    root = tmp_path_factory.mktemp("tfds")
    Builder(data_dir=root).download_and_prepare(file_format="array_record")
    return root


@pytest.fixture(name="encoded", scope="session")
def encoded_fixture():
    """The function `encoded`."""
    return encoded
