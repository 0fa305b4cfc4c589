"""Publish and subscribe: bounded, never waiting, telling what was lost."""

import threading
import time

import pytest

from bus import Bus


@pytest.fixture
def bus():
    made = Bus()
    yield made
    made.close()


def test_a_message_reaches_every_reader_of_its_topic_in_order(bus):
    with bus.subscribe("a") as one, bus.subscribe("a", "b") as two:
        for topic, message in (("a", 1), ("b", 2), ("c", 3), ("a", 4)):
            bus.publish(topic, message)
        assert one.drain() == [1, 4]
        assert two.drain() == [1, 2, 4]
        assert one.drain() == []


def test_a_slow_reader_loses_the_oldest_and_knows_how_many(bus):
    with bus.subscribe("a", limit=3) as reader:
        for n in range(10):
            bus.publish("a", n)
        assert reader.drain() == [7, 8, 9]
        assert reader.lost == 7


def test_a_slow_reader_holds_nobody_up(bus):
    with bus.subscribe("a", limit=1), bus.subscribe("a") as fast:
        for n in range(1000):
            bus.publish("a", n)
        assert len(fast.drain()) == 1000


def test_get_waits_for_a_message_and_no_longer_than_told(bus):
    with bus.subscribe("a") as reader:
        began = time.monotonic()
        assert reader.get(0.05) is None
        assert time.monotonic() - began >= 0.04
        threading.Timer(0.05, bus.publish, ("a", "now")).start()
        assert reader.get(5) == "now"


def test_closing_wakes_who_waits(bus):
    reader = bus.subscribe("a")
    threading.Timer(0.05, bus.close).start()
    assert reader.get(5) is None
    assert reader.closed


def test_who_has_left_is_forgotten(bus):
    with bus.subscribe("a", "b"):
        assert bus.heard("a") and bus.heard("b")
    assert not bus.heard("a") and not bus.heard("b")
    assert bus._topics == {}
    bus.publish("a", 1)


def test_many_writers_and_readers_lose_nothing(bus):
    count, readers = 200, [bus.subscribe("a", limit=10_000) for _ in range(4)]
    writers = [
        threading.Thread(target=lambda n=n: [bus.publish("a", (n, i)) for i in range(count)])
        for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for reader in readers:
        got = reader.drain()
        assert len(got) == 4 * count
        for n in range(4):
            assert [i for w, i in got if w == n] == list(range(count))
        reader.close()


class Large:
    size = 400


def test_a_slow_reader_holds_no_more_than_its_bytes(bus):
    with bus.subscribe("a", limit_bytes=1000) as reader:
        sent = [Large() for _ in range(5)]
        for message in sent:
            bus.publish("a", message)
        assert reader.drain() == sent[-2:]
        assert reader.lost == 3


def test_one_message_larger_than_the_limit_still_tells_the_reader_to_look(bus):
    with bus.subscribe("a", limit_bytes=100) as reader:
        for message in (first := Large(), last := Large()):
            bus.publish("a", message)
        assert first is not last
        assert reader.drain() == [last]


def test_whoever_publishes_hears_whether_anybody_took_it(bus):
    class Full:
        topics = ("a",)

        def put(self, _message) -> bool:
            return False

        def close(self) -> None:
            pass

    assert not bus.publish("a", 1)
    bus.add(full := Full())
    assert not bus.publish("a", 1)
    with bus.subscribe("a"):
        assert bus.publish("a", 1)
    bus.drop(full)
    assert not bus.heard("a")
