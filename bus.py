"""Publish and subscribe inside this process, with bounded queues.

A message is encoded once by its publisher; a subscriber that does not keep up loses the oldest
messages and is told how many (`lost`), so that it can read what it missed from the database. A
publisher never waits.
"""

import threading
from collections import deque

QUEUE_MESSAGES = 1000  # a reader further behind than this reads the table instead


class Subscription:
    """One reader's queue over any number of topics. Use as a context manager."""

    def __init__(self, bus: "Bus", topics: tuple[str, ...], limit: int):
        self._bus = bus
        self.topics = topics
        self._queue: deque = deque(maxlen=limit)
        self._ready = threading.Condition()
        self._closed = False
        self.lost = 0

    def put(self, message) -> None:
        with self._ready:
            if len(self._queue) == self._queue.maxlen:
                self.lost += 1
            self._queue.append(message)
            self._ready.notify()

    def get(self, timeout: float | None = None):
        """The next message; None when `timeout` seconds passed or the subscription is closed."""
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self._closed, timeout)
            return self._queue.popleft() if self._queue else None

    def drain(self) -> list:
        """All messages waiting now, without waiting for more."""
        with self._ready:
            taken = list(self._queue)
            self._queue.clear()
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
    """Topics are plain strings: `events`, `server:<id>`, `session:<id>`."""

    def __init__(self):
        self._lock = threading.Lock()
        self._topics: dict[str, set[Subscription]] = {}

    def subscribe(self, *topics: str, limit: int = QUEUE_MESSAGES) -> Subscription:
        subscription = Subscription(self, topics, limit)
        with self._lock:
            for topic in topics:
                self._topics.setdefault(topic, set()).add(subscription)
        return subscription

    def drop(self, subscription: Subscription) -> None:
        with self._lock:
            for topic in subscription.topics:
                readers = self._topics.get(topic, set())
                readers.discard(subscription)
                if not readers:
                    self._topics.pop(topic, None)

    def heard(self, topic: str) -> bool:
        """Whether anybody listens to the topic: a message nobody hears need not be made."""
        with self._lock:
            return topic in self._topics

    def publish(self, topic: str, message) -> None:
        with self._lock:
            readers = list(self._topics.get(topic, ()))
        for reader in readers:
            reader.put(message)

    def close(self) -> None:
        """End every subscription: used when the hub stops."""
        with self._lock:
            readers = {r for group in self._topics.values() for r in group}
        for reader in readers:
            reader.close()
