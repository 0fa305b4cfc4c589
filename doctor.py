"""What a hub needs to do its work, looked at now: each finding says what to do about it."""

import os
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit

from auth import Caller, require
from models import iso, loads, newest_schema, offloop, one, rows

SKEW_S = 30.0  # a clock that is further off confuses people, if not the hub
FREE_LITTLE_MB, FREE_NONE_MB = 2000, 200
WAL_MUCH_MB = 200  # of a write-ahead log: somebody keeps it from being copied home
UNTAKEN_S = 60.0  # a command that an agent has not taken for so long
BACKUP_S = 7 * 24 * 3600.0
SHOWN = 10  # of each sort of trouble


def finding(check: str, state: str, says: str, do: str = "") -> dict:
    """state: ok, warn (it works, not as it should) or bad (it does not)."""
    return {"check": check, "state": state, "says": says, "do": do}


def examine(caller: Caller, settings: dict, version: str, now: float, polling: set[str]) -> list:
    """Everything that can be seen from the hub, as findings. For its admins.

    settings: the hub's. polling: ids of servers whose agent polls just now. now: seconds since
    1970.
    """
    require(caller, "user.admin")
    data = Path(settings["data"])
    return [
        *_databases(data),
        *_disk(data),
        *_permissions(data),
        *_address(settings),
        _backup(now),
        *_commands(now),
        *_servers(version, polling),
        *_sessions(),
        *_bots(),
    ]


def _databases(data: Path) -> list[dict]:
    found = []
    for name in ("hub.db", "logs.db"):
        said = offloop(_integrity, str(data / name))
        if said == "ok":
            found.append(finding("database", "ok", f"{name} is whole."))
        else:
            do = "Stop the hub and restore the last backup (docs/operations.md)."
            found.append(finding("database", "bad", f"{name}: {said}", do))
        wal = data / f"{name}-wal"
        if wal.exists() and wal.stat().st_size > WAL_MUCH_MB * 10**6:
            do = "See who else has the file open (lsof); a restart of the hub copies it home."
            says = f"{wal.name} has {wal.stat().st_size // 10**6} MB."
            found.append(finding("database", "warn", says, do))
    schema = one("SELECT COUNT(*) AS n FROM schema_migration")["n"]
    if schema != newest_schema():
        says = f"The schema has {schema} migrations, this code knows {newest_schema()}."
        found.append(finding("database", "bad", says, "Run the newest hub on this data."))
    return found


def _integrity(path: str) -> str:
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        try:
            return db.execute("PRAGMA quick_check").fetchone()[0]
        finally:
            db.close()
    except sqlite3.DatabaseError as error:
        return str(error)


def _disk(data: Path) -> list[dict]:
    disk = os.statvfs(data)
    free = disk.f_bavail * disk.f_frsize // 10**6
    state = "bad" if free < FREE_NONE_MB else "warn" if free < FREE_LITTLE_MB else "ok"
    do = "" if state == "ok" else "Free some space, or lower log_total_mb."
    return [finding("disk", state, f"{free:,} MB are free where {data} is.", do)]


def _permissions(data: Path) -> list[dict]:
    open_ones = [
        str(path)
        for path in (data, *sorted(data.glob("*.db*")), data / "secret", data / "hub.yaml")
        if path.exists() and path.stat().st_mode & 0o077
    ]
    if not open_ones:
        return [finding("permissions", "ok", f"{data} is readable by its owner alone.")]
    says = f"Others may read {', '.join(open_ones[:SHOWN])}."
    return [finding("permissions", "bad", says, f"chmod -R go= {data}")]


LOCAL = ("localhost", "127.0.0.1", "::1")


def _address(settings: dict) -> list[dict]:
    url = urlsplit(settings["url"])
    if url.scheme == "https":
        return [finding("TLS", "ok", f"The hub's address is {settings['url']}.")]
    if url.hostname not in LOCAL or settings["host"] not in LOCAL:
        do = "Put a proxy with TLS in front and start the hub with --url https://…"
        says = f"Keys and terminals travel in the clear: {settings['url']} is not TLS."
        return [finding("TLS", "bad", says, do)]
    do = "For other machines put a proxy with TLS in front, and start with --url https://…"
    return [finding("TLS", "ok", "The hub is reached from this machine alone.", do)]


def _backup(now: float) -> dict:
    last = one("SELECT value FROM meta WHERE key = 'backup_at'")
    if last and now - float(last["value"]) < BACKUP_S:
        return finding("backup", "ok", f"The last one was made {iso(float(last['value']))}.")
    says = "The last one is older than a week." if last else "None was ever made."
    return finding("backup", "warn", says, "orchestratia hub backup FILE, every day by cron.")


def _commands(now: float) -> list[dict]:
    late = rows(
        "SELECT s.name, COUNT(*) AS n FROM command c JOIN server s ON s.id = c.server_id"
        " WHERE c.acked_at IS NULL AND c.created_at < ? AND s.online = 1 GROUP BY s.name LIMIT ?",
        (now - UNTAKEN_S, SHOWN),
    )
    do = "Look into that agent's log; restart it: its sessions go on."
    return [
        finding("commands", "bad", f"{row['name']} is online and has not taken {row['n']}.", do)
        for row in late
    ]


def _servers(version: str, polling: set[str]) -> list[dict]:
    found = []
    for server in rows("SELECT * FROM server WHERE revoked = 0 ORDER BY name"):
        troubles = [each for look in TROUBLES if (each := look(server, version, polling))]
        for state, says, do in troubles:
            found.append(finding("server", state, f"{server['name']}: {says}", do))
        if not troubles:
            found.append(finding("server", "ok", f"{server['name']} is well."))
    return found or [finding("server", "warn", "There is none.", "orchestratia server token")]


def _offline(server: dict, _version, _polling):
    if not server["online"]:
        return "warn", f"offline since {iso(server['offline_at'])}", "Start its agent there."


def _older(server: dict, version: str, _polling):
    if server["protocol"] == 2 and server["agent_version"] not in ("", version):
        return (
            "warn",
            f"its agent has version {server['agent_version']}, the hub {version}",
            "Run the hub's install.sh there: config, key and sessions stay.",
        )


def _polls(server: dict, _version, polling: set[str]):
    if server["id"] in polling:
        do = "Have the proxy pass on Upgrade and Connection; `agent.py --doctor` there tells more."
        return "warn", "its agent polls: a proxy breaks WebSockets, or it is set so", do


def _skewed(server: dict, _version, _polling):
    skew = loads(server["info"]).get("clock_skew_s")
    if isinstance(skew, int | float) and abs(skew) > SKEW_S:
        return "warn", f"its clock is {skew:+.0f} s beside the hub's", "Use NTP on both."


def _crowded(server: dict, _version, _polling):
    free = loads(server["info"]).get("state_free_mb")
    if isinstance(free, int | float) and free < FREE_LITTLE_MB / 2:
        return "warn", f"only {free:,} MB are free for its agent", "Free some space there."


def _troubled(server: dict, _version, _polling):
    trouble = loads(server["info"]).get("trouble")
    if trouble:
        return "bad", str(trouble), "Free some space there."


def _without_tmux(server: dict, _version, _polling):
    said = loads(server["info"])
    if "tmux" in said and not said["tmux"]:
        return "warn", "it has no tmux: sessions end with the agent", "Install tmux there."


TROUBLES = (_offline, _older, _polls, _skewed, _crowded, _troubled, _without_tmux)


def _sessions() -> list[dict]:
    """Sessions of coding agents of which no signal says what they do."""
    silent = rows(
        "SELECT s.name, s.profile, s.signals, v.name AS server FROM session s"
        " JOIN server v ON v.id = s.server_id"
        " WHERE s.project_id IN (SELECT id FROM project) AND s.state = 'active'"
        " AND s.activity = 'no_signal' AND s.profile NOT IN ('command') LIMIT ?",
        (SHOWN,),
    )
    do = "`orchestratia session explain` shows each source; look at the profile's hooks."
    found = []
    for row in silent:
        heard = ", ".join(sorted({str(s.get("source")) for s in loads(row["signals"])})) or "none"
        says = (
            f"{row['name']} ({row['profile']} on {row['server']}) gives no signal; heard: {heard}."
        )
        found.append(finding("signals", "warn", says, do))
    return found or [finding("signals", "ok", "Every coding agent says what it does.")]


def _bots() -> list[dict]:
    found = []
    for row in rows("SELECT * FROM bot WHERE trouble IS NOT NULL LIMIT ?", (SHOWN,)):
        name = row["username"] or row["id"]
        do = "See docs/telegram.md; 409 means that another program polls with the same token."
        found.append(finding("telegram", "bad", f"{name}: {row['trouble']}", do))
    return found
