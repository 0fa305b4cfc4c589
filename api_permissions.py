"""`/api/v1`: permission requests, the rules that answer some of them, grants and alerts."""

from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field, StringConstraints

import alerts
import auth
import document
import inbox
import permissions
import sessions
from api import Name, Said, Shape, Word, bp, given, project_ids, work
from document import answers, listing
from models import Invalid
from web import caller

Pattern = Annotated[str, StringConstraints(max_length=500)]
Call = Annotated[str, StringConstraints(min_length=1, max_length=200_000)]


class RequestPage(Shape):
    project_id: str | None = None
    session_id: str | None = None
    task_id: str | None = None
    status: str | None = None
    limit: Annotated[int, Field(ge=1, le=permissions.LIST_MOST)] = 100


class Decision(Shape):
    decision: Literal["allow", "deny"]
    scope: Literal[permissions.SCOPES] = "once"
    reason: Said | None = None
    pattern: Pattern | None = None
    answers: Annotated[list[Said], Field(max_length=20)] | None = None


class RulePage(Shape):
    project_id: str | None = None


class RuleFields(Shape):
    server_id: str | None = None
    agent: Word | None = None
    tool: Word | None = None
    pattern: Pattern | None = None
    action: Literal[permissions.ACTIONS] | None = None
    note: Annotated[str, StringConstraints(max_length=1000)] | None = None
    enabled: bool | None = None
    position: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class RuleIn(RuleFields):
    action: Literal[permissions.ACTIONS]
    project: Name | None = None
    project_id: Name | None = None


class RuleTest(Shape):
    tool: Word = "Bash"
    command: Call | None = None
    input: dict | None = None
    directory: Annotated[str, StringConstraints(max_length=4096)] = ""
    agent: Word | None = None
    project_id: str | None = None
    server_id: str | None = None


class AlertPage(Shape):
    project_id: str | None = None
    status: str | None = None


class Collecting(Shape):
    claim: UUID
    wait: Annotated[float, Field(ge=0, le=25)] = 0


# ── requests ──────────────────────────────────────────────────────────────────────────────────


@work.get("/permissions")
@work.input(RequestPage, location="query")
@answers(listing("permissions", document.Permission))
def list_permissions(query_data: RequestPage):
    """Permission requests and what was decided of them, newest first: the log of decisions."""
    named = {
        kind: auth.find(kind, caller(), ref, name=name)
        for kind, ref, name in (
            ("session", query_data.session_id, "name"),
            ("task", query_data.task_id, None),
        )
        if ref
    }
    found = permissions.list_requests(
        project_ids(query_data.project_id),
        status=query_data.status,
        limit=query_data.limit,
        **named,
    )
    return {"permissions": found}


@work.get("/permissions/<ref>")
@answers(document.Permission)
def get_permission(ref):
    """One permission request by id or unique prefix."""
    return permissions.permissions_json([permissions.get(caller(), ref)])[0]


@work.post("/permissions/<ref>/decide")
@work.input(Decision)
@answers(document.Permission)
def decide(ref, json_data: Decision):
    """Allow or deny a request (people only); the first answer counts and goes to the session.

    A question is allowed with `answers`: one for each of its questions, in their order.
    """
    decided = permissions.decide(
        caller(),
        ref,
        json_data.decision,
        scope=json_data.scope,
        reason=json_data.reason,
        pattern=json_data.pattern,
        answers=json_data.answers,
    )
    return permissions.permissions_json([decided])[0]


@work.get("/sessions/<ref>/grants")
@answers(listing("grants", document.Grant))
def list_session_grants(ref):
    """What is granted for the rest of the session."""
    return {"grants": permissions.grants_json(caller(), sessions.get_session(caller(), ref))}


@bp.delete("/grants/<ref>")
@answers(document.Deleted)
def revoke_grant(ref):
    """Take a grant back: what it allowed is asked again."""
    permissions.revoke_grant(caller(), ref)
    return {"deleted": True}


@work.get("/sessions/<ref>/explain")
@answers(document.Signals)
def explain_session(ref):
    """What the session is doing, which signal says so, and which signals are silent."""
    return sessions.explain(caller(), ref)


@work.post("/interventions/<ref>/collect")
@work.input(Collecting)
@answers(document.Intervention)
def collect_answer(ref, json_data: Collecting):
    """Wait for the answer. For the session that asked it is then returned here and not typed."""
    row = inbox.collect(caller(), ref, str(json_data.claim), json_data.wait)
    return inbox.interventions_json([row])[0]


# ── rules ─────────────────────────────────────────────────────────────────────────────────────


@bp.get("/rules")
@bp.input(RulePage, location="query")
@answers(listing("rules", document.Rule))
def list_permission_rules(query_data: RulePage):
    """The rules by which permission requests are answered, in their order."""
    return {"rules": permissions.list_rules(caller(), project_ids(query_data.project_id))}


@bp.post("/rules")
@bp.input(RuleIn)
@answers(document.Rule, 201)
def add_rule(json_data: RuleIn):
    """Add a rule: to a project (its admins), or to all of them (hub admins)."""
    data = {k: v for k, v in given(json_data).items() if v is not None}
    named = data.pop("project", None) or data.pop("project_id", None)
    data["project_id"] = auth.pick_project(caller(), named)["id"] if named else None
    _name_server(data)
    return permissions.rule_json(permissions.add_rule(caller(), data)), 201


def _name_server(data: dict) -> None:
    if data.get("server_id"):
        data["server_id"] = auth.find("server", caller(), data["server_id"], name="name")["id"]


@bp.patch("/rules/<ref>")
@bp.input(RuleFields)
@answers(document.Rule)
def change_rule(ref, json_data: RuleFields):
    """Change a rule, or its place in the order."""
    data = given(json_data)
    fixed = {k: v for k, v in data.items() if v is not None or k in ("server_id", "agent")}
    if "pattern" in data:
        fixed["pattern"] = data["pattern"] or None
    if not fixed:
        raise Invalid("Nothing to change: name at least one field.")
    _name_server(fixed)
    return permissions.rule_json(permissions.change_rule(caller(), ref, fixed))


@bp.delete("/rules/<ref>")
@answers(document.Deleted)
def remove_rule(ref):
    """Remove a rule."""
    permissions.remove_rule(caller(), ref)
    return {"deleted": True}


@bp.post("/rules/test")
@bp.input(RuleTest)
@answers(document.Verdict)
def try_rules(json_data: RuleTest):
    """What would become of a tool call, by which rule, part by part; changes nothing."""
    if json_data.input is None and json_data.command is None:
        raise Invalid("Say what to test: `command`, or `input` for another tool.", field="command")
    project = json_data.project_id and auth.pick_project(caller(), json_data.project_id)
    request = {
        "tool": json_data.tool,
        "input": json_data.input or permissions.input_of(json_data.tool, json_data.command),
        "directory": json_data.directory,
        "agent": json_data.agent,
        "project_id": project["id"] if project else None,
        "server_id": json_data.server_id,
        "home": None,
    }
    return permissions.try_rules(caller(), request)


# ── alerts ────────────────────────────────────────────────────────────────────────────────────


@work.get("/alerts")
@work.input(AlertPage, location="query")
@answers(listing("alerts", document.Alert))
def list_alerts(query_data: AlertPage):
    """What a person should look at: stuck workers, usage limits, doubtful deliveries."""
    found = alerts.list_alerts(project_ids(query_data.project_id), query_data.status)
    return {"alerts": found}


@work.post("/alerts/<ref>/dismiss")
@answers(document.Alert)
def dismiss_alert(ref):
    """Take an alert off the list."""
    return alerts.alerts_json([alerts.dismiss(caller(), ref)])[0]
