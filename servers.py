"""Every use case on servers: registration, administration, signs of life, silence noticed."""

import logging
import math
import threading
import time
from collections.abc import Callable

import alerts
import auth
import cascade
import reading
import routing
import sessions
import tasks
from auth import HUB, Caller, find, require
from models import (
    Conflict,
    Invalid,
    Refused,
    Server,
    Transaction,
    dumps,
    execute,
    in_chunks,
    iso,
    loads,
    one,
    rows,
    transaction,
)

log = logging.getLogger("orchestratia.servers")

HEARTBEAT_S = 30.0
OFFLINE_AFTER_S = 90.0
LOST_AFTER_S = 900.0
SLOTS_MOST = 10_000
TROUBLE_MOST = 500  # characters
SKEW_S = 5.0  # seconds; less than that a clock may seem off by what is on its way


def register(data: dict, address: str) -> dict:
    """Take a registration token and make or renew the server it is for.

    data: the body of servers/register. Returns {id, api_key, name, project_id, project_name,
    heartbeat_s, renewed}; the key is shown this once. Raises Unauthorised for the token and
    Conflict for a name that another machine has.
    """
    key = auth.new_server_key()
    with transaction() as tx:
        token = auth.redeem(data["registration_token"])
        project = one("SELECT * FROM project WHERE id = ?", (token["project_id"],))
        name = data["name"].strip()
        server = auth.renewable(project["id"], data.get("machine_id") or "", name)
        columns = _registered_columns(data, address) | {"key_hash": auth.digest(key)}
        renewed = bool(server)
        if server:
            Server.update(**columns).where(Server.id == server.id).execute()
        else:
            _refuse_taken_name(project["id"], name)
            server = Server.create(project_id=project["id"], name=name, **columns)
        execute("UPDATE registration SET server_id = ? WHERE id = ?", (server.id, token["id"]))
        tx.emit(
            "server_registered",
            project["id"],
            f"server:{name}",
            {"name": name, "hostname": columns["hostname"], "token": token["id"]},
            server=server.id,
        )
        tx.tell(f"server:{server.id}", "revoked")  # whoever still uses the old key
        tx.tell("access")
    return {
        "id": server.id,
        "api_key": key,
        "name": name,
        "project_id": project["id"],
        "project_name": project["name"],
        "heartbeat_s": HEARTBEAT_S,
        "renewed": renewed,
    }


def _registered_columns(data: dict, address: str) -> dict:
    system = data.get("system_info") or {}
    declared = data.get("capabilities") or {}
    older = data.get("capabilities") is None and "agent_version" in system
    return {
        "protocol": 1 if older else 2,  # as far as one can tell before it has connected
        "hostname": data.get("hostname") or "",
        "os": data.get("os") or "",
        "machine_id": data.get("machine_id") or "",
        "repos": repos_of(data.get("repos")),
        "info": system | {"address": address},
        "slots": declared.get("slots") or _slots_for(system.get("cpu_count")),
        **{kind: declared.get(kind) for kind in cascade.LISTS},
    }


def _slots_for(cpus) -> int:
    return min(cpus + 2, SLOTS_MOST) if isinstance(cpus, int) and cpus > 0 else 3


def repos_of(given: dict | None) -> dict:
    """{name: {path, branch}} from either form an agent may send."""
    return {
        name: value if isinstance(value, dict) else {"path": value or "", "branch": None}
        for name, value in (given or {}).items()
    }


def _refuse_taken_name(project_id: str, name: str, but: str = "") -> None:
    if not name:
        raise Invalid("A server needs a name that is not empty.", field="name")
    if one(
        "SELECT 1 FROM server WHERE project_id = ? AND name = ? AND revoked = 0 AND id <> ?",
        (project_id, name, but),
    ):
        raise Conflict(
            f"There is a server {name!r} in this project already: choose another name (--name; "
            "`server_name` in the file of an older agent), or revoke the old one first.",
            code="name_taken",
        )


def list_servers(project_ids: list[str], *, revoked: bool = False) -> list[dict]:
    marks = ", ".join("?" * len(project_ids))
    hidden = "" if revoked else " AND revoked = 0"
    found = rows(
        f"SELECT * FROM server WHERE project_id IN ({marks}){hidden} ORDER BY name", project_ids
    )
    return [server_json(row) for row in found]


def server_json(row: dict) -> dict:
    value = routing.server_value(row)
    live = one(
        "SELECT COUNT(*) AS n FROM session WHERE server_id = ?"
        " AND state IN ('starting', 'active', 'disconnected', 'recovering')",
        (row["id"],),
    )
    seen = _life.seen_at(row["id"]) or row["last_seen"]
    return {
        "id": row["id"],
        "name": row["name"],
        "project_id": row["project_id"],
        "hostname": row["hostname"],
        "os": row["os"],
        "status": value["status"],
        "last_heartbeat": iso(seen),
        "repos": value["repos"],
        **{kind: value[kind] for kind in cascade.LISTS},
        "profiles": loads(row["profiles"]),
        "declared": loads(row["declared"]),
        "slots": value["slots"],
        "busy": row["busy"],
        "manual": value["manual"],
        "agent_version": row["agent_version"],
        "system_info": _life.info(row["id"]) or loads(row["info"]),
        "sessions": live["n"],
        "created_at": iso(row["created_at"]),
    }


def get_server(caller: Caller, ref: str) -> dict:
    return find("server", caller, ref, name="name")


def change_server(caller: Caller, ref: str, changes: dict) -> dict:
    """Rename, declare, set slots or manual; waiting tasks are looked at again. Raises Conflict."""
    server = get_server(caller, ref)
    require(caller, "server.admin", server["project_id"], "server")
    if "name" in changes:
        changes["name"] = changes["name"].strip()
        _refuse_taken_name(server["project_id"], changes["name"], server["id"])
    if changes.get("slots"):
        changes["declared"] = (changes.get("declared") or {}) | {"slots": changes.pop("slots")}
    if "declared" in changes:  # what is not mentioned stays as it was declared
        changes["declared"] = loads(server["declared"]) | changes["declared"]
    return _server_event(caller, server, "server_changed", changes, {"changed": sorted(changes)})


def drain(caller: Caller, ref: str) -> dict:
    """No new work for the server; what runs there goes on."""
    return _admin_move(caller, ref, "server_draining", {"draining": True})


def resume(caller: Caller, ref: str) -> dict:
    """The server takes new work again."""
    return _admin_move(caller, ref, "server_resumed", {"draining": False})


def _admin_move(caller: Caller, ref: str, event: str, changes: dict) -> dict:
    server = get_server(caller, ref)
    require(caller, "server.admin", server["project_id"], "server")
    if server["revoked"]:
        raise Conflict(f"Server {server['name']!r} is revoked: register it again.")
    return _server_event(caller, server, event, changes, {})


def _server_event(caller, server: dict, event: str, changes: dict, details: dict) -> dict:
    with transaction() as tx:
        if changes:
            Server.update(**changes).where(Server.id == server["id"]).execute()
        details = details | {"server": changes.get("name", server["name"])}
        tx.emit(event, server["project_id"], caller.actor, details, server=server["id"])
        after = one("SELECT * FROM server WHERE id = ?", (server["id"],))
        routing.place_waiting(tx, after)
    return one("SELECT * FROM server WHERE id = ?", (server["id"],))


def revoke(caller: Caller, ref: str) -> dict:
    """Take the server's key away for good; its work is routed anew."""
    server = get_server(caller, ref)
    require(caller, "server.admin", server["project_id"], "server")
    if server["revoked"]:
        return server
    with transaction() as tx:
        Server.update(revoked=True, online=False, key_hash=None).where(
            Server.id == server["id"]
        ).execute()
        tx.emit(
            "server_revoked",
            server["project_id"],
            caller.actor,
            {"server": server["name"]},
            server=server["id"],
        )
        for session in sessions.believed_alive(server["id"]):
            sessions.move(tx, session, "lose", HUB.actor, reason="its server was revoked")
        execute(
            "UPDATE task SET pinned_server = NULL, pinned_session = NULL, auto_assign = 1"
            " WHERE pinned_server = ?",
            (server["id"],),
        )
        for task in tasks.held_by(server["id"]):
            tasks.release(tx, task, f"server {server['name']} was revoked", caller.actor)
        execute(
            "UPDATE command SET acked_at = ? WHERE server_id = ? AND acked_at IS NULL",
            (tx.now, server["id"]),
        )
        tx.tell(f"server:{server['id']}", "revoked")
        tx.tell("access")
    _life.forget(server["id"])
    return one("SELECT * FROM server WHERE id = ?", (server["id"],))


def assigned_tasks(caller: Caller) -> list[dict]:
    """The tasks on the caller's server, whole, oldest first."""
    return reading.tasks_json(sorted(tasks.held_by(caller.server_id), key=lambda t: t["seq"]))


class _Life:
    """When each server was last heard of. In memory: a hub that was away knows of no silence."""

    def __init__(self):
        self._lock = threading.Lock()
        self._heard: dict[str, tuple[float, float]] = {}  # monotonic, wall clock
        self._info: dict[str, dict] = {}
        self._unsaved: set[str] = set()
        self.troubles: dict[str, str] = {}  # as they stand among the alerts
        self.skews: dict[str, float] = {}  # seconds each one's clock is ahead of the hub's
        self._ticked = time.monotonic()

    def hear(self, server_id: str, info: dict | None = None) -> bool:
        """Note a sign of life; True when the server was not known to live."""
        with self._lock:
            if info:
                self._info[server_id] = info
            fresh = server_id not in self._heard
            self._heard[server_id] = (time.monotonic(), time.time())
            self._unsaved.add(server_id)
            return fresh

    def forget(self, server_id: str) -> None:
        with self._lock:
            self._heard.pop(server_id, None)
            self._info.pop(server_id, None)
            self._unsaved.discard(server_id)
            self.troubles.pop(server_id, None)

    def heard(self, server_id: str) -> tuple[float, float] | None:
        """When it gave its last sign of life: monotonic, and by the wall clock."""
        return self._heard.get(server_id)

    def still_silent(self, server_id: str, heard: tuple[float, float]) -> None:
        """It was forgotten, which could not be stored: as before, unless it spoke meanwhile."""
        with self._lock:
            self._heard.setdefault(server_id, heard)

    def seen_at(self, server_id: str) -> float | None:
        heard = self._heard.get(server_id)
        return heard[1] if heard else None

    def silent(self, seconds: float) -> list[str]:
        """Servers not heard of for so long; none after this process itself was asleep."""
        with self._lock:
            now = time.monotonic()
            if now - self._ticked > seconds / 2:
                self._heard = {k: (now, wall) for k, (_, wall) in self._heard.items()}
            self._ticked = now
            return [k for k, (heard, _) in self._heard.items() if now - heard > seconds]

    def info(self, server_id: str) -> dict | None:
        """The system_info of its last heartbeat, if this process has had one."""
        return self._info.get(server_id)

    def take_unsaved(self) -> list[tuple[float, dict | None, str]]:
        """(seen at, system_info, server id) of those heard since the last call."""
        with self._lock:
            unsaved = [
                (self._heard[s][1], self._info.get(s), s) for s in self._unsaved if s in self._heard
            ]
            self._unsaved.clear()
            return unsaved

    def reset(self, server_ids: list[str]) -> None:
        with self._lock:
            now = time.monotonic()
            self._heard = dict.fromkeys(server_ids, (now, time.time()))
            self._info.clear()
            self.skews.clear()
            self._unsaved.clear()
            self.troubles.clear()
            self._ticked = now


_life = _Life()


def begin() -> None:
    """Forget what an earlier hub in this process knew and give every server a fresh start."""
    _life.reset([r["id"] for r in rows("SELECT id FROM server WHERE online = 1")])
    sessions.screens.clear()


def alive(server_id: str, system_info: dict | None = None) -> None:
    """A sign of life: the server is online from now on."""
    if not _life.hear(server_id, system_info):
        return
    try:
        _came_online(server_id)
    except BaseException:
        _life.forget(server_id)  # not written down: the next sign of life tries again
        raise


def _came_online(server_id: str) -> None:
    with transaction() as tx:
        server = one(
            "UPDATE server SET online = 1, offline_at = NULL WHERE id = ? AND online = 0"
            " AND revoked = 0 RETURNING *",
            (server_id,),
        )
        if server:
            tx.emit(
                "server_online",
                server["project_id"],
                f"server:{server['name']}",
                {"server": server["name"]},
                server=server_id,
            )
            routing.place_waiting(tx, server)


def heartbeat(caller: Caller, system_info: dict | None) -> None:
    """A sign of life with what the agent says of its machine; `trouble` in it is an alert."""
    skew = note_clock(caller.server_id, (system_info or {}).get("time"))
    if skew is not None:
        system_info = system_info | {"clock_skew_s": round(skew, 1)}
    alive(caller.server_id, system_info)
    if system_info is not None:
        trouble = str(system_info.get("trouble") or "")[:TROUBLE_MOST]
        if trouble != _life.troubles.get(caller.server_id):
            _note_trouble(caller, trouble)
            _life.troubles[caller.server_id] = trouble


def note_clock(server_id: str, shows) -> float | None:
    """A server's clock shows so many seconds since 1970 just now: by how many it is ahead of the
    hub's; None for what is no time."""
    shows = _number(shows)
    if shows is None:
        return None
    skew = _life.skews[server_id] = shows - time.time()
    return skew


def by_our_clock(server_id: str, at: float) -> float:
    """A time by a server's clock, in seconds since 1970, as the hub's clock has it. What is on its
    way makes a clock look late, so that a few seconds say nothing."""
    skew = _life.skews.get(server_id, 0.0)
    return at - skew if abs(skew) > SKEW_S else at


def _note_trouble(caller: Caller, trouble: str) -> None:
    opened = one(
        "SELECT * FROM alert WHERE kind = 'server' AND status = 'open' AND about = ?",
        (caller.server_id,),
    )
    if not trouble and not opened:
        return
    with transaction() as tx:
        if opened:
            alerts.end(tx, opened)
        if trouble:
            server = one("SELECT * FROM server WHERE id = ?", (caller.server_id,))
            sentence = f"Server {server['name']}: {trouble}."
            about = {"server_id": server["id"], "about": server["id"]}
            alerts.begin(tx, "server", server["project_id"], sentence, **about)


def save_heartbeats() -> None:
    """Write the latest signs of life into the table, in one batch."""
    unsaved = _life.take_unsaved()
    if unsaved:
        with transaction():
            for at, info, server_id in unsaved:
                execute(
                    "UPDATE server SET last_seen = ?, info = COALESCE(?, info) WHERE id = ?",
                    (at, dumps(info) if info else None, server_id),
                )
                if info:
                    _note_load(server_id, int(at // 60), info)


LOAD_MINUTES = 60  # kept of each server


def _note_load(server_id: str, minute: int, info: dict) -> None:
    """Keep the last sample of a minute, and of the last hour only."""
    execute(
        "INSERT OR REPLACE INTO load (server_id, minute, cpu, memory, disk) VALUES (?, ?, ?, ?, ?)",
        (server_id, minute, *_shares(info)),
    )
    execute(
        "DELETE FROM load WHERE server_id = ? AND minute <= ?", (server_id, minute - LOAD_MINUTES)
    )


def _shares(info: dict) -> tuple[float | None, ...]:
    """(cpu, memory, disk) in percent; None for what the agent does not say. The load of a minute
    over the processors is what the machine is asked to do, so cpu may be over 100."""
    load, cpus = _number(info.get("load_1m")), _number(info.get("cpu_count"))
    cpu = 100 * load / cpus if load is not None and cpus else _number(info.get("cpu_percent"))
    return cpu, _number(info.get("memory_percent")), _number(info.get("disk_percent"))


def _number(value) -> float | None:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if fine and math.isfinite(value) and value >= 0 else None


def loads_of(server_ids: list[str], now: float) -> dict[str, list[dict]]:
    """{server id: [{minute, cpu, memory, disk}]} of the last hour, oldest first: `minute` is how
    many minutes ago, the others are percent or None; minutes of silence are not there."""
    last = int(now // 60)
    found = {server_id: [] for server_id in server_ids}
    for part, marks in in_chunks(server_ids):
        for row in rows(
            f"SELECT * FROM load WHERE server_id IN {marks} AND minute > ?"
            " ORDER BY server_id, minute",
            [*part, last - LOAD_MINUTES],
        ):
            values = {kind: row[kind] for kind in ("cpu", "memory", "disk")}
            found[row["server_id"]].append({"minute": last - row["minute"]} | values)
    return found


def notice_silence(
    offline_after: float = OFFLINE_AFTER_S, then: Callable[[str], None] = lambda server_id: None
) -> list[str]:
    """Call servers offline that gave no sign of life for so many seconds; their ids.

    then: called with the id of each once that is stored. One for which there is no room or no turn
    is still silent at the next look.
    """
    gone = []
    for server_id in _life.silent(offline_after):
        try:
            if _call_offline(server_id, offline_after):
                gone.append(server_id)
                then(server_id)
        except Refused as error:
            log.warning("a server is silent, which cannot be stored: %s", error)
    return gone


def _call_offline(server_id: str, silent_s: float) -> bool:
    """Whether it was silent still when we had our turn. Raises what a transaction raises."""
    heard = None
    try:
        with transaction() as tx:
            if server_id in _life.silent(silent_s):
                heard = _life.heard(server_id)
                _life.forget(server_id)  # so that a sign of life from now on is the first of many
                _went_offline(tx, server_id, silent_s)
    except BaseException:
        if heard:
            _life.still_silent(server_id, heard)
        raise
    return bool(heard)


def _went_offline(tx: Transaction, server_id: str, silent_s: float) -> None:
    server = one(
        "UPDATE server SET online = 0, offline_at = ? WHERE id = ? AND online = 1 RETURNING *",
        (tx.now, server_id),
    )
    if server:
        tx.emit(
            "server_offline",
            server["project_id"],
            HUB.actor,
            {"server": server["name"], "silent_s": round(silent_s)},
            server=server_id,
        )
        sessions.disconnect(tx, server_id)
