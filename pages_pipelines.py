"""The pages of pipelines."""

import picture
import reading
from pages import bp, person, scope, show


@bp.get("/pipelines")
def pipeline_list():
    """Pipelines with how far they are, newest first."""
    found = [reading.pipeline_json(row) for row in reading.list_pipelines(scope())]
    return show("pipelines/list.html", pipelines=found)


@bp.get("/pipelines/<ref>")
def pipeline(ref):
    """One pipeline: its picture and its tasks."""
    shown = reading.pipeline_json(reading.get_pipeline(person(), ref), with_tasks=True)
    keys = {task_id: key for key, task_id in shown["id_map"].items()}
    return show(
        "pipelines/pipeline.html",
        pipeline=shown,
        keys=keys,
        graph=picture.draw(shown["tasks"], keys),
    )
