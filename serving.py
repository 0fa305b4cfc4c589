"""gevent's HTTP server, with a limit on how long a request may take to arrive.

Without one, whoever sends a byte now and then holds a connection each, until there are none left
for others.
"""

import contextlib
import io
import logging
import resource
import socket
import time

READ_BYTES = 1024  # of a request, read at a time; every connection holds a buffer of this size
PACE = 16 * 1024  # bytes of a body that arrive in a second, at the least


class Paced(socket.SocketIO):
    """What a client sends, for as long as it may take."""

    def __init__(self, connection, unread_s: float):
        super().__init__(connection, "r")
        self._connection, self._unread_s = connection, unread_s
        self._until = self._pause_s = self._byte_s = 0.0

    def allow(self, seconds: float, byte_s: float = 0.0) -> None:
        """From now on, and so many seconds more for each byte that comes; no pause is longer."""
        self._until, self._pause_s = time.monotonic() + seconds, seconds
        self._byte_s = byte_s

    def readinto(self, buffer):
        """As of any stream. Raises TimeoutError, once and for all, when the time is up."""
        left = min(self._pause_s, self._until - time.monotonic())
        self._connection.settimeout(max(0.001, left))
        try:
            size = super().readinto(buffer)
        finally:
            self._connection.settimeout(self._unread_s)
        self._until += size * self._byte_s
        return size


def server(sock: socket.socket, app, request_s: float, unread_s: float, log: logging.Logger):
    """The server of a WSGI application on a listening socket; not started yet.

    request_s: how many seconds the head of a request may take to arrive, counted from where the
    connection is free for it; its body may take as long again, and a second for each `PACE` bytes.
    unread_s: how many seconds a piece of an answer may wait for the client to read it.
    """
    from gevent.pool import Pool
    from gevent.pywsgi import WSGIHandler, WSGIServer

    class Handler(WSGIHandler):
        """Holds little of a connection that lasts: there may be thousands."""

        def __init__(self, connection, address, server):
            self._paced = Paced(connection, unread_s)
            connection._io_refs += 1  # as its own makefile does
            reader = io.BufferedReader(self._paced, READ_BYTES)
            super().__init__(connection, address, server, reader)

        def handle(self):
            with contextlib.suppress(OSError):  # they left before they were answered
                super().handle()

        def handle_one_request(self):
            self._paced.allow(request_s)
            return super().handle_one_request()

        def get_environ(self):
            environ = super().get_environ()
            self.headers = None  # the environment has them
            self._paced.allow(request_s, 1 / PACE)
            return environ

        def run_application(self):
            try:
                super().run_application()
            finally:
                self._paced.allow(request_s)  # for what was sent and not read

        def _handle_client_error(self, error):
            if isinstance(error, TimeoutError):
                return None  # nobody is there to be answered
            return super()._handle_client_error(ValueError(str(error)))  # without a traceback

        def handle_error(self, kind, error, traceback):
            if isinstance(error, TimeoutError):
                self.close_connection = True  # they stopped reading
            else:
                super().handle_error(kind, error, traceback)

    # A pool, so that stopping waits for the requests under way before the database is closed.
    return WSGIServer(sock, app, log=None, error_log=log, spawn=Pool(), handler_class=Handler)


def allow_many_connections() -> None:
    """As many open files as the machine allows this process: shells often give it 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
