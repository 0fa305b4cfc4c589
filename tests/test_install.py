"""`/install.sh` run for real: by every shell there is, against a real hub, in a home of its own."""

import ast
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import auth
import install
from auth import HUB
from conftest import ROOT, clean_env, wait_until
from test_pipeline import FAST, at_end, task

PROGRAMS = ("agent.py", "cli.py")
TEMPLATE = (ROOT / "scripts/install.sh").read_text()
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


def shell_words(shell):
    found = shutil.which(shell)
    return [found, "sh"] if shell == "busybox" else [found]


class Machine:
    """A home in which the hub's script is run, as `curl … | sh -s -- …` does it."""

    def __init__(self, hub, home):
        self.hub, self.home = hub, home
        home.mkdir()
        self.base = home / ".orchestratia"
        self.config = home / ".config/orchestratia/config.yaml"

    def script(self):
        return self.hub.http.get(f"{self.hub.url}/install.sh", timeout=10).text

    def token(self):
        return self.hub.api("POST", "servers/tokens", {})["token"]

    def install(self, *argv, script=None, shell="dash", python=sys.executable, **more):
        env = clean_env(self.home, **({"ORCHESTRATIA_PYTHON": python} if python else {}))
        return subprocess.run(
            [*shell_words(shell), "-s", "--", *argv],
            input=script or self.script(),
            env=env | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )

    def run(self, name, *argv):
        words = [self.base / "bin" / name, *argv]
        return subprocess.run(words, env=clean_env(self.home), capture_output=True, text=True)

    def pid(self):
        return int((self.home / ".local/state/orchestratia/agent.lock").read_text())

    def forget(self):
        """End what the script has started."""
        if (self.base / "bin/orchestratia-agent").exists():
            self.run("orchestratia-agent", "--stop")
        for server in self.hub.api("GET", "servers")["servers"]:
            command = ["tmux", "-L", f"orc-{server['id'][:8]}", "kill-server"]
            subprocess.run(command, capture_output=True)


@pytest.fixture
def machine(shop, tmp_path):
    made = Machine(shop, tmp_path / "it's home")  # as awkward as a directory's name may be
    yield made
    made.forget()


def session(hub, name):
    return hub.api("GET", f"sessions/{name}")


def printed(hub, name):
    return hub.ask("GET", f"sessions/{name}/output").content.decode()


# ── installing and upgrading ──────────────────────────────────────────────────────────────────


@pytest.mark.hub(**FAST)
def test_it_installs_registers_and_starts_and_run_again_it_upgrades(shop, machine, tmp_path):
    (tmp_path / "core").mkdir()
    (machine.home / ".local/bin").mkdir(parents=True)
    token = machine.token()
    done = machine.install(token, "--name", "dev 1", "--repo", f"core={tmp_path / 'core'}")
    assert done.returncode == 0, done.stdout
    for name in PROGRAMS:
        text = (ROOT / name).read_bytes()
        assert (machine.base / name).read_bytes() == text
        assert f"Fetched {name}, sha256 {hashlib.sha256(text).hexdigest()}" in done.stdout
    assert "registered as dev 1 in the project shop." in done.stdout
    assert "The agent runs in the background and is online." in done.stdout
    assert token not in done.stdout and "orc_" not in done.stdout
    server = shop.api("GET", "servers/dev 1")
    assert (server["status"], list(server["repos"])) == ("online", ["core"])
    assert machine.base.stat().st_mode & 0o077 == 0
    assert machine.run("orchestratia", "--version").stdout.startswith("orchestratia ")
    for name in ("orchestratia", "orchestratia-agent"):
        assert (machine.home / ".local/bin" / name).resolve() == machine.base / "bin" / name

    made = task(shop, "Build", "sh", "-c", "pwd; orchestratia note built", target_repo="core",
                auto_assign=True)  # fmt: skip
    built = at_end(shop, made["id"])
    assert built["status"] == "done"
    assert [note["content"] for note in built["recent_notes"]] == ["built"]

    command = ["sh", "-c", "echo ready; read -r line; echo heard $line; read -r line"]
    body = {"server_id": "dev 1", "name": "keeps", "command": command}
    shop.api("POST", "sessions", body)
    wait_until(lambda: "ready" in printed(shop, "keeps"))
    config, before = machine.config.read_bytes(), machine.pid()
    (machine.base / "agent.py").write_text("raise SystemExit('an older one')")

    again = machine.install(python=None)  # it remembers which Python was chosen
    assert again.returncode == 0, again.stdout
    assert (machine.base / "agent.py").read_bytes() == (ROOT / "agent.py").read_bytes()
    assert machine.config.read_bytes() == config
    assert machine.pid() != before
    assert not (machine.base / "venv").exists()
    wait_until(lambda: session(shop, "keeps")["status"] == "active")
    shop.api("POST", "sessions/keeps/input", {"text": "hello"})
    wait_until(lambda: "heard hello" in printed(shop, "keeps"))

    used = machine.install(token, "--name", "other")  # the line from the history, once more
    assert used.returncode == 0, used.stdout
    assert "was already used" in used.stdout and "stays registered as it was" in used.stdout
    assert machine.config.read_bytes() == config
    assert [s["name"] for s in shop.api("GET", "servers")["servers"]] == ["dev 1"]
    assert session(shop, "keeps")["status"] in ("active", "recovering", "disconnected")
    assert [path.name for path in machine.base.glob("new.*")] == []


def reachable(folder):
    """Whether pip gets packages here at all."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    return subprocess.run([*command, install._pinned()[0]], capture_output=True).returncode == 0


@pytest.mark.hub(**FAST)
def test_it_makes_a_python_environment_of_its_own(shop, machine, tmp_path):
    if not reachable(tmp_path / "packages"):
        pytest.skip("pip finds no packages here")
    path = f"{only(machine.home / 'tools', 'python3')}:{os.environ['PATH']}"
    done = machine.install(machine.token(), "--name=dev", python=None, PATH=path)
    assert done.returncode == 0, done.stdout
    assert "is online" in done.stdout
    wrapper = (machine.base / "bin/orchestratia").read_text()
    assert "/.orchestratia/venv/bin/python' " in wrapper
    found = machine.base / "venv/bin/python"
    listed = subprocess.run([found, "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    assert {line.lower() for line in listed.split()} >= set(install._pinned())
    before = machine.pid()
    assert machine.install(python=None, PATH=path).returncode == 0
    assert machine.pid() != before


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_can_run_it(shop, machine, shell):
    done = machine.install(machine.token(), "--no-start", shell=shell)
    assert done.returncode == 0, done.stdout
    assert f"{machine.base}/bin/orchestratia-agent" in done.stdout
    assert 'export PATH="$HOME/.orchestratia/bin:$PATH"' in done.stdout
    assert machine.config.exists() and not (machine.base / "agent.out").exists()


@pytest.mark.parametrize("fetcher", ["curl", "wget"])
def test_either_fetcher_will_do(shop, machine, fetcher):
    if not shutil.which(fetcher):
        pytest.skip(f"no {fetcher} here")
    path = only(machine.home / "tools", fetcher, *TOOLS)
    done = machine.install(machine.token(), "--no-start", PATH=path)
    assert done.returncode == 0, done.stdout


def test_what_is_not_ours_in_local_bin_is_left_alone(shop, machine):
    folder = machine.home / ".local/bin"
    folder.mkdir(parents=True)
    (folder / "orchestratia").write_text("somebody else's")
    done = machine.install(machine.token(), "--no-start")
    assert done.returncode == 0
    assert f"Left alone: {folder}/orchestratia" in done.stdout
    assert (folder / "orchestratia").read_text() == "somebody else's"
    assert (folder / "orchestratia-agent").is_symlink()


def test_the_service_stops_an_agent_in_the_background_and_leaves_sessions_alone(shop, machine):
    done = machine.install(machine.token(), "--no-start")
    unit = (machine.base / "orchestratia-agent.service").read_text()
    program = f'"{machine.base}/bin/orchestratia-agent"'
    assert f"ExecStartPre={program} --stop\nExecStart={program} --quiet\n" in unit
    assert "KillMode=process" in unit
    assert f'Environment="PATH={os.environ["PATH"]}"' in unit
    if shutil.which("systemd-analyze"):
        command = [
            "systemd-analyze",
            "--user",
            "verify",
            machine.base / "orchestratia-agent.service",
        ]
        checked = subprocess.run(
            command, env=clean_env(machine.home), capture_output=True, text=True
        )
        assert "orchestratia-agent.service" not in checked.stderr, checked.stderr
    if shutil.which("systemctl"):
        assert "systemctl --user enable --now" in done.stdout
    else:
        assert "@reboot" in done.stdout


# ── what it refuses ───────────────────────────────────────────────────────────────────────────

TOOLS = ("sh", "sed", "cat", "uname", "mkdir", "mktemp", "mv", "rm", "chmod", "grep", "sleep")
TOOLS += ("env", "ln", "readlink", "nohup", "tmux")
PYTHON = sys._base_executable  # the interpreter itself, not what a version manager puts before it


def only(folder, *names):
    """A directory with just these programs, as the whole PATH."""
    folder.mkdir()
    for name in names:
        if found := PYTHON if name == "python3" else shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def program(folder, name, text):
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o700)


def nothing_done(machine):
    return not machine.base.exists() and not machine.config.exists()


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ((), 2, "not registered yet: give a registration token"),
        (("abc",), 2, "What is abc? A registration token begins with orcreg_"),
        (("--name",), 2, "--name needs a value"),
        (("orcreg_x.y", "--naem=x"), 2, "What is --naem=x?"),
        (("orcreg_x.y", "--python", "no-such-python"), 1, "There is no program no-such-python"),
        (("orcreg_x.y", "--python=/bin/true"), 1, "/bin/true is not Python 3.11 or newer"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_done(shop, machine, argv, code, said):
    done = machine.install(*argv, python=None)
    assert (done.returncode, said in done.stdout) == (code, True), done.stdout
    assert nothing_done(machine)
    assert "Usage: install.sh" in machine.install("--help").stdout


@pytest.mark.parametrize(
    ("have", "fake", "said"),
    [
        (("curl",), {}, "Python 3.11 or newer is needed"),
        (("curl",), {"python3": "exit 1"}, "Python 3.11 or newer is needed"),
        (("python3",), {}, "curl or wget is needed"),
        (("curl", "python3"), {"uname": "echo Darwin"}, "needs Linux; this is Darwin"),
        (
            ("curl",),
            {"python3": f'case "$2" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"'},
            "Python's venv is missing.*python3-venv",
        ),
    ],
)
def test_what_is_missing_is_said(shop, machine, have, fake, said):
    folder = machine.home / "tools"
    path = only(folder, *TOOLS, *have)
    for name, text in fake.items():
        program(folder, name, text)
    done = machine.install(machine.token(), python=None, PATH=path)
    assert done.returncode == 1
    assert re.search(said, done.stdout, re.S), done.stdout
    assert not machine.config.exists() and not list(machine.base.glob("*.py"))


def test_a_python_without_the_packages_is_refused_by_name(shop, machine, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = str(tmp_path / "bare/bin/python")
    done = machine.install(machine.token(), "--python", bare, python=None)
    assert (done.returncode, "lacks packages: requests pyyaml" in done.stdout) == (1, True)
    assert nothing_done(machine)


def test_a_file_that_is_not_the_announced_one_is_not_installed(shop, machine):
    text = machine.script()
    sums = re.findall(r"\b[0-9a-f]{64}\b", text)
    assert len(sums) == 2
    done = machine.install(machine.token(), script=text.replace(sums[1], "0" * 64))
    assert done.returncode == 1
    assert "cli.py is not the one this script is for" in done.stdout
    assert not machine.config.exists() and not (machine.base / "agent.py").exists()


def test_a_token_that_cannot_be_used_is_the_hubs_sentence(shop, machine):
    token = machine.token()
    done = machine.install(token[:-3] + "xyz")
    assert (done.returncode, "is unknown to this hub" in done.stdout) == (1, True)
    assert not machine.config.exists()


def test_a_machine_of_another_hub_stays_there(shop, machine):
    machine.config.parent.mkdir(parents=True)
    machine.config.write_text("hub_url: https://other.example/hub\napi_key: orc_secret\n")
    done = machine.install(machine.token())
    assert done.returncode == 1
    assert "belongs to the hub at https://other.example/hub" in done.stdout
    assert "orc_secret" not in done.stdout
    assert not machine.base.exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_that_was_cut_off_does_nothing(shop, machine, shell):
    text = machine.script()
    body = text.index("\n{\n") + 3
    token = machine.token()
    for cut in {*range(body, len(text) - 2, 499), *range(len(text) - 20, len(text) - 2)}:
        done = machine.install(token, script=text[:cut], shell=shell)
        assert done.returncode != 0, (cut, text[:cut][-40:])
        assert list(machine.home.iterdir()) == [], cut


# ── what the hub serves ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_clean_for_every_shell(client, shell):
    answer = client.flask.get("/install.sh")
    assert answer.mimetype == "text/x-shellscript"
    for text in (TEMPLATE, answer.text):
        checked = [*shell_words(shell), "-n"]
        done = subprocess.run(checked, input=text, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "url", ["https://hub.example.org", "https://example.org/a/b", "http://[::1]:8"]
)
def test_the_script_is_for_the_hub_at_its_own_address(app, client, admin, world, url):
    app.config["HUB"]["url"] = url
    text = client.flask.get("/install.sh").text
    [line] = re.findall(r"^HUB=.*$", text, re.M)
    values = dict(word.partition("=")[::2] for word in shlex.split(line, comments=True))
    assert values["HUB"] == url
    assert values["PACKAGES"].split() == install._pinned()
    for name in PROGRAMS:
        served = client.flask.get(f"/install/{name}")
        assert served.mimetype == "text/x-python"
        key = f"{name.removesuffix('.py').upper()}_SHA256"
        assert values[key] == hashlib.sha256(served.data).hexdigest()
    made = admin.post("servers/tokens", {}).json
    assert made["commands"]["script"] == f"curl -fsSL {url}/install.sh | sh -s -- {made['token']}"


def test_an_address_that_a_shell_would_act_on_stays_an_address(app, client):
    app.config["HUB"]["url"] = "https://x/$(touch canary)'`id`"
    line = re.search(r"^HUB=.*$", client.flask.get("/install.sh").text, re.M)[0]
    done = subprocess.run(
        ["dash", "-c", f'{line}\nprintf %s "$HUB"'], capture_output=True, text=True
    )
    assert done.stdout == "https://x/$(touch canary)'`id`"


def test_the_packages_are_what_the_two_programs_import():
    known = {"yaml": "pyyaml", "urllib3": "requests", "ptyprocess": "pexpect"}
    found = set()
    for name in PROGRAMS:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    foreign = {known.get(name, name) for name in found - set(sys.stdlib_module_names)}
    assert foreign == set(install.PACKAGES)


def test_the_token_itself_is_not_in_the_script(app, client, world):
    made = auth.registration_token(HUB, world.project("shop")["id"], "http://localhost")
    assert made["token"].partition(".")[2] not in client.flask.get("/install.sh").text
