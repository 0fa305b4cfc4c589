"""The pages of servers."""

import time

from flask import render_template, request, url_for

import auth
import cascade
import picture
import reading
import servers
import sessions
import web
from models import Invalid, NotFound, one
from pages import (
    NAME_MOST,
    NOT_FINISHED,
    bp,
    done,
    named,
    person,
    scope,
    show,
    text_of,
    visible,
    words_of,
)

EVENTS_SHOWN = 15
TASKS_SHOWN = 50


@bp.get("/servers", endpoint="servers")
def server_list():
    """Every server with what it has and how busy it is."""
    found = servers.list_servers(scope(), revoked="revoked" in request.args)
    return show(
        "servers/list.html",
        servers=found,
        charts=_charts([s["id"] for s in found]),
        may_add=[p for p in visible() if auth.can(person(), "server.token", p["id"])],
    )


def _charts(ids: list[str]) -> dict[str, dict]:
    """{server id: {cpu, memory, disk: the line of the last hour, or None}}."""
    return {
        server_id: {kind: picture.spark(samples, kind) for kind in ("cpu", "memory", "disk")}
        for server_id, samples in servers.loads_of(ids, time.time()).items()
    }


@bp.get("/servers/<ref>")
def server(ref):
    """Everything about one server."""
    row = servers.get_server(person(), ref)
    project = [row["project_id"]]
    at_work, _ = reading.list_tasks(
        project,
        status=NOT_FINISHED,
        server_id=row["id"],
        limit=TASKS_SHOWN,
    )
    events, _ = reading.events_page(project, False, {"server_id": row["id"]}, None, EVENTS_SHOWN)
    return show(
        "servers/server.html",
        server=servers.server_json(row),
        charts=_charts([row["id"]])[row["id"]],
        at_work=reading.cards(at_work),
        sessions=sessions.list_sessions(project, server_id=row["id"]),
        events=named(events),
        may_admin=auth.can(person(), "server.admin", row["project_id"]) and not row["revoked"],
    )


@bp.post("/servers/<ref>/change")
def describe_server(ref):
    """Rename a server, and say what it has beside what its agent found."""
    changes = {"name": text_of("name", NAME_MOST) or ""}
    slots = request.form.get("slots", "").strip()
    if slots:
        if not slots.isdecimal() or not 1 <= int(slots) <= servers.SLOTS_MOST:
            raise Invalid(
                f"Slots are a whole number from 1 to {servers.SLOTS_MOST:,}.", field="slots"
            )
        changes["slots"] = int(slots)
    changes["declared"] = {kind: words_of(kind) or None for kind in cascade.LISTS}
    changes["manual"] = "manual" in request.form
    servers.change_server(person(), ref, changes)
    return done(url_for("pages.server", ref=ref))


@bp.post("/servers/tokens")
def registration():
    """Make a registration token; it is shown this once, with the commands to type."""
    project = auth.pick_project(person(), request.form.get("project_id"))
    made = auth.registration_token(person(), project["id"], web.hub_url())
    page = "servers/_token.html" if request.headers.get("HX-Request") else "servers/token.html"
    return render_template(
        page,
        token=made["token"],
        expires_at=made["expires_at"],
        commands=auth.install_commands(made["token"], web.hub_url()),
        for_project=project,
        **_arrival(made["id"]),
    )


@bp.get("/servers/tokens/<token_id>")
def registration_state(token_id):
    """Whether the server a token was made for has arrived."""
    return render_template("servers/_arrival.html", **_arrival(token_id))


def _arrival(token_id: str) -> dict:
    """{registration, server}: the server a registration token has brought, if any."""
    found = one("SELECT * FROM registration WHERE id = ?", (token_id,))
    if not found or not auth.can(person(), "server.token", found["project_id"]):
        raise NotFound("There is no such registration token, or it is not visible to you.")
    server = one("SELECT * FROM server WHERE id = ?", (found["server_id"],))
    return {"registration": found, "server": server and servers.server_json(server)}


SERVER_VERBS = {"drain": servers.drain, "resume": servers.resume, "revoke": servers.revoke}


@bp.post("/servers/<ref>/<any(drain, resume, revoke):verb>")
def change_server(ref, verb):
    """Drain, resume or revoke a server."""
    SERVER_VERBS[verb](person(), ref)
    return done(url_for("pages.servers"))
