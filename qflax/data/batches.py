"""Batches of a stream of examples, made ahead of their use in threads or worker processes."""

import atexit
import gc
import multiprocessing
import os
import signal
import threading

import grain
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from qflax.data.dataset import Batch
from qflax.errors import UserError

_MOST_THREADS = 16


class Batches:
    """An iterator over batches; the threads or processes that make them end with it, or at `close`.

    Without workers, as many threads as there are cores, but at most 16, make a batch each; no more
    batches than threads are held. With workers, each is a process that makes one batch after the
    other, and at most four for each of them are held, in shared memory. The batch that was returned
    last comes on top. A program that uses workers must guard its main part by
    `if __name__ == "__main__"`: each of them imports it.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        *,
        first_step: int,
        batch_size: int,
        shard: tuple[int, int],
        num_workers: int,
    ):
        """Starts at once.

        Args:
            examples: of the whole stream, each a `Batch` without the leading axis.
            first_step: the first batch; those before it are not made.
            batch_size: of all shards together.
            shard: index and count; shard i gets the i-th of `count` equal parts of each batch.
            num_workers: number of processes; 0 for threads of this one.

        Raises:
            ValueError: if `shard` is no part of `batch_size`.
        """
        index, count = shard
        if batch_size % count or not 0 <= index < count:
            raise ValueError(f"shard {index} of {count} of batches of {batch_size}")
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, in programs without absl too.
        parts = examples.batch(batch_size // count)[first_step * count + index :: count]
        threads = 0 if num_workers else min(_MOST_THREADS, os.cpu_count() or 1)
        ahead = parts.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        self._iterator = iter(ahead.mp_prefetch(workers, _start_worker))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; raises UserError if an example of it cannot be read."""
        message = None
        try:
            batch = next(self._iterator, None)
        except UserError as error:
            message = str(error)
        except RuntimeError as error:
            if "Worker process" not in str(error):
                raise
            message = (
                "a process that reads and decodes images has ended; where it ran out of memory, or of shared "
                "memory (df /dev/shm), lower config.num_workers or config.batch_size; config.num_workers=0 "
                "reads in threads"
            )
        if message is None and batch is not None:
            return batch
        self.close()
        raise StopIteration if message is None else UserError(message)

    def close(self) -> None:
        """Ends the threads or processes; there are no further batches."""
        if isinstance(self._iterator, grain.DatasetIterator):
            self._iterator.close()
            self._iterator = iter(())
            # Tracebacks of what the workers raised hold batches, and with them shared memory, in cycles.
            # For the same reason errors are raised anew above.
            gc.collect()


def _free_shared_memory() -> None:
    """Waits for Grain's thread that frees shared memory; Python complains of what is left at its end."""
    gc.collect()
    pool = getattr(SharedMemoryArray, "_del_thread_pool", None)
    if pool is not None:
        pool.apply(int)  # It has one thread: whatever was handed in before is done.


# It runs before the handlers of multiprocessing, which were registered first and end that thread.
atexit.register(_free_shared_memory)


def _start_worker(index: int, count: int) -> None:
    """Has a worker end with the program, however that ends, and leave requests to stop to it."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):  # They may be sent to all processes of a group.
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_program, daemon=True).start()


def _end_with_program() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
