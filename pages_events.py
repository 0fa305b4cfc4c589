"""The page of events."""

from models import event_json, rows
from pages import among, bp, chosen, named, person, scope, show

EVENTS_SHOWN = 200


@bp.get("/events")
def event_list():
    """The newest events, the last one first."""
    return show("events.html", events=named(_newest(scope())))


def _newest(ids: list[str]) -> list[dict]:
    hub = " OR project_id IS NULL" if person().is_admin and not chosen() else ""
    found = rows(
        f"SELECT * FROM event WHERE project_id IN {among(ids)}{hub} ORDER BY id DESC LIMIT ?",
        [*ids, EVENTS_SHOWN],
    )
    return [event_json(row) for row in found]
