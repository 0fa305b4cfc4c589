"""Bots of this process against a Bot API server of its own, and people who write to them."""

import time
import uuid

import chats
import models
import notices
import sessions
import telegram
import telegram_acts
import telegram_words
import wire
from botapi import BotServer
from conftest import wait_until
from models import transaction

URL = "https://hub.example.org"


class Telling:
    """A worker's session W on `dev` that is shown on Telegram; olga operates, ada administers,
    vera looks on."""

    def __init__(self, world, server):
        self.world, self.server, self.bots = world, server, telegram.Bots()
        world.server("dev")
        world.working("W", server="dev", command=["make"])
        with transaction() as tx:
            for session in models.rows("SELECT * FROM session"):
                sessions.move(tx, session, "started", "hub")
        self.session = models.one("SELECT * FROM session WHERE task_id = ?", (world.ids["W"],))
        wire.acknowledge(world.servers["dev"], [c["id"] for c in world.commands("dev")])
        self.callers = {
            "olga": world.user("olga", shop="operator"),
            "ada": world.user("ada", shop="admin"),
            "vera": world.user("vera", shop="viewer"),
        }
        self._spooled = 0

    def start(self) -> None:
        self.bots.start()
        self.server.wait(lambda: self.server.calls_of("getUpdates"))

    def stop(self) -> None:
        self.server.down = True  # so that polls end
        self.bots.stop(10)

    def restart(self) -> None:
        """As a hub that was stopped and started: what it keeps is in its tables."""
        self.server.down = True
        self.bots.stop(10)
        self.server.down = False
        self.bots = telegram.Bots()
        self.bots.start()

    def pair(self, name: str, bot: str | None = None):
        """A phone paired with the user of that name."""
        person = self.server.person(name.capitalize(), username=name)
        code = chats.new_code(self.callers[name])
        person.says(f"/start {code}")
        self.server.wait(lambda: any("paired as" in text for text in person.chat.shown()))
        return person

    def say(self, frame_type: str, /, **fields) -> None:
        """A spooled frame of the agent on `dev`."""
        self._spooled += 1
        frame = {"type": frame_type, "spool": self._spooled, "session_id": self.session["id"]}
        taken = wire.take_spooled(self.world.key("dev"), [frame | fields])
        assert taken == self._spooled

    def ask(self, command: str = "rm -rf /tmp/build", **more) -> str:
        """A held permission request for a shell command; its id."""
        request_id = str(uuid.uuid4())
        fields = {"tool": "Bash", "input": {"command": command}, "directory": "/srv/core"}
        fields |= {"agent": "claude", "via": "hook", "request_id": request_id}
        self.say("permission_requested", **(fields | more))
        return request_id

    def permission(self, request_id: str) -> dict:
        return models.one("SELECT * FROM permission WHERE id = ?", (request_id,))

    def screen(self, *lines: str) -> None:
        """The session shows these lines."""
        frame = {"type": "session_screen", "session_id": self.session["id"], "lines": list(lines)}
        wire.PASSING["session_screen"](self.world.key("dev"), frame)

    def shown(self, person, *parts: str, chat=None):
        """The bot's message in their chat that says all of this, as soon as it stands there."""
        chat = chat or person.chat

        def found():
            for message in reversed(chat.messages):
                said = message.sender == "bot" and not message.deleted
                if said and all(part in message.text for part in parts):
                    return message
            return None

        self.server.wait(found)
        message = found()
        wait_until(lambda: self._kept(chat, message))
        return message

    def _kept(self, chat, message) -> bool:
        """Whether the bot has learned the number of its message."""
        place = (chat.id, message.id)
        return bool(
            models.one("SELECT 1 FROM post WHERE chat_id = ? AND message_id = ?", place)
            or models.one("SELECT 1 FROM focus WHERE message_id = ?", (message.id,))
            or message.deleted
        )

    def quiet(self) -> None:
        """Everything there is to carry was carried."""
        wait_until(
            lambda: (
                not models.one("SELECT 1 FROM post WHERE state NOT IN ('sent', 'dropped')")
                and not models.one("SELECT 1 FROM notice WHERE due_at < ?", (time.time(),))
            )
        )


def running(world, monkeypatch):
    """What the fixture `told` is: a generator of one `Telling`."""
    monkeypatch.setattr(notices, "MERGE_S", 0.001)
    monkeypatch.setattr(telegram, "LONG_POLL_S", 1)
    monkeypatch.setattr(telegram, "BACKOFF_S", (0.02, 0.2))
    for limit in ("ALL", "CHAT", "GROUP"):  # how it keeps to Telegram's pace is a test of its own
        monkeypatch.setattr(telegram.Pace, limit, (100.0, 100.0))
    telegram_acts.strangers._told.clear()
    chats.presence.reset()
    telegram_words.use_url(URL)
    with BotServer() as server:
        server.floods = False
        telegram.use_api(server.url)
        chats.use_hub_bot(server.token)
        telling = Telling(world, server)
        telling.start()
        yield telling
        telling.stop()
    chats.use_hub_bot("")
