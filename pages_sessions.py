"""The pages of sessions."""

from flask import request, url_for

import auth
import cascade
import sessions
from pages import bp, done, person, scope, show, styled


@bp.get("/sessions")
def session_list():
    """The live sessions, with `all` those that ended too."""
    every = "all" in request.args
    return show(
        "sessions/list.html", sessions=sessions.list_sessions(scope(), every=every), every=every
    )


@bp.get("/sessions/<ref>")
def session(ref):
    """One session: its state, its terminal and its log."""
    shown = sessions.session_view(sessions.get_session(person(), ref))
    project_id = shown["project_id"]
    page = show(
        "sessions/session.html",
        session=shown,
        live_session=shown["status"] in cascade.SESSION_LIVE,
        may_watch=auth.can(person(), "session.watch", project_id),
        may_close=auth.can(person(), "session.close", project_id)
        and shown["status"] in cascade.SESSION_LIVE | {"lost"},
    )
    return styled(page)


@bp.post("/sessions/<ref>/close")
def close_session(ref):
    """Have a session ended."""
    sessions.close_session(person(), ref, force="force" in request.form)
    return done(url_for("pages.session", ref=ref))
