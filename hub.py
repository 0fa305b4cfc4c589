#!/usr/bin/env python3
"""The hub: settings, wiring, scheduled jobs, `main()`."""

if __name__ == "__main__":
    # First of all, so that every module below sees cooperative threads and sockets.
    from gevent import monkey

    monkey.patch_all()

import argparse
import contextlib
import fcntl
import functools
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from datetime import UTC
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from apiflask import APIFlask
from apscheduler.events import EVENT_JOB_ERROR
from apscheduler.schedulers.background import BackgroundScheduler

import api
import api_hub
import api_permissions
import auth
import backup
import chats
import document
import inbox
import install
import leases
import live
import logs
import metrics
import models
import moves
import notices
import pages
import pages_events
import pages_permissions
import pages_pipelines
import pages_servers
import pages_sessions
import pages_settings
import pages_tasks
import pages_telegram
import permissions
import servers
import serving
import sessions
import sockets
import tasks
import telegram
import telegram_words
import terminals
import web
import ws

log = logging.getLogger("orchestratia.hub")
HERE = Path(__file__).parent
# Importing them adds their views to the one blueprint of the pages, or of the API.
API = (api_permissions, api_hub)
PAGES = (
    pages_permissions,
    pages_tasks,
    pages_pipelines,
    pages_servers,
    pages_sessions,
    pages_telegram,
    pages_settings,
    pages_events,
)

# (name, default, help). From flags, then ORCHESTRATIA_<NAME>, then hub.yaml in the data directory.
SETTINGS = (
    ("host", "127.0.0.1", "address to listen on; anything but loopback needs TLS in front"),
    ("port", 8080, "port to listen on; 0 takes a free one"),
    ("data", "~/.local/share/orchestratia", "directory of the database, the logs and the secret"),
    ("url", "", "address by which agents and people reach the hub; part of registration tokens"),
    ("heartbeat_s", 30.0, "how often agents give a sign of life, in seconds"),
    ("offline_after_s", 90.0, "silence after which a server is offline, in seconds"),
    ("poll_silence_s", 40.0, "silence of the poll after which sessions are disconnected"),
    ("grace_s", 15.0, "how long a recovered session is watched before it is active, in seconds"),
    ("lost_after_s", 900.0, "absence after which a server's tasks are given to others"),
    ("claim_s", 20.0, "how long an answer is kept for a call that waits for it, in seconds"),
    ("queue_timeout_s", 3600.0, "a task that no server takes for so long is an alert, in seconds"),
    ("start_timeout_s", 900.0, "a worker that has not started by then is given up, in seconds"),
    ("stuck_after_s", 1800.0, "a worker without progress for so long is an alert, in seconds"),
    ("tick_s", 5.0, "how often silence is looked for, in seconds"),
    ("due_s", 1.0, "how often retries and timeouts are looked for, in seconds"),
    ("lock_patience_s", 5.0, "how long a change waits for its turn before it is refused"),
    ("registration_s", 3600.0, "life of a registration token, in seconds"),
    ("telegram_token", "", "the bot's token, as @BotFather gives it; better not as a flag"),
    ("telegram_api", "https://api.telegram.org", "where the Bot API is reached"),
    ("telegram_wait_s", 120.0, "how long a phone waits while its dashboard is looked at"),
    ("telegram_again_s", 600.0, "after how long what still waits is said again, in seconds"),
    ("telegram_merge_s", 10.0, "what follows one of its kind so soon is told with others"),
    ("log_session_mb", 64.0, "most output kept of one session, the newest, in megabytes"),
    ("log_total_mb", 10240.0, "most output kept of all sessions together, in megabytes"),
    ("max_body_mb", 32.0, "largest request accepted, in megabytes"),
    ("request_s", 75.0, "how long the head of a request may take to arrive, in seconds"),
    ("unread_s", 300.0, "how long a piece of an answer may wait to be read, in seconds"),
    ("ping_s", 25.0, "silence after which a WebSocket is pinged, in seconds"),
    ("gone_s", 60.0, "silence after which the other end of a WebSocket is gone, in seconds"),
    ("linger_s", 15.0, "how long a session is still sent that nobody watches, in seconds"),
    ("log_level", "INFO", "how much the hub logs: DEBUG, INFO, WARNING or ERROR"),
)


LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
SECRETS = frozenset({"telegram_token"})  # settings that no page shows
KINDS = {str: "text", int: "a whole number", float: "a number"}


# How long requests under way may take when the hub stops; idle connections would keep it for ever.
STOPPING_S = 0.5
RESTART_S = 0.5  # from the answer that says so to the restart


class Discreet(logging.Formatter):
    """Writes no bot's token, wherever a library may have put it."""

    def format(self, record: logging.LogRecord) -> str:
        return chats.TOKEN.sub(r"\1:<secret>", super().format(record))


class BadSetting(Exception):
    """A setting that cannot be used; the sentence says which, where it came from and why."""


def read_settings(flags: dict | None = None, environ=os.environ) -> dict:
    """The value of every setting, typed as its default. Raises BadSetting."""
    flags = {k: v for k, v in (flags or {}).items() if v is not None}
    given = dict(flags)
    for name, _, _ in SETTINGS:
        if name not in given and f"ORCHESTRATIA_{name.upper()}" in environ:
            given[name] = environ[f"ORCHESTRATIA_{name.upper()}"]
    data = Path(str(given.get("data", _default("data")))).expanduser()
    given = _from_file(data / "hub.yaml") | given
    settings = {name: _typed(name, given.get(name, default)) for name, default, _ in SETTINGS}
    settings["data"] = data
    if settings["gone_s"] <= settings["ping_s"]:
        raise BadSetting("gone_s must be more than ping_s: the answer to a ping takes a while.")
    return settings


def _default(name: str):
    return next(default for known, default, _ in SETTINGS if known == name)


def _from_file(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise BadSetting(f"{path} is not valid YAML: {error}") from None
    if not isinstance(given, dict):
        raise BadSetting(f"{path} must have lines of the form `name: value`.")
    unknown = set(given) - {name for name, _, _ in SETTINGS}
    if unknown:
        raise BadSetting(f"{path} has unknown settings: {', '.join(sorted(unknown))}.")
    return given


def _typed(name: str, value):
    kind = type(_default(name))
    try:
        typed = kind(value)
    except (TypeError, ValueError):
        raise BadSetting(f"{name} must be {KINDS[kind]}, not {value!r}.") from None
    if kind is float and not 0 < typed < math.inf:
        raise BadSetting(f"{name} must be above 0 and finite, not {value!r}.")
    if name == "port" and not 0 <= typed <= 65535:
        raise BadSetting(f"port must be from 0 to 65535, not {value!r}.")
    if name == "telegram_token" and typed and not chats.TOKEN.fullmatch(typed):
        raise BadSetting("telegram_token must be as @BotFather gives it: 123456789:AbC….")
    if name == "log_level" and typed not in LEVELS:
        raise BadSetting(f"log_level must be one of {', '.join(LEVELS)}, not {value!r}.")
    return typed


class DataInUse(models.UnusableData):
    """Another process holds the data directory."""


@contextlib.contextmanager
def holding(data: Path):
    """The data directory is this process's alone meanwhile, until it ends in whatever way. Raises
    DataInUse when it is another's: two hubs on one database would not know of each other."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(data / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DataInUse(
                f"The hub is running (process {lock.read() or '?'}, data {data}): stop it first."
            ) from None
        with contextlib.suppress(OSError):  # no room: it is held all the same
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), str(os.getpid()).encode())
        yield


def put_in_place(data: Path) -> bool:
    """Put a backup that waits in the place of what is there; whether one did."""
    if kept := backup.put_in_place(data):
        log.warning("restored from a backup; what was there before is in %s", kept)
    return bool(kept)


def open_data(settings: dict) -> None:
    """Open the data directory and make the modules that keep something keep it there."""
    data = Path(settings["data"])
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    put_in_place(data)
    models.open_db(data / "hub.db")
    backup.finish(data)
    auth.use_secret(data / "secret")
    sessions.use_logs(
        logs.LogStore(data / "logs.db", settings["log_session_mb"], settings["log_total_mb"])
    )
    servers.HEARTBEAT_S = settings["heartbeat_s"]
    servers.LOST_AFTER_S = settings["lost_after_s"]
    auth.REGISTRATION_S = settings["registration_s"]
    inbox.CLAIM_S = settings["claim_s"]
    notices.WAIT_S = settings["telegram_wait_s"]
    notices.AGAIN_S = settings["telegram_again_s"]
    notices.MERGE_S = settings["telegram_merge_s"]
    chats.use_hub_bot(settings["telegram_token"])
    chats.presence.reset()
    moves.QUEUE_TIMEOUT_S = settings["queue_timeout_s"]
    moves.START_TIMEOUT_S = settings["start_timeout_s"]
    models.LOCK_PATIENCE_S = settings["lock_patience_s"]
    ws.QUIET_S, ws.GONE_S = settings["ping_s"], settings["gone_s"]
    terminals.LINGER_S = settings["linger_s"]
    models.clock.translate = leases.translate
    leases.listening.begin(settings["offline_after_s"])
    servers.begin()
    sockets.links.reset()
    terminals.streams.reset()
    sockets.profiles.load(HERE / "profiles")
    permissions.begin()


def create_app(settings: dict) -> APIFlask:
    """The process's application, for a hub whose data is open; starts nothing."""
    app = wired(urlsplit(settings["url"]).path.rstrip("/"))
    app.config["HUB"] = settings
    app.config["MAX_CONTENT_LENGTH"] = int(settings["max_body_mb"] * 1_000_000)
    return app


@functools.cache
def wired(prefix: str) -> APIFlask:
    """The application before it has settings: made once, for its hundreds of addresses take time.

    prefix: the path of the hub's address, if it has one.
    """
    app = APIFlask("orchestratia", title="Orchestratia", version=api.VERSION, docs_path=None)
    app.root_path = str(HERE)
    app.config["OPENAPI_VERSION"] = "3.1.0"
    app.config["HUB_SETTINGS"] = [s for s in SETTINGS if s[0] not in SECRETS]
    web.init_app(app, prefix)
    document.init_app(app)
    app.register_blueprint(api.bp, url_prefix="/api/v1")
    app.register_blueprint(api.work, url_prefix="/api/v1")
    app.register_blueprint(api.work, url_prefix="/api/v1/server", name="work_on_server")
    app.register_blueprint(sockets.bp, url_prefix="/api/v1")
    app.register_blueprint(sockets.sockets)
    app.register_blueprint(live.bp)
    app.register_blueprint(pages.bp)
    app.register_blueprint(install.bp)
    app.register_blueprint(metrics.bp)
    return app


def jobs(settings: dict):
    """(name, seconds between runs, function) of what the hub does by itself."""
    return (
        ("silence", settings["tick_s"], lambda: _silence(settings)),
        ("due", settings["due_s"], _due),
        ("settle", settings["due_s"], lambda: _settle(settings)),
        ("answers", settings["due_s"], lambda: inbox.send_unclaimed(time.time())),
        ("stuck", settings["tick_s"], lambda: _notice_stuck(settings)),
        ("remind", 1, _remind),
        ("chats", 3600, lambda: chats.forget_old(time.time(), notices.POSTS_KEPT_S)),
        ("tokens", 3600, lambda: auth.forget_expired(time.time())),
    )


def _silence(settings: dict) -> None:
    sockets.notice_silence(settings["poll_silence_s"])
    servers.notice_silence(settings["offline_after_s"], sockets.links.hush)
    if not leases.listening:
        leases.release_lost(time.time(), settings["lost_after_s"])
    leases.end_alerts()
    servers.save_heartbeats()


def _due() -> None:
    tasks.due_again(time.time())
    leases.notice_unplaced(time.time())
    if not leases.listening:
        tasks.time_out(time.time())


def _notice_stuck(settings: dict) -> None:
    inbox.notice_stuck(time.time(), settings["stuck_after_s"])


def _remind() -> None:
    sockets.links.remind()
    terminals.streams.sweep(time.monotonic())


def _settle(settings: dict) -> None:
    sessions.settle_recovering(time.time(), settings["grace_s"])


def _run_job(function) -> None:
    """What is looked for by the clock is looked for after a clock that was set has been heeded."""
    if models.clock.set_by():
        with models.transaction():
            pass
    function()


def _job_failed(event) -> None:
    if isinstance(event.exception, models.Refused):  # the disk is full, for one: it says what to do
        log.error("job %s: %s", event.job_id, event.exception)
    else:
        log.error("job %s failed", event.job_id, exc_info=event.exception)


def start_jobs(settings: dict) -> BackgroundScheduler:
    scheduler = BackgroundScheduler(
        timezone=UTC,
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": 60},
    )
    scheduler.add_listener(_job_failed, EVENT_JOB_ERROR)
    for name, seconds, function in jobs(settings):
        run = functools.partial(_run_job, function)
        scheduler.add_job(run, "interval", seconds=seconds, id=name, replace_existing=True)
    scheduler.start()
    return scheduler


def listener(host: str, port: int) -> socket.socket:
    """A listening socket without Nagle's delay. Raises OSError when the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.bind((host, port))
    sock.listen(1024)
    return sock


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hub.py", description="The Orchestratia hub. Settings also come from the environment "
        "(ORCHESTRATIA_PORT …) and from hub.yaml in the data directory."
    )  # fmt: skip
    for name, default, text in SETTINGS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar="X", help=f"{text} ({default!r})"
        )
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--login-link", action="store_true", help="print a one-time login link")
    one_of.add_argument("--backup", metavar="FILE", help="write a backup, beside a running hub too")
    one_of.add_argument("--restore", metavar="FILE", help="begin anew from a backup; hub stopped")
    return parser


def main(argv: list[str] | None = None) -> int:
    os.umask(0o077)  # database, logs and secret are nobody else's to read
    flags = vars(_parser().parse_args(argv))
    deeds = {name: flags.pop(name) for name in DEEDS}
    try:
        settings = read_settings(flags)
    except BadSetting as error:
        print(f"hub.py: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings["log_level"])
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Discreet("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    logging.getLogger("apscheduler.executors").setLevel(logging.CRITICAL)  # see _job_failed
    try:
        for name, deed in DEEDS.items():
            if deeds[name]:
                return deed(settings, deeds[name])
        with holding(Path(settings["data"])):
            return serve(_restored(settings, flags))
    except (models.UnusableData, BadSetting) as error:
        return _complain(str(error))


def _restored(settings: dict, flags: dict) -> dict:
    """The settings to serve with: those of a backup that waits, once it is in its place. Raises
    BadSetting."""
    if not put_in_place(settings["data"]):
        return settings
    settings = read_settings(flags)
    logging.getLogger().setLevel(settings["log_level"])
    return settings


def print_login_link(settings: dict, _flag: bool) -> int:
    """Make a login link beside a running hub: whoever can read its data directory may sign in."""
    data = Path(settings["data"])
    url = settings["url"] or f"http://{settings['host']}:{settings['port']}"
    try:
        with holding(data):
            open_data(settings)
            sessions.logs().close()
    except DataInUse:
        models.open_db(data / "hub.db", beside=True)
    print(f"{url}/login?token={auth.login_link()}")
    models.close_db()
    return 0


def write_backup(settings: dict, file: str) -> int:
    """Write a backup of the data directory, whether its hub runs or not."""
    data, target = Path(settings["data"]), Path(file)
    if not (data / "hub.db").exists():
        return _complain(f"There is no hub's data in {data}: give --data.")
    folder = data / f"backup-{os.getpid()}"
    try:
        backup.make(data, api.VERSION, folder)
        with open(target, "xb") as archive:
            archive.writelines(backup.Packed(folder))
    except OSError as error:
        return _complain(f"Cannot write {target}: {error.strerror}.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"Saved {target}, {target.stat().st_size:,} bytes. It holds secrets: keep it safe.")
    return 0


def take_backup(settings: dict, file: str) -> int:
    """Put a backup in the place of the data of a hub that is stopped."""
    data = Path(settings["data"])
    try:
        with holding(data):
            return _take_backup(settings, data, file)
    except DataInUse as error:
        return _complain(f"{error} Or use `orchestratia hub restore`.")


def _take_backup(settings: dict, data: Path, file: str) -> int:
    try:
        with open(file, "rb") as archive:
            description = backup.receive(auth.HUB, archive, data, models.newest_schema())
    except OSError as error:
        return _complain(f"Cannot read {file}: {error.strerror}.")
    except models.Refused as refused:
        return _complain(str(refused))
    open_data(settings)
    sessions.logs().close()
    models.close_db()
    print(
        f"Restored the backup of {description['at']}. Everybody signs in anew (--login-link), and "
        "no server takes new work until you say so: see docs/operations.md."
    )
    return 0


def _complain(sentence: str) -> int:
    print(f"hub.py: {sentence}", file=sys.stderr)
    return 1


DEEDS = {"login_link": print_login_link, "backup": write_backup, "restore": take_backup}


def serve(settings: dict) -> int:
    import gevent

    try:
        sock = listener(settings["host"], settings["port"])
    except OSError as error:
        print(
            f"hub.py: cannot listen on {settings['host']}:{settings['port']}: {error.strerror}. "
            "Is another hub running? Choose another --port.",
            file=sys.stderr,
        )
        return 1
    serving.allow_many_connections()
    settings["port"] = sock.getsockname()[1]
    settings["url"] = (settings["url"] or f"http://{settings['host']}:{settings['port']}").rstrip(
        "/"
    )
    backup.tidy(settings["data"])
    open_data(settings)
    app = create_app(settings)
    _welcome(settings)
    scheduler = start_jobs(settings)
    telegram.use_api(settings["telegram_api"])
    telegram_words.use_url(settings["url"])
    telegram.bots.start()
    server = serving.server(sock, app, settings["request_s"], settings["unread_s"], log)
    stop, again = threading.Event(), threading.Event()

    def restart() -> None:
        """Stop once the answer is out, and begin anew with what waits in the data directory."""
        again.set()
        threading.Timer(RESTART_S, stop.set).start()

    app.config["RESTART"] = restart
    for name in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(name, stop.set)
    server.start()
    stop.wait()
    log.info("stopping")
    scheduler.shutdown(wait=False)
    telegram.bots.stop()
    server.stop_accepting()
    ws.stop(STOPPING_S)
    models.bus.close()
    server.stop(timeout=STOPPING_S)
    try:
        servers.save_heartbeats()
    except models.Refused as refused:  # they are but signs of life: it ends, or begins anew
        log.error("stopping: %s", refused)
    sessions.logs().close()
    models.close_db()
    if again.is_set():
        sock.close()
        argv = [str(HERE / "hub.py"), *sys.argv[1:], "--port", str(settings["port"])]
        os.execv(sys.executable, [sys.executable, *argv])
    return 0


def _welcome(settings: dict) -> None:
    """Say where the hub is, and on the first start how to sign in."""
    password = os.environ.get("ORCHESTRATIA_ADMIN_PASSWORD")
    link = auth.first_admin(password)
    print(f"Orchestratia hub on {settings['url']}", flush=True)
    if link:
        print(f"Sign in (once, within the hour): {settings['url']}/login?token={link}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
