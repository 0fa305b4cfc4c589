"""The pages of permissions: deciding on requests, the rules and their tester, the log, alerts."""

import re
from itertools import groupby

from flask import render_template, request, url_for

import alerts
import auth
import permissions
import rules
import servers
import sessions
import words
from models import Invalid, containing, newest, one
from pages import (
    NAME_MOST,
    bp,
    choice_of,
    coding_agents,
    done,
    person,
    scope,
    show,
    text_of,
    visible,
)

TEXT_MOST = 50_000
LOG_SHOWN = 100
LOOKED_BACK = 50_000  # requests that a page of the log looks through: its cost does not grow
CHANGES_SHOWN = 20  # requests on the page of their session or task
OWN = re.compile(r"own-\d\d?")  # a field for the answer to a question in one's own words
HUB_RULES_FOLDED = 10  # so many rules in a row that came with the hub are folded


@bp.post("/inbox/permissions/<ref>/decide")
def decide_permission(ref):
    """Allow or deny a request; the first answer counts."""
    decision = choice_of("decision", tuple(permissions.DECISIONS))
    permissions.decide(
        person(),
        ref,
        decision or "",
        scope=choice_of("scope", permissions.SCOPES) or "once",
        reason=text_of("reason", TEXT_MOST),
        pattern=text_of("pattern", rules.PATTERN_MOST),
        answers=_answers(),
    )
    return done(url_for("pages.waiting"))


def _answers() -> list[str] | None:
    """What a form says to each question: own words, or what was chosen."""
    count = 1 + max((int(name[4:]) for name in request.form if OWN.fullmatch(name)), default=-1)
    chosen = [", ".join(request.form.getlist(f"choice-{n}")) for n in range(count)]
    own = [text_of(f"own-{n}", permissions.ANSWER_MOST) for n in range(count)]
    return [a or b for a, b in zip(own, chosen, strict=True)] or None


@bp.post("/inbox/alerts/<ref>/dismiss")
def dismiss_alert(ref):
    """Take an alert off the list."""
    alerts.dismiss(person(), ref)
    return done(url_for("pages.waiting"))


@bp.post("/sessions/<ref>/grants/<grant_id>/revoke")
def revoke_grant(ref, grant_id):
    """Take back what was allowed for the rest of a session."""
    permissions.revoke_grant(person(), grant_id)
    return done(url_for("pages.session", ref=ref))


# ── what a request's card shows ───────────────────────────────────────────────────────────────

BEGINNING_LINES, BEGINNING_MOST = 10, 800  # of a long text; the rest is unfolded
bp.add_app_template_global(words.changes_of)


@bp.app_template_global()
def beginning_of(text: str) -> str:
    """The text itself, or the beginning of one that would fill the page."""
    lines = text.split("\n")
    if len(lines) <= 1.5 * BEGINNING_LINES and len(text) <= 1.5 * BEGINNING_MOST:
        return text
    return "\n".join(lines[:BEGINNING_LINES])[:BEGINNING_MOST]


@bp.app_template_global()
def patterns_of(asked: dict) -> list[str]:
    """The patterns of the rules that would stand for exactly this request."""
    return rules.patterns_for(asked["tool"], asked["input"])


def about_session(row: dict) -> dict:
    """What a session's page says of signals, grants and decisions."""
    return {
        "explained": sessions.explain(person(), row["id"]),
        "grants": permissions.grants_json(person(), row),
        "requests": permissions.list_requests([], session=row, limit=CHANGES_SHOWN),
    }


# ── rules ─────────────────────────────────────────────────────────────────────────────────────


@bp.get("/rules")
def rule_list():
    """The rules by which requests are answered, in their order, with a tester."""
    return show("rules/rules.html", **_rules_shown())


def _rules_shown(**more) -> dict:
    found = permissions.list_rules(person(), scope())
    return {
        "runs": [list(run) for _, run in groupby(found, key=_came_with_the_hub)],
        "folded": lambda run: _came_with_the_hub(run[0]) and len(run) >= HUB_RULES_FOLDED,
        "places_of": _places(found),
        "actions": permissions.ACTIONS,
        "places": [p for p in visible() if auth.can(person(), "rule.admin", p["id"])],
        "everywhere": auth.can(person(), "rule.all"),
        "among": servers.list_servers(scope()),
        "server_names": {s["id"]: s["name"] for s in servers.list_servers(scope())},
        "agents": coding_agents(),
    } | more


def _came_with_the_hub(rule: dict) -> bool:
    return rule["created_by"] == auth.HUB.actor and rule["enabled"]


def _places(found: list[dict]) -> dict[str, dict]:
    """{rule: {up, down: the position that puts it there, None at the end}}."""
    around = zip([None, *found[:-1]], found, [*found[1:], None], strict=True)
    return {
        rule["id"]: {
            "up": above and above["position"],
            "down": below and below["position"] + 1,
        }
        for above, rule, below in around
    }


@bp.post("/rules")
def add_rule():
    """Add a rule at the end."""
    permissions.add_rule(person(), _rule_fields() | {"project_id": _project()})
    return done(url_for("pages.rule_list"))


def _rule_fields() -> dict:
    return {
        "action": choice_of("action", permissions.ACTIONS),
        "tool": text_of("tool", NAME_MOST) or "*",
        "pattern": text_of("pattern", rules.PATTERN_MOST),
        "agent": text_of("agent", NAME_MOST),
        "server_id": text_of("server", NAME_MOST),
        "note": text_of("note", 1000) or "",
    }


def _project() -> str | None:
    """The project a form names, None for all. Raises NotFound."""
    given = request.form.get("project")
    return auth.pick_project(person(), given)["id"] if given else None


@bp.post("/rules/<rule_id>")
def change_rule(rule_id):
    """Turn a rule on or off, or move it before another."""
    if request.form.get("enabled") in ("0", "1"):
        changes = {"enabled": request.form["enabled"] == "1"}
    elif (place := request.form.get("position", "")).isdigit() and len(place) < 8:
        changes = {"position": int(place)}
    else:
        raise Invalid("The form does not say what to change of the rule.")
    permissions.change_rule(person(), rule_id, changes)
    return done(url_for("pages.rule_list"))


@bp.post("/rules/<rule_id>/remove")
def remove_rule(rule_id):
    """Remove a rule."""
    permissions.remove_rule(person(), rule_id)
    return done(url_for("pages.rule_list"))


@bp.post("/rules/test")
def try_rules():
    """What would become of a call, and by which rule; changes nothing."""
    tool = text_of("tool", NAME_MOST) or "Bash"
    said = permissions.try_rules(
        person(),
        {
            "tool": tool,
            "input": permissions.input_of(tool, text_of("command", TEXT_MOST) or ""),
            "directory": text_of("directory", 4096) or "/",
            "agent": text_of("agent", NAME_MOST),
            "project_id": _project(),
            "server_id": None,
            "home": None,
        },
    )
    if request.headers.get("HX-Request"):
        return render_template("rules/_verdict.html", verdict=said)
    return render_template("rules/rules.html", **_rules_shown(verdict=said))


# ── the log ───────────────────────────────────────────────────────────────────────────────────


@bp.get("/permissions")
def permission_log():
    """Every request and what was decided of it, newest first, of what the address asks for."""
    wanted = {name: request.args.get(name, "").strip()[:NAME_MOST] for name in LOG_FIELDS}
    if wanted["status"] and wanted["status"] not in permissions.STATUSES:
        raise Invalid(
            f"Unknown status {wanted['status']!r}: use one of {', '.join(permissions.STATUSES)}.",
            field="status",
        )
    session = wanted["session"] and sessions.get_session(person(), wanted["session"])
    before = request.args.get("before", type=int)
    found, older = _log(wanted, session or None, before)
    return show(
        "rules/log.html",
        requests=permissions.permissions_json(found),
        older=older,
        first=before is None,
        wanted=wanted,
        given={name: value for name, value in wanted.items() if value},
        statuses=permissions.STATUSES,
        session=session or None,
    )


LOG_FIELDS = ("status", "session", "q")  # of the filter, as the address has them


def _log(wanted: dict, session: dict | None, before: int | None) -> tuple[list[dict], int | None]:
    """(request rows that fit, newest first; where older ones go on, or None)."""
    last = one("SELECT MAX(seq) AS seq FROM permission")["seq"] or 0
    top = min(before, last + 1) if before is not None else last + 1
    floor = max(0, top - LOOKED_BACK)
    where, values = ["seq < ?", "seq > ?"], [top, floor]
    if wanted["status"]:
        where.append("status = ?")
        values.append(wanted["status"])
    if wanted["q"]:
        where.append("(tool LIKE ? ESCAPE '\\' OR subject LIKE ? ESCAPE '\\')")
        values += [containing(wanted["q"])] * 2
    branches = [{"project_id": project} for project in scope()]
    if session:
        branches = [{"session_id": session["id"]}]
    found = newest("permission", branches, " AND ".join(where), values, LOG_SHOWN + 1)
    if len(found) > LOG_SHOWN:
        return found[:LOG_SHOWN], found[LOG_SHOWN - 1]["seq"]
    return found, floor + 1 if floor else None
