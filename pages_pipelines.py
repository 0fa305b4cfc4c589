"""The pages of pipelines, and the pictures of what waits for what and of what ran when."""

import time

import yaml
from flask import render_template, request, url_for

import api
import auth
import cascade
import picture
import reading
import tasks
import words
from models import Invalid, Refused, iso
from pages import (
    NOT_FINISHED,
    SPEC_MOST,
    bp,
    by_id,
    chosen,
    go,
    may_create,
    person,
    project_ids,
    scope,
    show,
    text_of,
)

DRAWN_MOST = 500  # tasks in one picture
LISTED_MOST = 100  # tasks of a pipeline in the table below it
BARS_MOST = 200  # tasks in the picture of when
NODES_MOST = 200_000  # of a pipeline's text with all its aliases written out


@bp.get("/pipelines")
def pipeline_list():
    """Pipelines with how far they are, newest first."""
    found = [reading.pipeline_json(row) for row in reading.list_pipelines(scope())]
    return show("pipelines/list.html", pipelines=found, may_apply=bool(may_create()))


@bp.get("/pipelines/<ref>")
def pipeline(ref):
    """One pipeline: its picture and its tasks, or what of it ran when and where."""
    row = reading.get_pipeline(person(), ref)
    shown = reading.pipeline_json(row, with_tasks=True)
    keys = {task_id: key for key, task_id in shown["id_map"].items()}
    return show(
        "pipelines/pipeline.html",
        pipeline=shown,
        keys=keys,
        listed=shown["tasks"][:LISTED_MOST],
        **_views([t["id"] for t in shown["tasks"]], shown["tasks"], keys),
    )


@bp.get("/graph")
def graph():
    """The newest tasks with what they wait for, or when and where they ran."""
    status = "open" if request.args.get("show") == "open" else None
    found, more = reading.list_tasks(
        scope(), status=NOT_FINISHED if status else None, limit=DRAWN_MOST
    )
    shown = reading.tasks_json(found)
    page = _views([t["id"] for t in found], shown, {})
    return show("pipelines/graph.html", tasks=shown, more=more is not None, only=status, **page)


def _views(ids: list[str], shown: list[dict], keys: dict[str, str]) -> dict:
    """What the chosen view of these tasks needs: the graph, or the chart."""
    if request.args.get("view") != "time":
        return {"view": "graph", "graph": picture.draw(shown[:DRAWN_MOST], keys)}
    newest = sorted(by_id("task", ids), key=lambda t: t["assigned_at"] or 0)[-BARS_MOST:]
    ran = [a | {"state": ENDS.get(a["state"], a["state"])} for a in reading.attempts(newest)]
    drawn = picture.chart(ran, time.time())
    return {"view": "time", "chart": drawn, "since": drawn and iso(drawn["begin"])}


ENDS = {  # how an attempt ended, as a state
    "complete": "done",
    "fail": "failed",
    "cancel": "cancelled",
    "release": "lost",
    "unknown": "lost",
}


@bp.get("/graph/states")
def states():
    """How the tasks named stand, for a picture that is there already."""
    asked = request.args.get("ids", "").split(",")[:DRAWN_MOST]
    mine = set(project_ids())
    found = [t for t in by_id("task", [i for i in asked if i]) if t["project_id"] in mine]
    return {
        "tasks": {
            card["id"]: {
                "state": card["shown_status"],
                "words": card["shown_status"].replace("_", " "),
                "shape": words.STATES[card["shown_status"]][0],
                "tone": words.STATES[card["shown_status"]][1],
                "where": picture.where(card),
            }
            for card in reading.cards(found)
        }
    }


# ── a new one ─────────────────────────────────────────────────────────────────────────────────


@bp.get("/pipelines/new")
def new_pipeline():
    """Where a pipeline's file is pasted or opened, looked at and applied."""
    allowed = may_create()
    if not allowed:
        raise Invalid("There is no project you may create tasks in: make one, or ask an admin.")
    return render_template(
        "pipelines/new.html", allowed=allowed, target=chosen() or allowed[0], most=SPEC_MOST
    )


@bp.post("/pipelines/check")
def check_pipeline():
    """Draw what a file would make, or say what is wrong with it; nothing is made."""
    try:
        shown = tasks.try_pipeline(person(), *_given_pipeline())
    except (Refused, cascade.RuleBroken) as why:
        return render_template("pipelines/_checked.html", why=str(why), project_id=None)
    keys = {task_id: key for key, task_id in shown["id_map"].items()}
    return render_template(
        "pipelines/_checked.html",
        pipeline=shown,
        graph=picture.draw(shown["tasks"][:DRAWN_MOST], keys),
        keys=keys,
    )


@bp.post("/pipelines")
def apply_pipeline():
    """Make all tasks of the file, or none."""
    made = tasks.create_pipeline(person(), *_given_pipeline())
    return go(url_for("pages.pipeline", ref=made["id"]))


def _given_pipeline() -> tuple[dict, str, list[dict]]:
    """(project, name, items) of the form's file."""
    text = text_of("file", SPEC_MOST)
    if not text:
        raise Invalid("There is no pipeline yet: paste its file, or open it.", field="file")
    said = _read(text)
    shape = api.valid(api.PipelineIn, said)
    named = request.form.get("project_id") or shape.project_id or shape.project
    project = auth.pick_project(person(), named)
    return project, shape.name, [api.pipeline_item(task) for task in shape.tasks]


def _read(text: str) -> dict:
    """The object of a YAML or JSON text. Raises Invalid that names line and column."""
    try:
        node = yaml.compose(text, _Loader)
        _refuse_too_large(node)
        said = yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Invalid(f"The file is not valid YAML{at}: {error.problem}.", field="file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Invalid(f"The file is not valid YAML: {error}.", field="file") from None
    if not isinstance(said, dict):
        raise Invalid("The file is no pipeline: give it a name and tasks.", field="file")
    return said


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Safe YAML that keeps dates as text, as in JSON."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _refuse_too_large(node) -> None:
    """Aliases of aliases make millions of values of a few lines; a key is given once."""
    sizes: dict[int, int] = {}  # 0 while it is being counted

    def size(at) -> int:
        if id(at) in sizes:
            if not sizes[id(at)]:
                raise Invalid("The file contains itself by an alias.", field="file")
            return sizes[id(at)]
        sizes[id(at)] = 0
        parts = []
        if isinstance(at, yaml.MappingNode):
            _refuse_double_keys(at)
            parts = [part for pair in at.value for part in pair]
        elif isinstance(at, yaml.SequenceNode):
            parts = at.value
        sizes[id(at)] = 1 + sum(map(size, parts))
        if sizes[id(at)] > NODES_MOST:
            raise Invalid(f"The file holds more than {NODES_MOST:,} values.", field="file")
        return sizes[id(at)]

    if node is not None:
        size(node)


def _refuse_double_keys(mapping) -> None:
    seen = set()
    for key, _ in mapping.value:
        if isinstance(key.value, str) and key.value in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
            )
        seen.add(key.value if isinstance(key.value, str) else id(key))
