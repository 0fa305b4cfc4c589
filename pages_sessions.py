"""The pages of sessions."""

from flask import request, url_for

import auth
import cascade
import reading
import servers
import sessions
import web
import words
from models import event_json, one, rows
from pages import NAME_MOST, bp, done, named, person, scope, show, styled
from pages_permissions import about_session

LIVE = cascade.SESSION_LIVE
REPLAY_CSP = web.CSP.replace("script-src 'self'", "script-src 'self' 'wasm-unsafe-eval'")
MOMENTS_MOST = 1000  # events beside a replay
LOOKED_THROUGH = 20_000  # events after its start and before its end, of a session without a task
AFTERMATH_S = 10.0  # what its end leads to still belongs to a session


@bp.app_template_global()
def activity_of(session: dict) -> tuple[str, str, str] | None:
    """Shape, tone and words of what a session does; None where nobody can know."""
    if session["status"] not in ("active", "recovering"):
        return None
    plain = ("square", "quiet", session["activity"].replace("_", " "))
    return words.ACTIVITIES.get(session["activity"], plain)


@bp.get("/sessions")
def session_list():
    """The live sessions, with `all` those that ended too; of one server, by a part of the name."""
    every = "all" in request.args
    wanted = {name: request.args.get(name, "").strip()[:NAME_MOST] for name in ("q", "server")}
    server = wanted["server"] and servers.get_server(person(), wanted["server"])["id"]
    listed = sessions.list_sessions(
        scope(), every=every, q=wanted["q"] or None, server_id=server or None
    )
    return show(
        "sessions/list.html",
        sessions=listed,
        every=every,
        wanted=wanted,
        given={name: value for name, value in wanted.items() if value},
        among=servers.list_servers(scope()),
        most=sessions.LIST_MOST,
    )


@bp.get("/sessions/<ref>")
def session(ref):
    """One session: its state, its terminal and its log."""
    shown = sessions.session_view(sessions.get_session(person(), ref))
    project_id = shown["project_id"]
    page = show(
        "sessions/session.html",
        session=shown,
        live_session=shown["status"] in LIVE,
        **about_session(sessions.get_session(person(), shown["id"])),
        may_watch=auth.can(person(), "session.watch", project_id),
        may_close=auth.can(person(), "session.close", project_id)
        and shown["status"] in LIVE | {"lost"},
    )
    return styled(page)


@bp.post("/sessions/<ref>/close")
def close_session(ref):
    """Have a session ended."""
    sessions.close_session(person(), ref, force="force" in request.form)
    return done(url_for("pages.session", ref=ref))


# ── the replay ────────────────────────────────────────────────────────────────────────────────


@bp.get("/sessions/<ref>/replay")
def replay(ref):
    """A session played back, with the events of its task to jump to."""
    row = sessions.get_session(person(), ref)
    auth.require(person(), "session.watch", row["project_id"], "session")
    shown = sessions.session_view(row)
    page = show(
        "sessions/replay.html",
        session=shown,
        live_session=shown["status"] in LIVE,
        printed=shown["log_end"] > shown["log_start"],
        missing=sessions.logs().marks(row["id"]),
        began=_began(row),
        moments=_moments(row),
    )
    # the player is made of WebAssembly; everything else stays as strict as on every page
    return page, {"Content-Security-Policy": REPLAY_CSP}


def _moments(session: dict) -> list[dict]:
    """The events of a session, each with `offset`: seconds since its recording began."""
    began = _began(session)
    found = _events_of(session)
    shown = named([event_json(row) for row in found])
    return [
        e | {"offset": max(0.0, row["at"] - began)} for e, row in zip(shown, found, strict=True)
    ]


def _began(session: dict) -> float:
    """When its recording begins: with the first byte that is there."""
    first, _, _ = sessions.logs().blocks(session["id"], 0, 1)
    return first[0].at if first else session["started_at"] or session["created_at"]


def _events_of(session: dict) -> list[dict]:
    """Event rows of its task while it was there, or, without a task, of its own."""
    task = session["task_id"] and one("SELECT seq FROM task WHERE id = ?", (session["task_id"],))
    since, until = session["created_at"], session["closed_at"]
    if task:
        before, values = ("", []) if until is None else (" AND at <= ?", [until + AFTERMATH_S])
        return rows(
            f"SELECT * FROM event WHERE task_seq = ? AND at >= ?{before} ORDER BY id LIMIT ?",
            [task["seq"], since, *values, MOMENTS_MOST],
        )
    return rows(
        "SELECT * FROM event WHERE session_id = ?1 AND project_id = ?2 AND id >= ?3 AND"
        " (id BETWEEN ?3 AND ?3 + ?5 OR id BETWEEN ?4 - ?5 AND ?4) ORDER BY id LIMIT ?6",
        (
            session["id"],
            session["project_id"],
            _first_event(since),
            _first_event(None if until is None else until + AFTERMATH_S),
            LOOKED_THROUGH,
            MOMENTS_MOST,
        ),
    )


def _first_event(at: float | None) -> int:
    """Id of the first event at this time or later, found by halving: ids grow with time."""
    low, high = 1, reading.last_event_id() + 1
    while at is not None and low < high:
        middle = (low + high) // 2
        row = one("SELECT at FROM event WHERE id >= ? ORDER BY id LIMIT 1", (middle,))
        if row and row["at"] < at:
            low = middle + 1
        else:
            high = middle
    return high
