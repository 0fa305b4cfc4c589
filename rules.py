"""The rules engine: may a coding agent make this call of a tool?

`judge` answers allow, deny or ask, from plain values. Commands are read as a shell reads them and
matched part by part. The hub judges by it, and sends this very text to its agents, who judge by it
while the hub is away; so it needs the standard library alone and keeps no state.

Two sides, two measures. To allow, everything must be understood: what is not is asked. To deny,
it is enough that some part may do what a rule denies: where that is certain it is denied, where
only a shell could know (a variable, a glob, text that cannot be read) it is asked, whatever else
allows it. A rule is no sandbox: a program that runs may do anything.
"""

import fnmatch
import functools
import json
import os
import re
import unicodedata
from urllib.parse import urlsplit

TEXT_MOST = 64 * 1024  # characters of a command; a longer one is asked
DEPTH_MOST = 12  # of code within code
PARTS_MOST = 500
PATTERN_MOST = 500

# Tools of Claude Code, Codex, Gemini CLI and aider, by what their input holds; lower case. A rule
# for one of a kind (`Bash`) is a rule for all of it: agents call the same thing by many names.
SHELL = {
    "bash",
    "shell",
    "local_shell",
    "run_shell_command",
    "exec",
    "exec_command",
    "unified_exec",
}
READ = {"read", "read_file", "read_many_files", "notebookread", "view_image"}
WRITE = {"write", "edit", "multiedit", "notebookedit", "write_file", "replace", "apply_patch"}
SEARCH = {"glob", "grep", "ls", "list_directory", "search_file_content"}
WEB = {"webfetch", "web_fetch"}
KINDS = (SHELL, READ, WRITE, SEARCH, WEB)
MAIN = ("command", "cmd", "file_path", "notebook_path", "absolute_path", "path", "url", "pattern")
MAIN += ("query", "prompt")

# Programs that run another one: which of their options take a value, and how many words come
# before the command. `plain` ones change nothing that matters to a rule.
WRAPPERS = {
    "sudo": ("ugCDhprtTU", 0),
    "doas": ("uC", 0),
    "env": ("uC", 0),
    "nice": ("n", 0),
    "ionice": ("cnp", 0),
    "nohup": ("", 0),
    "setsid": ("", 0),
    "timeout": ("sk", 1),
    "time": ("fo", 0),
    "command": ("", 0),
    "builtin": ("", 0),
    "exec": ("a", 0),
    "stdbuf": ("ioe", 0),
    "xargs": ("IinPLdasE", 0),
    "watch": ("n", 0),
    "parallel": ("jN", 0),
    "busybox": ("", 0),
    "toybox": ("", 0),
    "chroot": ("", 1),
    "flock": ("wE", 1),
    "unshare": ("", 0),
    "nsenter": ("t", 0),
    "strace": ("eopsu", 0),
    "chrt": ("", 1),
    "taskset": ("", 1),
    "caffeinate": ("t", 0),
}
PLAIN = {"nice", "ionice", "nohup", "setsid", "timeout", "time", "command", "builtin", "exec"}
PLAIN |= {"stdbuf"}
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "ash", "fish", "rbash"}
# Interpreters and the options after which they take code: a pattern must name that option itself.
CODE = {
    "python": "c",
    "perl": "eE",
    "ruby": "e",
    "node": "ep",
    "php": "rB",
    "lua": "e",
    "deno": "",
    "osascript": "e",
    "pwsh": "c",
    "powershell": "c",
}
LONG = {  # long options and the short ones they stand for, of commands that rules are about
    "rm": {"recursive": "r", "R": "r", "force": "f"},
    "chmod": {"recursive": "R"},
    "chown": {"recursive": "R"},
    "cp": {"recursive": "r", "R": "r", "force": "f"},
    "mv": {"force": "f"},
    "git": {"force": "f"},
}
RESERVED = {"if", "then", "elif", "else", "while", "until", "do", "!", "{"}
ENDS = {"fi", "done", "}"}
UNREAD = {"case", "select", "function", "coproc", "[[", "alias", "trap", "source", ".", "esac"}


# ── reading a command as a shell does ─────────────────────────────────────────────────────────


class Word:
    """One word: its text without quotes; `open` when only the shell knows what it becomes."""

    def __init__(self):
        self.text = ""
        self.open = False  # holds a variable, a substitution or a glob
        self.quoted = False
        self.started = False
        self.braces = False

    def add(self, text, *, quoted=False):
        self.text += text
        self.started = True
        self.quoted = self.quoted or quoted


class Part:
    """A simple command: its words, what it sets before, where it writes."""

    def __init__(self):
        self.words = []
        self.sets = []
        self.writes = []
        self.reads = []
        self.unclear = None  # why it is not understood, if so
        self.is_plain = False  # a wrapper that changes nothing that matters
        self.is_shadow = False  # what might be a command within: only a deny looks at it
        self.code_at = None  # index of the option that brings code
        self.opaque = False  # that code is of a language that is not read here
        self.document = None  # what it is given to read, where that is known

    @property
    def text(self):
        return " ".join(word.text for word in self.words)

    @property
    def name(self):
        return os.path.basename(self.words[0].text) if self.words else ""


class Unclear(Exception):
    """A command that cannot be read for certain."""


ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b"}
ESCAPED |= {"f": "\f", "v": "\v", "\\": "\\", "'": "'", '"': '"', "?": "?"}
ANSI_C = re.compile(
    r"\\(x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{1,4}|U[0-9a-fA-F]{1,8}|[0-7]{1,3}|c.|.)", re.S
)


def _ansi_c(found):
    said = found[1]
    if said[0] in "xuU" and len(said) > 1:
        return chr(min(int(said[1:], 16), 0x10FFFF))
    if said[0] in "01234567":
        return chr(int(said, 8) & 255)
    if said[0] == "c" and len(said) > 1:
        return chr(ord(said[1]) & 31)
    return ESCAPED.get(said, "\\" + said)


class Reader:
    """Reads a script into parts; `parts` also has those of code within it."""

    OPERATORS = (";;&", "<<-", "<<<", "&>>", ";;", ";&", "&&", "||", "|&", "&>", ">>", ">|", "<<")
    OPERATORS += ("<&", ">&", "<>", ";", "&", "|", "<", ">", "(", ")", "\n")
    REDIRECTIONS = {"<", ">", ">>", ">|", "<>", "<&", ">&", "&>", "&>>", "<<", "<<-", "<<<"}

    def __init__(self, text, depth=0):
        if depth > DEPTH_MOST:
            raise Unclear("code within code, too deep")
        self.text, self.at, self.depth = text, 0, depth
        self.parts = []
        self.part = Part()
        self.heredocs = []
        self.header = None  # within the head of a `for`

    def read(self, until=""):
        """Read up to the end, or to the closing sign; the parts."""
        while True:
            token = self._token()
            if token is None or (token == until and until):
                break
            if isinstance(token, Word):
                self._word(token)
            else:
                self._operator(token, until)
        if token is None and until:
            raise Unclear("an opening that is not closed")
        self._end_part()
        return self.parts

    # -- signs

    def _token(self):
        """The next word or operator; None at the end."""
        text, word = self.text, Word()
        while self.at < len(text):
            sign = text[self.at]
            if text.startswith("\\\n", self.at):
                self.at += 2
            elif sign in " \t":
                self.at += 1
                if word.started:
                    return word
            elif sign == "#" and not word.started:
                end = text.find("\n", self.at)
                self.at = len(text) if end < 0 else end
            elif operator := self._operator_here(word):
                if word.started:
                    return word
                self.at += len(operator)
                return operator
            else:
                self._sign(word, sign)
        return word if word.started else None

    def _operator_here(self, word):
        if self.text.startswith(("<(", ">("), self.at):
            return None  # of a process substitution
        found = next((o for o in self.OPERATORS if self.text.startswith(o, self.at)), None)
        if found and found[0] in "<>" and word.text.isdigit() and not word.quoted:
            word.started = False  # the number of what is redirected
        return found

    def _sign(self, word, sign):
        if sign == "'":
            self._single(word)
        elif sign == '"':
            self._double(word)
        elif sign == "\\":
            if self.at + 1 >= len(self.text):
                raise Unclear("a backslash at the end")
            word.add(self.text[self.at + 1], quoted=True)
            self.at += 2
        elif sign in "$`" or self.text.startswith(("<(", ">("), self.at):
            self._expansion(word)
        else:
            if sign in "*?[":
                word.open = True
            if sign == "{":
                word.braces = True
            word.add(sign)
            self.at += 1

    def _single(self, word):
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise Unclear("a quote that is not closed")
        word.add(self.text[self.at + 1 : end], quoted=True)
        self.at = end + 1

    def _double(self, word):
        self.at += 1
        word.add("", quoted=True)
        while self.at < len(self.text):
            sign = self.text[self.at]
            if sign == '"':
                self.at += 1
                return
            if sign == "\\" and self.text[self.at + 1 : self.at + 2] in tuple('$`"\\\n'):
                following = self.text[self.at + 1]
                word.add("" if following == "\n" else following)
                self.at += 2
            elif sign in "$`":
                self._expansion(word)
            else:
                word.add(sign)
                self.at += 1
        raise Unclear("a quote that is not closed")

    def _expansion(self, word):
        """A `$…`, backticks or a process substitution: code within is read too."""
        rest, at = self.text, self.at
        if rest.startswith("$'", at):
            end = re.compile(r"(?:[^'\\]|\\.)*", re.S).match(rest, at + 2).end()
            if end >= len(rest):
                raise Unclear("a quote that is not closed")
            word.add(ANSI_C.sub(_ansi_c, rest[at + 2 : end]), quoted=True)
            self.at = end + 1
        elif rest.startswith('$"', at):
            self.at += 1
        elif rest.startswith("$((", at):
            self._arithmetic(word)
        elif rest.startswith(("$(", "<(", ">("), at):
            self._code(word, at + 2)
        elif rest[at] == "`":
            self._backticks(word)
        elif rest.startswith("${", at):
            self._parameter(word)
        else:
            name = re.compile(r"\$(\w+|[@*#?$!-])?").match(rest, at)
            word.add(name[0])
            word.open = word.open or bool(name[1])
            self.at = name.end()

    def _code(self, word, start):
        inner = Reader(self.text, self.depth + 1)
        inner.at = start
        self.parts += inner.read(")")
        word.add(self.text[self.at : inner.at])
        word.open = True
        self.at = inner.at

    def _arithmetic(self, word):
        depth, at = 0, self.at + 1
        while at < len(self.text):
            depth += {"(": 1, ")": -1}.get(self.text[at], 0)
            at += 1
            if depth == 0:
                break
        else:
            raise Unclear("an opening that is not closed")
        self._within(self.text[self.at + 3 : at - 2])
        word.add(self.text[self.at : at])
        word.open = True
        self.at = at

    def _parameter(self, word):
        depth, at = 0, self.at + 1
        while at < len(self.text):
            depth += {"{": 1, "}": -1}.get(self.text[at], 0)
            at += 2 if self.text[at] == "\\" else 1
            if depth == 0:
                break
        else:
            raise Unclear("an opening that is not closed")
        self._within(self.text[self.at + 2 : at - 1])
        word.add(self.text[self.at : at])
        word.open = True
        self.at = at

    def _within(self, text):
        """Code in an expression that is not code itself."""
        if "$" in text or "`" in text:
            inner = Reader(text.replace('"', "").replace("'", ""), self.depth + 1)
            while inner._token() is not None:
                pass
            self.parts += inner.parts

    def _backticks(self, word):
        found = re.compile(r"(?:[^`\\]|\\.)*", re.S).match(self.text, self.at + 1)
        if self.text[found.end() : found.end() + 1] != "`":
            raise Unclear("a quote that is not closed")
        code = re.sub(r"\\([`$\\])", r"\1", found[0])
        self.parts += Reader(code, self.depth + 1).read()
        word.add(f"`{found[0]}`")
        word.open = True
        self.at = found.end() + 1

    # -- commands

    def _operator(self, sign, until):
        if sign in self.REDIRECTIONS:
            return self._redirection(sign)
        if sign == "\n":
            self._read_heredocs()
        if sign == "(":
            if self.part.words:
                raise Unclear("a function is defined")
            self._end_part()
            inner = Reader(self.text, self.depth + 1)
            inner.at = self.at
            self.parts += inner.read(")")
            self.at = inner.at
            return
        if sign == ")":
            raise Unclear("a closing that was not opened")
        self._end_part()

    def _redirection(self, sign):
        target = self._token()
        if not isinstance(target, Word):
            raise Unclear("a redirection without a target")
        if sign in ("<<", "<<-"):
            self.heredocs.append((target, sign == "<<-", self.part))
        elif sign == "<<<":
            self.part.document = None if target.open else target.text
        elif sign in ("<&", ">&") and re.fullmatch(r"\d+-?|-", target.text):
            pass
        elif sign == "<":
            self.part.reads.append(target)
        elif target.open or target.text not in ("/dev/null", "/dev/stdout", "/dev/stderr"):
            self.part.writes.append(target)

    def _read_heredocs(self):
        for end, tabs, part in self.heredocs:
            lines = []
            while True:
                if self.at >= len(self.text):
                    raise Unclear("a document that does not end")
                stop = self.text.find("\n", self.at)
                stop = len(self.text) if stop < 0 else stop
                line = self.text[self.at : stop]
                self.at = stop + 1
                if (line.lstrip("\t") if tabs else line) == end.text:
                    break
                lines.append(line)
            text = "\n".join(lines)
            if not end.quoted:
                self._within(text)
            part.document = text
            if part.words and part.name.lower() in SHELLS:
                part.unclear = None
                self.parts += _inner(part, self.depth)
        self.heredocs = []

    def _word(self, word):
        part = self.part
        if self.header is not None:  # for NAME in …
            self.header += 1
            return
        if not part.words and not word.quoted:
            if word.text in RESERVED or word.text in ENDS:
                return
            if word.text == "for":
                self.header = 0
                return
            if word.text in UNREAD:
                part.unclear = f"`{word.text}` is not followed"
            if re.match(r"[A-Za-z_]\w*(\[.*?\])?\+?=", word.text):
                part.sets.append(word)
                return
        if word.braces and (found := _braces(word)):
            part.words += found
        else:
            part.words.append(word)

    def _end_part(self):
        part, self.part, self.header = self.part, Part(), None
        if part.words or part.sets or part.writes or part.reads:
            self.parts.append(part)
            self.parts += _inner(part, self.depth)
        if len(self.parts) > PARTS_MOST:
            raise Unclear("too many commands in one")


def _braces(word):
    """The words a brace expression stands for; [] when it is none."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", word.text)
    if not found:
        if re.search(r"\{[^{}]*\.\.[^{}]*\}", word.text):
            word.open = True
        return []
    made = []
    for each in found[1].split(",")[:50]:
        copy = Word()
        copy.add(word.text[: found.start()] + each + word.text[found.end() :])
        copy.open, copy.quoted = word.open, word.quoted
        made += _braces(copy) or [copy]
        if len(made) > PARTS_MOST:
            raise Unclear("too many commands in one")
    return made


# ── code within a command ─────────────────────────────────────────────────────────────────────


def _inner(part, depth):
    """The commands that a command runs, with those that they run."""
    if not part.words:
        return []
    name = part.name.lower()
    if name in SHELLS or name == "su":
        return _of_shell(part, depth)
    if name == "eval":
        return _of_code(part, part.words[1:], depth)
    if name == "find":
        return _of_find(part, depth)
    if name in ("ssh", "script"):
        return _of_remote(part, name, depth)
    if name in WRAPPERS:
        return _of_wrapper(part, name, depth)
    _note_code(part, name)
    return []


def _of_code(part, words, depth):
    """Words that are read as a script."""
    if any(word.open for word in words):
        part.unclear = "runs code that is not known before"
    try:
        return Reader(" ".join(word.text for word in words), depth + 1).read()
    except Unclear as unclear:
        part.unclear = str(unclear)
        return []


HARMLESS = {"--login", "--noprofile", "--norc", "--posix", "--command"}  # options of shells


def _of_shell(part, depth):
    words, is_shell = part.words[1:], part.name.lower() in SHELLS
    for place, word in enumerate(words):
        if word.text in ("-c", "--command") or (is_shell and re.fullmatch(r"-\w*c\w*", word.text)):
            part.is_plain = is_shell
            return _of_code(part, words[place + 1 : place + 2], depth)
        if word.text.startswith("--") and word.text not in HARMLESS:
            part.unclear = f"a shell with {word.text}"
        elif not word.text.startswith("-") and is_shell:
            return []  # a script by name
    if not is_shell:
        return []
    if part.document is None:
        part.unclear = "a shell that reads its commands from its input"
        return []
    part.is_plain = True
    try:
        return Reader(part.document, depth + 1).read()
    except Unclear as unclear:
        part.unclear = str(unclear)
        return []


def _of_find(part, depth):
    found, words = [], part.words
    for place, word in enumerate(words):
        if word.text in ("-exec", "-execdir", "-ok", "-okdir"):
            stop = next(
                (n for n in range(place, len(words)) if words[n].text in (";", "+")), len(words)
            )
            given = [_anything() if "{}" in w.text else w for w in words[place + 1 : stop]]
            found += _as_part(given, depth)
            part.code_at = part.code_at or place
        elif word.text in ("-delete", "-fprint", "-fprintf", "-fls"):
            part.code_at = part.code_at or place
    return found


def _anything():
    """A word that the command is given when it runs."""
    word = Word()
    word.add("$@")
    word.open = True
    return word


def _of_remote(part, name, depth):
    words = part.words[1:]
    if name == "script":
        place = next((n for n, w in enumerate(words) if w.text in ("-c", "--command")), None)
        return [] if place is None else _of_code(part, words[place + 1 : place + 2], depth)
    place = 0
    while place < len(words) and words[place].text.startswith("-"):
        option = words[place].text
        place += 2 if len(option) == 2 and option[1] in "bcDEeFIiJLlmOopQRSWw" else 1
        if option.startswith("-o"):
            part.code_at = part.code_at or place
    return _of_code(part, words[place + 1 :], depth) if len(words) > place + 1 else []


def _of_wrapper(part, name, depth):
    valued, skipped = WRAPPERS[name]
    words, place = part.words, 1
    while place < len(words):
        text = words[place].text
        if name == "env" and re.match(r"[A-Za-z_]\w*=", text):
            part.sets.append(words[place])
        elif text.startswith("-") and text != "-":
            if name == "command" and text in ("-v", "-V"):
                return []
            if name == "env" and (split := re.match(r"-\w*S|--split-string=?", text)):
                rest = Word()
                rest.add(text[split.end() :])
                rest.open = words[place].open
                return _of_code(part, [rest, *words[place + 1 :]], depth)
            if name == "flock" and text in ("-c", "--command"):
                return _of_code(part, words[place + 1 : place + 2], depth)
            if text == "--":
                place += 1
                break
            if len(text) == 2 and text[1] in valued:
                place += 1
        elif skipped:
            skipped -= 1
        else:
            break
        place += 1
    part.is_plain = name in PLAIN
    if name in ("watch", "parallel"):
        return _of_code(part, words[place:], depth)
    given = [_anything()] if name == "xargs" else []
    shadows = [_shadow(words[n:] + given) for n in range(1, min(len(words), 20)) if n != place]
    return [*_as_part(words[place:] + given, depth), *shadows]


def _shadow(words):
    """What would be run if an option before took no value, or took one."""
    shadow = Part()
    shadow.words, shadow.is_shadow = list(words), True
    return shadow


def _as_part(words, depth):
    if not words:
        return []
    if depth > DEPTH_MOST:
        raise Unclear("code within code, too deep")
    inner = Part()
    inner.words = list(words)
    return [inner, *_inner(inner, depth + 1)]


def _note_code(part, name):
    options = CODE.get(re.sub(r"[\d.]+$", "", name))
    if options is None:
        return
    for place, word in enumerate(part.words[1:], 1):
        if re.fullmatch(rf"-\w*[{options or '-'}].*", word.text) or word.text in (
            "--eval",
            "-",
            "eval",
        ):
            part.code_at, part.opaque = place, True
            return
        if not word.text.startswith("-"):
            return
    if len(part.words) == 1:
        part.unclear = "an interpreter that reads its program from its input"


ODD_KINDS = {"Cc", "Cf", "Co", "Cs", "Zs", "Zl", "Zp"}  # Unicode's: controls, formats, spaces


def is_odd(text):
    """Whether it holds signs that cannot be seen, or a space that is none to a shell."""
    return any(unicodedata.category(sign) in ODD_KINDS for sign in set(text) if sign not in " \t\n")


def read_command(text):
    """(parts, why it is not understood or None)."""
    if len(text) > TEXT_MOST:
        return [], f"longer than {TEXT_MOST} characters"
    reader = Reader(text)
    try:
        parts = reader.read()
    except (Unclear, RecursionError) as unclear:
        return reader.parts, str(unclear) or "code within code, too deep"
    return parts, "it holds signs that cannot be seen" if is_odd(text) else None


# ── matching ──────────────────────────────────────────────────────────────────────────────────


def _fits(text, pattern):
    return fnmatch.fnmatchcase(text, pattern)


@functools.lru_cache(maxsize=4096)
def _unquoted(pattern):
    """(words of a pattern with quotes taken as a shell takes them, whether any may follow)."""
    words, rest = [], False
    reader = Reader(pattern)
    while (token := reader._token()) is not None:
        if not isinstance(token, Word):
            raise ValueError(token)
        words.append(token)
    if len(words) > 1 and words[-1].text == "*" and not words[-1].quoted:
        words, rest = words[:-1], True
    return [word.text for word in words], rest


def allows(part, pattern):
    """Whether an allow rule's pattern stands for all of this part."""
    if part.unclear or part.sets or part.writes or part.words[0].open:
        return False
    wanted, rest = _unquoted(pattern)
    words = part.words
    if len(words) < len(wanted) or (len(words) > len(wanted) and not rest):
        return False
    if part.code_at is not None and (
        part.code_at >= len(wanted) or wanted[part.code_at] != words[part.code_at].text
    ):
        return False
    name = words[0].text
    if "/" not in wanted[0] and "/" in name:
        return False  # some other program of that name
    return all(_fits(w.text, p) for w, p in zip(words, wanted, strict=False))


NO, MAYBE, YES = 0, 1, 2


def denies(part, pattern, request):
    """NO, YES, or MAYBE where only the shell knows: whether a deny rule's pattern is about this
    part."""
    wanted, _ = _unquoted(pattern)
    words = part.words
    if not words or not wanted:
        return NO
    certain = _same_program(words[0], wanted[0])
    if certain == NO:
        return NO
    names, flags = _sorted_words(words[1:])
    for word in wanted[1:]:
        if word.startswith("-") and word != "-":
            fit = _has_options(flags, word, part.name.lower(), names)
        else:
            fit, names = _next_word(names, word, request)
        certain = min(certain, fit)
        if certain == NO:
            return NO
    return certain


def _same_program(word, pattern):
    name = os.path.basename(word.text).lower() if "/" not in pattern else word.text.lower()
    if word.open:
        if "$" in word.text or "`" in word.text:
            return MAYBE
        return MAYBE if _fits(pattern.lower(), name) or _fits(name, pattern.lower()) else NO
    name = re.sub(r"\.exe$", "", name)
    return YES if _fits(name, pattern.lower()) else NO


def _sorted_words(words):
    """(words that are no options, options)."""
    names, flags, ended = [], [], False
    for word in words:
        if word.text == "--" and not ended:
            ended = True
        elif word.text.startswith("-") and len(word.text) > 1 and not ended:
            flags.append(word)
        else:
            names.append(word)
    return names, flags


def _short(option, command):
    """The options an option word stands for: `-rf` is two, `--force` may be `f`."""
    alike = LONG.get(command, {})
    if option.startswith("--"):
        name = option[2:].partition("=")[0]
        full = [n for n in alike if n.startswith(name) and len(n) > 1]  # they may be shortened
        return {alike[full[0]]} if len(full) == 1 else {name.lower()}
    return {alike.get(letter, letter) for letter in option[1:]}


def _has_options(flags, wanted, command, names):
    if "*" in wanted or "?" in wanted or "=" in wanted:
        found = any(_fits(flag.text.lower(), wanted.lower()) for flag in flags)
    else:
        given = set().union(*(_short(flag.text, command) for flag in flags if not flag.open))
        long = any(flag.text.lower().partition("=")[0] == wanted.lower() for flag in flags)
        found = long or _short(wanted, command) <= given
    if found:
        return YES
    return MAYBE if any(word.open and "$" in word.text for word in (*flags, *names)) else NO


def _next_word(names, wanted, request):
    """(how well one of the words fits, the words behind it)."""
    best, rest = NO, names
    for place, word in enumerate(names):
        fit = _word_fits(word, wanted, request)
        if fit > best:
            best, rest = fit, names[place + 1 :]
        if best == YES:
            break
    return best, rest


def _word_fits(word, wanted, request):
    wanted, certain = wanted.lower(), YES
    forms = {word.text.lower()}
    if _fits(word.text.lower(), wanted):
        return YES
    if re.match(r"[/~.]|\$HOME|\$\{HOME\}", word.text, re.I) or wanted[:1] in "/~":
        forms |= {path.lower() for path in _paths(word.text, request)}
        wanted_forms = {wanted, *(p.lower() for p in _paths(wanted, request))}
        if request.get("adrift") and not word.text.startswith(("/", "~", "$")):
            certain = MAYBE  # below a directory that is not known
    else:
        wanted_forms = {wanted}
    if any(_fits(form, each) for form in forms for each in wanted_forms):
        return certain
    if word.open and ("$" in word.text or "`" in word.text or "(" in word.text):
        return MAYBE
    if word.open and any(_fits(each, form) for form in forms for each in wanted_forms):
        return MAYBE
    return NO


def _paths(text, request):
    """A path as it may be written, made absolute and without detours; with its real place."""
    home = request.get("home") or "~"
    text = re.sub(r"^(\$HOME|\$\{HOME\}|~)(?=/|$)", lambda _: home, text)
    whole = text if text.startswith(("/", "~")) else os.path.join(request["directory"] or "/", text)
    flat = re.sub(r"^//+", "/", os.path.normpath(whole))
    return {text, flat, os.path.realpath(flat)} if flat.startswith("/") else {text, flat}


def _path_pattern(pattern, request):
    """A regular expression for a path pattern: `**` any depth, `*` within one part."""
    home = request.get("home")
    if pattern.startswith("~/") and home:
        pattern = home + pattern[1:]
    if not pattern.startswith(("/", "~", "*")):
        pattern = os.path.join(request["directory"] or "/", pattern)
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(signs.get(piece, re.escape(piece)) for piece in pieces)


def _path_fits(path, pattern, request, *, deny):
    forms = _paths(path, request)
    if not deny:
        forms -= {path} if not path.startswith("/") else set()
    expression = _path_pattern(pattern, request)
    found = [
        re.fullmatch(expression, form, re.I if deny else 0)
        or (deny and re.fullmatch(expression, form + "/", re.I))
        for form in forms
    ]
    return any(found) if deny else all(found)


def _url_fits(url, pattern):
    if "://" in pattern:
        whole = urlsplit(url)
        return _fits(f"{whole.scheme}://{_host(whole)}{whole.path or '/'}".lower(), pattern.lower())
    return _fits(_host(urlsplit(url)), pattern.lower()) or (
        pattern.startswith("*.") and _host(urlsplit(url)) == pattern[2:].lower()
    )


def _host(parts):
    return (parts.hostname or "").lower().rstrip(".")


# ── judging ───────────────────────────────────────────────────────────────────────────────────


def kind_of(tool):
    """The kind of tools one belongs to, as a set of names; itself alone when it is of none."""
    return next((kind for kind in KINDS if tool.lower() in kind), {tool.lower()})


def main_parameter(tool):
    """The name of the field of a tool's input that patterns are about."""
    kind = kind_of(tool)
    if kind is SHELL:
        return "command"
    if kind in (READ, WRITE):
        return "file_path"
    return "url" if kind is WEB else "pattern" if kind is SEARCH else "query"


def subject_of(tool, given):
    """What a tool call is about, as a person is shown it: the exact command, path or address."""
    for name in MAIN:
        value = given.get(name)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            return _command_of(value)
    return json.dumps(given, ensure_ascii=False, sort_keys=True)


def _command_of(words):
    """A command given as words: what its shell is to run, or the words as one would type them."""
    if len(words) == 3 and os.path.basename(words[0]) in SHELLS and words[1] in ("-c", "-lc"):
        return words[2]
    return " ".join(
        word if re.fullmatch(r"[\w@%+=:,./-]+", word) else _quote(word) for word in words
    )


def _quote(word):
    return "'" + word.replace("'", "'\"'\"'") + "'"


def check_pattern(tool, pattern):
    """Raises ValueError, saying why, for a pattern that no rule can have."""
    if not pattern.strip():
        raise ValueError("The pattern is empty: leave it out to mean every call of the tool.")
    if len(pattern) > PATTERN_MOST:
        raise ValueError(f"The pattern is longer than {PATTERN_MOST} characters: shorten it.")
    if is_odd(pattern) or "\n" in pattern:
        raise ValueError("The pattern holds signs that cannot be seen: write it on one line.")
    if not any(_fits(name, tool.lower()) for name in SHELL):
        return
    try:
        words, _ = _unquoted(pattern)
    except Unclear as unclear:
        raise ValueError(f"The pattern cannot be read ({unclear}): close what it opens.") from None
    except ValueError as operator:
        raise ValueError(
            f"The pattern has `{operator}` in it, but commands are matched one by one: make a rule "
            "for each."
        ) from None
    if not words:
        raise ValueError("The pattern is empty: leave it out to mean every call of the tool.")


def patterns_for(tool, given):
    """Patterns of allow rules that together stand for exactly this call; [] when none can."""
    subject = subject_of(tool, given)
    if kind_of(tool) is not SHELL:
        return [_literal(subject)] if len(subject) <= PATTERN_MOST // 2 else []
    parts, unclear = read_command(subject)
    if unclear or not parts:
        return []
    found = []
    for part in parts:
        if (
            part.unclear
            or part.sets
            or part.writes
            or any("$" in w.text and w.open for w in part.words)
        ):
            return []
        if not part.is_plain:
            found.append(" ".join(_literal_word(word.text) for word in part.words))
    return list(dict.fromkeys(found)) if all(len(p) <= PATTERN_MOST for p in found) else []


def _literal(text):
    return re.sub(r"([*?\[])", r"[\1]", text)


def _literal_word(text):
    literal = _literal(text)
    return literal if re.fullmatch(r"[\w@%+=:,./\[\]*?~-]+", literal) else _quote(literal)


def applies(rule, request):
    """Whether a rule is about this tool, project, server and agent at all."""
    if not rule.get("enabled", True):
        return False
    if any(rule.get(k) not in (None, request.get(k)) for k in ("project_id", "server_id", "agent")):
        return False
    wanted, tool = (rule.get("tool") or "*").lower(), request["tool"].lower()
    return _fits(tool, wanted) or (wanted in kind_of(tool) and len(kind_of(tool)) > 1)


def judge(rules, request, grants=()):
    """May this call be made? {decision: allow | deny | ask, rule, grant, because, parts}.

    rules: [{id, tool, pattern, action, project_id, server_id, agent, enabled}] in their order.
    request: {tool, input, directory, agent, project_id, server_id, home}. grants: [{tool, subject,
    directory}] of the session. A deny beats a grant and whatever else; then an exact grant; then
    for each part the first rule that fits it. parts: [{text, decision, rule_id, because}].
    """
    subject = subject_of(request["tool"], request["input"])
    parts, unclear = _parts_of(request, subject)
    active = [rule for rule in rules if applies(rule, request)]
    others = [r for r in rules if r not in active and _guards_paths(r, request)]
    doubt = None
    judged = [said for said in _judged(parts, active, others, request) if said]
    if unclear:
        doubt = f"it cannot be read for certain: {unclear}"
        denied = _net(subject, active)
        if denied:
            judged.append(
                _said(subject, "deny", denied, "its words are those of a rule that denies")
            )
    for said in judged:
        if said["decision"] == "deny":
            return _verdict(
                "deny", said["rule"], None, f"{said['because']}: {said['text'][:200]}", judged
            )
    grant = next((g for g in grants if _is_granted(g, request, subject)), None)
    if grant:
        return _verdict("allow", None, grant, "granted for this session", judged)
    asking = next((said for said in judged if said["decision"] == "ask"), None)
    if doubt or asking or not judged:
        said = asking or {"rule": None, "because": "no rule is about it"}
        return _verdict("ask", said["rule"], None, doubt or said["because"], judged)
    return _verdict("allow", judged[0]["rule"], None, judged[0]["because"], judged)


def _judged(parts, active, guards, request):
    """What is said of each part, None for a shadow that nothing denies."""
    for part in parts:
        said = _judge_part(part, active, guards, request)
        is_shadow = not isinstance(part, str) and part.is_shadow
        yield None if is_shadow and said["decision"] != "deny" else said
        if not isinstance(part, str) and part.name in ("cd", "pushd"):
            request = _moved(part, request)


def _moved(part, request):
    """The request as it is once the directory was changed."""
    target = next((w for w in part.words[1:] if not w.text.startswith("-")), None)
    if target is None:
        return {**request, "directory": request.get("home") or "~"}
    if target.open and not re.match(r"\$\{?HOME\}?(/|$)", target.text):
        return {**request, "adrift": True}
    place = max(_paths(target.text, request), key=lambda path: path.startswith("/"))
    return {**request, "directory": place}


def _verdict(decision, rule, grant, because, judged):
    parts = [{k: said[k] for k in ("text", "decision", "rule_id", "because")} for said in judged]
    return {"decision": decision, "rule": rule, "grant": grant, "because": because, "parts": parts}


def _said(text, decision, rule, because):
    rule_id = rule.get("id") if rule else None
    return {
        "text": text,
        "decision": decision,
        "rule": rule,
        "rule_id": rule_id,
        "because": because,
    }


def _is_granted(grant, request, subject):
    same = grant["tool"].lower() == request["tool"].lower() and grant["subject"] == subject
    return same and (grant.get("directory") or "") == (request.get("directory") or "")


def _parts_of(request, subject):
    if kind_of(request["tool"]) is SHELL:
        return read_command(subject)
    return [subject], None


def _guards_paths(rule, request):
    """A rule that denies paths holds for commands that name them too."""
    if rule.get("action") != "deny" or not rule.get("pattern") or not rule.get("enabled", True):
        return False
    about_files = kind_of(rule.get("tool") or "*") in (READ, WRITE)
    same = all(rule.get(k) in (None, request.get(k)) for k in ("project_id", "server_id", "agent"))
    return about_files and same and kind_of(request["tool"]) is SHELL


def _judge_part(part, active, guards, request):
    text = part if isinstance(part, str) else part.text
    doubt = None
    for rule in active:
        if rule["action"] == "deny":
            fit = _deny_fits(part, rule, request)
            if fit == YES:
                return _said(text, "deny", rule, "a rule denies this")
            doubt = doubt or (rule if fit == MAYBE else None)
    for rule in guards:
        if any(_names_path(word, rule["pattern"], request) for word in _words_of(part, rule)):
            return _said(text, "deny", rule, "a rule denies this file")
    if doubt:
        return _said(text, "ask", doubt, "it may be what a rule denies")
    if not isinstance(part, str):
        if part.unclear and (denied := _net(part.text, active)):
            return _said(text, "deny", denied, "its words are those of a rule that denies")
        if part.unclear:
            return _said(text, "ask", None, part.unclear)
        if not part.words:
            return _said(text, "ask", None, "it sets variables or writes a file")
    for rule in active:
        if rule["action"] == "ask" and _ask_fits(part, rule, request):
            return _said(text, "ask", rule, "a rule says to ask")
        if rule["action"] == "allow" and _allow_fits(part, rule, request):
            return _said(text, "allow", rule, "a rule allows this")
    if not isinstance(part, str) and part.is_plain and not part.sets and not part.writes:
        return _said(text, "allow", None, "it only runs what follows")
    return _said(text, "ask", None, _why_asked(part))


def _why_asked(part):
    if isinstance(part, str):
        return "no rule is about it"
    if part.writes:
        return f"it writes {part.writes[0].text}"
    if part.sets:
        return f"it sets {part.sets[0].text.partition('=')[0]}"
    return "what runs is not known before" if part.words[0].open else "no rule is about it"


WRITERS = {"cp", "mv", "tee", "sed", "dd", "install", "ln", "rm", "touch", "truncate", "chmod"}
WRITERS |= {"chown", "rsync", "patch", "unlink", "shred", "ed", "vi", "vim", "nano"}


def _words_of(part, rule):
    """The words by which a command may do to a file what the rule denies."""
    if kind_of(rule["tool"]) is READ:
        return [*part.words, *part.writes, *part.reads, *part.sets]
    return [*part.writes, *(part.words if part.name.lower() in WRITERS else ())]


def _names_path(word, pattern, request):
    text = word.text.rpartition("=")[2] if "=" in word.text else word.text
    text = text.lstrip("@<>")
    if not text or (word.open and "$" in text and not re.match(r"\$\{?HOME\}?/", text)):
        return False
    if not re.search(r"[/~.]", text) and not pattern.startswith("*"):
        return False
    return _path_fits(text, pattern, request, deny=True)


def _deny_fits(part, rule, request):
    pattern = rule.get("pattern")
    if not pattern:
        return YES
    if isinstance(part, str):
        return YES if _subject_fits(part, pattern, request, deny=True) else NO
    return denies(part, pattern, request)


def _ask_fits(part, rule, request):
    return _deny_fits(part, rule, request) != NO


def _allow_fits(part, rule, request):
    pattern = rule.get("pattern")
    if isinstance(part, str):
        return not pattern or _subject_fits(part, pattern, request, deny=False)
    if part.sets or part.writes or part.unclear or part.words[0].open:
        return False
    if not pattern or pattern == "*":
        return not part.opaque
    return allows(part, pattern)


def _subject_fits(subject, pattern, request, *, deny):
    kind = kind_of(request["tool"])
    if kind in (READ, WRITE, SEARCH):
        return _path_fits(subject, pattern, request, deny=deny)
    if kind is WEB:
        return _url_fits(subject, pattern)
    return _fits(subject.lower(), pattern.lower()) if deny else _fits(subject, pattern)


def _net(text, active):
    """A rule that denies whose words follow one another in a text that cannot be read."""
    bare = re.sub(r"\\\n|[\"'\\`]", "", text).lower()
    words = re.split(r"[\s;&|(){}<>$=]+", bare)
    for rule in active:
        if rule["action"] == "deny" and rule.get("pattern"):
            wanted, _ = _unquoted(rule["pattern"].lower())
            if _in_order(wanted, words):
                return rule
    return None


def _in_order(wanted, words):
    """Whether the words of a pattern come in their order, its options anywhere."""
    names = [word for word in wanted if not word.startswith("-")]
    given = set().union(*(_short(word, names[0]) for word in words if word.startswith("-")), ())
    if not all(_short(word, names[0]) <= given for word in wanted if word.startswith("-")):
        return False
    place = 0
    for word in words:
        wanted_here = names[place] if place < len(names) else None
        if wanted_here and (_fits(word, wanted_here) or os.path.basename(word) == wanted_here):
            place += 1
    return place == len(names)


# ── what a hub begins with ────────────────────────────────────────────────────────────────────


def _rule(action, tool, pattern, note):
    return {"action": action, "tool": tool, "pattern": pattern, "note": note}


def _denied(note, *patterns, tool="Bash"):
    return [_rule("deny", tool, pattern, note) for pattern in patterns]


SYSTEM = ("/", "/[*]", "/bin", "/boot", "/etc", "/home", "/lib", "/opt", "/root", "/sbin", "/srv")
SYSTEM += ("/usr", "/var", "~", "~/[*]", "..", "../..")

DEFAULT_RULES = (
    *_denied("deletes the system or everybody's home", *(f"rm -r {place}" for place in SYSTEM)),
    *_denied(
        "deletes the system or everybody's home", *(f"find {place} -delete" for place in SYSTEM)
    ),
    *_denied("deletes without any guard", "rm --no-preserve-root *"),
    *_denied("formats or overwrites a disk", "mkfs *", "mkfs.* *", "wipefs *", "fdisk *"),
    *_denied("formats or overwrites a disk", "dd of=/dev/*", "shred /dev/*", "blkdiscard *"),
    *_denied(
        "ends the machine", "shutdown *", "reboot *", "poweroff *", "halt *", "init 0", "init 6"
    ),
    *_denied("ends the machine", "systemctl poweroff", "systemctl reboot", "systemctl halt"),
    *_denied("opens or takes the whole system", "chmod -R 777 /", "chmod -R * /", "chown -R * /"),
    *_denied(
        "ends every session on the server", "tmux kill-server *", "pkill tmux", "killall tmux"
    ),
    *_denied("ends everything that runs", "kill -9 -1", "kill -1"),
    *_denied("a key of the server or of its user", "~/.ssh/id_*", "/etc/shadow", tool="Read"),
    *_denied("a key of the server or of its user", "~/.aws/credentials", tool="Read"),
    *_denied("a key of the server or of its user", "~/.config/orchestratia/**", tool="Read"),
    *_denied("who may sign in to the server", "~/.ssh/**", "/etc/sudoers", tool="Write"),
    *_denied("who may sign in to the server", "/etc/sudoers.d/**", "/etc/passwd", tool="Write"),
    *_denied("the keys of the agent", "~/.config/orchestratia/**", tool="Write"),
)
