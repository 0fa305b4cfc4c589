"""Permission requests of coding agents: the rules and grants that answer some of them, what waits
for a person, and the log of every decision.

A request is answered once: by a rule or a grant as it comes in, by a person, or at the terminal
itself (`withdrawn`). What is answered from here goes to the session's server as a command, and the
server says what became of it (`delivery`).

A coding agent's own dialogs are of three kinds (`asks`): it asks for a permission, it asks the
person a question with answers to choose from, or it has a plan to be approved. A question is
allowed by answering it. No rule allows a question or a plan, since they are for people; a rule may
deny them.
"""

import logging
import time
import uuid

import alerts
import moves
import rules
from auth import HUB, Caller, can, find, require
from models import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Transaction,
    dumps,
    execute,
    insert_many,
    iso,
    labels,
    loads,
    new_id,
    newest,
    one,
    rows,
    transaction,
)

log = logging.getLogger("orchestratia.permissions")

STATUSES = ("pending", "allowed", "denied", "withdrawn")
ASKS = ("permission", "question", "plan")
DECISIONS = {"allow": "allowed", "deny": "denied"}
SCOPES = ("once", "session", "always")
ACTIONS = ("allow", "deny", "ask")
LIST_MOST = 500
WAITING_MOST = 200
EVENT_TEXT = 2000  # characters of what is asked for that its event repeats
INPUT_MOST = 256 * 1024  # bytes of a tool's input as JSON; a larger one is kept by its beginning
RULES_MOST = 2000
PENDING_MOST = 50  # of one session: a program in a loop must not fill the inbox
ANSWER_MOST = 4000  # characters of the answer to one question


# ── requests ──────────────────────────────────────────────────────────────────────────────────


def requested(tx: Transaction, caller: Caller, session: dict, frame: dict) -> None:
    """Take a request from the session's server; said twice, it is one.

    frame: request_id, asks, tool, input, directory, agent, via (`hook`: the agent waits for the
    answer; `screen`: it is given by keys); `decision` and `rule_id` when the server has decided by
    its copy of the rules. Raises ValueError for a malformed one.
    """
    request_id = str(uuid.UUID(frame["request_id"]))
    if one("SELECT 1 FROM permission WHERE id = ?", (request_id,)):
        return
    asked = _asked(tx, session, frame) | {"id": request_id}
    if frame.get("decision") in DECISIONS:
        said_there = {"decided_by": _by_rule(frame.get("rule_id")), "delivery": "delivered"}
        asked |= said_there | {"rule_id": frame.get("rule_id"), "reason": frame.get("because")}
        asked |= {"status": DECISIONS[frame["decision"]], "decided_at": tx.now}
        return _log(tx, session, asked)
    verdict = _judge(session, asked)
    # A screen may not show all of a command: by that a rule denies, but only a person allows.
    for_people = asked["via"] == "screen" or asked["asks"] != "permission"
    if verdict["decision"] == "ask" or (verdict["decision"] == "allow" and for_people):
        return _wait(tx, caller, session, asked)
    rule, grant = verdict["rule"], verdict["grant"]
    asked |= {
        "status": DECISIONS[verdict["decision"]],
        "decided_by": _by_rule(rule and rule["id"], grant),
        "decided_at": tx.now,
        "rule_id": rule and rule["id"],
        "reason": verdict["because"] if verdict["decision"] == "deny" else None,
        "delivery": "sent",
    }
    _log(tx, session, asked)
    _answer(tx, session, asked)


def _asked(tx: Transaction, session: dict, frame: dict) -> dict:
    tool, given = str(frame["tool"])[:200], frame.get("input")
    given = given if isinstance(given, dict) else {"value": given}
    asks = frame.get("asks") if frame.get("asks") in ASKS else "permission"
    written = dumps(given)
    if len(written) > INPUT_MOST:
        written = dumps({"too_large": written[:INPUT_MOST]})
    return {
        "project_id": session["project_id"],
        "server_id": session["server_id"],
        "session_id": session["id"],
        "task_id": session["task_id"],
        "attempt": session["attempt"],
        "agent": str(frame.get("agent") or session["profile"] or "")[:60] or None,
        "via": "screen" if frame.get("via") == "screen" else "hook",
        "asks": asks,
        "tool": tool,
        "input": written,
        "subject": str(frame.get("subject") or _subject(asks, tool, given))[:INPUT_MOST],
        "directory": str(frame.get("directory") or session["working_directory"] or "")[:4096],
        "status": "pending",
        "asked_at": tx.now,
        "decided_by": None,
        "decided_at": None,
        "rule_id": None,
        "scope": None,
        "reason": None,
        "answers": None,
        "delivery": None,
    }


def _subject(asks: str, tool: str, given: dict) -> str:
    if asks == "question" and (asked := questions_of(given)):
        return "\n".join(asking["question"] for asking in asked)
    if asks == "plan" and isinstance(given.get("plan"), str):
        return given["plan"]
    return rules.subject_of(tool, given)


def questions_of(given: dict) -> list[dict]:
    """What a question asks: [{question, several, options: [{label, description}]}], empty when
    that cannot be read. several: more than one of the options may be chosen."""
    asked = _list(given.get("questions"))
    if not all(isinstance(each, dict) and isinstance(each.get("question"), str) for each in asked):
        return []
    return [
        {
            "question": each["question"],
            "several": bool(each.get("multiSelect")),
            "options": [
                {"label": option["label"], "description": str(option.get("description") or "")}
                for option in _list(each.get("options"))
                if isinstance(option, dict) and isinstance(option.get("label"), str)
            ],
        }
        for each in asked
    ]


def _questions(asked: dict) -> list[dict]:
    return questions_of(loads(asked["input"])) if asked["asks"] == "question" else []


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _by_rule(rule_id: str | None, grant: dict | None = None) -> str:
    if grant:
        return f"grant:{grant['granted_by']}"
    return f"rule:{rule_id}" if rule_id else "rule"


def _judge(session: dict, asked: dict) -> dict:
    request = {
        "tool": asked["tool"],
        "input": loads(asked["input"]),
        "directory": asked["directory"],
        "agent": asked["agent"],
        "project_id": session["project_id"],
        "server_id": session["server_id"],
        "home": None,
    }
    return rules.judge(rules_for(session["project_id"]), request, grants_of(session["id"]))


def _wait(tx: Transaction, caller: Caller, session: dict, asked: dict) -> None:
    [[open_ones]] = execute(
        "SELECT COUNT(*) FROM permission WHERE session_id = ? AND status = 'pending'",
        (session["id"],),
    ).fetchall()
    if open_ones >= PENDING_MOST:
        why = f"the session has {open_ones} requests open already"
        asked |= {"status": "withdrawn", "answered_where": why, "decided_at": tx.now}
    _insert(asked)
    _emit(tx, asked, "permission_requested", caller.actor)


def _log(tx: Transaction, session: dict, asked: dict) -> None:
    """Keep what a rule or a grant has decided."""
    _insert(asked)
    _emit(tx, asked, "permission_answered", asked["decided_by"] or f"session:{session['name']}")


def _insert(asked: dict) -> None:
    insert_many("permission", tuple(asked), [tuple(asked.values())])


def _emit(tx: Transaction, asked: dict, event: str, actor: str) -> None:
    details = {
        "permission_id": asked["id"],
        "asks": asked["asks"],
        "tool": asked["tool"],
        "subject": asked["subject"][:EVENT_TEXT],
        "status": asked["status"],
    }
    if event == "permission_answered":
        details |= {k: asked.get(k) for k in ("scope", "reason", "rule_id", "answered_where")}
        details["answers"] = _answers_in_order(asked)
    tx.emit(
        event,
        asked["project_id"],
        actor,
        details,
        task=asked["task_id"],
        session=asked["session_id"],
        server=asked["server_id"],
    )


def _answers_in_order(asked: dict) -> list[str] | None:
    if not asked["answers"]:
        return None
    answers = loads(asked["answers"])
    return [answers[each["question"]] for each in _questions(asked)]


def _answer(tx: Transaction, session: dict, asked: dict) -> None:
    """Send the decision to the session's server."""
    said = {
        "request_id": asked["id"],
        "decision": "allow" if asked["status"] == "allowed" else "deny",
        "scope": asked["scope"] or "once",
        "message": asked["reason"],
        "author": asked["decided_by"],
    }
    if asked["answers"]:
        said["answers"] = loads(asked["answers"])
    moves.command(tx, asked["server_id"], "permission_answer", session["id"], None, said)


def answered_there(tx: Transaction, frame: dict, session: dict) -> None:
    """The request was settled on the server: at its terminal, or nobody waits any more."""
    where = str(frame.get("where") or "in the terminal")[:300]
    asked = one(
        "UPDATE permission SET status = 'withdrawn', answered_where = ?, decided_at = ?"
        " WHERE id = ? AND session_id = ? AND status = 'pending' RETURNING *",
        (where, tx.now, frame["request_id"], session["id"]),
    )
    if asked:
        return _emit(tx, asked, "permission_answered", f"session:{session['name']}")
    # Decided here while it was settled there: nothing was passed on.
    execute(
        "UPDATE permission SET delivery = 'failed', delivery_why = ?"
        " WHERE id = ? AND session_id = ? AND delivery = 'sent'",
        (f"it was settled {where} before the answer came", frame["request_id"], session["id"]),
    )


def delivered(tx: Transaction, session: dict, request_id: str, how: str, why: str | None) -> None:
    """What became of an answer: `delivered`, `unknown` or `failed`, with the reason."""
    execute(
        "UPDATE permission SET delivery = ?, delivery_why = ?"
        " WHERE id = ? AND session_id = ? AND delivery = 'sent'",
        (how, why, request_id, session["id"]),
    )


def decide(
    caller: Caller,
    ref: str,
    decision: str,
    *,
    scope: str = "once",
    reason: str | None = None,
    pattern: str | None = None,
    answers: list[str] | None = None,
) -> dict:
    """Answer a request; its row. The first answer counts and goes to the session.

    scope: `session` grants exactly this call for the rest of the session, `always` makes an allow
    rule of `pattern`, or of exactly this call. answers: one for each question, without which a
    question cannot be allowed. Raises Forbidden, Invalid, NotFound, Conflict
    `decided` with who decided what, or `withdrawn`.
    """
    asked = find("permission", caller, ref)
    _check_may_decide(caller, asked, decision, scope)
    answered = _answered(asked, decision, answers)
    patterns = _patterns(asked, pattern) if (decision, scope) == ("allow", "always") else []
    with transaction() as tx:
        decided = one(
            "UPDATE permission SET status = ?, decided_by = ?, decided_at = ?, scope = ?,"
            " reason = ?, answers = ?, answered_where = ?, delivery = 'sent'"
            " WHERE id = ? AND status = 'pending' RETURNING *",
            (
                DECISIONS[decision],
                caller.actor,
                tx.now,
                scope,
                reason or None,
                answered,
                caller.where,
                asked["id"],
            ),
        )
        if decided:
            if decision == "allow" and scope == "session":
                _grant(tx, caller, decided)
            for one_pattern in patterns:
                _rule_of(tx, caller, decided, one_pattern)
            session = one("SELECT * FROM session WHERE id = ?", (decided["session_id"],))
            _answer(tx, session, decided)
            _emit(tx, decided, "permission_answered", caller.actor)
            return decided
    stands = get(caller, asked["id"])
    said = (stands["status"], stands["decided_by"], stands["scope"], stands["answers"])
    if said == (DECISIONS[decision], caller.actor, scope, answered):
        return stands
    raise _too_late(stands)


def _check_may_decide(caller: Caller, asked: dict, decision: str, scope: str) -> None:
    if caller.kind not in ("user", "hub"):
        raise Forbidden("A permission request is answered by people, not with a key.")
    require(caller, "permission.decide", asked["project_id"], "permission request")
    if decision not in DECISIONS:
        raise Invalid(f"Unknown decision {decision!r}: use allow or deny.", field="decision")
    if scope not in SCOPES:
        raise Invalid(f"Unknown scope {scope!r}: use {', '.join(SCOPES)}.", field="scope")
    if decision == "deny" and scope != "once":
        raise Invalid(
            "A denial holds for this request only: to deny always, add a rule that denies.",
            field="scope",
        )
    if scope != "once" and asked["asks"] != "permission":
        raise Invalid(f"The answer to a {asked['asks']} holds once.", field="scope")
    if scope == "always" and not can(caller, "rule.admin", asked["project_id"]):
        raise Forbidden(
            "To allow this always makes a rule, which takes an admin of the project: allow it "
            "once or for the session, or ask an admin."
        )


def _answered(asked: dict, decision: str, answers: list[str] | None) -> str | None:
    """What is stored of the answers: {question: answer} as JSON. Raises Invalid."""
    if asked["asks"] != "question" or decision != "allow":
        if answers:
            raise Invalid("Only a question that is allowed takes answers.", field="answers")
        return None
    questions = [each["question"] for each in _questions(asked)]
    if not questions:
        raise Invalid(
            "Its questions cannot be read here: answer in the session's terminal.", field="answers"
        )
    given = [answer.strip() for answer in answers or ()]
    if max(map(len, given), default=0) > ANSWER_MOST:
        raise Invalid(f"An answer may have {ANSWER_MOST} characters.", field="answers")
    if len(given) != len(questions) or not all(given):
        asks = (
            "one question" if len(questions) == 1 else f"{len(questions)} questions, in this order"
        )
        raise Invalid(
            f"It asks {asks}: give an answer to each. " + " ".join(questions)[:500], field="answers"
        )
    return dumps(dict(zip(questions, given, strict=True)))


def _patterns(asked: dict, pattern: str | None) -> list[str | None]:
    """Patterns of the allow rules that `always` makes. Raises Invalid."""
    if pattern:
        return [_checked_pattern(asked["tool"], pattern)]
    found = rules.patterns_for(asked["tool"], loads(asked["input"]))
    if not found:
        raise Invalid(
            "No rule can stand for exactly this call, since what it does is not known before it "
            "runs: allow it once or for the session, or give a pattern of your own.",
            field="pattern",
        )
    return found


def _checked_pattern(tool: str, pattern: str | None) -> str | None:
    if not pattern:
        return None
    try:
        rules.check_pattern(tool, pattern)
    except ValueError as refused:
        raise Invalid(str(refused), field="pattern") from refused
    return pattern


def _too_late(stands: dict) -> Conflict:
    at = iso(stands["decided_at"])
    if stands["status"] == "withdrawn":
        return Conflict(
            f"This request was settled {stands['answered_where']} at {at}: there is nothing to "
            "decide any more.",
            code="withdrawn",
        )
    return Conflict(
        f"{stands['decided_by']} {stands['status']} this already at {at}: your answer changes "
        "nothing.",
        code="decided",
        decided_by=stands["decided_by"],
        decision=next(verb for verb, status in DECISIONS.items() if status == stands["status"]),
        decided_at=at,
        scope=stands["scope"],
    )


def get(caller: Caller, ref: str) -> dict:
    """A request's row by id or unique prefix."""
    return find("permission", caller, ref)


def list_requests(
    project_ids: list[str],
    *,
    status: str | None = None,
    session: dict | None = None,
    task: dict | None = None,
    limit: int = LIST_MOST,
) -> list[dict]:
    """Requests as JSON, newest first: the log of decisions with what waits. Raises Invalid."""
    if status and status not in STATUSES:
        raise Invalid(f"Unknown status {status!r}: use one of {', '.join(STATUSES)}.")
    if session or task:
        branches = [{"session_id": session["id"]} if session else {"task_id": task["id"]}]
        where, values = ("status = ?", [status]) if status else ("", [])
        return permissions_json(newest("permission", branches, where, values, limit))
    branches = [{"project_id": project} for project in project_ids]
    if status:
        branches = [b | {"status": status} for b in branches]
    return permissions_json(newest("permission", branches, "", [], limit))


def waiting(project_ids: list[str], task_id: str | None = None) -> list[dict]:
    """What waits for a person, oldest first, at most 200."""
    which, values = ("AND task_id = ?", [task_id]) if task_id else ("", [])
    found = rows(
        f"SELECT * FROM permission WHERE project_id IN ({', '.join('?' * len(project_ids))})"
        f" AND status = 'pending' {which} ORDER BY seq LIMIT ?",
        [*project_ids, *values, WAITING_MOST],
    )
    return permissions_json(found)


def permissions_json(found: list[dict]) -> list[dict]:
    """Request rows as the API shows them."""
    names = labels("session", "name", {row["session_id"] for row in found if row["session_id"]})
    hosts = labels("server", "name", {row["server_id"] for row in found})
    titles = labels("task", "title", {row["task_id"] for row in found if row["task_id"]})
    shown = ("id", "status", "tool", "subject", "directory", "agent", "via", "project_id")
    shown += ("server_id", "session_id", "task_id", "attempt", "decided_by", "scope", "reason")
    shown += ("rule_id", "delivery", "delivery_why", "answered_where", "asks")
    return [
        {name: row[name] for name in shown}
        | {
            "input": loads(row["input"]),
            "questions": _questions(row),
            "answers": loads(row["answers"]) if row["answers"] else None,
            "server_name": hosts.get(row["server_id"]),
            "session_name": names.get(row["session_id"]),
            "task_title": titles.get(row["task_id"]),
            "asked_at": iso(row["asked_at"]),
            "decided_at": iso(row["decided_at"]),
        }
        for row in found
    ]


# ── grants ────────────────────────────────────────────────────────────────────────────────────


def _grant(tx: Transaction, caller: Caller, asked: dict) -> None:
    """Exactly this call is allowed for the rest of the session."""
    execute(
        "INSERT OR IGNORE INTO session_grant (id, session_id, tool, subject, directory,"
        " granted_by, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            new_id(),
            asked["session_id"],
            asked["tool"],
            asked["subject"],
            asked["directory"],
            caller.actor,
            tx.now,
        ),
    )


def grants_of(session_id: str) -> list[dict]:
    """What is granted for the rest of a session, oldest first."""
    return rows("SELECT * FROM session_grant WHERE session_id = ? ORDER BY seq", (session_id,))


def grants_json(caller: Caller, session: dict) -> list[dict]:
    require(caller, "read", session["project_id"], "session")
    return [
        {k: g[k] for k in ("id", "tool", "subject", "directory", "granted_by")}
        | {"at": iso(g["at"])}
        for g in grants_of(session["id"])
    ]


def revoke_grant(caller: Caller, grant_id: str) -> None:
    """Take a grant back. Raises NotFound, Forbidden."""
    grant = one(
        "SELECT g.*, s.project_id, s.server_id FROM session_grant g JOIN session s"
        " ON s.id = g.session_id WHERE g.id = ?",
        (grant_id,),
    )
    if not grant:
        raise NotFound(f"There is no grant {grant_id!r}: it may have been taken back already.")
    require(caller, "permission.decide", grant["project_id"], "grant")
    with transaction() as tx:
        execute("DELETE FROM session_grant WHERE id = ?", (grant_id,))
        details = {"tool": grant["tool"], "subject": grant["subject"][:EVENT_TEXT]}
        tx.emit(
            "grant_revoked",
            grant["project_id"],
            caller.actor,
            details,
            session=grant["session_id"],
            server=grant["server_id"],
        )


# ── rules ─────────────────────────────────────────────────────────────────────────────────────


def rules_for(project_id: str | None) -> list[dict]:
    """Rules that may apply in a project (None: those for all projects), in their order."""
    return rows(
        "SELECT * FROM rule WHERE project_id IS NULL OR project_id = ? ORDER BY position, seq",
        (project_id,),
    )


def rules_of_server(server: dict) -> list[dict]:
    """The rules its agent keeps a copy of, in their order."""
    shown = ("id", "project_id", "server_id", "agent", "tool", "pattern", "action")
    return [
        {name: rule[name] for name in shown}
        for rule in rules_for(server["project_id"])
        if rule["enabled"] and rule["server_id"] in (None, server["id"])
    ]


def list_rules(caller: Caller, project_ids: list[str]) -> list[dict]:
    """The rules the caller can see as JSON, in their order."""
    among = ", ".join("?" * len(project_ids))
    found = rows(
        f"SELECT * FROM rule WHERE project_id IS NULL OR project_id IN ({among})"
        " ORDER BY position, seq",
        project_ids,
    )
    return [rule_json(rule) for rule in found]


def rule_json(rule: dict) -> dict:
    shown = ("id", "position", "project_id", "server_id", "agent", "tool", "pattern", "action")
    said = {name: rule[name] for name in (*shown, "note", "created_by")}
    return said | {"enabled": bool(rule["enabled"]), "created_at": iso(rule["created_at"])}


def _may_change_rules(caller: Caller, project_id: str | None) -> None:
    """A rule for all projects is for admins of the hub. Raises Forbidden."""
    if caller.kind not in ("user", "hub"):
        raise Forbidden("Rules are changed by people, not with a key.")
    require(caller, "rule.admin" if project_id else "rule.all", project_id, "rule")


def add_rule(caller: Caller, data: dict) -> dict:
    """Add a rule; its row. data: project_id, server_id, agent, tool, pattern, action, note,
    enabled, position (of the rule it comes before; last without one).

    Raises Forbidden, Invalid, Conflict (too many).
    """
    project_id = data.get("project_id")
    _may_change_rules(caller, project_id)
    fields = _rule_fields(data | {"tool": data.get("tool") or "*"})
    with transaction() as tx:
        [[known]] = execute("SELECT COUNT(*) FROM rule").fetchall()
        if known >= RULES_MOST:
            raise Conflict(f"There are {known} rules already: remove some that are not needed.")
        position = data.get("position")
        rule = {
            "id": new_id(),
            "position": _free_place(position),
            "project_id": project_id,
            **fields,
            "created_by": caller.actor,
            "created_at": tx.now,
        }
        insert_many("rule", tuple(rule), [tuple(rule.values())])
        _rules_changed(tx, caller, rule, "added")
        return rule


def _rule_fields(data: dict) -> dict:
    if data.get("action") not in ACTIONS:
        raise Invalid(f"A rule says one of {', '.join(ACTIONS)}.", field="action")
    tool = str(data.get("tool") or "*").strip()
    if data.get("server_id") and not one(
        "SELECT 1 FROM server WHERE id = ? AND (project_id = ? OR ? IS NULL)",
        (data["server_id"], data.get("project_id"), data.get("project_id")),
    ):
        raise Invalid("The rule names a server that is not of its project.", field="server_id")
    return {
        "server_id": data.get("server_id") or None,
        "agent": data.get("agent") or None,
        "tool": tool,
        "pattern": _checked_pattern(tool, data.get("pattern")),
        "action": data["action"],
        "note": data.get("note") or "",
        "enabled": int(data.get("enabled", True)),
    }


def _free_place(position: int | None) -> int:
    """A free position: the one given, those from it on moved up; the next one without it."""
    if position is None:
        return (one("SELECT MAX(position) AS last FROM rule")["last"] or 0) + 1
    execute("UPDATE rule SET position = position + 1 WHERE position >= ?", (position,))
    return position


def change_rule(caller: Caller, rule_id: str, data: dict) -> dict:
    """Change fields of a rule, or its place; its row. Raises Forbidden, Invalid, NotFound."""
    rule = _rule(caller, rule_id)
    _may_change_rules(caller, rule["project_id"])
    fields = _rule_fields(rule | data)
    with transaction() as tx:
        if data.get("position") is not None and data["position"] != rule["position"]:
            fields["position"] = _free_place(data["position"])
        columns = ", ".join(f"{name} = ?" for name in fields)
        execute(f"UPDATE rule SET {columns} WHERE id = ?", (*fields.values(), rule["id"]))
        changed = rule | fields
        _rules_changed(tx, caller, changed, "changed")
        return changed


def remove_rule(caller: Caller, rule_id: str) -> None:
    """Raises Forbidden, NotFound."""
    rule = _rule(caller, rule_id)
    _may_change_rules(caller, rule["project_id"])
    with transaction() as tx:
        execute("DELETE FROM rule WHERE id = ?", (rule["id"],))
        _rules_changed(tx, caller, rule, "removed")


def _rule(caller: Caller, rule_id: str) -> dict:
    wanted = rule_id.strip().lower()
    found = rows("SELECT * FROM rule WHERE id >= ? AND id < ? LIMIT 2", (wanted, wanted + "g"))
    seen = [r for r in found if r["project_id"] is None or can(caller, "read", r["project_id"])]
    if len(seen) != 1 or len(wanted) < 4:
        raise NotFound(f"There is no rule {rule_id!r}, or more than one begins so: list them.")
    return seen[0]


def _rule_of(tx: Transaction, caller: Caller, asked: dict, pattern: str | None) -> None:
    """An allow rule that stands for a request from now on, in its project and for its agent."""
    rule = add_rule(
        caller,
        {
            "project_id": asked["project_id"],
            "agent": asked["agent"],
            "tool": asked["tool"],
            "pattern": pattern,
            "action": "allow",
            "note": f"made of a request in session {asked['session_id'][:8]}",
        },
    )
    execute("UPDATE permission SET rule_id = ? WHERE id = ?", (rule["id"], asked["id"]))


def _rules_changed(tx: Transaction, caller: Caller, rule: dict, how: str) -> None:
    """Agents get the rules anew."""
    said = {k: rule[k] for k in ("id", "tool", "pattern", "action")} | {"change": how}
    if rule["project_id"]:
        tx.emit("rules_changed", rule["project_id"], caller.actor, said)
    else:
        log.info("%s: a rule for all projects was %s: %s", caller.actor, how, said)
    where, values = ("AND project_id = ?", [rule["project_id"]]) if rule["project_id"] else ("", [])
    for server in rows(f"SELECT id FROM server WHERE revoked = 0 {where}", values):
        # One that still waits would bring no more than this one.
        execute(
            "DELETE FROM command WHERE server_id = ? AND type = 'rules_changed'"
            " AND acked_at IS NULL",
            (server["id"],),
        )
        moves.command(tx, server["id"], "rules_changed", None)


def try_rules(caller: Caller, request: dict) -> dict:
    """What would become of a tool call, and why: judge's answer with the whole rule.

    request: tool, input, directory, agent, project_id, server_id; changes nothing.
    """
    if request.get("project_id"):
        require(caller, "read", request["project_id"], "project")
    verdict = rules.judge(rules_for(request.get("project_id")), request)
    rule = verdict["rule"]
    return {
        "decision": verdict["decision"],
        "because": verdict["because"],
        "rule": rule_json(rule) if rule else None,
        "parts": verdict["parts"],
    }


def begin() -> None:
    """Store the rules a hub begins with, once."""
    with transaction():
        if one("SELECT 1 FROM meta WHERE key = 'rules_seeded'"):
            return
        execute("INSERT INTO meta (key, value) VALUES ('rules_seeded', '1')")
        for place, rule in enumerate(rules.DEFAULT_RULES, 1):
            made = {"id": new_id(), "position": place, "project_id": None}
            made |= _rule_fields(rule) | {"created_by": HUB.actor, "created_at": time.time()}
            insert_many("rule", tuple(made), [tuple(made.values())])


def end_of_session(tx: Transaction, session: dict) -> None:
    """A session that has ended waits for nothing."""
    for asked in rows(
        "UPDATE permission SET status = 'withdrawn', decided_at = ?,"
        " answered_where = 'when its session ended' WHERE session_id = ? AND status = 'pending'"
        " RETURNING *",
        (tx.now, session["id"]),
    ):
        _emit(tx, asked, "permission_answered", HUB.actor)
    execute("DELETE FROM session_grant WHERE session_id = ?", (session["id"],))


# ── public daemons ────────────────────────────────────────────────────────────────────────────


def rules_for_daemon(caller: Caller) -> list[dict]:
    """The rules that deny, as the hooks of a public daemon read them, narrow ones first.

    Its hooks glob a command as one text, by which an allow could be stretched (`git *` would fit
    `git x && rm -rf /`), and know no rule that asks; so those that allow stay here.
    """
    server = one("SELECT * FROM server WHERE id = ?", (caller.server_id,))
    found = [r for r in rules_of_server(server) if r["action"] == "deny"]
    found.sort(key=lambda r: (r["server_id"] is None, r["project_id"] is None))
    return [
        {
            "id": r["id"],
            "name": f"{r['tool']} {r['pattern'] or ''}".strip(),
            "is_active": True,
            "tool_pattern": r["tool"],
            "param_pattern": r["pattern"],
            "scope_type": _scope_type(r),
            "scope_id": r["server_id"] or r["project_id"],
            "agent_filter": r["agent"] or "all",
            "action": "deny",
        }
        for r in found
    ]


def _scope_type(rule: dict) -> str:
    if rule["server_id"]:
        return "server"
    return "project" if rule["project_id"] else "tenant"


LOGGED = {"allowed": "allowed", "denied": "denied", "asked": "withdrawn"}


def take_log(caller: Caller, entries: list) -> int:
    """Keep what a public daemon's hooks have decided; how many entries could be used.

    What was asked there waits in its terminal, where alone it can be answered: an alert says so.
    """
    kept = 0
    with transaction() as tx:
        for entry in entries:
            session = isinstance(entry, dict) and _session_of(caller, entry.get("session_id"))
            if session and entry.get("decision") in LOGGED and entry.get("tool_name"):
                _keep(tx, session, entry)
                kept += 1
    return kept


def _session_of(caller: Caller, session_id) -> dict | None:
    return one(
        "SELECT * FROM session WHERE id = ? AND server_id = ?",
        (str(session_id), caller.server_id),
    )


def _keep(tx: Transaction, session: dict, entry: dict) -> None:
    frame = {"tool": entry["tool_name"], "input": entry.get("tool_input")}
    asked = _asked(tx, session, frame | {"agent": entry.get("agent_name")})
    asked |= {
        "id": new_id(),
        "via": "log",
        "status": LOGGED[entry["decision"]],
        "decided_by": _by_rule(entry.get("matched_rule_id")),
        "rule_id": entry.get("matched_rule_id"),
        "reason": entry.get("reason"),
        "decided_at": tx.now,
    }
    alerts.over(tx, session["id"], "prompt")
    if entry["decision"] == "asked":
        asked |= {"decided_by": None, "answered_where": "in the terminal"}
        sentence = (
            f"{asked['agent'] or 'The agent'} in {session['name']} may wait for a permission "
            f"({asked['tool']}: {asked['subject'][:300]}): answer in its terminal."
        )
        alerts.begin(tx, "prompt", session["project_id"], sentence, session=session)
    _log(tx, session, asked)


def input_of(tool: str, text: str) -> dict:
    """A tool's input of one text: a command, a path or an address."""
    return {rules.main_parameter(tool): text}
