"""The hub itself by the API: backups of it, beginning anew from one, and what its doctor finds."""

import time

from flask import Response, current_app, request

import api
import backup
import doctor
import document
import models
import sockets
from api import bp
from document import answers, listing
from web import caller

TAR = "application/x-tar"


@bp.post("/hub/backup")
@answers(None, media=TAR)
def make_backup():
    """A backup of the hub as it is now, as a tar archive. It holds every secret: admins only."""
    settings = current_app.config["HUB"]
    return Response(backup.of_running(caller(), settings["data"], api.VERSION), content_type=TAR)


@bp.get("/hub/doctor")
@answers(listing("findings", document.Finding))
def examine():
    """What the hub needs to do its work, looked at now, each finding with what to do. Admins."""
    found = doctor.examine(
        caller(), current_app.config["HUB"], api.VERSION, time.time(), sockets.links.by_poll()
    )
    return {"findings": found}


@bp.post("/hub/restore")
@answers(document.Restoring, 202)
def restore_backup():
    """Take a backup (a tar archive as the body) and begin anew from it: the hub restarts."""
    request.max_content_length = None  # as large as it is
    settings = current_app.config["HUB"]
    schema = models.newest_schema()
    description = backup.receive(caller(), request.stream, settings["data"], schema)
    current_app.config["RESTART"]()
    return {"made_at": description["at"], "version": description["version"]}, 202
