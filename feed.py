"""Events as they are committed, for one reader: what SSE and the dashboard's socket both follow."""

import auth
import reading
from models import Event, Glimpse, Unauthorised, bus

# An event that others look for under a second name too.
ALSO = {"task_needs_human": "intervention_requested"}
BEAT_S = 15.0  # a stream that says nothing never notices that its reader has gone


class Reset:
    """The reader's id is ahead of ours (a restored database): they begin anew at `id`."""

    def __init__(self, newest: int):
        self.id = newest


def follow(who: auth.Caller, after: int | None, live=None):
    """Yield Event and Reset as they come, and None at least every BEAT_S seconds; Glimpse too, if
    `live` has them among its topics.

    What the table has above `after` comes first (nothing without `after`), then what the bus
    brings; a gap between ids (this reader was too slow, or two commits crossed) is read from the
    table. Ends when `live` (a subscription to `events` and `access`, made here if not given) is
    closed. Raises Unauthorised when the reader may not read any more.
    """
    with live or bus.subscribe("events", "access") as live:
        newest = reading.last_event_id()
        last = newest if after is None else min(after, newest)
        lost = live.lost
        yield None
        if after is not None and after > newest:
            yield Reset(newest)
        for event in _missed(who, last):
            last = event["id"]
            yield event
        while not live.closed:
            message = live.get(BEAT_S)
            if live.closed:
                return
            if isinstance(message, Glimpse):
                if live.lost > lost:  # events may be among them
                    lost = live.lost
                    for event in _missed(who, last):
                        last = event["id"]
                        yield event
                if auth.can(who, "read", message.project_id):
                    yield message
                continue
            if not isinstance(message, dict):  # a beat, or rights were changed somewhere
                who = auth.again(who)
                if who is None:
                    raise Unauthorised("You have been signed out: sign in again.")
                yield None
                continue
            if message["id"] <= last:
                continue
            if message["prev"] > last:
                yield from _missed(who, last, message["id"])
            elif reading.may_see(who, message):
                yield message
            last = message["id"]


def _missed(who: auth.Caller, after: int, upto: int | None = None):
    visible = [p["id"] for p in auth.visible_projects(who)]
    while True:
        page = reading.events(who, after, project_ids=visible, limit=reading.EVENTS_MOST)
        for event in page:
            if upto is None or event["id"] <= upto:
                yield Event(event)
        if len(page) < reading.EVENTS_MOST or (upto is not None and page[-1]["id"] >= upto):
            return
        after = page[-1]["id"]
