"""What is said on Telegram: notices, answers to commands, the screen of a session.

A message is {html, buttons, force}: its text, rows of buttons ({text, data} or {text, url}), and
what is asked for where an answer is wanted. What a button says to us is `verb:id`.
"""

import json
import re
from urllib.parse import urlsplit

import inbox
import notices
import permissions
import reading
import rules
import words
from auth import Caller, can
from models import labels, loads, one
from telegram_text import (
    MESSAGE_MOST,
    Text,
    b,
    clean,
    code,
    cut,
    i,
    joined,
    last,
    link,
    marked,
    pre,
    quote,
    units,
)

SUBJECT_MOST = 2500  # units of what is asked for, of one that stands alone in its message
BRIEF_MOST = 220  # of one among others
LINES_MOST = 25  # of a list; the rest is counted
LABEL_MOST = 40  # units on a button
DATA_MOST = 64  # bytes of what a button says to us (https://core.telegram.org/bots/api)
WHOLE = "There is more: tap “Whole text”."

AGENTS = {"claude": "Claude", "codex": "Codex", "gemini": "Gemini", "aider": "aider"}
COMMANDS = ("bash", "shell", "run_shell_command", "exec_command", "local_shell", "execute")
ICONS = {
    "failed": "❌",
    "done": "✅",
    "server": "🔌",
    "lost": "🔌",
    "progress": "➡️",
    "note": "📝",
    "alert": "⚠️",
}

_url = ""


def use_url(url: str) -> None:
    """The hub's address, for links: none where no phone could follow them, and Telegram takes none
    that is no name or number of a host."""
    global _url
    host = urlsplit(url).hostname or ""
    here = host in ("localhost", "0.0.0.0") or host.startswith("127.")
    _url = url if "." in host and not here else ""


def address(path: str) -> str | None:
    return f"{_url}/{path}" if _url else None


# ── pieces ────────────────────────────────────────────────────────────────────────────────────


def button(label: str, data: str) -> dict:
    return {"text": cut(clean(label), LABEL_MOST), "data": data}


def opens(label: str, path: str) -> list[dict]:
    """A button that opens a page of the dashboard, where the hub has an address for it."""
    return [{"text": label, "url": address(path)}] if _url else []


def said(*pieces, buttons=(), force: str | None = None) -> dict:
    """A message's body, cut to what Telegram takes."""
    body = {"html": Text(*pieces).cut().html(), "buttons": [row for row in buttons if row]}
    return body | ({"force": force} if force else {})


def _titled(task_id: str | None, most: int = 120) -> Text | None:
    title = task_id and labels("task", "title", {task_id}).get(task_id)
    if not title:
        return None
    where = address(f"tasks/{task_id}")
    return link(cut(title, most), where) if where else b(cut(title, most))


def _short(ref: str) -> Text:
    return code(ref[:8])


def _where(row: dict) -> Text:
    """The session, server and task something is about, as one line."""
    session = row["session_id"] and labels("session", "name", {row["session_id"]})
    server = row["server_id"] and labels("server", "name", {row["server_id"]})
    names = [*(session or {}).values(), *(server or {}).values()]
    parts = [Text(cut(name, 60)) for name in names]
    return joined([*parts, _titled(row["task_id"])], " · ")


def _by(name: str | None, where: str | None) -> str:
    return f"by {name or 'nobody'}" + (f" {where}" if where else "")


# ── what waits for a person ───────────────────────────────────────────────────────────────────
# Each maker gives (what is asked, what was decided of it or None, rows of buttons).


def permission(ref: str, most: int, opened: str | None = None):
    asked = one("SELECT * FROM permission WHERE id = ?", (ref,))
    ended = None if asked["status"] == "pending" else _decided(asked)
    return _asks(asked, most), ended, [] if ended else _deciding(asked, opened)


def _asks(asked: dict, most: int) -> Text:
    agent = b(AGENTS.get(asked["agent"] or "", asked["agent"] or "The agent"))
    if asked["asks"] == "question":
        return joined([Text("❓ ", agent, " asks:"), _choices(asked, most), _where(asked)])
    if asked["asks"] == "plan":
        plan = marked(asked["subject"]).cut(most)
        return joined([Text("📋 ", agent, " has a plan:"), plan, _where(asked)])
    given = loads(asked["input"])
    if asked["tool"].lower() in COMMANDS:
        wants = Text("🔐 ", agent, " wants to run:")
    else:
        wants = Text("🔐 ", agent, " wants to use ", b(asked["tool"]), ":")
    what = pre(cut(clean(asked["subject"]), most))
    why = given.get("description")
    why = i(cut(why, 300)) if isinstance(why, str) and why else None
    changes = "\n".join(f"{mark} {line}" for mark, line in words.changes_of(given))
    diff = pre(cut(clean(changes), most)) if changes else None
    place = Text("in ", code(cut(asked["directory"], 200))) if asked["directory"] else None
    return joined([wants, what, diff, why, place, _where(asked)])


def _choices(asked: dict, most: int) -> Text:
    found = permissions.questions_of(loads(asked["input"]))
    parts = []
    for each in found:
        options = [
            Text(f"{n}. ", b(o["label"]), f" {o['description']}" if o["description"] else None)
            for n, o in enumerate(each["options"], 1)
        ]
        several = i("(several are possible)") if each["several"] else None
        parts.append(joined([quote(each["question"]), several, *options]))
    return joined(parts or [quote(asked["subject"])], "\n\n").cut(most)


def _decided(asked: dict) -> Text:
    status, where = asked["status"], asked["answered_where"]
    if status == "withdrawn":
        return Text(f"➖ Settled {where or 'without an answer'}.")
    who = asked["decided_by"] or ""
    by = "by a rule" if who.startswith("rule") else _by(who.removeprefix("grant:"), where)
    scope = {"session": " for the session", "always": " always"}.get(asked["scope"], "")
    if status == "denied":
        reason = Text(": ", i(cut(asked["reason"], 300))) if asked["reason"] else "."
        return Text("🚫 ", b("Denied"), f" {by}", reason)
    if asked["asks"] == "question" and asked["answers"]:
        answers = "; ".join(loads(asked["answers"]).values())
        return Text("✅ ", b("Answered"), f" {by}: ", i(cut(answers, 500)))
    done = "Approved" if asked["asks"] == "plan" else "Allowed"
    return Text("✅ ", b(f"{done}{scope}"), f" {by}.")


def _deciding(asked: dict, opened: str | None) -> list[list[dict]]:
    ref = asked["id"]
    open_ = opens("Open", f"sessions/{asked['session_id']}") if asked["session_id"] else []
    if asked["asks"] == "question":
        return [*_options(asked), [button("Do not answer", f"pd:{ref}"), *open_]]
    if asked["asks"] == "plan":
        back = button("Send back…", f"pr:{ref}")
        return [[button("Approve", f"pa:{ref}"), back, *open_], _whole(asked, "p")]
    if opened == ref:
        return [
            [button("Yes, always allow this", f"py:{ref}")],
            [button("Back", f"pb:{ref}")],
        ]
    first = [button("Allow", f"pa:{ref}"), button("Session", f"ps:{ref}")]
    if rules.patterns_for(asked["tool"], loads(asked["input"])):
        first.append(button("Always…", f"pw:{ref}"))
    return [first, [button("Deny", f"pd:{ref}"), *open_], _whole(asked, "p")]


def _whole(asked: dict, what: str) -> list[dict]:
    """The button that sends as a file what was too long for the message."""
    long = units(asked["subject"]) > SUBJECT_MOST
    return [button("Whole text", f"w{what}:{asked['id']}")] if long else []


def _options(asked: dict) -> list[list[dict]]:
    """A button for each choice of a single question; more are answered in a reply."""
    found = permissions.questions_of(loads(asked["input"]))
    if len(found) != 1 or found[0]["several"]:
        return [[button("Answer…", f"pr:{asked['id']}")]]
    labelled = [
        [button(option["label"], f"p{n}:{asked['id']}")]
        for n, option in enumerate(found[0]["options"][:10])
    ]
    return [*labelled, [button("In own words…", f"pr:{asked['id']}")]]


def intervention(ref: str, most: int, _opened=None):
    asked = one("SELECT * FROM intervention WHERE id = ?", (ref,))
    heads = {"approval": "🙋 Asks for approval:", "help": "🆘 Needs help:"}
    context = Text(asked["context"]).cut(most // 2) if asked["context"] else None
    urgent = b("urgent") if asked["urgency"] not in (None, "normal", "low") else None
    text = joined(
        [
            joined([Text(heads.get(asked["kind"], "❓ Asks:")), urgent], " "),
            quote(Text(asked["question"]).cut(most)),
            context,
            _where(asked),
        ]
    )
    if asked["status"] == "responded":
        by = _by(asked["ended_by"], asked["ended_where"])
        return text, Text("✅ ", b("Answered"), f" {by}: ", i(cut(asked["response"], 500))), []
    if asked["status"] == "closed":
        why = inbox.CLOSED.get(asked["closed_why"], "has ended")
        return text, Text(f"➖ Closed: the task {why}."), []
    quick = [button(choice, f"i{n}:{ref}") for n, choice in enumerate(quick_answers(asked))]
    buttons = [quick[start : start + 2] for start in range(0, len(quick), 2)]
    open_ = opens("Open", f"tasks/{asked['task_id']}")
    long = [button("Whole text", f"wi:{ref}")] if units(asked["question"]) > SUBJECT_MOST else []
    return text, None, [*buttons, [button("Reply…", f"ir:{ref}"), *open_], long]


CHOICE = re.compile(r"^\s*(?:[-*•]|\(?[0-9a-hA-H][.)])\s+(\S.{0,59})$", re.MULTILINE)


def quick_answers(asked: dict) -> list[str]:
    """Answers one tap away: the choices a question lists, else what one usually says."""
    if asked["kind"] == "approval":
        return ["Approved", "Rejected"]
    listed = CHOICE.findall(f"{asked['question']}\n{asked['context'] or ''}")
    if 2 <= len(listed) <= 8:
        return [choice.strip() for choice in listed]
    return ["Yes", "No", "You decide"]


def plan(ref: str, most: int, _opened=None):
    task_id, _, version = ref.rpartition("-")
    row = one("SELECT * FROM plan WHERE task_id = ? AND version = ?", (task_id, version))
    task = one("SELECT * FROM task WHERE id = ?", (task_id,))
    number = f" (version {version})" if row["version"] > 1 else ""
    written = plan_text(loads(row["plan"]))
    head = joined([Text(f"📋 Plan{number} for "), _titled(task_id)], "")
    text = joined([head, written.cut(most), _where(task | {"task_id": None, "id": None})], "\n\n")
    if row["status"] != "pending":
        done = inbox.DECIDED[row["status"]]
        by = _by(row["decided_by"], row["decided_where"])
        words_ = Text(": ", i(cut(row["feedback"], 500))) if row["feedback"] else "."
        icon = "✅" if row["status"] == "approved" else "↩️" if row["status"] == "revised" else "➖"
        return text, Text(f"{icon} ", b(done.capitalize()), f" {by}", words_), []
    open_ = opens("Open", f"tasks/{task_id}")
    first = [button("Approve", f"la:{ref}"), button("Send back…", f"lr:{ref}"), *open_]
    long = [button("Whole plan", f"wl:{ref}")] if written.size > most else []
    return text, None, [first, long]


def plan_text(value) -> Text:
    """A plan, whatever JSON it is, as it is read."""
    if isinstance(value, str):
        return marked(value)
    if isinstance(value, dict) and isinstance(value.get("summary"), str):
        steps = value.get("steps") if isinstance(value.get("steps"), list) else []
        shown = [
            Text(f"{n}. ", marked(step) if isinstance(step, str) else _json(step))
            for n, step in enumerate(steps, 1)
        ]
        rest = {k: v for k, v in value.items() if k not in ("summary", "steps")}
        return joined([marked(value["summary"]), joined(shown), rest and pre(_json(rest))])
    return pre(_json(value))


def _json(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def alert(ref: str, most: int, _opened=None):
    row = one("SELECT * FROM alert WHERE id = ?", (ref,))
    text = joined([Text("⚠️ ", Text(row["sentence"]).cut(most)), _where(row)])
    if row["status"] != "open":
        ended = "dismissed" if row["status"] == "dismissed" else "over"
        by = f" by {row['ended_by']}" if ended == "dismissed" else ""
        return text, Text(f"➖ {ended.capitalize()}{by}."), []
    look = [button("Look at it", f"f:{row['session_id']}")] if row["session_id"] else []
    again = [button("Try again", f"tr:{row['task_id']}")] if row["kind"] == "lost" else []
    return text, None, [[*again, button("Dismiss", f"ad:{ref}"), *look]]


def server(ref: str, _most: int, _opened=None):
    row = one("SELECT * FROM server WHERE id = ?", (ref,))
    where = address(f"servers/{ref}")
    name = link(row["name"], where) if where else b(row["name"])
    ended = Text("🟢 Online again.") if row["online"] else None
    return Text("🔌 Server ", name, " is out of sight."), ended, []


MAKERS = {
    "permission": permission,
    "intervention": intervention,
    "plan": plan,
    "alert": alert,
    "server": server,
}


def made_of(subject: str, most: int, opened: str | None = None):
    """(what is asked, what was decided or None, buttons) of a notice's subject."""
    what, _, ref = subject.partition(":")
    return MAKERS[what](ref, most, opened)


# ── messages of notices ───────────────────────────────────────────────────────────────────────

HEADS = {
    "permission": "permission requests",
    "intervention": "questions",
    "plan": "plans to approve",
    "alert": "alerts",
    "server": "servers out of sight",
    "failed": "failures",
    "done": "tasks done",
    "lost": "sessions lost",
    "progress": "steps of the cascade",
    "note": "notes",
}


FOR_ONE = ("w", "pw")  # what buttons say that a message of several things has not


def of_post(post: dict) -> dict:
    """A message as it should stand now: of its notices, or as it was kept."""
    told = notices.notices_of(post)
    if not told:
        return notices.body(post)
    if not post["sent_at"] and post["opened"] != notices.ASKED_FOR:
        told = [notice for notice in told if _stands(notice)]  # what has ended is not told
        if not told:
            return {}
    if post["kind"] == "reminder":
        return _reminder(told)
    if told[0]["subject"]:
        return _waiting(told, post["opened"])
    return _news(told)


def _stands(notice: dict) -> bool:
    return not notice["subject"] or notices.is_open(notice["subject"])


def _waiting(told: list[dict], opened: str | None) -> dict:
    if len(told) == 1:
        asks, ended, buttons = made_of(told[0]["subject"], SUBJECT_MOST, opened)
        return said(joined([asks.cut(MESSAGE_MOST - 700), ended], "\n\n"), buttons=buttons)
    parts, rows = [Text(b(f"{len(told)} {HEADS[told[0]['kind']]}"))], []
    for number, notice in enumerate(told, 1):
        asks, ended, buttons = made_of(notice["subject"], BRIEF_MOST)
        parts.append(joined([Text(f"{number}. ", asks.cut(2 * BRIEF_MOST)), ended]))
        numbered = [b_ | {"text": f"{number} {b_['text']}"} for row in buttons for b_ in row]
        rows.append([b_ for b_ in numbered if not b_.get("data", "w").startswith(FOR_ONE)][:4])
    return said(joined(parts, "\n\n"), buttons=rows)


def _reminder(told: list[dict]) -> dict:
    minutes = round(notices.AGAIN_S / 60) or 1
    waits = "This still waits" if len(told) == 1 else f"{len(told)} still wait"
    return said(f"⏰ {waits} for you, for {minutes} min now.")


def _news(told: list[dict]) -> dict:
    shown, rest = told[:LINES_MOST], len(told) - LINES_MOST
    lines = [_line(notice["event"]) for notice in shown]
    if len(told) == 1:
        return said(lines[0], buttons=_news_buttons(told[0]["event"]))
    head = b(f"{len(told)} {HEADS[told[0]['kind']]}")
    return said(joined([head, *lines, Text(f"… and {rest} more") if rest > 0 else None]))


def _line(event: dict) -> Text:
    kind = notices.TOLD[event["type"]][1]
    cause = event["cause_task_id"]
    titles = labels("task", "title", {cause}) if cause else {}
    what = words.said(event | {"cause": titles.get(cause)})
    if kind == "note":
        author = event["details"].get("author")
        what = Text(f"{author}: ", i(cut(event["details"].get("content") or "", 1500)))
    elif kind == "done":
        what = cut((event["details"].get("result") or {}).get("summary") or "done", 1500)
    names = event["session_id"] and labels("session", "name", {event["session_id"]})
    about = _titled(event["task_id"]) or b(next(iter((names or {}).values()), "a session"))
    return Text(f"{ICONS[kind]} ", about, " — ", Text(what).cut(1500))


def _news_buttons(event: dict) -> list[list[dict]]:
    if not event["task_id"]:
        return []
    show = button("Show", f"t:{event['task_id']}")
    if event["type"] == "task_failed":
        return [[button("Try again", f"tr:{event['task_id']}"), show]]
    return [[show]] if event["type"] == "task_completed" else []


# ── answers to commands ───────────────────────────────────────────────────────────────────────


def _activity(row: dict) -> str:
    if row["status"] != "active" or row["activity"] == "no_signal":
        return row["status"]
    return words.ACTIVITIES.get(row["activity"], ("", "", row["activity"]))[2]


MARKS = {"warn": "🟡", "bad": "🔴", "good": "🟢", "live": "🔵", "quiet": "⚪"}


def _mark(state: str, of=words.STATES) -> str:
    return MARKS[of.get(state, ("", "quiet"))[1]]


def session_list(found: list[dict]) -> dict:
    """Active sessions, numbered, with a button each that shows its screen."""
    if not found:
        return said("No session is active now.")
    lines = [
        Text(
            f"{n}. {_mark(s['activity'], words.ACTIVITIES)} ",
            code(s["tmux_name"]),
            f" {cut(s['name'], 60)} ({cut(s['server_name'] or '?', 40)}) — {_activity(s)}",
            Text(" · ", i(cut(s["task_title"], 80))) if s["task_title"] else None,
        )
        for n, s in enumerate(found[:LINES_MOST], 1)
    ]
    rest = len(found) - LINES_MOST
    buttons = [button(str(n), f"f:{s['id']}") for n, s in enumerate(found[:LINES_MOST], 1)]
    return said(
        joined([b("Active sessions"), *lines, Text(f"… and {rest} more") if rest > 0 else None]),
        buttons=[buttons[start : start + 5] for start in range(0, len(buttons), 5)],
    )


def task_list(found: list[dict], more: bool) -> dict:
    if not found:
        return said("No task is like that.")
    cards = reading.cards(found)
    lines = [
        Text(
            f"{n}. {_mark(t['shown_status'])} ",
            code(t["id"][:8]),
            f" {cut(t['title'], 90)} — {t['shown_status'].replace('_', ' ')}",
            f" on {t['assigned_server_name']}" if t["assigned_server_name"] else None,
        )
        for n, t in enumerate(cards, 1)
    ]
    buttons = [button(str(n), f"t:{t['id']}") for n, t in enumerate(cards, 1)]
    return said(
        joined([b("Tasks"), *lines, Text("… and more") if more else None]),
        buttons=[buttons[start : start + 5] for start in range(0, len(buttons), 5)],
    )


def task_view(row: dict, caller: Caller) -> dict:
    shown = reading.task_json(row)
    waits = [d for d in shown["dependencies"] if not d["resolved"]]
    facts = [
        Text(_mark(shown["shown_status"]), f" {shown['shown_status'].replace('_', ' ')}"),
        Text(shown["reason"]) if shown["reason"] else None,
        _fact("Server", shown["assigned_server_name"]),
        _fact("Session", shown["target_session_name"]),
        _fact("Repo", shown["target_repo"]),
        _fact("Priority", shown["priority"] if shown["priority"] != "normal" else None),
        _fact("Attempt", str(shown["attempt"]) if shown["attempt"] > 1 else None),
        _fact("Waits for", ", ".join(d["depends_on_title"] for d in waits)),
        _fact("Contracts", ", ".join(shown["contracts"])),
    ]
    result = shown["result"]
    summary = result.get("summary") if isinstance(result, dict) else None
    notes = [Text(f"📝 {n['author']}: ", i(cut(n["content"], 200))) for n in
             shown["recent_notes"][-3:]]  # fmt: skip
    spec = Text(shown["spec"] or "").cut(1200)
    body = joined(
        [
            joined([_titled(row["id"], 200), Text(" ", _short(row["id"]))], ""),
            joined(facts),
            spec,
            Text("Result: ", Text(str(summary)).cut(800)) if summary else None,
            joined(notes),
        ],
        "\n\n",
    )
    return said(body, buttons=_task_buttons(row, caller))


def _fact(name: str, value: str | None) -> Text | None:
    return Text(f"{name}: ", b(cut(value, 200))) if value else None


def _task_buttons(row: dict, caller: Caller) -> list[list[dict]]:
    ref, first = row["id"], []
    if can(caller, "task.change", row["project_id"]):
        if row["status"] == "pending":
            first.append(button("Assign", f"ta:{ref}"))
        if row["status"] in ("failed", "cancelled"):
            first.append(button("Try again", f"tr:{ref}"))
        else:
            first += [button("Cancel…", f"tc:{ref}")] if row["status"] != "done" else []
    if row["session_id"]:
        first.append(button("Screen", f"f:{row['session_id']}"))
    return [first, opens("Open", f"tasks/{ref}")]


def server_list(found: list[dict]) -> dict:
    if not found:
        return said("There is no server yet.")
    lines = [
        Text(
            f"{_mark(s['status'])} ",
            b(cut(s["name"], 60)),
            f" — {s['status']}, {s['busy']} of {s['slots']} slots taken",
            Text(" · ", i(", ".join(sorted(s["repos"])[:6]))) if s["repos"] else None,
        )
        for s in found[:LINES_MOST]
    ]
    rest = len(found) - LINES_MOST
    return said(joined([b("Servers"), *lines, Text(f"… and {rest} more") if rest > 0 else None]))


# ── the screen of a session ───────────────────────────────────────────────────────────────────

LINE_MOST = 160  # characters of a line of a screen
KEYS = (
    (("⏎ Enter", "ke"), ("Esc", "kx"), ("⇥ Tab", "kt"), ("Ctrl-C", "kc")),
    (("↑", "ku"), ("↓", "kd")),
)


def screen(session: dict, lines: list[str], may_type: bool) -> dict:
    """A session's screen, the end of it where all is too much. session: a row with server_name."""
    state = session["state"]
    doing = _activity({"status": state, "activity": session["activity"]})
    if state in ("closed", "failed") and session["exit_code"] is not None:
        doing = f"{state}, exit code {session['exit_code']}"
    head = Text(
        "📺 ",
        code(session["tmux_name"]),
        f" {cut(session['name'], 60)} ({cut(session['server_name'], 40)}) — {doing}",
    )
    rows = [clean(line)[:LINE_MOST].rstrip() for line in lines]
    shown = last("\n".join(rows).strip("\n"), MESSAGE_MOST - head.size - 50)
    body = pre(shown) if shown.strip() else i("nothing on the screen yet")
    if state in ("closed", "failed"):
        return said(head, "\n", body)
    ref = session["id"]
    keys = [[button(label, f"{verb}:{ref}") for label, verb in row] for row in KEYS]
    unfocus = button("Unfocus", f"fu:{ref}")
    buttons = [keys[0], [*keys[1], unfocus]] if may_type else [[unfocus]]
    return said(head, "\n", body, buttons=buttons)
