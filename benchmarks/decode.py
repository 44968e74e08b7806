"""Images per second of one core that are decoded for training, against tf.data doing the same work.

python -m benchmarks.decode --tensorflow_python=VENV/bin/python --data_dir=DIR --output=decode.json

TensorFlow runs in an environment of its own. All variants decode the same windows of the same stored images
to 224x224 pixels and stack them in batches; each has its own interpreter, on the same core, and they take
turns, one pass over the images each a round. "full-size" are the images of another size than 224x224, where
a sample of the data set holds such small ones too. Time is that of the processor, so that what else the
machine does counts little.
"""

import argparse
import json
import os
import pathlib
import pickle
import statistics
import subprocess
import sys
import tempfile
import time

BATCH = 32
_TENSORFLOW = pathlib.Path(__file__).with_name("decode_tensorflow.py")


def serve_qflax(path: pathlib.Path) -> None:
    """Makes a round for each line of the standard input and prints its images per second."""
    import numpy as np

    from qflax.data import Crop
    from qflax.data.decode import decode_training

    images, _ = pickle.loads(path.read_bytes())
    for line in sys.stdin:
        rng, batch = np.random.default_rng(int(line)), []
        began = time.process_time()
        for image in images:
            batch.append(decode_training(image, rng, Crop()))
            if len(batch) == BATCH:
                np.stack(batch)
                batch = []
        print(len(images) / (time.process_time() - began), flush=True)


def image_sets(data_dir: str | None, count: int, rounds: int) -> dict[str, tuple]:
    """Returns images and, by round, their windows (top, left, height, width), of each set."""
    import io

    import numpy as np
    from PIL import Image

    from qflax.data import Crop, load
    from qflax.data.crop import random_window

    records = load("imagenet2012", "train", data_dir=data_dir).records
    images = [records[i].image for i in range(min(len(records), count))]
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    full = [i for i, size in enumerate(sizes) if size != (224, 224)]
    sets = {}
    for name, chosen in (("all", list(range(len(images)))), ("full-size", full * (count // len(full)))):
        windows = []
        for seed in range(rounds):
            rng = np.random.default_rng(seed)
            drawn = (random_window(rng, *sizes[i], Crop()) for i in chosen)
            windows.append([(top, left, height, width) for left, top, width, height in drawn])
        sets[name] = [images[i] for i in chosen], windows
    return sets


def measure(commands: dict[str, list], path: pathlib.Path, core: int, rounds: int) -> dict[str, list[float]]:
    """Returns the images per second of each round, by variant; the first round is not counted."""
    servers = {
        name: subprocess.Popen(
            [*map(str, command), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        for name, command in commands.items()
    }
    rates = {name: [] for name in servers}
    for seed in range(rounds):
        for name, server in servers.items():
            print(seed, file=server.stdin, flush=True)
            rates[name].append(float(server.stdout.readline()))
    for server in servers.values():
        server.stdin.close()
        server.wait()
    return {name: values[1:] for name, values in rates.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensorflow_python", type=pathlib.Path, help="interpreter with TensorFlow")
    parser.add_argument("--data_dir", help="where TFDS keeps imagenet2012; TFDS_DATA_DIR by default")
    parser.add_argument("--images", type=int, default=740)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    parser.add_argument("--serve", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_qflax(options.serve)
        return
    commands = {"qflax": [sys.executable, "-m", "benchmarks.decode", "--serve"]}
    if options.tensorflow_python:
        tensorflow = [options.tensorflow_python, _TENSORFLOW]
        commands |= {"tf.data": [*tensorflow, "plain"], "tf.data, antialiased": [*tensorflow, "antialias"]}
    rows = []
    for set_name, content in image_sets(options.data_dir, options.images, options.rounds + 1).items():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "images.pickle"
            path.write_bytes(pickle.dumps(content))
            rates = measure(commands, path, options.core, options.rounds + 1)
        for name, values in rates.items():
            median = statistics.median(values)
            ratio = statistics.median(a / b for a, b in zip(rates["qflax"], values, strict=True))
            print(f"{set_name:12}{name:24}{median:8.0f} images/s   qflax is {ratio:.2f} times as fast")
            rows.append({"images": set_name, "variant": name, "images_per_second": values})
    if options.output:
        options.output.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
