"""The pages of projects."""

from flask import url_for

import auth
from models import Invalid
from pages import NAME_MOST, bp, go, person, text_of, visible


@bp.post("/projects")
def create_project():
    """Make a project and show it."""
    name = text_of("name", 2 * NAME_MOST)
    if not name:
        raise Invalid("A project needs a name that is not empty.", field="name")
    first = not visible()
    made = auth.create_project(person(), name)
    return go(url_for("pages.overview", project=None if first else made["id"]))
