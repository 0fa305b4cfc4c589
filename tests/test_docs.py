"""What is promised on paper is so."""

import re
from pathlib import Path

import hub

ROOT = Path(hub.__file__).parent


def test_every_setting_stands_in_the_readme_with_its_default_and_help():
    readme = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", readme, re.M)
    assert table == [(name, str(default), text) for name, default, text in hub.SETTINGS]


def test_every_pinned_dependency_has_its_reason():
    reasons = (ROOT / "docs/dependencies.md").read_text()
    pinned = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned
    for name, version in pinned:
        assert re.search(rf"^\| {name} \| {re.escape(version)} \| \S.+ \|$", reasons, re.M), name
