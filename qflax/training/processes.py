"""Several processes that train one network: how they agree, and how none outlives another."""

import contextlib
import os
import select
import socket
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from qflax.errors import BAD_INPUT, FAILED, INTERRUPTED, Interrupted, UserError, require
from qflax.runtime import coordinator_host

_FAREWELL = 0  # Otherwise a process tells the exit code that it ends with.
_GRACE = 1.0  # Seconds in which all may come to the same end by themselves.
_RELAY = 3.0  # Seconds that the first process, whose end JAX answers with an abort, leaves to the others.
_CONNECT_SECONDS = 60
_TOKEN_BYTES = 16


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def from_first(tree):
    """The first process's tree of arrays, in all of them; elsewhere shapes and dtypes alone matter."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def presence() -> contextlib.AbstractContextManager:
    """Within this context a process that dies, or ends with an error, ends all others."""
    alone = jax.process_count() == 1 or coordinator_host() is None
    return contextlib.nullcontext() if alone else _Presence(coordinator_host())


class _Presence(contextlib.AbstractContextManager):
    """A connection of every process to the first: the system closes it, however a process ends.

    JAX notices the same, but it takes as long as its heartbeat, or what the network's collectives wait for,
    and aborts without a word that a user could act on.
    """

    def __init__(self, host: str):
        self._host, self._links = host, {}

    def __enter__(self) -> "_Presence":
        try:
            self._connect()
        except OSError as error:
            raise UserError(
                f"process {jax.process_index()} cannot reach the first one at {self._host} ({error}); allow "
                "TCP connections between the machines"
            ) from None
        self._closing, wake = socket.socketpair()
        threading.Thread(target=self._watch, args=(wake,), daemon=True, name="presence").start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        well = kind is None or issubclass(kind, Interrupted)
        if not well and not issubclass(kind, UserError):
            # It may be what another one's death did to a computation: then the watch ends this one meanwhile.
            time.sleep(2 * _RELAY)
        self._closing.close()
        self._say(_FAREWELL if well else BAD_INPUT if issubclass(kind, UserError) else FAILED)
        if is_first() and not well:
            time.sleep(_RELAY)

    def _connect(self) -> None:
        """Connects; whoever does not know the token of this run is not of it."""
        first, token = is_first(), np.frombuffer(os.urandom(_TOKEN_BYTES), np.uint8)
        server = socket.create_server(("", 0)) if first else None
        port, token = from_first((np.int32(server.getsockname()[1] if first else 0), token))
        token = np.asarray(token).tobytes()
        if not first:
            link = socket.create_connection((self._host, int(port)), timeout=_CONNECT_SECONDS)
            link.sendall(token + jax.process_index().to_bytes(4, "big"))
            self._add(link, 0)
            return
        with server:
            server.settimeout(_CONNECT_SECONDS)
            while len(self._links) < jax.process_count() - 1:
                link, _ = server.accept()
                link.settimeout(_CONNECT_SECONDS)
                told = link.recv(_TOKEN_BYTES + 4, socket.MSG_WAITALL)
                if told[:_TOKEN_BYTES] == token:
                    self._add(link, int.from_bytes(told[_TOKEN_BYTES:], "big"))
                else:
                    link.close()

    def _add(self, link: socket.socket, other: int) -> None:
        link.settimeout(None)
        self._links[link] = other

    def _say(self, code: int) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.sendall(bytes([code]))

    def _watch(self, wake: socket.socket) -> None:
        links = dict(self._links)
        while links:
            for link in select.select([*links, wake], [], [])[0]:
                if link is wake:
                    return
                try:
                    word = link.recv(1)
                except OSError:
                    word = b""
                if word == bytes([_FAREWELL]):
                    del links[link]
                else:
                    self._end(links[link], word[0] if word else None)

    def _end(self, other: int, code: int | None) -> None:
        """Ends this process, since another one ended: with its exit code, or because it was killed."""
        if code is None:
            told = f"process {other} of this run has died; the same command goes on from the last checkpoint"
        else:
            time.sleep(_GRACE)
            told = f"process {other} of this run has ended with an error, see its messages"
        print(f"interrupted: {told}", file=sys.stderr, flush=True)
        if is_first():
            self._say(INTERRUPTED if code is None else code)
            time.sleep(_RELAY)
        os._exit(INTERRUPTED if code is None else code)


def require_all_devices(num_devices: int) -> None:
    """Raises `UserError` for less than all devices: every process must have a part in the training."""
    require(
        jax.process_count() == 1 or num_devices in (0, jax.device_count()),
        f"config.num_devices={num_devices}: {jax.process_count()} processes train on all of their "
        f"{jax.device_count()} devices; set it to 0",
    )
