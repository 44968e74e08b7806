"""The tf.data pipeline that `benchmarks.decode` compares with; it needs nothing but TensorFlow."""

import pathlib
import pickle
import sys
import time

import tensorflow as tf

_SIZE = 224
_BATCH = 32  # As in benchmarks.decode.


def main(resize: str, path: str) -> None:
    """Makes a round for each line of the standard input and prints its images per second."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    images, windows = pickle.loads(pathlib.Path(path).read_bytes())

    def decode(image, window):
        part = tf.image.decode_and_crop_jpeg(image, window, channels=3)
        scaled = tf.image.resize(part, [_SIZE, _SIZE], antialias=resize == "antialias")
        return tf.cast(tf.clip_by_value(tf.round(scaled), 0, 255), tf.uint8)

    source = tf.constant(images)
    for line in sys.stdin:
        drawn = tf.constant(windows[int(line)], tf.int32)
        data = tf.data.Dataset.from_tensor_slices((source, drawn))
        batches = data.map(decode, num_parallel_calls=1).batch(_BATCH)
        began = time.process_time()
        for _ in batches:
            pass
        print(len(images) / (time.process_time() - began), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
