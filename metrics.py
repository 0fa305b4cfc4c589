"""`/metrics`: how the hub stands, as Prometheus reads it.

Everything is counted by indices or in memory, so that a reading costs the same however long the
history is: of tasks and sessions those that are open, of events the number of the last.
"""

import os

from flask import Blueprint, Response, current_app
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

import api
import auth
import cascade
import inbox
import reading
import sockets
import terminals
import web
from models import execute, rows

bp = Blueprint("metrics", __name__)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FILES = ("hub.db", "hub.db-wal", "logs.db", "logs.db-wal")  # of the data directory


@bp.get("/metrics")
def metrics():
    """The hub in figures, for its admins: a token of one as a bearer."""
    auth.require(web.caller(), "user.admin")
    return Response(generate_latest(_registry()), content_type=CONTENT_TYPE)


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Hub(current_app.config["HUB"]["data"]))
    return registry


class _Hub:
    """Collects the figures anew at each reading."""

    def __init__(self, data):
        self._data = data

    def collect(self):
        yield InfoMetricFamily(
            "orchestratia_hub", "The hub's version", value={"version": api.VERSION}
        )
        yield _by_state("tasks", "Tasks that are not ended", "task", "status", cascade.OPEN)
        live = cascade.SESSION_LIVE | {"lost"}
        yield _by_state("sessions", "Sessions that are not closed", "session", "state", live)
        yield _servers()
        yield _gauge("inbox_waiting", "What waits for a person", inbox.count(_projects()))
        yield CounterMetricFamily(
            "orchestratia_events", "Events written since the first", value=reading.last_event_id()
        )
        [[waiting]] = execute("SELECT COUNT(*) FROM command WHERE acked_at IS NULL").fetchall()
        yield _gauge("commands_unacknowledged", "Commands no agent has acknowledged yet", waiting)
        yield _gauge("agents_connected", "Agents with a connection", sockets.links.count())
        yield _gauge("sessions_watched", "Sessions somebody looks at", terminals.streams.count())
        [[posts]] = execute(
            "SELECT COUNT(*) FROM post WHERE state IN ('due', 'stale', 'gone', 'void')"
        ).fetchall()
        yield _gauge("telegram_posts_waiting", "Messages that Telegram has not taken yet", posts)
        yield self._files()

    def _files(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "orchestratia_file_bytes", "Size of what the hub keeps on disk", labels=["file"]
        )
        for name in FILES:
            path = os.path.join(self._data, name)
            family.add_metric([name], os.path.getsize(path) if os.path.exists(path) else 0)
        return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"orchestratia_{name}", text, value=value)


def _projects() -> list[str]:
    return [row["id"] for row in rows("SELECT id FROM project ORDER BY id")]


def _by_state(name: str, text: str, table: str, column: str, states) -> GaugeMetricFamily:
    """How many rows of each project are in each of these states: a short walk of an index each."""
    family = GaugeMetricFamily(f"orchestratia_{name}", text, labels=["project", "state"])
    for project in rows("SELECT id, name FROM project ORDER BY name"):
        for state in sorted(states):
            [[count]] = execute(
                f"SELECT COUNT(*) FROM {table} WHERE project_id = ? AND {column} = ?",
                (project["id"], state),
            ).fetchall()
            family.add_metric([project["name"], state], count)
    return family


def _servers() -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "orchestratia_servers", "Servers that are not revoked", labels=["project", "state"]
    )
    for row in rows(
        "SELECT p.name, CASE WHEN online = 0 THEN 'offline' WHEN draining THEN 'draining'"
        " ELSE 'online' END AS state, COUNT(*) AS count FROM server s"
        " JOIN project p ON p.id = s.project_id WHERE revoked = 0 GROUP BY p.name, 2"
    ):
        family.add_metric([row["name"], row["state"]], row["count"])
    return family
