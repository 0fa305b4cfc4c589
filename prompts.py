"""The prompt a worker is started with: what it is to do, what it is given, and how it reports.

A project may have a template of its own. It is text with the names of BLOCKS in double braces and
nothing else that is carried out: people's text in, plain text out.
"""

import json
import re

import auth
import reading
from models import Invalid, labels, loads, one

TEMPLATE_MOST = 50_000  # characters
NAME = re.compile(r"\{\{\s*(\w+)\s*\}\}")

DEFAULT = """\
# {{ title }}

You work on task `{{ id }}` of the project {{ project }}, on the server {{ server }}.

{{ spec }}

{{ requirements }}

{{ criteria }}

{{ inputs }}

{{ contracts }}

{{ feedback }}

{{ report }}
"""

AGAIN = """\
# {{ title }}

Your terminal on {{ server }} was lost while you worked on this task, `{{ id }}`; this is attempt
{{ attempt }}, and the conversation is the one you had. Look at what is done already, then go on.

{{ report }}
"""

REPORT = """\
## How to report

The command `orchestratia` is on your PATH and knows who you are.

{begin}
- Where you cannot decide, ask and wait for the answer:
  `orchestratia task help {id} --question "..." --wait`
- Say what matters to others: `orchestratia note {id} "..."`
- When all is done, write the result as JSON to a file, such as
  `{{"summary": "...", "contracts": {{}}}}`, and run
  `orchestratia task complete {id} --result-file FILE`. If it is refused, read why, mend it and run
  it again.
- When it cannot be done: `orchestratia task fail {id} --error "why"`"""

BEGIN = "- Begin with `orchestratia task start {id}`"
PLAN_FIRST = """\
- Plan first: change nothing until the plan is approved. Write it as Markdown to a file and run
  `orchestratia plan submit {id} --plan-file FILE --wait`. It ends with 0 when the plan is approved,
  and with 1 when it is sent back: the feedback is printed; mend the plan and submit it again."""


def of_session(session: dict) -> str | None:
    """The prompt of a session's task, or what one that resumes a conversation is told; None for a
    session without a task, or for a plain program."""
    if not session["task_id"] or session["profile"] in (None, "command"):
        return None
    task = one("SELECT * FROM task WHERE id = ?", (session["task_id"],))
    project = one("SELECT * FROM project WHERE id = ?", (session["project_id"],))
    server = labels("server", "name", {session["server_id"]})[session["server_id"]]
    template = loads(project["settings"]).get("prompt") or DEFAULT
    if session["resumes"]:
        template = AGAIN
    return fill(template, values_of(task, project["name"], server))


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its names replaced, without the gaps that empty blocks leave. A name that
    is not known stays as it is."""
    filled = NAME.sub(lambda name: values.get(name[1], name[0]), template)
    return re.sub(r"\n{3,}", "\n\n", filled).strip() + "\n"


def values_of(task: dict, project: str, server: str) -> dict[str, str]:
    """What the names of a template stand for: {name of BLOCKS: text}. task: its row."""
    return {"project": project, "server": server} | {n: make(task) for n, make in BLOCKS.items()}


def _spec(task: dict) -> dict:
    return loads(task["structured_spec"]) or {}


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _requirements(task: dict) -> str:
    items = [f"- {r['description']} ({r['priority']})" for r in _spec(task).get("requirements", ())]
    return _section("Requirements", "\n".join(items))


def _criteria(task: dict) -> str:
    found = loads(task["acceptance_criteria"]) or _spec(task).get("acceptance_criteria") or ()
    return _section("Accepted when", "\n".join(f"- {criterion}" for criterion in found))


def _fenced(value) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"


def _inputs(task: dict) -> str:
    given = loads(task["resolved_inputs"], {})
    parts = [f"### {key}\n\n{_fenced(data)}" for key, data in given.items()]
    return _section("What the tasks before this one hand to you", "\n\n".join(parts))


def _contracts(task: dict) -> str:
    parts = [_contract(owed["key"], owed["schema"]) for owed in reading.contracts_of(task)]
    body = "By these keys under `contracts` of your result:\n\n" + "\n".join(parts)
    return _section("What you must hand over", body if parts else "")


def _contract(key: str, schema: dict | None) -> str:
    return f"- `{key}`" + (f", valid by this JSON Schema:\n\n{_fenced(schema)}\n" if schema else "")


def _report(task: dict) -> str:
    begin = PLAN_FIRST if task["require_plan"] else BEGIN
    return REPORT.format(id=task["id"], begin=begin.format(id=task["id"]))


BLOCKS = {
    "id": lambda task: task["id"],
    "title": lambda task: task["title"],
    "spec": lambda task: task["spec"],
    "attempt": lambda task: str(task["attempt"]),
    "repo": lambda task: loads(task["requirements"]).get("repo") or "",
    "branch": lambda task: task["target_branch"] or "",
    "requirements": _requirements,
    "criteria": _criteria,
    "inputs": _inputs,
    "contracts": _contracts,
    "feedback": lambda task: _section("Feedback on your last plan", task["plan_feedback"] or ""),
    "report": _report,
}
NAMES = (*BLOCKS, "project", "server")


def check(template: str) -> str:
    """A template as it may be stored. Raises Invalid with what is wrong in it."""
    if len(template) > TEMPLATE_MOST:
        raise Invalid(
            f"The prompt's template is longer than {TEMPLATE_MOST:,} characters: shorten it.",
            field="prompt",
        )
    unknown = sorted({name for name in NAME.findall(template) if name not in NAMES})
    if unknown:
        raise Invalid(
            f"The prompt's template has unknown names ({', '.join(unknown)}): use "
            f"{', '.join(sorted(NAMES))}.",
            field="prompt",
        )
    if "report" not in NAME.findall(template):
        raise Invalid(
            "The prompt's template lacks {{ report }}: without it a worker does not learn how to "
            "report, and its task never ends.",
            field="prompt",
        )
    return template


auth.PROJECT_CHECKS["prompt"] = check
