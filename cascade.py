"""The rules, on plain values: which moves a task may make, what a completion hands down, what makes
a cycle, which server fits a task best and why. No database, no web, no clock.

Errors raised here, all with a sentence for the user:

    RuleBroken
    ├── IllegalMove    a verb that the present state does not allow
    ├── Cycle          a dependency that would make a task wait for itself
    └── BadContract    a contract that is missing, malformed or breaks its schema
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import lru_cache

import jsonschema
import regex
from referencing import Registry
from referencing.exceptions import Unresolvable

# ── states ────────────────────────────────────────────────────────────────────────────────────

STATES = (
    "pending",
    "assigned",
    "planning",
    "plan_review",
    "running",
    "needs_human",
    "done",
    "failed",
    "cancelled",
)
FINAL = frozenset({"done", "failed", "cancelled"})
OPEN = frozenset(STATES) - FINAL
# A slot is held from assignment to the final state or release, plans and questions included.
HOLDS_SLOT = OPEN - {"pending"}

# verb: (states it may start from, state it leads to). A tuple as goal names what `move` decides
# between: a plan asked for or not; the state a question was asked in.
TRANSITIONS = {
    "assign": (frozenset({"pending"}), ("assigned", "planning")),
    "submit_plan": (frozenset({"planning", "plan_review"}), "plan_review"),
    "approve_plan": (frozenset({"plan_review"}), "running"),
    "revise_plan": (frozenset({"plan_review"}), "planning"),
    "start": (frozenset({"assigned", "running"}), "running"),
    "ask": (frozenset({"assigned", "planning", "running"}), "needs_human"),
    "answer": (frozenset({"needs_human"}), ("running", "planning")),
    "complete": (frozenset({"assigned", "running", "needs_human"}), "done"),
    "fail": (HOLDS_SLOT, "failed"),
    "release": (HOLDS_SLOT, "pending"),
    "cancel": (OPEN, "cancelled"),
    "retry": (frozenset({"failed", "cancelled"}), "pending"),
}

SESSION_STATES = (
    "starting",
    "active",
    "disconnected",
    "recovering",
    "lost",
    "closed",
    "failed",
)
SESSION_LIVE = frozenset({"starting", "active", "disconnected", "recovering"})

SESSION_TRANSITIONS = {
    "started": (frozenset({"starting", "disconnected", "lost"}), "active"),
    "disconnect": (frozenset({"active", "recovering"}), "disconnected"),
    "reconnect": (frozenset({"disconnected"}), "active"),
    "recover": (frozenset({"active", "disconnected", "lost"}), "recovering"),
    "settle": (frozenset({"recovering"}), "active"),
    "lose": (SESSION_LIVE, "lost"),
    "close": (SESSION_LIVE | {"lost"}, "closed"),
    "fail": (frozenset({"starting"}), "failed"),
}

# What to do instead, by the state that stands in the way.
REMEDY = {
    "pending": "assign it first",
    "assigned": "start it, or fail or cancel it",
    "planning": "submit a plan first",
    "plan_review": "approve the plan or send it back first",
    "running": "complete, fail or cancel it",
    "needs_human": "answer its open question first",
    "done": "it is finished; create a new task for more work",
    "failed": "retry it to open it again",
    "cancelled": "retry it to open it again",
}

SPEAKING = {
    "submit_plan": "submit a plan for",
    "approve_plan": "approve the plan of",
    "revise_plan": "send back the plan of",
    "ask": "ask a question on",
    "answer": "answer a question on",
}


class RuleBroken(Exception):
    """A rule says no; `str(error)` is one sentence for the user."""

    code = "refused"

    def __init__(self, sentence: str, **fields):
        super().__init__(sentence)
        self.fields = fields


class IllegalMove(RuleBroken):
    code = "illegal_move"


class Cycle(RuleBroken):
    code = "cycle"


class BadContract(RuleBroken):
    code = "bad_contract"


def move(state: str, verb: str, *, plan: bool = False, asked_in: str | None = None) -> str:
    """Return the state `verb` leads to from `state`.

    `plan`: a plan is required (for assign). `asked_in`: the state a question was asked in (for
    answer). Raises IllegalMove when TRANSITIONS does not allow it.
    """
    starts, goal = TRANSITIONS[verb]
    if state not in starts:
        raise IllegalMove(
            f"Cannot {SPEAKING.get(verb, verb)} a task that is {state}: {REMEDY[state]}.",
            status=state,
            verb=verb,
        )
    if verb == "assign":
        return "planning" if plan else "assigned"
    if verb == "answer":
        return "planning" if asked_in == "planning" else "running"
    return goal


# ── dependencies ──────────────────────────────────────────────────────────────────────────────

DEPENDENCY_TYPES = ("blocks", "input", "related")
ORDERING = frozenset({"blocks", "input"})


def check_dependency(kind: str, key: str | None) -> None:
    """Raise RuleBroken unless `kind` is known and has a contract key just where one belongs."""
    if kind not in DEPENDENCY_TYPES:
        raise RuleBroken(
            f"Unknown dependency type {kind!r}: use one of {', '.join(DEPENDENCY_TYPES)}."
        )
    if kind == "input" and not key:
        raise RuleBroken(
            "An input dependency needs the key of the contract it hands down: give contract_key."
        )
    if kind == "input" and not key_allowed(key):
        raise RuleBroken(f"{key!r} is no contract key: use letters, digits, _ . and -.")
    if kind != "input" and key:
        raise RuleBroken(
            f"A contract key belongs to an input dependency, not to {kind!r}: "
            "use type input, or leave the key out."
        )


def path_to(start: str, goal: str, upstreams: Callable[[list[str]], dict[str, list[str]]]):
    """Walk from `start` along its upstreams, level by level; return the path to `goal` or None.

    `upstreams(ids)` gives {id: [ids it waits for]} for a level, so the cost is that of the
    ancestors of `start` alone.
    """
    came_from: dict[str, str | None] = {start: None}
    level = [start]
    while level and goal not in came_from:
        found = upstreams(level)
        level = []
        for task, ups in found.items():
            for up in ups:
                if up not in came_from:
                    came_from[up] = task
                    level.append(up)
    if goal not in came_from:
        return None
    path, step = [], goal
    while step is not None:
        path.append(step)
        step = came_from[step]
    return path[::-1]


def find_cycle(graph: dict[str, Iterable[str]]) -> list[str] | None:
    """Return one cycle of {task: tasks it waits for} as [a, b, …, a], or None."""
    done: set[str] = set()
    for root in graph:
        trail: dict[str, None] = {}
        stack = [(root, iter(graph.get(root, ())))] if root not in done else []
        if stack:
            trail[root] = None
        while stack:
            task, ups = stack[-1]
            nxt = next(ups, None)
            if nxt is None:
                stack.pop()
                trail.pop(task)
                done.add(task)
            elif nxt in trail:
                names = list(trail)
                return names[names.index(nxt) :] + [nxt]
            elif nxt not in done:
                trail[nxt] = None
                stack.append((nxt, iter(graph.get(nxt, ()))))
    return None


# ── specs, results, contracts ─────────────────────────────────────────────────────────────────

TASK_SPEC = "orchestratia/task-spec/v1"
TASK_RESULT = "orchestratia/task-result/v1"
PIPELINE = "orchestratia/pipeline/v1"
CONTRACT_KEY = r"^[A-Za-z_][A-Za-z0-9_.-]{0,99}\Z"

_STRINGS = {"type": "array", "items": {"type": "string", "minLength": 1}}
_COUNT = {"type": "integer", "minimum": 0}

SPEC_SCHEMA = {
    "type": "object",
    "properties": {
        "$schema": {"const": TASK_SPEC},
        "requirements": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["description"],
                "properties": {
                    "description": {"type": "string", "minLength": 1},
                    "priority": {"enum": ["must", "should", "could", "wont"]},
                    "category": {"type": "string"},
                },
            },
        },
        "constraints": {
            "type": "object",
            "properties": {"languages": _STRINGS, "frameworks": _STRINGS},
        },
        "input_context": {
            "type": "object",
            "properties": {"references": {"type": "array", "items": {"type": "object"}}},
        },
        "acceptance_criteria": _STRINGS,
        "expected_contracts": {
            "type": "object",
            "propertyNames": {"pattern": CONTRACT_KEY},
            "additionalProperties": {
                "type": "object",
                "properties": {
                    "type": {"type": "string"},
                    "description": {"type": "string"},
                    "schema": {"type": ["object", "boolean"]},
                },
                "additionalProperties": False,
            },
        },
    },
}

RESULT_SCHEMA = {
    "type": "object",
    "properties": {
        "$schema": {"const": TASK_RESULT},
        "summary": {"type": "string"},
        "changes": {
            "type": "object",
            "properties": dict.fromkeys(
                ("files_modified", "files_created", "files_deleted"), _STRINGS
            ),
        },
        "contracts": {"type": "object", "propertyNames": {"pattern": CONTRACT_KEY}},
        "tests": {
            "type": "object",
            "properties": dict.fromkeys(("passed", "failed", "skipped"), _COUNT),
        },
    },
}

# An empty registry resolves nothing, so a "$ref" in a user's schema never makes the hub fetch.
_NO_FETCHING = Registry()


# A schema is a stranger's program: it may take so many steps, and its patterns so long in all.
STEPS = 250_000
REFERENCE = 8  # steps of following one: some 20 µs, where another keyword takes 3 (2026-11)
PATTERNS_S = 0.5


class _TooMuch(Exception):
    """A schema took more work than it may."""


class _Budget:
    def __init__(self):
        self.steps, self.seconds = STEPS, PATTERNS_S

    def step(self, count: int) -> None:
        self.steps -= count
        if self.steps < 0:
            raise _TooMuch

    def search(self, pattern: str, text: str) -> bool:
        began = time.perf_counter()
        try:
            found = regex.search(pattern, text, timeout=max(self.seconds, 0.001))
        except TimeoutError:
            raise _TooMuch from None
        self.seconds -= time.perf_counter() - began
        return found is not None


_budget: ContextVar[_Budget] = ContextVar("budget")


def _counted(name: str, keyword):
    count = REFERENCE if name in ("$ref", "$dynamicRef", "$recursiveRef") else 1

    def check(validator, value, instance, schema):
        _budget.get().step(count)
        return keyword(validator, value, instance, schema)

    return check


def _pattern(validator, pattern, instance, _schema):
    if validator.is_type(instance, "string") and not _budget.get().search(pattern, instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator, patterns, instance, _schema):
    if validator.is_type(instance, "object"):
        for pattern, subschema in patterns.items():
            for key, value in instance.items():
                if _budget.get().search(pattern, key):
                    yield from validator.descend(value, subschema, path=key, schema_path=pattern)


def _additional_properties(validator, allowed, instance, schema):
    if not validator.is_type(instance, "object"):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, value in instance.items():
        if key in known or any(_budget.get().search(p, key) for p in patterns):
            continue
        if validator.is_type(allowed, "object"):
            yield from validator.descend(value, allowed, path=key)
        elif allowed is False:
            yield jsonschema.ValidationError(f"{key!r} is not allowed here")


OUR_KEYWORDS = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}


@lru_cache(maxsize=64)
def _bounded(cls):
    """The validator class with every keyword counted and patterns that cannot run away."""
    keywords = cls.VALIDATORS | OUR_KEYWORDS
    return jsonschema.validators.extend(cls, {k: _counted(k, f) for k, f in keywords.items()})


@lru_cache(maxsize=512)
def _validator(schema_text: str):
    schema = json.loads(schema_text)
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return _bounded(cls)(schema, registry=_NO_FETCHING)


_SPEC = _validator(json.dumps(SPEC_SCHEMA))
_RESULT = _validator(json.dumps(RESULT_SCHEMA))


def _problem(validator, data) -> str | None:
    """A sentence fragment 'at $.a.b: reason', or None when the validator accepts `data`."""
    spent = _budget.set(_Budget())
    try:
        error = jsonschema.exceptions.best_match(validator.iter_errors(data))
    except Unresolvable as broken:  # a $ref that leads nowhere surfaces only while validating
        return f"its schema refers to something that is not in it ({broken.ref})"
    except _TooMuch:
        return "its schema takes too much work to check: make its patterns and references simpler"
    except (RecursionError, AttributeError, TypeError, regex.error) as broken:
        return f"its schema cannot be applied ({type(broken).__name__}: {str(broken)[:200]})"
    finally:
        _budget.reset(spent)
    return None if error is None else f"at {error.json_path}: {error.message[:300]}"


def _breaks(schema, data) -> str | None:
    return None if schema is True else _problem(_validator(json.dumps(schema)), data)


def check_spec(spec) -> dict:
    """Return the structured spec unchanged; raise RuleBroken naming what is wrong with it."""
    problem = _problem(_SPEC, spec)
    if problem:
        raise RuleBroken(f"The structured_spec is not a valid {TASK_SPEC}, {problem}.")
    for key, expected in (spec.get("expected_contracts") or {}).items():
        check_schema(key, expected.get("schema", True))
    return spec


def check_schema(key: str, schema) -> None:
    """Raise RuleBroken unless `schema` is itself a valid JSON Schema that can be applied."""
    try:
        cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        cls.check_schema(schema)
        why = _unfit(schema)
    except jsonschema.SchemaError as error:
        why = f"at {error.json_path}: {error.message[:300]}"
    except (RecursionError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
    if why:
        raise RuleBroken(f"The schema of contract {key!r} is not a valid JSON Schema, {why}.")


def _unfit(schema, *, nested: bool = False) -> str | None:
    """What would get round the bounds of `_bounded`, in words."""
    if isinstance(schema, dict):
        if nested and isinstance(schema.get("$schema"), str):
            return "$schema belongs at its top only"
        if "patternProperties" in schema and "unevaluatedProperties" in schema:
            return "unevaluatedProperties cannot be combined with patternProperties here"
    inner = schema.values() if isinstance(schema, dict) else schema
    if not isinstance(schema, dict | list):
        return None
    return next(filter(None, (_unfit(part, nested=True) for part in inner)), None)


def key_allowed(key: str) -> bool:
    """Whether `key` may name a contract."""
    return re.fullmatch(CONTRACT_KEY, key) is not None


def contract_data(value) -> tuple[bool, object]:
    """What a result says of one contract: (there, data).

    `{status: fulfilled, data}` gives the data; another status counts as missing; any other
    value is the data itself.
    """
    if isinstance(value, dict) and "status" in value:
        return value["status"] == "fulfilled" and "data" in value, value.get("data")
    if isinstance(value, dict) and "data" in value and "type" in value:
        return True, value["data"]  # the form of task-result/v1: {type, description, data}
    return value is not None, value


def check_result(result, expected: dict[str, dict]) -> dict[str, object]:
    """Return {key: data} of the contracts a completion delivers.

    `result`: any JSON. `expected`: {key: {schema?, …}}. Raises BadContract naming each key, path
    and reason when one is missing or breaks its schema, or the result is no valid task-result/v1.
    """
    given = {}
    if isinstance(result, dict):
        if result.get("$schema") == TASK_RESULT or "contracts" in result:
            problem = _problem(_RESULT, {**result, "$schema": result.get("$schema", TASK_RESULT)})
            if problem:
                raise BadContract(f"The result is not a valid {TASK_RESULT}, {problem}.")
        given = result.get("contracts") or {}
    problems, delivered = {}, {}
    for key, value in given.items():
        there, data = contract_data(value)
        if there:
            delivered[key] = data
    for key, wanted in expected.items():
        problem = _contract_problem(key, delivered, given, wanted.get("schema", True))
        if problem:
            problems[key] = problem
    if problems:
        listed = "; ".join(f"{key}: {why}" for key, why in problems.items())
        raise BadContract(
            f"The task cannot be completed, its contracts are not fulfilled ({listed}). "
            "Put them into result.contracts and complete it again.",
            contracts=problems,
        )
    return delivered


def check_contract(key: str, data, schema) -> None:
    """Raise BadContract when `data` breaks `schema`."""
    problem = _breaks(schema, data)
    if problem:
        raise BadContract(f"Contract {key!r} breaks its schema, {problem}.")


def _contract_problem(key, delivered, given, schema) -> str | None:
    if key not in delivered:
        if key in given:
            return "present, but its status is not fulfilled"
        return "missing"
    problem = _breaks(schema, delivered[key])
    return f"breaks its schema, {problem}" if problem else None


# ── routing ───────────────────────────────────────────────────────────────────────────────────

# Scores of the documentation: an idle server that is online, has the repo and declares the
# languages gets 100 + 100 + 50 + 5 = 255.
ONLINE_POINTS = 100
REPO_POINTS = 100
LANGUAGE_POINTS = 50
IDLE_POINTS = 5
MISSED_PREFERENCE = 10

LISTS = ("languages", "frameworks", "capabilities")
WISHES = (*LISTS, "agents")  # agents: coding agents that are installed
ALIASES = {"ts": "typescript", "js": "javascript", "py": "python", "golang": "go"}


def names(values) -> frozenset[str]:
    """The names in `values` as they are compared: lower case, short forms written out."""
    return frozenset(ALIASES.get(v.lower(), v.lower()) for v in values or ())


def signature(requirements: dict) -> str:
    """The requirements as one canonical string: what fits one task of it fits all."""
    wanted = {k: sorted(names(requirements.get(k))) for k in WISHES if requirements.get(k)}
    if requirements.get("repo"):
        wanted["repo"] = requirements["repo"]
    if requirements.get("prefer"):
        wanted["prefer"] = requirements["prefer"]
    if requirements.get("server"):
        wanted["server"] = requirements["server"]
    return json.dumps(wanted, sort_keys=True, separators=(",", ":"))


def rank(requirements: dict, servers: Iterable[dict]) -> list[dict]:
    """Every server with its score or every reason against it, the best first.

    requirements: {repo?, languages?, frameworks?, capabilities?, agents?, prefer?: the same,
    server?: id}. servers: {id, name, status, repos: collection, languages|frameworks|capabilities|
    agents: list or None for undeclared, slots, busy}; all of the task's project. Returns
    [{server_id, server, fits, score: int or None, reasons: [sentence], busy}]. Ties go to the least
    busy, then by name.
    """
    ranked = [_candidate(requirements, server) for server in servers]
    ranked.sort(key=lambda c: (not c["fits"], -(c["score"] or 0), c["busy"], c["server"]))
    return ranked


def _candidate(requirements: dict, server: dict) -> dict:
    reasons = exclusions(requirements, server)
    return {
        "server_id": server["id"],
        "server": server["name"],
        "fits": not reasons,
        "score": None if reasons else score(requirements, server),
        "reasons": reasons,
        "busy": server["busy"],
    }


def exclusions(requirements: dict, server: dict, *, ignore_full: bool = False) -> list[str]:
    """Every reason why `server` cannot take a task of `requirements`; empty when it can."""
    reasons = []
    if server["status"] != "online":
        reasons.append(server["status"])
    if requirements.get("server") not in (None, server["id"]):
        reasons.append("the task was given to another server")
    repo = requirements.get("repo")
    if repo and repo not in server["repos"]:
        reasons.append(f"no repo {repo}")
    for kind in WISHES:
        if server.get(kind) is not None and requirements.get(kind):
            missing = names(requirements[kind]) - names(server[kind])
            reasons += [f"no {_singular(kind)} {name}" for name in sorted(missing)]
    if server["busy"] >= server["slots"] and not ignore_full:
        reasons.append(f"full ({server['busy']} of {server['slots']} slots taken)")
    return reasons


def score(requirements: dict, server: dict) -> int:
    """The score of a server that fits, in whole points."""
    free = max(0, server["slots"] - server["busy"])
    points = ONLINE_POINTS + math.floor(IDLE_POINTS * free / max(1, server["slots"]) + 0.5)
    if requirements.get("repo"):
        points += REPO_POINTS
    if requirements.get("languages") and server["languages"] is not None:
        points += LANGUAGE_POINTS
    return points - MISSED_PREFERENCE * _missed(requirements.get("prefer") or {}, server)


def _missed(prefer: dict, server: dict) -> int:
    missed = int(bool(prefer.get("repo")) and prefer["repo"] not in server["repos"])
    for kind in WISHES:
        if server.get(kind) is not None:
            missed += len(names(prefer.get(kind)) - names(server[kind]))
    return missed


def _singular(kind: str) -> str:
    return "capability" if kind == "capabilities" else kind[:-1]


def why_waiting(requirements: dict, candidates: list[dict]) -> str:
    """One sentence: why no candidate takes a ready task."""
    if not candidates:
        return "no server is registered in this project"
    repo = requirements.get("repo")
    if repo and all(f"no repo {repo}" in c["reasons"] for c in candidates):
        return f"no server has repo {repo}"
    full = [c for c in candidates if len(c["reasons"]) == 1 and c["reasons"][0].startswith("full")]
    if full:
        return f"{_count(len(full), 'server fits', 'servers fit')} but {_are(len(full))} full"
    pinned = [c for c in candidates if "the task was given to another server" not in c["reasons"]]
    if requirements.get("server") and pinned:
        return f"waiting for {pinned[0]['server']}: {', '.join(pinned[0]['reasons'])}"
    nearest = min(candidates, key=lambda c: (len(c["reasons"]), c["server"]))
    return f"no server fits; nearest is {nearest['server']}: {', '.join(nearest['reasons'])}"


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _are(n: int) -> str:
    return "is" if n == 1 else "are"
