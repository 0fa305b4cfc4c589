"""The page of events."""

from flask import request

import reading
import servers
import sessions
import words
from models import Invalid
from pages import bp, chosen, named, person, scope, show

EVENTS_SHOWN = 200
KINDS = ("task", "session", "server", "intervention", "contract", "dependency", "project", "user")
FIELDS = ("kind", "type", "actor", "server", "session")  # of the filter, as the address has them


@bp.get("/events")
def event_list():
    """What happened, the last first: of everything, or of what the address asks for."""
    wanted = {name: request.args.get(name, "").strip() for name in FIELDS}
    if wanted["kind"] and wanted["kind"] not in KINDS:
        raise Invalid(f"Unknown kind {wanted['kind']!r}: use one of {', '.join(KINDS)}.")
    before = request.args.get("before", type=int)
    found, older = reading.events_page(
        scope(), person().is_admin and not chosen(), _exactly(wanted), before, EVENTS_SHOWN
    )
    return show(
        "events.html",
        events=named(found),
        older=older,
        first=before is None,
        wanted=wanted,
        given={k: v for k, v in wanted.items() if v},
        kinds=KINDS,
        types=sorted(words.WORDS),
        among=servers.list_servers(scope()),
    )


def _exactly(wanted: dict) -> dict:
    """The filter with ids for names."""
    server, session = wanted["server"], wanted["session"]
    return {
        "kind": wanted["kind"],
        "type": wanted["type"],
        "actor": wanted["actor"],
        "server_id": server and servers.get_server(person(), server)["id"],
        "session_id": session and sessions.get_session(person(), session)["id"],
    }
