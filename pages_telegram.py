"""The pages of Telegram: pairing, what one wishes to be told, a project's bot and its groups."""

from flask import render_template, request, url_for

import auth
import chats
from models import Invalid
from pages import NAME_MOST, bp, done, person, text_of

TAB_MOST = 64


@bp.app_template_global()
def bots_reached() -> list[dict]:
    """The bots that speak of a project one sees: {id, username, trouble, projects}."""
    mine = {p["id"]: p["name"] for p in auth.visible_projects(person())}
    found = []
    for bot in chats.bots():
        names = [mine[project] for project in chats.served(bot) if project in mine]
        if names or bot == chats.hub_bot():
            found.append(chats.bot_row(bot) | {"projects": names})
    return found


@bp.app_template_global()
def telegram_of(project_id: str) -> dict | None:
    """A project's own bot, if any, and its groups, for who may change them."""
    if not auth.can(person(), "project.admin", project_id):
        return None
    bot = chats.bot_of(project_id)
    own = bot is not None and chats.has_own_bot(project_id)
    return {
        "own": own,
        "bot": chats.bot_row(bot) if bot else None,
        "groups": chats.groups_of(person(), project_id),
    }


def account() -> dict:
    """What the settings page says of one's chats and wishes."""
    return {
        "chats": chats.own_chats(person()),
        "wish": chats.wish_of(person().id),
        "kinds": chats.KINDS,
        "wishes": [
            project | {"kinds": chats.kinds_of(person().id, project["id"])}
            for project in auth.visible_projects(person())
        ],
    }


@bp.post("/settings/telegram/code")
def pairing_code():
    """Make a code that pairs a chat with oneself; it is shown this once."""
    code = chats.new_code(person())
    page = render_template(
        "settings/_code.html",
        code=f"{code[: chats.NAMED]}-{code[chats.NAMED :]}",
        links=[
            {"bot": bot["username"], "url": f"https://t.me/{bot['username']}?start={code}"}
            for bot in bots_reached()
            if bot["username"]
        ],
        minutes=round(chats.CODE_S / 60),
    )
    return page, 200, {"HX-Trigger": "live-now"}


@bp.post("/settings/telegram/chats/<chat_id>/unpair")
def unpair(chat_id):
    """End one of one's own pairings."""
    chats.unpair(person(), chat_id)
    return done(url_for("pages.settings"))


@bp.post("/settings/telegram/wishes")
def set_wish():
    """Say when to be left in peace, and whether the phone waits for the dashboard."""
    chats.set_wish(
        person(),
        text_of("quiet_from", NAME_MOST),
        text_of("quiet_to", NAME_MOST),
        text_of("zone", NAME_MOST),
        "patient" in request.form,
    )
    return done(url_for("pages.settings"))


@bp.post("/settings/telegram/projects/<project_id>")
def set_kinds(project_id):
    """Say what to be told of a project."""
    chats.set_kinds(person(), project_id, request.form.getlist("kind"))
    return done(url_for("pages.settings"))


@bp.post("/projects/<project_id>/telegram")
def set_bot(project_id):
    """Give the project a bot of its own, or have the hub's speak of it again."""
    token = text_of("token", 2 * NAME_MOST)
    if not token and "remove" not in request.form:
        raise Invalid("Paste the token that @BotFather gave you.", field="token")
    chats.set_project_bot(person(), project_id, token if "remove" not in request.form else None)
    return done(url_for("pages.project_list"))


@bp.post("/projects/telegram/groups/<chat_id>")
def change_group(chat_id):
    """Say what a group is told, or take it off."""
    if "remove" in request.form:
        chats.unbind_group(person(), chat_id)
    else:
        chats.set_group_kinds(person(), chat_id, request.form.getlist("kind"))
    return done(url_for("pages.project_list"))


@bp.post("/seen")
def seen():
    """A browser says that somebody looks at the dashboard, or looks away."""
    tab = (request.form.get("tab") or "")[:TAB_MOST]
    chats.presence.seen(person().id, tab, "away" not in request.form)
    return "", 204
