"""The pages of servers."""

from flask import render_template, request, url_for

import auth
import servers
import web
from models import NotFound, one
from pages import bp, done, person, scope, show, visible


@bp.get("/servers", endpoint="servers")
def server_list():
    """Every server with what it has and how busy it is."""
    return show(
        "servers/list.html",
        servers=servers.list_servers(scope(), revoked="revoked" in request.args),
        may_add=[p for p in visible() if auth.can(person(), "server.token", p["id"])],
    )


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
