"""The pages of projects, and of the settings: one's own account, people, the hub."""

from flask import current_app, render_template, request, url_for

import auth
import cascade
import chats
import pages_telegram
import prompts
import servers
from models import Invalid, loads, one
from pages import (
    NAME_MOST,
    among,
    bp,
    choice_of,
    done,
    go,
    person,
    show,
    text_of,
    visible,
)

PASSWORD_MOST = auth.PASSWORD_MOST


# ── projects ──────────────────────────────────────────────────────────────────────────────────


@bp.get("/projects", endpoint="project_list")
def project_list():
    """The projects one can see, with what goes on in each and who may do what."""
    ids = [p["id"] for p in visible()]
    members = auth.members(person(), ids)
    return show(
        "settings/projects.html",
        shown=[_project_view(p) | {"members": members.get(p["id"])} for p in visible()],
        roles=auth.ROLES,
        telegram_kinds=chats.KINDS,
        usual_prompt=prompts.DEFAULT,
        prompt_names=sorted(prompts.NAMES),
        users=auth.list_users(person()) if auth.can(person(), "user.admin") else [],
    )


def _project_view(project: dict) -> dict:
    found = servers.list_servers([project["id"]])
    open_states = [s for s in cascade.STATES if s in cascade.OPEN]
    tasks = one(
        f"SELECT COUNT(*) AS n FROM task WHERE project_id = ? AND status IN {among(open_states)}",
        [project["id"], *open_states],
    )
    return {
        "id": project["id"],
        "name": project["name"],
        "profile": project["profile"],
        "settings": loads(project["settings"]),
        "servers": len(found),
        "online": sum(s["status"] == "online" for s in found),
        "open_tasks": tasks["n"],
    }


@bp.post("/projects")
def create_project():
    """Make a project and show it."""
    first = not visible()
    made = auth.create_project(person(), _name())
    return go(url_for("pages.overview", project=None if first else made["id"]))


def _name() -> str:
    name = text_of("name", 2 * NAME_MOST)
    if not name:
        raise Invalid("A project needs a name that is not empty.", field="name")
    return name


@bp.post("/projects/<project_id>")
def change_project(project_id):
    """Rename a project, and say which worker its tasks have when they name none."""
    changes = {"name": _name(), "profile": text_of("profile", NAME_MOST) or "command"}
    if "model" in request.form:
        given = {name: text_of(name, NAME_MOST) for name in ("model", "mode")}
        changes["settings"] = _settings_with(project_id, given)
    auth.change_project(person(), project_id, changes)
    return done(url_for("pages.project_list"))


@bp.post("/projects/<project_id>/prompt")
def change_prompt(project_id):
    """Change the template of the prompt its workers are started with; empty for the usual one."""
    given = {"prompt": text_of("prompt", prompts.TEMPLATE_MOST)}
    auth.change_project(person(), project_id, {"settings": _settings_with(project_id, given)})
    return done(url_for("pages.project_list"))


def _settings_with(project_id: str, given: dict) -> dict:
    """The project's settings with these; those that say nothing are left out."""
    kept = loads(auth.pick_project(person(), project_id)["settings"])
    return {name: value for name, value in (kept | given).items() if value}


@bp.post("/projects/<project_id>/members")
def change_member(project_id):
    """Give a person a role in the project, or take it away."""
    user = auth.get_user(person(), text_of("user", NAME_MOST) or "")
    roles = auth.user_json(user)["roles"]
    roles.pop(project_id, None)
    if role := choice_of("role", auth.ROLES):
        roles[project_id] = role
    auth.change_user(person(), user["id"], {"roles": roles})
    return done(url_for("pages.project_list"))


# ── one's own account ─────────────────────────────────────────────────────────────────────────


@bp.get("/settings")
def settings():
    """One's own account; for an admin of the hub, its people and its settings too."""
    admin = auth.can(person(), "user.admin")
    return show(
        "settings/settings.html",
        telegram=pages_telegram.account(),
        tokens=auth.own_tokens(person()),
        days=auth.TOKEN_DAYS,
        has_password=bool(
            one("SELECT password_hash FROM user WHERE id = ?", (person().id,))["password_hash"]
        ),
        length=auth.PASSWORD_LENGTH,
        users=auth.list_users(person()) if admin else None,
        roles=auth.ROLES,
        hub=_hub_settings() if admin else None,
    )


def _hub_settings() -> list[dict]:
    """{name, value, help} of each."""
    given = current_app.config["HUB"]
    return [
        {"name": name, "value": given.get(name), "help": text}
        for name, _, text in current_app.config["HUB_SETTINGS"]
    ]


@bp.post("/settings/password")
def change_password():
    """Change one's own password; every other browser and program is signed out."""
    old, new = request.form.get("old", ""), _password("new") or ""
    auth.change_own_password(person(), old, new, request.remote_addr or "")
    return _told("The password is changed. Everywhere else you are signed out.")


@bp.post("/settings/tokens")
def create_token():
    """Make a token for a program; it is shown this once."""
    name = text_of("name", NAME_MOST) or ""
    secret = auth.new_token(person(), name)
    page = render_template("settings/_new_token.html", secret=secret, name=name)
    return page, 200, {"HX-Trigger": "live-now"}


@bp.post("/settings/tokens/<token_id>/end")
def end_token(token_id):
    """End one of one's own tokens."""
    auth.end_token(person(), token_id)
    return done(url_for("pages.settings"))


@bp.post("/settings/tokens/end-others")
def end_other_tokens():
    """Sign oneself out everywhere else."""
    auth.end_other_tokens(person())
    return done(url_for("pages.settings"))


def _told(text: str):
    """A sentence beside the form that it answers."""
    return render_template("settings/_told.html", text=text), 200, {"HX-Trigger": "live-now"}


# ── people ────────────────────────────────────────────────────────────────────────────────────


@bp.post("/settings/users")
def create_user():
    """Make a user; without a password they come in by a login link only."""
    username = text_of("username", NAME_MOST)
    if not username:
        raise Invalid("A user needs a name that is not empty.", field="username")
    role, project = choice_of("role", auth.ROLES), text_of("project", NAME_MOST)
    auth.create_user(
        person(),
        username,
        password=_password(),
        is_admin="is_admin" in request.form,
        roles={project: role} if role and project else {},
    )
    return done(url_for("pages.settings"))


def _password(field: str = "password") -> str | None:
    given = request.form.get(field, "")
    if len(given) > PASSWORD_MOST:
        raise Invalid(f"The password is too long: at most {PASSWORD_MOST} characters.", field=field)
    return given or None


@bp.post("/settings/users/<user_id>")
def change_user(user_id):
    """Change a user's rights or password, or lock them out."""
    changes = {"is_admin": "is_admin" in request.form, "disabled": "disabled" in request.form}
    password = _password()
    auth.change_user(person(), user_id, changes | ({"password": password} if password else {}))
    return done(url_for("pages.settings"))


@bp.post("/settings/users/<user_id>/delete")
def delete_user(user_id):
    """Delete a user; what they did stays in the log."""
    auth.delete_user(person(), user_id)
    return done(url_for("pages.settings"))
