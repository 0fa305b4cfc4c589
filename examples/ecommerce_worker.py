"""The workers of ecommerce.yaml: real programs that read what they are handed, check it, work for
a while and deliver. Copied into each repo as `work.py`; needs the standard library only.

What the agent gives every worker: ORCHESTRATIA_TASK_FILE (the task with its resolved inputs),
ORCHESTRATIA_RESULT_FILE (where the result goes), `orchestratia` on the PATH.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SCHEMA = {
    "version": "2.5",
    "endpoints": [
        {"path": "/users", "method": "GET", "response": "User[]"},
        {"path": "/users/{id}", "method": "GET", "response": "User"},
        {"path": "/orders", "method": "POST", "response": "Order"},
    ],
    "types": {
        "User": {"id": "uuid", "name": "string", "email": "string"},
        "Order": {"id": "uuid", "user": "User", "total": "decimal"},
    },
}


def read_task() -> dict:
    return json.loads(Path(os.environ["ORCHESTRATIA_TASK_FILE"]).read_text())


def api_schema(task: dict) -> dict:
    """The input this worker builds on; it stops when it is not what it was promised."""
    schema = task["resolved_inputs"].get("api_schema")
    if not schema or schema.get("version") != "2.5" or not schema.get("endpoints"):
        sys.exit(f"expected api_schema 2.5 with endpoints, was handed {schema!r}")
    print(f"read api_schema {schema['version']} with {len(schema['endpoints'])} endpoints")
    return schema


def schema(_task):
    return {"api_schema": SCHEMA}


def gateway(task):
    return {"gateway_routes": [f"{e['method']} {e['path']}" for e in api_schema(task)["endpoints"]]}


def search(task):
    return {"search_index": {"types": sorted(api_schema(task)["types"])}}


def dashboard(task):
    return {"dashboard_bundle": {"pages": [e["path"] for e in api_schema(task)["endpoints"]]}}


def nothing(_task):
    return {}


WORK = {
    "schema": schema,
    "gateway": gateway,
    "search": search,
    "dashboard": dashboard,
    "tests": nothing,
    "deploy": nothing,
    "desktop": nothing,
}


def deliver(result: dict) -> None:
    Path(os.environ["ORCHESTRATIA_RESULT_FILE"]).write_text(json.dumps(result))


def report_by_command_line(result: dict) -> None:
    """Complete the task as a coding agent does: with the session's own key."""
    subprocess.run(
        ["orchestratia", "task", "complete", os.environ["ORCHESTRATIA_TASK_ID"]]
        + ["--result", json.dumps(result)],
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=WORK)
    parser.add_argument("--seconds", type=float, default=1)
    args = parser.parse_args()
    task = read_task()
    print(f"{task['title']} in {Path.cwd().name}, attempt {task['attempt']}", flush=True)
    contracts = WORK[args.part](task)
    inputs = json.dumps(task["resolved_inputs"], sort_keys=True)
    for step in range(1, 6):
        time.sleep(args.seconds / 5)
        print(f"step {step} of 5", flush=True)
    result = {
        "$schema": "orchestratia/task-result/v1",
        "summary": f"{args.part} done in {Path.cwd().name}",
        "inputs_sha256": hashlib.sha256(inputs.encode()).hexdigest(),
        "contracts": {key: {"status": "fulfilled", "data": d} for key, d in contracts.items()},
        "tests": {"passed": 12 if args.part == "tests" else 0, "failed": 0, "skipped": 0},
    }
    (report_by_command_line if args.part == "tests" else deliver)(result)


if __name__ == "__main__":
    main()
