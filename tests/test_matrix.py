"""Each kind of request, by each channel, with hub or agent killed before, during and after the
answer: delivered at most once, and exactly once or shown as in doubt; and nothing is stuck."""

import itertools
import re
import threading

import pytest
import requests

from conftest import cookie, wait_until
from standin import happened
from test_humans import GIT, help_step, stand  # noqa: F401

pytestmark = pytest.mark.hub(grace_s=1.0)
WORDS = "JWT with refresh tokens"


class Question:
    steps, profile, fields = (help_step(), {"wait": True}), "claude", {}

    @staticmethod
    def waits(stand):  # noqa: F811
        found = stand.hub.api("GET", "interventions?status=pending")
        return found and found[0]

    api = ("interventions/{id}/respond", {"response": WORDS})
    page = ("inbox/{id}/answer", {"response": WORDS})
    cli = ("intervention", "respond", "{id}", WORDS)

    @staticmethod
    def delivered(stand):  # noqa: F811
        return sum(text.endswith(WORDS) for text in stand.submitted())

    @staticmethod
    def doubt(stand, item):  # noqa: F811
        return stand.hub.api("GET", f"interventions/{item['id']}")["delivery"] == "unknown"


class Plan:
    submit = {
        "shell": [
            *("sh", "-c"),
            "echo Go > p.md; orchestratia plan submit $ORCHESTRATIA_TASK_ID --plan-file p.md",
        ]
    }
    steps, profile, fields = (submit, {"wait": True}), "claude", {"require_plan": True}

    @staticmethod
    def waits(stand):  # noqa: F811
        return stand.look()["status"] == "plan_review" and {"id": stand.task["id"]}

    api = ("tasks/{id}/plan/approve", {"comment": WORDS})
    page = ("inbox/plans/{id}/approve", {"comment": WORDS, "version": 1})
    cli = ("plan", "approve", "{id}", "--comment", WORDS)

    @staticmethod
    def delivered(stand):  # noqa: F811
        return sum(text.startswith("Your plan is approved") for text in stand.submitted())

    @staticmethod
    def doubt(stand, _item):  # noqa: F811
        return any("approval of a plan" in alert["sentence"] for alert in stand.alerts())


class Permission:
    steps, profile, fields = (GIT,), "claude", {}

    @staticmethod
    def waits(stand):  # noqa: F811
        listed = stand.hub.api("GET", f"permissions?session_id={stand.session_id}&status=pending")
        return listed["permissions"] and listed["permissions"][0]

    api = ("permissions/{id}/decide", {"decision": "allow"})
    page = ("inbox/permissions/{id}/decide", {"decision": "allow"})
    cli = ("permission", "allow", "{id}")

    @staticmethod
    def delivered(stand):  # noqa: F811
        return len(happened(stand.record, "tool"))

    @staticmethod
    def doubt(stand, item):  # noqa: F811
        return stand.hub.api("GET", f"permissions/{item['id']}")["delivery"] in (
            "unknown",
            "failed",
        )


class ByKey(Permission):
    profile = "codex"


KINDS = {"question": Question, "plan": Plan, "hook": Permission, "key": ByKey}
CHANNELS = ("api", "page", "cli")
FAULTS = [(None, None), *itertools.product(("hub", "agent"), ("before", "during", "after"))]
# Every kind meets every fault and every channel, and every channel every fault.
CASES = [
    (kind, CHANNELS[(k + f) % 3], *fault)
    for k, kind in enumerate(KINDS)
    for f, fault in enumerate(FAULTS)
]


def by_api(stand, kind, item, _cli):  # noqa: F811
    path, body = kind.api
    return stand.hub.ask("POST", path.format(**item), body).status_code


def by_page(stand, kind, item, _cli):  # noqa: F811
    path, fields = kind.page
    with requests.Session() as browser:
        kept = cookie(stand.hub.url, stand.hub.login())
        browser.cookies.set(kept["name"], kept["value"])
        page = browser.get(f"{stand.hub.url}/inbox").text
        csrf = re.search(r'name="csrf-token" content="([^"]+)"', page)[1]
        said = browser.post(
            f"{stand.hub.url}/{path.format(**item)}",
            data=fields | {"csrf_token": csrf},
            headers={"Origin": stand.hub.url},
            allow_redirects=False,
        )
        return said.status_code


def by_cli(_stand, kind, item, cli):
    done = cli(*(word.format(**item) for word in kind.cli), ok=False)
    if done.returncode == 3:
        raise requests.ConnectionError(done.stderr)
    return 200 if done.returncode == 0 else 409


ANSWERS = {"api": by_api, "page": by_page, "cli": by_cli}


def answer(stand, kind, channel, item, cli):  # noqa: F811
    """Answer, again when the hub was away; the same answer again changes nothing."""

    def once():
        try:
            return ANSWERS[channel](stand, kind, item, cli) < 500
        except (requests.RequestException, TypeError, AssertionError):
            return False  # the hub was killed

    wait_until(once, 40, every=0.1)


def break_(stand, who):  # noqa: F811
    if who == "hub":
        stand.hub.kill()
        stand.hub.start()
    else:
        stand.agent.kill()
        stand.agent.start()


@pytest.mark.parametrize(("kind", "channel", "who", "when"), CASES)
def test_an_answer_arrives_once_or_its_doubt_is_shown(stand, cli, kind, channel, who, when):  # noqa: F811
    kind = KINDS[kind]
    stand.begin(*kind.steps, profile=kind.profile, **kind.fields)
    item = wait_until(lambda: kind.waits(stand))
    if kind is ByKey:
        stand.activity("blocked:permission")
    if when == "before":
        break_(stand, who)
    answering = threading.Thread(target=answer, args=(stand, kind, channel, item, cli))
    answering.start()
    if when != "during":
        answering.join()
    if when in ("during", "after"):
        break_(stand, who)
    answering.join()
    wait_until(stand.agent.is_online, 60)
    wait_until(lambda: kind.delivered(stand) or kind.doubt(stand, item), 60)
    wait_until(lambda: not kind.waits(stand))
    assert stand.look()["status"] == "running"
    wait_until(lambda: stand.session()["status"] == "active", 40)
    assert kind.delivered(stand) <= 1
    assert happened(stand.record, "stray") == []
    if who is None:
        assert kind.delivered(stand) == 1
        assert not kind.doubt(stand, item)
        assert stand.alerts() == []
