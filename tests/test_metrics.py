"""`/metrics`: figures as Prometheus reads them, for admins, at a cost that does not grow."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

import inbox
import metrics
import models
from auth import HUB


def read(client) -> dict[tuple, float]:
    """{(name, labels by name …): value} of everything that is told."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.content_type == metrics.CONTENT_TYPE
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_it_says_how_the_hub_stands(app, world, admin):
    world.server("dev")
    world.server("spare", online=False)
    world.working("W", server="dev", command=["make"])
    world.task("B", after=["W"])
    inbox.ask(HUB, world.ids["W"], "Which?")
    said = read(admin)
    assert said["orchestratia_tasks", "needs_human", "shop"] == 1
    assert said["orchestratia_tasks", "pending", "shop"] == 1
    assert said["orchestratia_tasks", "running", "shop"] == 0
    assert said["orchestratia_sessions", "shop", "starting"] == 1
    assert said["orchestratia_servers", "online", "shop"] == 1
    assert said["orchestratia_servers", "offline", "shop"] == 1
    assert said["orchestratia_inbox_waiting",] == 1
    assert said["orchestratia_events_total",] == world.now()
    assert said["orchestratia_commands_unacknowledged",] == len(world.commands("dev"))
    assert said["orchestratia_agents_connected",] == 0
    assert said["orchestratia_file_bytes", "hub.db"] > 0
    assert said["process_resident_memory_bytes",] > 1_000_000


@pytest.mark.parametrize("who", ["nobody", "viewer", "admin of a project", "server"])
def test_it_is_for_admins_of_the_hub(app, world, client, who):
    world.server("dev")
    if who == "server":
        client = client.as_server(world.keys["dev"])
    elif who != "nobody":
        role = "viewer" if who == "viewer" else "admin"
        client = client.as_token(world.token(world.user("olga", shop=role).id))
    answer = client.get("/metrics")
    assert answer.status_code == (401 if who == "nobody" else 403)
    assert "orchestratia_" not in answer.text


def test_reading_walks_no_table(app, world, admin, monkeypatch):
    """Every query is answered by an index: none looks through tasks, sessions, events, posts."""
    asked = []
    execute = metrics.execute

    def noting(sql, values=()):
        asked.append((sql, values))
        return execute(sql, values)

    monkeypatch.setattr(metrics, "execute", noting)
    read(admin)
    assert len(asked) > 5
    for sql, values in asked:
        plan = [row[3] for row in models.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        assert not any(step.startswith("SCAN") and "INDEX" not in step for step in plan), plan
