"""What a public daemon is told to type into a session: its own frames, their text made fit for a
terminal.

The daemon types a sentence around that text, with Enter, into whatever reads there, which may be a
shell: so nothing may act as a key, and nothing that others wrote as a command.
"""

import re

TEXT_MOST = 3000  # characters typed at once: tmux takes 16 KB
TITLE_MOST = 200
EMPTY = "(empty)"  # nothing at all would be Enter by itself

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
KEYS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
UNSAFE = re.compile(r"[^\w .,-]+")
# What a shell acts on, and the wide form of the same sign, which it does not.
TWINS = {ord(sign): ord(sign) + 0xFEE0 for sign in ";|&$`<>()'\"\\!{}[]^*~#"}


def typed(text, most: int = TEXT_MOST) -> str:
    """`text` as one line that reaches the program as it stands: the daemon hands it to tmux, which
    takes a leading `-` for an option and a trailing `;` for its own, and a newline is Enter."""
    line = CONTROL.sub(" ", str(text)).strip()
    line = line if len(line) <= most else line[: most - 1].rstrip() + "…"
    line = f" {line}" if line.startswith("-") else line
    return f"{line} ." if line.endswith(";") else line or EMPTY


def harmless(text, most: int = TITLE_MOST) -> str:
    """`text` without anything a shell would act on: it may be one that reads it."""
    return typed(" ".join(UNSAFE.sub(" ", CONTROL.sub(" ", str(text))).split()), most)


def spoken(text, most: int = TEXT_MOST) -> str:
    """`text` readable as it was, with nothing in it that a shell would act on."""
    return typed(CONTROL.sub(" ", str(text)).translate(TWINS), most)


def _nudge(kind: str, session: dict, frame: dict, **fields) -> dict:
    task_id = frame.get("task_id") or ""
    return {"type": kind, "session_id": session["id"], "task_id": task_id} | fields


def _assigned(session: dict, frame: dict) -> dict:
    # never with pending_approval: its banner is written as if typed, with Enter
    task = frame["task"]
    return {
        "type": "task_assigned",
        "session_id": session["id"],
        "task_id": task["id"],
        "title": harmless(task["title"]),
        "pending_approval": False,
        "require_plan": bool(task["require_plan"]),
    }


def _status_update(session: dict, frame: dict) -> dict:
    status = harmless(frame.get("status") or "")
    return _nudge(
        "task_status_update",
        session,
        frame,
        title=harmless(frame.get("title") or ""),
        status=status,
        status_label=status.replace("_", " "),
        summary=harmless(frame.get("summary") or ""),
    )


def _note(session: dict, frame: dict) -> dict:
    content = spoken(frame.get("content") or "")
    author = harmless(frame.get("author") or "somebody")
    if frame.get("mentioned_via") == "dependency":
        return {
            "type": "note_for_session",
            "target_session_id": session["id"],
            "content": content,
            "author": author,
            "mentioned_via": "dependency",
        }
    urgent = bool(frame.get("urgent"))
    return _nudge("task_note", session, frame, content=content, author=author, urgent=urgent)


def _cancelled(session: dict, frame: dict) -> dict:
    """There is no frame for it: an urgent note of fixed words."""
    said = f"This task was taken back, stop working on it {frame.get('task_id')}"
    return _note(session, frame | {"content": said, "author": "hub", "urgent": True})


# What follows is typed by itself: its first word would be a command to a shell.


def _response(session: dict, frame: dict) -> dict:
    response = spoken(f"Answer: {frame.get('response') or EMPTY}")
    return _nudge("intervention_response", session, frame, response=response)


def _revision(session: dict, frame: dict) -> dict:
    feedback = spoken(f"The plan is sent back: {frame.get('feedback') or EMPTY}")
    return _nudge("plan_revision", session, frame, feedback=feedback)


def _question(session: dict, frame: dict) -> dict:
    return {
        "type": "intervention_for_session",
        "target_session_id": session["id"],
        "question": spoken(frame["question"]),
        "source": harmless(frame["source"]),
    }


NUDGES = {
    "task_assigned": _assigned,
    "task_updated": lambda session, frame: _nudge("task_updated", session, frame),
    "task_status_update": _status_update,
    "task_cancelled": _cancelled,
    "task_note": _note,
    "intervention_response": _response,
    "intervention_for_session": _question,
    "plan_approved": lambda session, frame: _nudge("plan_approved", session, frame),
    "plan_revision": _revision,
}
