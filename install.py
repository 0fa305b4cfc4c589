"""`/install.sh`: the hub hands out its agent and command line, and a script that sets them up."""

import hashlib
import re
import shlex
from pathlib import Path

from flask import Blueprint, Response

import web

bp = Blueprint("install", __name__)

HERE = Path(__file__).parent
PACKAGES = ("requests", "pyyaml", "websockets", "pexpect", "click", "rich")  # what those import
BLANKS = "HUB='' AGENT_SHA256='' CLI_SHA256='' PACKAGES=''"


@bp.get("/install.sh")
def script():
    """The script that installs agent and command line, for this hub and these files."""
    text = (HERE / "scripts/install.sh").read_text()
    return Response(text.replace(BLANKS, _filled(), 1), mimetype="text/x-shellscript")


@bp.get("/install/<any('agent.py', 'cli.py'):name>")
def program(name):
    """The agent or the command line, as this hub has it."""
    return Response((HERE / name).read_bytes(), mimetype="text/x-python")


def _filled() -> str:
    values = {
        "HUB": web.hub_url(),
        "AGENT_SHA256": _checksum("agent.py"),
        "CLI_SHA256": _checksum("cli.py"),
        "PACKAGES": " ".join(_pinned()),
    }
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())


def _checksum(name: str) -> str:
    return hashlib.sha256((HERE / name).read_bytes()).hexdigest()


def _pinned() -> list[str]:
    """`name==version` of each package, as this hub has been tested with it."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (HERE / "requirements.txt").read_text(), re.M))
    return [f"{name}=={pins[name]}" for name in PACKAGES]
