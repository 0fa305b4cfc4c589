"""Fetch the third-party files of static/vendor anew, as scripts/vendor.json names them.

Each package comes by `npm pack` and must be, to the byte, what the list recorded. To renew one:
change its version there, empty its integrity, run this, and look at what it recorded.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "scripts" / "vendor.json"
FOLDER = ROOT / "static" / "vendor"
TABLE = "VERSIONS.md"


class Wrong(Exception):
    """A package is not what the list says."""


def packages() -> list[dict]:
    return json.loads(LIST.read_text())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def integrity(data: bytes) -> str:
    """As npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


def check_package(package: dict, archive: bytes, members: dict[str, bytes]) -> None:
    """Hold a package against what the list recorded. Raises Wrong."""
    name = f"{package['package']}@{package['version']}"
    about = json.loads(members["package.json"])
    if (about["name"], about["version"]) != (package["package"], package["version"]):
        raise Wrong(f"{name}: the archive holds {about['name']}@{about['version']}")
    if about.get("license") != package["licence"]:
        raise Wrong(f"{name}: its licence is {about.get('license')}, not {package['licence']}")
    missing = [f["from"] for f in package["files"].values() if f["from"] not in members]
    if missing:
        raise Wrong(f"{name}: it has no {missing[0]}")
    if not package["integrity"]:
        return
    if integrity(archive) != package["integrity"]:
        raise Wrong(f"{name}: the archive is not the one that was recorded")
    for file, entry in package["files"].items():
        if sha256(members[entry["from"]]) != entry["sha256"]:
            raise Wrong(f"{name}: {file} is not the one that was recorded")


def record(package: dict, archive: bytes, members: dict[str, bytes]) -> None:
    package["integrity"] = integrity(archive)
    for entry in package["files"].values():
        entry["sha256"] = sha256(members[entry["from"]])


def fetch(package: dict, scratch: Path) -> tuple[bytes, dict[str, bytes]]:
    """The archive of a package and the files in it."""
    wanted = f"{package['package']}@{package['version']}"
    packed = subprocess.run(
        ["npm", "pack", "--silent", wanted], cwd=scratch, check=True, stdout=subprocess.PIPE
    )
    archive = scratch / packed.stdout.decode().split()[-1]
    with tarfile.open(archive) as tar:
        members = {
            info.name.partition("/")[2]: tar.extractfile(info).read()
            for info in tar.getmembers()
            if info.isfile()
        }
    return archive.read_bytes(), members


def table(found: list[dict]) -> str:
    """The list as a page to read."""
    lines = [
        "# Vendored files",
        "",
        "Third-party files as published on npm, unchanged. Written by `make vendor` from",
        "`scripts/vendor.json`, which also records what each file is to the byte.",
        "",
        "| name | version | licence | files | package | used for |",
        "|---|---|---|---|---|---|",
    ]
    for package in found:
        files = ", ".join(f"`{name}`" for name in package["files"])
        lines.append(
            f"| {package['title']} | {package['version']} | {package['licence']}"
            f" (`{package['licence_file']}`) | {files} | `{package['package']}`"
            f" | {package['use']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    found = packages()
    written = {}
    with tempfile.TemporaryDirectory() as scratch:
        for package in found:
            archive, members = fetch(package, Path(scratch))
            check_package(package, archive, members)
            record(package, archive, members)
            written |= {name: members[e["from"]] for name, e in package["files"].items()}
            print(f"{package['title']} {package['version']}")
    for name, data in written.items():
        (FOLDER / name).write_bytes(data)
    (FOLDER / TABLE).write_text(table(found))
    LIST.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    for path in sorted(FOLDER.iterdir()):
        if path.name not in written and path.name != TABLE:
            print(f"not in the list: {path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Wrong, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"Nothing was changed: {error}.")
