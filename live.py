"""The WebSockets of people: `/ws/terminal/<session>` and `/ws/dashboard`."""

import json
import logging
import threading
from functools import partial

from apiflask import APIBlueprint
from flask import request
from simple_websocket import ConnectionClosed

import auth
import feed
import web
import ws
from auth import Caller
from models import Event, Invalid, Refused, Unauthorised, bus
from terminals import Watcher
from ws import Wire, text_frame

log = logging.getLogger("orchestratia.live")

bp = APIBlueprint("live", __name__, enable_openapi=False)

PERSON_MOST = 1024 * 1024 + 64 * 1024  # a pasted megabyte, base64-coded, comes in several messages
HELLO_S = 10.0  # until somebody who connects has said who they are
FIRST_S = 0.25  # a client that wants to go on somewhere says so at once; others get a repaint
PAUSE_S = 20.0
CLOSE_CODES = {401: 4401, 403: 4403, 404: 4404, 409: 4409}
NO_MESSAGE = "A message is not a JSON object."


# ── who is there ──────────────────────────────────────────────────────────────────────────────


def _arrived(connection: Wire) -> Caller:
    """Whoever has connected: by cookie or header, else by a first frame `auth {token}`.

    Raises Unauthorised.
    """
    if request.headers.get("Authorization") or request.headers.get("X-API-Key"):
        return web.caller()
    if web.COOKIE in request.cookies:
        return web.caller()
    text = connection.receive(HELLO_S)
    frame = _message(text) if text else {}
    token = frame.get("token")
    if frame.get("type") != "auth" or not isinstance(token, str):
        raise Unauthorised("Say who you are first: send {type: auth, token}, or sign in.")
    return auth.by_key(token) if token.startswith(("orc_", "orcs_")) else auth.by_token(token)


def _message(text: str | bytes) -> dict:
    """The object in a message. Raises Invalid."""
    try:
        value = web.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError):
        raise Invalid(NO_MESSAGE) from None
    if not isinstance(value, dict):
        raise Invalid(NO_MESSAGE)
    return value


def _turn_away(connection: Wire, refused: Refused) -> None:
    """Tell a client why, and close with the code that says what to do."""
    text = json.dumps({"type": "error", "detail": str(refused), "code": refused.code})
    try:
        connection.send(text)
    except ConnectionClosed:
        return
    connection.close(CLOSE_CODES.get(refused.status, 4400), str(refused))


# ── a terminal ────────────────────────────────────────────────────────────────────────────────


@ws.route(bp, "/ws/terminal/<ref>")
def terminal(connection: Wire, ref: str):
    """Watch a session and type into it."""
    try:
        return partial(_watch, connection, _arrived(connection), ref)
    except Refused as refused:
        _turn_away(connection, refused)


def _watch(connection: Wire, caller: Caller, ref: str) -> None:
    watcher = None
    try:
        watcher = Watcher(caller, ref)
        connection.allow(PERSON_MOST)
        first = connection.receive(FIRST_S)
        watcher.act(_message(first) if first else {"type": "resume", "offset": None})
        threading.Thread(
            target=_show, args=(connection, watcher), name="to a terminal", daemon=True
        ).start()
        while True:
            for text in connection.receive_all():
                watcher.act(_message(text))
    except Refused as refused:
        _turn_away(connection, refused)
    finally:
        if watcher:
            watcher.close()


def _show(connection: Wire, watcher: Watcher) -> None:
    """Send what is to be seen, at the pace the connection takes it."""
    try:
        while not (watcher.ended or watcher.left):
            frames = watcher.frames(PAUSE_S)
            if frames:
                connection.send_encoded(b"".join(text_frame(frame) for frame in frames))
        if watcher.ended:
            connection.close(1000, "the session has ended")
    except ConnectionClosed:
        watcher.close()
    except Refused as refused:
        _turn_away(connection, refused)


# ── the dashboard ─────────────────────────────────────────────────────────────────────────────

KINDS = ("task", "session", "server")


@ws.route(bp, "/ws/dashboard")
def dashboard(connection: Wire):
    """Every event one may see, as it is committed; `resume {after}` begins at an id."""
    try:
        return partial(_report, connection, _arrived(connection))
    except Refused as refused:
        _turn_away(connection, refused)


def _report(connection: Wire, caller: Caller) -> None:
    try:
        first = connection.receive(FIRST_S)
        following, sending = _follow(connection, caller, _after(first))
        try:
            while True:
                for text in connection.receive_all():
                    frame = _message(text)
                    if frame.get("type") == "resume":
                        after = _after(text)
                        following.close()
                        sending.join()  # what it was at does not mix with what comes now
                        following, sending = _follow(connection, caller, after)
        finally:
            following.close()
    except Refused as refused:
        _turn_away(connection, refused)


def _after(text: str | bytes | None) -> int | None:
    frame = _message(text) if text else {}
    after = frame.get("after") if frame.get("type") == "resume" else None
    if after is not None and (not isinstance(after, int) or after < 0):
        raise Invalid("`after` is the id of an event, a whole number.")
    return after


def _follow(connection: Wire, caller: Caller, after: int | None):
    """Send events in a thread of its own until the subscription is closed: (subscription,
    thread)."""
    live = bus.subscribe("events", "access")

    def run() -> None:
        try:
            for item in feed.follow(caller, after, live):
                if live.closed:
                    return
                frames = _frames(item)
                if frames:
                    connection.send_encoded(frames)
        except Refused as refused:
            _turn_away(connection, refused)
        except ConnectionClosed:
            live.close()

    thread = threading.Thread(target=run, name="to a dashboard", daemon=True)
    thread.start()
    return live, thread


def _frames(item) -> bytes:
    if isinstance(item, feed.Reset):
        return text_frame(json.dumps({"type": "reset", "id": item.id}).encode())
    return item.written("dashboard", _written) if item is not None else b""


def _written(event: Event) -> bytes:
    """The message (or two) that tell of an event."""
    said = {"event": event["type"], **{k: v for k, v in event.items() if k != "type"}}
    frames = text_frame(json.dumps({"type": _kind(event), **said}).encode())
    also = feed.ALSO.get(event["type"])
    if also:
        frames += text_frame(json.dumps({"type": also, **said, "event": also}).encode())
    return frames


def _kind(event: Event) -> str:
    """task_event, session_event or server_event, by its name or else by what it is about."""
    named = event["type"].partition("_")[0]
    kinds = [kind for kind in KINDS if kind == named or event[f"{kind}_id"]]
    return f"{named if named in KINDS else kinds[0] if kinds else 'hub'}_event"
