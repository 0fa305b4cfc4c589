"""Publish and subscribe inside this process, with bounded queues.

A message is encoded once by its publisher; a subscriber that does not keep up loses the oldest
messages and is told how many (`lost`), so that it can read what it missed from the database. A
publisher never waits.
"""

import threading
from collections import deque

QUEUE_MESSAGES = 1000  # a reader further behind than this reads the table instead
QUEUE_BYTES = 8 * 1024 * 1024  # of messages that know their `size`


class Subscription:
    """One reader's queue over any number of topics. Use as a context manager."""

    def __init__(self, bus: "Bus", topics: tuple[str, ...], limit: int, limit_bytes: int):
        self._bus = bus
        self.topics = topics
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._queue: deque = deque()
        self._bytes = 0
        self._ready = threading.Condition()
        self._closed = False
        self.lost = 0

    def put(self, message) -> bool:
        with self._ready:
            self._queue.append(message)
            self._bytes += getattr(message, "size", 0)
            while self._too_full():
                self._bytes -= getattr(self._queue.popleft(), "size", 0)
                self.lost += 1
            self._ready.notify()
        return True

    def _too_full(self) -> bool:
        """The newest message always stays: it tells the reader that others are missing."""
        waiting = len(self._queue)
        return waiting > self._limit or (waiting > 1 and self._bytes > self._limit_bytes)

    def get(self, timeout: float | None = None):
        """The next message; None when `timeout` seconds passed or the subscription is closed."""
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self._closed, timeout)
            if not self._queue:
                return None
            message = self._queue.popleft()
            self._bytes -= getattr(message, "size", 0)
            return message

    def drain(self) -> list:
        """All messages waiting now, without waiting for more."""
        with self._ready:
            taken = list(self._queue)
            self._queue.clear()
            self._bytes = 0
            return taken

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._bus.drop(self)
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Bus:
    """Topics are plain strings: `events`, `server:<id>`, `session:<id>`.

    A reader is a Subscription, or anything with `topics`, `put(message) -> taken` that returns at
    once, and `close()`.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._topics: dict[str, set] = {}

    def subscribe(
        self, *topics: str, limit: int = QUEUE_MESSAGES, limit_bytes: int = QUEUE_BYTES
    ) -> Subscription:
        subscription = Subscription(self, topics, limit, limit_bytes)
        self.add(subscription)
        return subscription

    def add(self, reader) -> None:
        with self._lock:
            for topic in reader.topics:
                self._topics.setdefault(topic, set()).add(reader)

    def drop(self, reader) -> None:
        with self._lock:
            for topic in reader.topics:
                readers = self._topics.get(topic, set())
                readers.discard(reader)
                if not readers:
                    self._topics.pop(topic, None)

    def heard(self, topic: str) -> bool:
        """Whether anybody listens to the topic: a message nobody hears need not be made."""
        with self._lock:
            return topic in self._topics

    def publish(self, topic: str, message) -> bool:
        """Hand the message to whoever listens; whether anybody took it."""
        with self._lock:
            readers = list(self._topics.get(topic, ()))
        return any([reader.put(message) for reader in readers])

    def close(self) -> None:
        """End every subscription: used when the hub stops."""
        with self._lock:
            readers = {r for group in self._topics.values() for r in group}
        for reader in readers:
            reader.close()
