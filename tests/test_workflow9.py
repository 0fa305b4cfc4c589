"""Workflow 9: an orchestrator in a session creates, assigns, watches and answers, by the command
line and its session's key alone; two agents do the work."""

import json
import os

from conftest import wait_until

SCHEMA = {"endpoints": ["/users"], "types": {"User": ["id", "name"]}}

# What an orchestrator agent would type. The pipes make the order certain: T1 does not end before
# it was seen running, T2 and T3 only end together.
ORCHESTRATOR = """
set -eu
id() { awk '$1 == "id" { print $2 }'; }

# 1. Discover available agents
orchestratia status
orchestratia server list

# 2. Create tasks with dependencies
T1=$(orchestratia task create --title "Design API schema" --repo pinaka-master \\
    -- sh "$WORK/design.sh" | id)
T2=$(orchestratia task create --title "Gateway routes" --repo pinaka-gateway \\
    --depends-on "$T1" -- sh "$WORK/gateway.sh" | id)
T3=$(orchestratia task create --title "Web dashboard" --repo pinaka-web \\
    --depends-on "$T1" -- sh "$WORK/web.sh" | id)

# 3. Add typed dependency for data flow
orchestratia task deps add "$T2" --depends-on "$T1" --type input --contract-key api_schema

# 4. Assign first task
orchestratia task assign "$T1" --session dev-staging

# 5. Monitor progress
orchestratia task wait "$T1" --for started --timeout 60
orchestratia task list --status running | grep "Design API schema"
orchestratia task view "$T1" | grep "server *dev-staging"
echo go > "$WORK/seen"

# What is asked it hears of in its terminal, like the end of each task; so do the others.
while [ -z "${asked:-}" ]; do
    read -r line
    echo "heard: $line" >> "$WORK/heard"
    asked=$(orchestratia intervention list --status pending | awk 'NR > 1 { print $2 }')
done
orchestratia intervention show "$asked" | grep "Which colour?"
orchestratia intervention respond "$asked" blue

orchestratia task wait "$T1" "$T2" "$T3" --timeout 60
for line in 1 2 3 4; do
    [ "$(wc -l < "$WORK/heard")" -eq 4 ] && break
    read -r line && echo "heard: $line" >> "$WORK/heard"
done
orchestratia task list
printf '%s\\n' "$T1" "$T2" "$T3" > "$WORK/ids.new" && mv "$WORK/ids.new" "$WORK/ids"
"""
WORKERS = {
    "design.sh": """
set -e
read -r go < "$WORK/seen"
cp "$WORK/schema.json" "$ORCHESTRATIA_RESULT_FILE"
""",
    "gateway.sh": """
set -e
cp "$ORCHESTRATIA_TASK_FILE" "$WORK/gateway.json"
read -r both < "$WORK/both"
orchestratia note "the routes stand"
""",
    "web.sh": """
set -e
echo here > "$WORK/both"
colour=$(orchestratia task help --type question --question "Which colour?" --wait --timeout 60)
printf '{"summary": "painted it %s"}' "$colour" > "$ORCHESTRATIA_RESULT_FILE"
""",
}


def write_programs(work):
    work.mkdir()
    for name in ("seen", "both"):
        os.mkfifo(work / name)
    result = {"summary": "designed", "contracts": {"api_schema": SCHEMA}}
    (work / "schema.json").write_text(json.dumps(result))
    for name, text in (WORKERS | {"orchestrator.sh": ORCHESTRATOR}).items():
        (work / name).write_text(f'WORK="{work}"\n{text}')


def test_an_orchestrator_drives_a_pipeline_of_two_servers_by_the_command_line_alone(
    shop, start_agent, cli, tmp_path
):
    write_programs(tmp_path / "work")
    start_agent(shop, "dev-staging", repos=["pinaka-master", "pinaka-gateway"])
    start_agent(shop, "dev-web", repos=["pinaka-web"])
    program = ["sh", str(tmp_path / "work/orchestrator.sh")]
    start = ["session", "start", "dev-staging", "--name", "boss", "--role", "orchestrator"]
    boss = cli(*start, "--json", "--", *program)["id"]

    def ended():
        found = shop.api("GET", f"sessions/{boss}")
        return found if found["status"] == "closed" else None

    code = wait_until(ended, 120)["exit_code"]
    printed = cli("session", "logs", boss).stdout
    assert code == 0, printed
    for line in ("pinaka-master, pinaka-gateway", "pinaka-web", "Gateway routes", "Web dashboard"):
        assert line in printed

    ids = (tmp_path / "work/ids").read_text().split()
    design, gateway, web = (shop.api("GET", f"tasks/{task_id}") for task_id in ids)
    check_what_was_done(design, gateway, web)
    check_the_order(shop, *ids)
    check_what_was_heard((tmp_path / "work/heard").read_text().splitlines(), ids)

    handed = json.loads((tmp_path / "work/gateway.json").read_text())
    assert handed["resolved_inputs"] == {"api_schema": SCHEMA}


def check_what_was_done(design, gateway, web):
    for task in (design, gateway, web):
        assert (task["status"], task["attempt"]) == ("done", 1)
        assert (task["created_by"], task["source_session_name"]) == ("session:boss", "boss")
    where = [task["assigned_server_name"] for task in (design, gateway, web)]
    assert where == ["dev-staging", "dev-staging", "dev-web"]
    kinds = [d["dependency_type"] for d in gateway["dependencies"]]
    assert (kinds, all(d["resolved"] for d in gateway["dependencies"])) == (
        ["blocks", "input"],
        True,
    )
    assert gateway["resolved_inputs"] == {"api_schema": SCHEMA}
    assert [note["content"] for note in gateway["recent_notes"]] == ["the routes stand"]
    assert web["result"]["summary"] == "painted it blue"


def check_the_order(hub, design, gateway, web):
    """As the hub's own log has it: nothing began before what it builds on was done, and the two
    that do not wait for each other ran at the same time."""
    at = {}
    events = hub.api("GET", "events?limit=1000")["events"]
    for event in events:
        at.setdefault((event["task_id"], event["type"]), event["id"])
    done = at[design, "task_completed"]
    for task in (gateway, web):
        assert done < at[task, "task_unblocked"] < at[task, "task_auto_assigned"]
        assert at[task, "task_auto_assigned"] < at[task, "task_started"]
    began = max(at[gateway, "task_started"], at[web, "task_started"])
    assert began < min(at[gateway, "task_completed"], at[web, "task_completed"])
    assert at[web, "task_started"] < at[web, "task_needs_human"] < at[web, "task_completed"]
    by_hand = [
        e["actor"] for e in events if e["type"] in ("task_assigned", "intervention_responded")
    ]
    assert by_hand == ["session:boss", "session:boss"]


def check_what_was_heard(lines, ids):
    """The ends of three tasks and a question, typed into the orchestrator's terminal."""
    heard = sorted(ids.index(line.split()[-1]) for line in lines)
    assert heard == [0, 1, 2, 2], lines
