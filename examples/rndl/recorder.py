"""The attacker's tap: a proxy that passes a TCP connection on and keeps a copy of it."""

from __future__ import annotations

import socket
import threading
from typing import Self

from rndl.eavesdropper import Recording

__all__ = ["RecordingProxy"]

_TIMEOUT = 30  # seconds without a byte


class RecordingProxy:
    """A proxy on a port of 127.0.0.1; `recordings` has one entry for each connection, in their order.

    Args:
        target: host and port of the server.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self.recordings: list[Recording] = []
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()
        self._acceptor = threading.Thread(target=self._accept, name="tap")
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._acceptor.join()
        self._listening.close()
        self.wait()

    def wait(self) -> None:
        """Wait until the current connections have ended, and everything is recorded."""
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            recording = Recording()
            self.recordings.append(recording)
            thread = threading.Thread(target=self._pass_on, args=(near, recording), name="recording")
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, near: socket.socket, recording: Recording) -> None:
        with near, socket.create_connection(self._target) as far:
            near.settimeout(_TIMEOUT)
            far.settimeout(_TIMEOUT)
            backwards = threading.Thread(target=self._copy, args=(far, near, recording, "server"))
            backwards.start()
            self._copy(near, far, recording, "client")
            backwards.join()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, recording: Recording, side: str) -> None:
        try:
            while data := source.recv(1 << 16):
                recording.pieces.append((side, data))
                if side == "client":
                    recording.client += data
                else:
                    recording.server += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one of them is gone: there is nothing left to record in this direction
