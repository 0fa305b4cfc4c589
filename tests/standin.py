"""A coding agent for tests: a real terminal program that behaves as the real ones do.

    python standin.py --as claude --settings FILE --session-id UUID [PROMPT]
    python standin.py --as codex -c 'hooks.Stop=[…]' [PROMPT]
    python standin.py --as gemini            (settings: GEMINI_CLI_SYSTEM_SETTINGS_PATH)
    python standin.py --as aider --message-file FILE

What it does after its first prompt is a list of steps in the JSON file STANDIN_SCENARIO; what has
happened it writes as lines of JSON to STANDIN_RECORD. Without steps it waits for messages.

    {"tool": "Bash", "input": {...}}     asks for a permission, with hooks and a dialog
    {"tool": ..., "ask": false}          uses a tool without asking
    {"tool": "AskUserQuestion" or "ExitPlanMode", "input": {...}}   asks to choose, for its plan
    {"shell": ["argv", ...]}             runs a program, as a tool it may use
    {"work": seconds}, {"wait": true}    works on; waits for a message at its prompt
    {"quota": text}, {"silent": true}    a usage limit; a turn that ends without any hook
    {"exit": code}
"""

import argparse
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import tomllib
import tty
import uuid
from pathlib import Path

VERSIONS = {
    "claude": "2.1.220 (Claude Code)",
    "codex": "codex-cli 0.140.0",
    "gemini": "0.20.0",
    "aider": "aider 0.86.1",
}
RULE = "─" * 60


def install(directory: Path, scenario: list, names=("claude",)) -> Path:
    """Put stand-ins into a directory, to be found on PATH by the real names; the record they
    write. Their scenario may be changed later, in `scenario.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    record = directory / "record.jsonl"
    (directory / "scenario.json").write_text(json.dumps(scenario))
    for name in names:
        program = directory / name
        program.write_text(
            f"#!/bin/sh\nSTANDIN_SCENARIO={directory}/scenario.json STANDIN_RECORD={record}"
            f' exec {sys.executable} {Path(__file__).resolve()} --as {name} "$@"\n'
        )
        program.chmod(0o755)
    return record


def happened(record: Path, what: str | None = None) -> list[dict]:
    """What has happened, oldest first."""
    lines = record.read_text().splitlines() if record.exists() else []
    found = [json.loads(line) for line in lines]
    return [entry for entry in found if what in (None, entry["what"])]


class Hooks:
    """Runs the hooks of the settings as the agent does: through sh, JSON on standard input."""

    def __init__(self, table: dict, common: dict, seconds: float):
        self.table, self.common, self.seconds = table, common, seconds

    def run(self, event: str, **payload) -> list[dict]:
        """Run the hooks of an event; what those that are waited for have printed."""
        said = [self.one(hook, event, payload) for hook in self.of(event)]
        return [answer for answer in said if answer]

    def of(self, event: str) -> list[dict]:
        return [hook for group in self.table.get(event, []) for hook in group["hooks"]]

    def one(self, hook: dict, event: str, payload: dict, started=None) -> dict | None:
        process = subprocess.Popen(
            ["sh", "-c", hook["command"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if started:
            started(process)
        sent = json.dumps(self.common | {"hook_event_name": event} | payload).encode()
        if hook.get("async"):
            threading.Thread(target=process.communicate, args=(sent,), daemon=True).start()
            return None
        begun = time.monotonic()
        try:
            out = process.communicate(sent, timeout=hook.get("timeout", 60) * self.seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out = process.communicate()[0]
        note("hook", event=event, printed=out.decode(), seconds=time.monotonic() - begun)
        return json.loads(out) if out.strip() else None


def note(what: str, **more) -> None:
    with open(os.environ["STANDIN_RECORD"], "a") as file:
        file.write(json.dumps({"what": what, "at": time.time()} | more) + "\n")


class Screen:
    """Title, transcript, and below them the prompt box or a dialog."""

    def __init__(self, kind: str):
        self.kind = kind
        self.lines: list[str] = []
        self.draft = ""
        self.dialog: list[str] | None = None
        self.busy = ""
        self.banner = ""
        self.lock = threading.RLock()

    def say(self, text: str) -> None:
        with self.lock:
            self.lines = (self.lines + text.splitlines())[-12:]
        self.draw()

    def draw(self) -> None:
        with self.lock:
            shown = [*self.lines, "", *([self.banner] if self.banner else [])]
            shown += self.dialog or self.box()
            text = "\x1b[H\x1b[2J" + "\r\n".join(shown)
            os.write(1, (self.title() + text).encode())

    def title(self) -> str:
        signs = {
            "claude": ("⠂ Working", "✳ Ready", "✳ Ready"),
            "codex": ("⠋ project", "project", "[ ! ] Action Required"),
            "gemini": ("✦  Working…", "◇  Ready", "✋  Action Required"),
            "aider": ("", "", ""),
        }[self.kind]
        sign = signs[2] if self.dialog else signs[0] if self.busy else signs[1]
        return f"\x1b]0;{sign}\x07" if sign else ""

    def box(self) -> list[str]:
        draft = self.draft.split("\n")
        if len(draft) > 4 or len(self.draft) > 800:
            draft = [f"[Pasted text #1 +{len(draft) - 1} lines]"]
        if self.kind == "claude":
            busy = [f"✻ {self.busy}… (3s · ↓ 120 tokens · esc to interrupt)", ""] * bool(self.busy)
            rest = [f"  {line}" for line in draft[1:]]
            return [*busy, RULE, f"❯\u00a0{draft[0]}", *rest, RULE, "  ? for shortcuts"]
        if self.kind == "codex":
            busy = ["• Working (3s • esc to interrupt)", ""] * bool(self.busy)
            return [*busy, f"› {draft[0]}", *draft[1:], "", "  gpt-5 · 100% context left"]
        if self.kind == "gemini":
            busy = ["⠏ Thinking... (esc to cancel, 3s)", ""] * bool(self.busy)
            return [*busy, f"> {draft[0] or '  Type your message or @path/to/file'}", *draft[1:]]
        return ["░█ Waiting for model"] if self.busy else [f"> {draft[0]}", *draft[1:]]


ALWAYS = "Yes, and don't ask again for these commands"
OPTIONS = {
    "claude": [
        ("Yes", "allow"),
        (ALWAYS, "always"),
        ("No, and tell Claude what to do (esc)", "deny"),
    ],
    "codex": [
        ("Yes, proceed (y)", "allow"),
        ("Yes, and don't ask again for this command (a)", "session"),
        ("No, and tell Codex what to do differently (esc)", "deny"),
    ],
    "gemini": [
        ("Allow once", "allow"),
        ("Allow for this session", "session"),
        ("No, suggest changes (esc)", "deny"),
    ],
}


PLANS = [
    ("Yes, and auto-accept edits", "auto"),
    ("Yes, and manually approve edits", "allow"),
    ("No, keep planning", "deny"),
]


def options_of(kind: str, call: dict) -> list[tuple[str, str]]:
    """[(label, what it means)] of the dialog for a call."""
    if call["tool_name"] == "AskUserQuestion":
        offered = call["tool_input"]["questions"][0]["options"]
        return [(option["label"], option["label"]) for option in offered]
    return PLANS if call["tool_name"] == "ExitPlanMode" else OPTIONS.get(kind, [])


def other_dialog(call: dict, options: list) -> list[str] | None:
    """That of a question or a plan, as Claude Code shows it."""
    given = call["tool_input"]
    lines = [f" {'❯' if n == 1 else ' '} {n}. {label}" for n, (label, _) in enumerate(options, 1)]
    if call["tool_name"] == "AskUserQuestion":
        asked = given["questions"][0]
        head = [f" ☐ {asked['header']}", "", f" {asked['question']}", ""]
        foot = ["", " Enter to select · Tab/Arrow keys to navigate · Esc to cancel"]
        return [RULE, *head, *lines, *foot]
    if call["tool_name"] == "ExitPlanMode":
        plan = [f" {line}" for line in given["plan"].splitlines()]
        head = [" Ready to code?", "", " Here is Claude's plan:", *plan, ""]
        return [RULE, *head, " Would you like to proceed?", *lines]
    return None


def dialog_of(kind: str, tool: str, subject: str) -> list[str]:
    if kind == "aider":
        return [f"$ {subject}", "Run shell command? (Y)es/(N)o/(D)on't ask again [Yes]: "]
    marks = {"claude": "❯", "codex": "›", "gemini": "●"}
    options = [
        f" {marks[kind] if n == 1 else ' '} {n}. {label}"
        for n, (label, _) in enumerate(OPTIONS[kind], 1)
    ]
    if kind == "claude":
        head = {"Bash": "Bash command", "Edit": "Edit file", "Write": "Create file"}.get(
            tool, "Tool use"
        )
        asked = (
            f" Do you want to make this edit to {subject}?"
            if tool == "Edit"
            else " Do you want to proceed?"
        )
        body = [] if tool == "Edit" else ["", f"   {subject}", "   What it is for", ""]
        return [RULE, f" {head}", *body, asked, *options, "", " Esc to cancel"]
    if kind == "codex":
        foot = "  Press enter to confirm or esc to cancel"
        ask = "  Would you like to run the following command?"
        return [ask, "", f"  $ {subject}", "", *options, "", foot]
    head = ["│ Action Required", "│", f"│ ?  Shell {subject}", "│", "│ Allow execution of: 'x'?"]
    return [*head, *(f"│{option}" for option in options)]


class Agent:
    def __init__(self, kind: str, hooks: Hooks, steps: list):
        self.kind, self.hooks, self.steps = kind, hooks, steps
        self.screen = Screen(kind)
        self.messages: queue.Queue = queue.Queue()
        self.answers: queue.Queue = queue.Queue()
        self.asking = False
        self.ended: int | None = None
        self.wake = os.pipe()

    # -- what is typed

    def read_keys(self) -> None:
        """Until it ends: keys, one after the other."""
        pending = b""
        while self.ended is None:
            ready, _, _ = select.select([0, self.wake[0]], [], [], 0.05 if pending else None)
            if self.wake[0] in ready:
                os.read(self.wake[0], 100)
            if 0 in ready:
                data = os.read(0, 65536)
                if not data:
                    return self.end(0)
                pending += data
            pending = self.keys(pending, final=0 not in ready)

    def keys(self, data: bytes, *, final: bool) -> bytes:
        """Handle what is whole; the rest."""
        while data:
            if data.startswith(b"\x1b[200~"):
                stop = data.find(b"\x1b[201~")
                if stop < 0:
                    return data
                self.pasted(data[6:stop].decode())
                data = data[stop + 6 :]
            elif data[:1] == b"\x1b" and len(data) == 1 and not final:
                return data
            elif data[:1] == b"\x1b":
                found = re.match(rb"\x1b(?:\[[0-9;?]*[A-Za-z~])?", data)
                self.key(found[0])
                data = data[found.end() :]
            else:
                size = 1 if data[0] < 0xC0 else 2 if data[0] < 0xE0 else 3 if data[0] < 0xF0 else 4
                if len(data) < size and not final:
                    return data
                self.key(data[:size])
                data = data[size:]
        self.screen.draw()
        return b""

    def pasted(self, text: str) -> None:
        if self.asking:
            return self.key(b"\x1b")  # its leading Escape cancels the dialog
        self.screen.draft += text.replace("\r", "\n")

    def key(self, key: bytes) -> None:
        if self.asking:
            return self.dialog_key(key)
        screen = self.screen
        if key == b"\r":
            if screen.draft.endswith("\\"):
                screen.draft = screen.draft[:-1] + "\n"
            elif screen.draft.strip():
                self.submit(screen.draft.removesuffix("\n"))
        elif key == b"\x03":
            screen.draft = ""
        elif key == b"\x1b":
            if screen.busy:
                note("interrupted")
        elif key == b"\x7f":
            screen.draft = screen.draft[:-1]
        elif key >= b" ":
            screen.draft += key.decode("utf-8", "replace")

    def submit(self, text: str) -> None:
        self.screen.draft = ""
        note("submitted", text=text)
        self.screen.say(f"> {text}"[:200])
        self.messages.put(text)

    def dialog_key(self, key: bytes) -> None:
        if self.kind == "aider":
            self.letters += key.decode("utf-8", "replace")
            if key == b"\r":
                self.answers.put(
                    ("key", "deny" if self.letters.lower().startswith("n") else "allow", "")
                )
            return
        meaning = {str(n).encode(): what for n, (_, what) in enumerate(self.options, 1)}
        meaning |= {b"\x1b": "deny", b"\r": self.options[0][1]}
        if self.kind == "codex":
            meaning |= {b"y": "allow", b"a": "session"}
        if key in meaning:
            self.answers.put(("key", meaning[key], ""))
        else:
            note("stray", key=key.decode("latin-1"))

    # -- what it does

    def work(self, prompt: str | None) -> None:
        self.hooks.run("SessionStart", source="startup")
        self.screen.draw()
        if prompt:
            self.submit(prompt)
        while self.ended is None:
            message = self.messages.get()
            self.turn(message)

    def turn(self, message: str) -> None:
        self.begin(message)
        steps, self.steps = self.steps, []
        for step in steps:
            if self.step(step):
                break
        else:
            self.stop()

    def begin(self, message: str) -> None:
        self.screen.busy = "Brewing"
        self.hooks.run({"gemini": "BeforeAgent"}.get(self.kind, "UserPromptSubmit"), prompt=message)
        self.screen.draw()

    def stop(self) -> None:
        self.screen.busy = ""
        self.hooks.run({"gemini": "AfterAgent"}.get(self.kind, "Stop"), stop_hook_active=False)
        self.screen.draw()

    def step(self, step: dict) -> bool:
        """Carry out a step; whether the turn is over with it."""
        if "tool" in step:
            self.use(step)
        elif "shell" in step:
            done = subprocess.run(
                step["shell"], capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
            note(
                "shell", argv=step["shell"], exit=done.returncode, out=done.stdout, err=done.stderr
            )
        elif "work" in step:
            time.sleep(step["work"])
        elif "wait" in step:
            self.stop()
            self.begin(self.messages.get())
        elif "quota" in step:
            self.screen.banner, self.screen.busy = step["quota"], ""
            self.hooks.run("StopFailure", error=step["quota"])
            self.screen.draw()
            return True
        elif "silent" in step:
            self.screen.busy = ""
            self.screen.draw()
            return True
        elif "exit" in step:
            self.end(step["exit"])
            return True
        return False

    def use(self, step: dict) -> None:
        """Use a tool: guarded by a hook, asked for, then done."""
        call = {"tool_name": step["tool"], "tool_input": step["input"]}
        call["tool_use_id"] = step.get("id") or f"toolu_{uuid.uuid4().hex[:12]}"
        before, after = (
            ("BeforeTool", "AfterTool") if self.kind == "gemini" else ("PreToolUse", "PostToolUse")
        )
        for said in self.hooks.run(before, **call):
            verdict = said.get("decision") or said["hookSpecificOutput"]["permissionDecision"]
            if verdict == "deny":
                why = said.get("reason") or said["hookSpecificOutput"]["permissionDecisionReason"]
                return note("answered", by="guard", decision="deny", message=why, **call)
        by, decision, message = self.ask(call) if step.get("ask", True) else ("", "allow", "")
        note("answered", by=by, decision=decision, message=message, **call)
        if decision != "deny":
            self.screen.say(f"● {step['tool']} done")
            note("tool", **call)
            self.hooks.run(after, tool_response={}, **call)

    def ask(self, call: dict) -> tuple[str, str, str]:
        """(hook or key, decision, message) of a permission dialog."""
        subject = call["tool_input"].get("command") or call["tool_input"].get("file_path") or "x"
        if self.kind == "codex":  # its hook comes first, then the dialog
            for said in self.hooks.run("PermissionRequest", **call):
                decision = said["hookSpecificOutput"]["decision"]
                return "hook", decision["behavior"], decision.get("message", "")
        if self.kind == "gemini":
            self.hooks.run(
                "Notification", notification_type="ToolPermission", message="?", details=call
            )
        self.letters, self.asking = "", True
        self.options = options_of(self.kind, call)
        dialog = other_dialog(call, self.options)
        self.screen.dialog = dialog or dialog_of(self.kind, call["tool_name"], subject)
        self.screen.draw()
        held: list[subprocess.Popen] = []
        if self.kind == "claude":
            for hook in self.hooks.of("PermissionRequest"):
                threading.Thread(target=self.hold, args=(hook, call, held), daemon=True).start()
        answer = self.answers.get()
        self.asking, self.screen.dialog = False, None
        if answer[0] == "key":
            for process in held:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
        self.answers = queue.Queue()
        self.screen.draw()
        return answer

    def hold(self, hook: dict, call: dict, held: list) -> None:
        """A hook beside the dialog: the first answer counts."""
        said = self.hooks.one(hook, "PermissionRequest", call, held.append)
        if said:
            decision = said["hookSpecificOutput"]["decision"]
            if call["tool_name"] == "ExitPlanMode" and decision["behavior"] == "allow":
                return note("stray", hook=decision)  # as the real one passes it over
            more = decision.get("updatedInput") or decision.get("message", "")
            self.answers.put(("hook", decision["behavior"], more))

    def end(self, code: int) -> None:
        self.ended = code
        note("exit", code=code)
        self.hooks.run("SessionEnd", reason="other")
        os.write(self.wake[1], b"x")


def hooks_of(args, environ) -> tuple[dict, float]:
    """(the table of hooks, seconds in its unit of time)."""
    if args.kind == "claude" and args.settings:
        return json.loads(Path(args.settings).read_text()).get("hooks", {}), 1
    if args.kind == "gemini" and (path := environ.get("GEMINI_CLI_SYSTEM_SETTINGS_PATH")):
        return json.loads(Path(path).read_text()).get("hooks", {}), 0.001
    if args.kind == "codex":
        text = "\n".join(config for config in args.config if config.startswith("hooks."))
        return tomllib.loads(text).get("hooks", {}), 1
    return {}, 1


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--as", dest="kind", choices=VERSIONS, required=True)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-c", dest="config", action="append", default=[])
    for option in ("settings", "session-id", "resume", "model", "permission-mode", "message-file"):
        parser.add_argument(f"--{option}")
    for option in ("prompt-interactive", "approval-mode", "ask-for-approval", "chat-mode"):
        parser.add_argument(f"--{option}")
    parser.add_argument("prompt", nargs="?")
    args, _ = parser.parse_known_args()
    if args.version:
        print(VERSIONS[args.kind])
        return 0
    table, seconds = hooks_of(args, os.environ)
    conversation = args.session_id or args.resume or str(uuid.uuid4())
    common = {"session_id": conversation, "cwd": os.getcwd(), "transcript_path": "/dev/null"}
    common["permission_mode"] = args.permission_mode or "default"
    steps = json.loads(Path(os.environ["STANDIN_SCENARIO"]).read_text())
    note("started", argv=sys.argv[1:], conversation=conversation, cwd=os.getcwd())
    agent = Agent(args.kind, Hooks(table, common, seconds), steps)
    prompt = args.prompt or args.prompt_interactive
    if args.message_file:
        prompt = Path(args.message_file).read_text()
    kept = termios.tcgetattr(0)
    tty.setraw(0)
    os.write(1, b"\x1b[?2004h")
    try:
        threading.Thread(target=agent.work, args=(prompt,), daemon=True).start()
        agent.read_keys()
    finally:
        os.write(1, b"\x1b[?2004l\r\n")
        termios.tcsetattr(0, termios.TCSADRAIN, kept)
    return agent.ended or 0


if __name__ == "__main__":
    sys.exit(main())
