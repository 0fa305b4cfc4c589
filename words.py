"""States and events in plain words, each with its shape and tone; what a call would change."""

import difflib

# state of a task, server or session: (shape in _shapes.html, tone in app.css)
STATES = {
    "blocked": ("bars", "quiet"),
    "ready": ("ring", "live"),
    "not assigned": ("dashed", "quiet"),
    "pending": ("dashed", "quiet"),
    "assigned": ("half", "live"),
    "planning": ("diamond", "live"),
    "plan_review": ("diamond-full", "warn"),
    "running": ("play", "live"),
    "needs_human": ("triangle", "warn"),
    "done": ("check", "good"),
    "failed": ("cross", "bad"),
    "cancelled": ("slash", "quiet"),
    "online": ("disc", "good"),
    "offline": ("cross", "bad"),
    "draining": ("half", "warn"),
    "revoked": ("slash", "quiet"),
    "starting": ("dashed", "live"),
    "active": ("disc", "good"),
    "disconnected": ("triangle", "warn"),
    "recovering": ("half", "warn"),
    "lost": ("cross", "bad"),
    "closed": ("square", "quiet"),
}

# what a live session does: (shape, tone, in words)
ACTIVITIES = {
    "working": ("play", "live", "working"),
    "idle": ("ring", "quiet", "idle"),
    "waiting_input": ("diamond-full", "warn", "waits for input"),
    "blocked:permission": ("triangle", "warn", "asks for a permission"),
    "blocked:question": ("triangle", "warn", "asks a question"),
    "blocked:plan": ("triangle", "warn", "waits for its plan's approval"),
    "blocked:trust": ("triangle", "warn", "asks whether to trust the directory"),
    "quota": ("bars", "warn", "out of quota"),
    "error": ("cross", "bad", "shows an error"),
    "no_signal": ("dashed", "quiet", "no signal"),
}


def _assignee_or_fields(event: dict) -> str:
    if event["details"].get("assignee"):
        return f"meant for {event['details']['assignee']} once it is free"
    return f"changed: {', '.join(event['details'].get('changed', ()))}"


def _completed(event: dict) -> str:
    summary = (event["details"].get("result") or {}).get("summary")
    return f"done: {summary}" if summary else "done"


def _dependency(verb: str):
    def sentence(event: dict) -> str:
        details = event["details"]
        key = f" (input {details['key']})" if details.get("key") else ""
        return f"{verb} {details.get('title', 'a task')}{key}"

    return sentence


def _resolved(event: dict) -> str:
    cause = event.get("cause") or "a task it waited for"
    if key := event["details"].get("key"):
        return f"input {key} has arrived from {cause}"
    return f"no longer waits for {cause}"


def _ended(event: dict) -> str:
    code = event["details"].get("exit_code")
    return "session closed" if code is None else f"session closed, exit code {code}"


BRIEF_MOST = 200  # characters of a call in a sentence; the log of decisions has all of it


def _brief(text: str) -> str:
    first, _, more = text.strip().partition("\n")
    return f"{first[:BRIEF_MOST]}…" if more or len(first) > BRIEF_MOST else first


ASKS = {"question": "asks", "plan": "asks for its plan to be approved"}


def _requested(event: dict) -> str:
    said = _Details(event["details"])
    if said["asks"] in ASKS:
        return f"{ASKS[said['asks']]}: {_brief(said['subject'])}"
    return f"asks to use {said['tool']}: {_brief(said['subject'])}"


PERMISSION_SHAPES = {"denied": ("cross", "bad"), "withdrawn": ("slash", "quiet")}
SCOPES = {"session": " (for the session)", "always": " (always)"}


def _permission(event: dict) -> str:
    said = _Details(event["details"])
    where = said["answered_where"] or "without an answer"
    done = f"settled {where}" if said["status"] == "withdrawn" else ""
    if said["answers"] and said["asks"] == "question":
        return f"answered: {_brief('; '.join(said['answers']))}"
    call = f"{said['tool']} {done}".strip() + f": {_brief(said['subject'])}"
    length = SCOPES.get(said["scope"], "")
    return call if done else f"{said['status']} {call}{length}"


# type of an event: (shape, tone, what happened: a text with the fields of its details, or a
# function of the event). live.js listens for exactly these types.
WORDS = {
    "task_created": ("ring", "quiet", "created"),
    "task_assigned": ("half", "live", "given to {agent}"),
    "task_auto_assigned": ("half", "live", "given to {agent}, who fits best ({score} points)"),
    "task_planning": ("diamond", "live", "the worker is planning"),
    "task_plan_submitted": ("diamond-full", "warn", "plan handed in"),
    "task_plan_approved": ("check", "good", "plan approved"),
    "task_plan_revision": ("diamond", "live", "plan sent back"),
    "task_started": ("play", "live", "attempt {attempt} started"),
    "task_needs_human": ("triangle", "warn", "waits for a person"),
    "intervention_responded": ("check", "good", "question answered"),
    "permission_requested": ("triangle", "warn", _requested),
    "permission_answered": ("check", "good", _permission),
    "task_note_added": ("square", "quiet", "note added"),
    "task_updated": ("square", "quiet", _assignee_or_fields),
    "task_completed": ("check", "good", _completed),
    "task_failed": ("cross", "bad", "attempt {attempt} failed: {error}"),
    "task_cancelled": ("slash", "quiet", "cancelled"),
    "task_retried": ("ring", "live", "opened again as attempt {next_attempt}"),
    "task_released": ("ring", "warn", "taken back, {why}; attempt {next_attempt} is next"),
    "task_status_update": ("square", "quiet", "{status}: told to the session that ordered it"),
    "late_report": ("triangle", "warn", "late report on attempt {attempt} ({said}) kept"),
    "contract_fulfilled": ("check", "good", "contract {key} delivered"),
    "contract_amended": ("check", "good", "contract {key} supplied by hand"),
    "dependency_added": ("bars", "quiet", _dependency("depends on")),
    "dependency_removed": ("bars", "quiet", _dependency("no longer depends on")),
    "dependency_resolved": ("check", "quiet", _resolved),
    "task_unblocked": ("ring", "live", "no longer blocked"),
    "session_requested": ("dashed", "quiet", "session asked for"),
    "session_started": ("dashed", "live", "session started"),
    "session_active": ("disc", "good", "session active"),
    "session_recovered": ("half", "warn", "session recovered"),
    "session_closed": ("square", "quiet", _ended),
    "session_disconnected": ("triangle", "warn", "session out of sight: its server is away"),
    "session_lost": ("cross", "bad", "session lost: {reason}"),
    "session_failed": ("cross", "bad", "session did not start: {error}"),
    "session_log_gap": ("triangle", "warn", "output is missing from the log: {why}"),
    "session_log_removed": ("slash", "quiet", "the log has begun to lose its start: {why}"),
    "server_registered": ("ring", "live", "server registered"),
    "server_online": ("disc", "good", "server online"),
    "server_offline": ("cross", "bad", "server offline, silent for {silent_s} s"),
    "server_draining": ("half", "warn", "server takes no new work"),
    "server_resumed": ("disc", "good", "server takes work again"),
    "server_revoked": ("slash", "quiet", "server revoked"),
    "server_changed": ("square", "quiet", _assignee_or_fields),
    "backup_made": ("check", "quiet", "a backup of the hub was made"),
    "hub_restored": ("triangle", "warn", "the hub was restored from a backup of {made_at}"),
    "clock_set": ("triangle", "warn", "the hub's clock was set by {by_s} s"),
    "alert_raised": ("triangle", "warn", "{sentence}"),
    "alert_ended": ("check", "quiet", "alert {status}"),
    "rules_changed": ("square", "quiet", "rule {change}: {action} {tool} {pattern}"),
    "grant_revoked": ("slash", "quiet", "grant taken back: {tool} {subject}"),
    "registration_token_created": ("square", "quiet", "registration token made"),
    "project_created": ("square", "quiet", "project {name} created"),
    "project_changed": ("square", "quiet", _assignee_or_fields),
    "user_created": ("square", "quiet", "user {username} created"),
    "user_changed": ("square", "quiet", "user {username} changed"),
    "user_deleted": ("slash", "quiet", "user {username} deleted"),
}


class _Details(dict):
    def __missing__(self, key):
        return "?"


def said(event: dict) -> str:
    """What happened, in plain words; an event from `_named` can name the task that caused it."""
    _, _, words = WORDS.get(event["type"], ("", "", event["type"].replace("_", " ")))
    if callable(words):
        return words(event)
    return words.format_map(_Details(event["details"]))


def shape_of(event: dict) -> tuple[str, str]:
    if event["details"].get("status") in PERMISSION_SHAPES:
        return PERMISSION_SHAPES[event["details"]["status"]]
    return WORDS.get(event["type"], ("square", "quiet", ""))[:2]


# ── what a call would change ──────────────────────────────────────────────────────────────────

COMPARED_MOST = 500  # lines on each side; more are shown as taken out and put in


def changes_of(given: dict) -> list[tuple[str, str]]:
    """What a tool's input changes of a file: lines with `-`, `+`, ` `, or `@` between two places;
    none when it is no edit."""
    found = []
    for before, after in _edits(given):
        found += ([("@", "")] if found else []) + _compared(before, after)
    return found or _patch(given)


def _edits(given: dict) -> list[tuple[str, str]]:
    """[(before, after)] of the forms in which coding agents name an edit."""
    several = given["edits"] if isinstance(given.get("edits"), list) else [given]
    pairs = [
        (edit.get("old_string", ""), edit.get("new_string", edit.get("content")))
        for edit in several
        if isinstance(edit, dict)
    ]
    return [pair for pair in pairs if all(isinstance(text, str) for text in pair)]


def _compared(before: str, after: str) -> list[tuple[str, str]]:
    if before.endswith("\n") and after.endswith("\n"):
        before, after = before[:-1], after[:-1]
    old, new = (text.split("\n") if text else [] for text in (before, after))
    if max(len(old), len(new)) > COMPARED_MOST:
        return [("-", line) for line in old] + [("+", line) for line in new]
    found = []
    for verb, a, b, c, d in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if verb == "equal":
            found += [(" ", line) for line in old[a:b]]
        else:
            found += [("-", line) for line in old[a:b]] + [("+", line) for line in new[c:d]]
    return found


def _patch(given: dict) -> list[tuple[str, str]]:
    """The lines of a patch in its own words, as one coding agent sends it."""
    texts = [t for t in given.values() if isinstance(t, str) and t.startswith("*** Begin Patch")]
    lines = texts[0].split("\n") if texts else []
    return [(line[:1], line[1:]) if line[:1] in "+- " and line else ("@", line) for line in lines]
