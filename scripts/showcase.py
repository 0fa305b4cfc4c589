"""A hub with something on every page: for the pictures of them, and for the tests that look at
each."""

from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
HELD_UP = (  # title, what its worker asks, what it says of it
    (
        "Add sign-in to the web shop",
        "JWT or session cookies?\nThe spec says both in different places.",
        "src/auth.py:40 wants cookies, docs/api.md says bearer tokens.",
    ),
    ("Move the cart to Redis", "May I drop the table carts_old? It has 3 rows.", None),
)
PLAN = {
    "summary": "Split the importer in three steps and test each",
    "steps": ["Read CSV in chunks", "Validate the rows", "Write in one transaction"],
}
BACKLOG = {
    "Cache the product list": "low",
    "Remove the old checkout": "normal",
    "Alert when the queue grows": "high",
    "Fix the rounding of prices": "critical",
}
SPEC = {
    "requirements": [
        {"description": "Prices are rounded half up", "priority": "must"},
        {"description": "Old invoices keep their totals", "priority": "must"},
        {"description": "The rule is in one place", "priority": "should"},
    ],
    "expected_contracts": {
        "rounding": {"description": "The rule as code", "schema": {"type": "object"}}
    },
}


def pipeline() -> dict:
    """The pipeline of the examples, for whoever has its repos."""
    said = yaml.safe_load((ROOT / "examples" / "ecommerce.yaml").read_text())
    for task in said["tasks"]:
        task.pop("assign", None)
    return said


def fill(call: Callable, server: str) -> dict[str, str]:
    """Tasks in every state but done, for people to decide on and to look at, as the admin whose
    API `call(method, path, body)` is; `server` takes them. {name: id} of some."""
    made = {}
    for title, question, context in HELD_UP:
        task = _started(call, title, server)
        body = {"question": question, "intervention_type": "question"}
        call("POST", f"tasks/{task}/help", body | ({"context": context} if context else {}))
        made["asks"] = task
    made["plans"] = _assigned(call, "Rewrite the importer", server, require_plan=True)
    call("POST", f"tasks/{made['plans']}/plan", {"plan": PLAN})
    note = {"content": "Mind the two CSV dialects: the old shop writes semicolons.", "urgent": True}
    call("POST", f"tasks/{made['plans']}/notes", note)
    made["failed"] = _started(call, "Shrink the image", server)
    call("POST", f"tasks/{made['failed']}/fail", {"error": "no space left on device"})
    for title, priority in BACKLOG.items():
        body = {"title": title, "priority": priority, "structured_spec": SPEC}
        made["waits"] = call("POST", "tasks", body)["id"]
    after = {"depends_on_task_id": made["waits"], "dependency_type": "input"}
    body = {
        "title": "Print the invoices anew",
        "dependencies": [after | {"contract_key": "rounding"}],
    }
    made["blocked"] = call("POST", "tasks", body)["id"]
    return made


def _assigned(call: Callable, title: str, server: str, **more) -> str:
    task = call("POST", "tasks", {"title": title})["id"]
    call("POST", f"tasks/{task}/assign", {"server": server} | more)
    return task


def _started(call: Callable, title: str, server: str) -> str:
    task = _assigned(call, title, server)
    call("POST", f"tasks/{task}/start", {})
    return task
