"""The rules, as tables: no database, no web, no clock."""

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cascade

# ── every verb in every state ─────────────────────────────────────────────────────────────────

STATES = [
    "pending",
    "assigned",
    "planning",
    "plan_review",
    "running",
    "needs_human",
    "done",
    "failed",
    "cancelled",
]

# The table of the documentation, written out again: what is not here is refused.
MOVES = {
    ("pending", "assign"): "assigned",
    ("planning", "submit_plan"): "plan_review",
    ("plan_review", "submit_plan"): "plan_review",
    ("plan_review", "approve_plan"): "running",
    ("plan_review", "revise_plan"): "planning",
    ("assigned", "start"): "running",
    ("running", "start"): "running",
    ("assigned", "ask"): "needs_human",
    ("planning", "ask"): "needs_human",
    ("running", "ask"): "needs_human",
    ("needs_human", "answer"): "running",
    ("assigned", "complete"): "done",
    ("running", "complete"): "done",
    ("needs_human", "complete"): "done",
    ("assigned", "fail"): "failed",
    ("planning", "fail"): "failed",
    ("plan_review", "fail"): "failed",
    ("running", "fail"): "failed",
    ("needs_human", "fail"): "failed",
    ("assigned", "release"): "pending",
    ("planning", "release"): "pending",
    ("plan_review", "release"): "pending",
    ("running", "release"): "pending",
    ("needs_human", "release"): "pending",
    ("pending", "cancel"): "cancelled",
    ("assigned", "cancel"): "cancelled",
    ("planning", "cancel"): "cancelled",
    ("plan_review", "cancel"): "cancelled",
    ("running", "cancel"): "cancelled",
    ("needs_human", "cancel"): "cancelled",
    ("failed", "retry"): "pending",
    ("cancelled", "retry"): "pending",
}
VERBS = sorted({verb for _, verb in MOVES})


def test_the_table_knows_the_same_states_and_verbs():
    assert list(cascade.STATES) == STATES
    assert sorted(cascade.TRANSITIONS) == VERBS


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", STATES)
def test_each_verb_in_each_state_does_what_the_documentation_says(state, verb):
    goal = MOVES.get((state, verb))
    if goal:
        assert cascade.move(state, verb) == goal
        return
    with pytest.raises(cascade.IllegalMove) as refused:
        cascade.move(state, verb)
    sentence = str(refused.value)
    assert state in sentence and sentence.endswith(".")
    assert refused.value.fields == {"status": state, "verb": verb}


def test_assigning_with_a_plan_required_leads_to_planning():
    assert cascade.move("pending", "assign", plan=True) == "planning"


@pytest.mark.parametrize(
    ("asked_in", "goal"),
    [("planning", "planning"), ("running", "running"), ("assigned", "running"), (None, "running")],
)
def test_an_answer_leads_back_to_where_the_question_was_asked(asked_in, goal):
    assert cascade.move("needs_human", "answer", asked_in=asked_in) == goal


def test_a_slot_is_held_in_every_open_state_but_pending():
    assert {
        "assigned",
        "planning",
        "plan_review",
        "running",
        "needs_human",
    } == cascade.HOLDS_SLOT
    assert {"done", "failed", "cancelled"} == cascade.FINAL
    assert set(STATES) == cascade.OPEN | cascade.FINAL


SESSION_MOVES = {
    ("starting", "started"): "active",
    ("disconnected", "started"): "active",
    ("lost", "started"): "active",
    ("active", "disconnect"): "disconnected",
    ("recovering", "disconnect"): "disconnected",
    ("disconnected", "reconnect"): "active",
    ("active", "recover"): "recovering",
    ("disconnected", "recover"): "recovering",
    ("lost", "recover"): "recovering",
    ("recovering", "settle"): "active",
    ("starting", "lose"): "lost",
    ("active", "lose"): "lost",
    ("disconnected", "lose"): "lost",
    ("recovering", "lose"): "lost",
    ("starting", "close"): "closed",
    ("active", "close"): "closed",
    ("disconnected", "close"): "closed",
    ("recovering", "close"): "closed",
    ("lost", "close"): "closed",
    ("starting", "fail"): "failed",
}


def test_sessions_move_as_the_table_says_and_no_other_way():
    allowed = {
        (start, verb): goal
        for verb, (starts, goal) in cascade.SESSION_TRANSITIONS.items()
        for start in starts
    }
    assert allowed == SESSION_MOVES


# ── dependencies ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "key", "fragment"),
    [
        ("blocks", None, None),
        ("related", None, None),
        ("related", "", None),
        ("input", "api_schema", None),
        ("input", "a.b-c_2", None),
        ("input", None, "needs the key"),
        ("input", "", "needs the key"),
        ("input", "no spaces", "is no contract key"),
        ("input", "2nd", "is no contract key"),
        ("input", "x" * 101, "is no contract key"),
        ("input", "key\n", "is no contract key"),
        ("blocks", "api_schema", "belongs to an input dependency"),
        ("related", "api_schema", "belongs to an input dependency"),
        ("after", None, "Unknown dependency type 'after'"),
    ],
)
def test_a_dependency_has_a_key_just_where_one_belongs(kind, key, fragment):
    if fragment is None:
        cascade.check_dependency(kind, key)
        return
    with pytest.raises(cascade.RuleBroken, match=fragment):
        cascade.check_dependency(kind, key)


graphs = st.dictionaries(
    st.sampled_from("abcdefgh"), st.lists(st.sampled_from("abcdefgh"), max_size=4), max_size=8
)


def reachable(graph: dict, start: str) -> set[str]:
    """Everything above `start`, by walking every path there is."""
    seen, todo = set(), list(graph.get(start, ()))
    while todo:
        task = todo.pop()
        if task not in seen:
            seen.add(task)
            todo += graph.get(task, ())
    return seen


@given(graphs)
def test_find_cycle_finds_one_exactly_when_a_task_stands_above_itself(graph):
    found = cascade.find_cycle(graph)
    assert (found is not None) == any(task in reachable(graph, task) for task in graph)
    if found:
        assert found[0] == found[-1] and len(found) > 1
        assert all(up in graph[task] for task, up in zip(found, found[1:], strict=False))


@given(graphs, st.sampled_from("abcdefgh"), st.sampled_from("abcdefgh"))
def test_path_to_finds_a_way_exactly_when_the_goal_stands_above(graph, start, goal):
    found = cascade.path_to(start, goal, lambda ids: {i: graph.get(i, []) for i in ids})
    assert (found is not None) == (goal == start or goal in reachable(graph, start))
    if found:
        assert found[0] == start and found[-1] == goal
        assert all(up in graph[task] for task, up in zip(found, found[1:], strict=False))


def test_path_to_asks_for_no_task_twice():
    graph = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}
    asked = []

    def upstreams(ids):
        asked.extend(ids)
        return {i: graph[i] for i in ids}

    assert cascade.path_to("a", "nowhere", upstreams) is None
    assert sorted(asked) == ["a", "b", "c", "d"]


# ── contracts ─────────────────────────────────────────────────────────────────────────────────

OBJECT_WITH_PATHS = {
    "type": "object",
    "required": ["endpoints"],
    "properties": {
        "endpoints": {"type": "array", "items": {"type": "object", "required": ["path"]}}
    },
}


@pytest.mark.parametrize(
    ("given_value", "data"),
    [
        ({"status": "fulfilled", "data": {"a": 1}}, {"a": 1}),
        ({"status": "fulfilled", "data": None}, None),
        ({"status": "fulfilled", "data": [1, 2]}, [1, 2]),
        ({"a": 1}, {"a": 1}),
        ({}, {}),
        ([1, 2], [1, 2]),
        ("v2.5", "v2.5"),
        (0, 0),
        (False, False),
        ({"type": "api_schema", "description": "d", "data": {"a": 1}}, {"a": 1}),
        ({"data": {"a": 1}}, {"data": {"a": 1}}),
    ],
)
def test_a_contract_may_come_as_status_and_data_or_as_the_data_itself(given_value, data):
    assert cascade.check_result({"contracts": {"k": given_value}}, {"k": {}}) == {"k": data}


@pytest.mark.parametrize(
    "value", [{"status": "pending"}, {"status": "partial", "data": {}}, {"status": "fulfilled"}]
)
def test_another_status_counts_as_missing(value):
    with pytest.raises(cascade.BadContract, match="api: present, but its status is not fulfilled"):
        cascade.check_result({"contracts": {"api": value}}, {"api": {}})
    assert cascade.check_result({"contracts": {"api": value}}, {}) == {}


@pytest.mark.parametrize("result", [None, "done", 3, [1], {}, {"summary": "x"}, {"contracts": {}}])
def test_a_result_without_the_contract_it_owes_is_refused_by_name(result):
    with pytest.raises(cascade.BadContract, match="api_schema: missing") as refused:
        cascade.check_result(result, {"api_schema": {}, "docs": {}})
    assert set(refused.value.fields["contracts"]) == {"api_schema", "docs"}


@pytest.mark.parametrize("result", [None, "done", 3, 1.5, True, [1], {}, {"summary": "x"}])
def test_a_task_that_owes_nothing_may_end_with_any_json(result):
    assert cascade.check_result(result, {}) == {}


def test_a_broken_schema_is_named_with_key_path_and_reason():
    with pytest.raises(cascade.BadContract) as refused:
        cascade.check_result(
            {"contracts": {"api": {"endpoints": [{"path": "/a"}, {"method": "GET"}]}}},
            {"api": {"schema": OBJECT_WITH_PATHS}},
        )
    sentence = str(refused.value)
    assert "api: breaks its schema" in sentence
    assert "$.endpoints[1]" in sentence
    assert "'path' is a required property" in sentence


def test_a_contract_that_nobody_owes_is_delivered_all_the_same():
    assert cascade.check_result({"contracts": {"extra": 1}}, {}) == {"extra": 1}


@pytest.mark.parametrize(
    ("result", "fragment"),
    [
        ({"contracts": []}, r"at \$\.contracts"),
        ({"contracts": {"bad key": 1}}, "at"),
        ({"contracts": {}, "summary": 3}, r"at \$\.summary"),
        ({"$schema": "orchestratia/task-result/v1", "tests": {"passed": -1}}, r"\$\.tests\.passed"),
        ({"contracts": {}, "$schema": "something/else"}, r"\$schema"),
    ],
)
def test_a_result_that_is_no_task_result_says_where(result, fragment):
    with pytest.raises(cascade.BadContract, match=fragment):
        cascade.check_result(result, {})


@pytest.mark.parametrize(
    "reference", ["http://127.0.0.1:{port}/schema.json", "#/nowhere", "other.json"]
)
def test_a_reference_out_of_a_schema_is_never_fetched(reference):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        schema = {"$ref": reference.format(port=listener.getsockname()[1])}
        with pytest.raises(cascade.BadContract, match="refers to something that is not in it"):
            cascade.check_contract("api", {"a": 1}, schema)
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_reference_within_a_schema_works():
    schema = {"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}}
    cascade.check_contract("api", [1, 2], schema)
    with pytest.raises(cascade.BadContract, match=r"\$\[1\]"):
        cascade.check_contract("api", [1, "two"], schema)


@pytest.mark.parametrize(("schema", "fits"), [(True, True), ({}, True), (False, False)])
def test_schemas_may_be_booleans(schema, fits):
    if fits:
        cascade.check_contract("api", {"a": 1}, schema)
    else:
        with pytest.raises(cascade.BadContract):
            cascade.check_contract("api", {"a": 1}, schema)


def expecting(schema) -> dict:
    return {"expected_contracts": {"api": {"schema": schema}}}


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        (expecting({"type": "objekt"}), "schema of contract 'api' is not a valid JSON Schema"),
        (expecting({"required": "endpoints"}), "schema of contract 'api'"),
        (expecting(3), r"\$\.expected_contracts\.api\.schema"),
        ({"expected_contracts": {"bad key": {}}}, "not a valid orchestratia/task-spec/v1"),
        ({"expected_contracts": {"api": {"shema": {}}}}, "shema"),
        ({"requirements": [{"priority": "must"}]}, "'description' is a required property"),
        ({"requirements": [{"description": "x", "priority": "maybe"}]}, "maybe"),
        ({"constraints": {"languages": "python"}}, r"\$\.constraints\.languages"),
        ({"acceptance_criteria": [1]}, r"\$\.acceptance_criteria\[0\]"),
        ({"$schema": "orchestratia/task-spec/v2"}, "v1"),
        ([], "not a valid"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_place(spec, fragment):
    with pytest.raises(cascade.RuleBroken, match=fragment):
        cascade.check_spec(spec)


def test_the_spec_of_the_documentation_is_taken_as_it_is():
    spec = {
        "$schema": "orchestratia/task-spec/v1",
        "requirements": [
            {"description": "Implement all endpoints", "priority": "must"},
            {"description": "Add integration tests", "priority": "should"},
            {"description": "Cache", "priority": "could", "category": "speed"},
            {"description": "GraphQL", "priority": "wont"},
        ],
        "constraints": {"languages": ["python"], "frameworks": ["fastapi"]},
        "input_context": {"references": [{"type": "file", "path": "api.md"}]},
        "acceptance_criteria": ["green"],
        "expected_contracts": {"api_schema": {"type": "api_schema", "schema": OBJECT_WITH_PATHS}},
    }
    assert cascade.check_spec(spec) is spec


# ── routing ───────────────────────────────────────────────────────────────────────────────────


def server(name, **given_values) -> dict:
    return {
        "id": f"id-{name}",
        "name": name,
        "status": "online",
        "repos": {},
        "languages": None,
        "frameworks": None,
        "capabilities": None,
        "slots": 4,
        "busy": 0,
    } | given_values


def reasons(requirements: dict, **given_values) -> list[str]:
    return cascade.exclusions(requirements, server("s", **given_values))


def score(requirements: dict, **given_values) -> int:
    return cascade.rank(requirements, [server("s", **given_values)])[0]["score"]


def test_the_example_of_workflow_5_scores_255_and_every_other_reason_is_named():
    task = {"repo": "api-gateway", "languages": ["rust"]}
    ranked = cascade.rank(
        task,
        [
            server("dev-desktop", status="offline", repos={"desktop-app": {}}),
            server("hub-server", repos={"hub": {}}, languages=["python"]),
            server("dev-backend", repos={"api-gateway": {}}, languages=["rust", "python"]),
        ],
    )
    shown = [(c["server"], c["fits"], c["score"], c["reasons"]) for c in ranked]
    assert shown == [
        ("dev-backend", True, 255, []),
        ("dev-desktop", False, None, ["offline", "no repo api-gateway"]),
        ("hub-server", False, None, ["no repo api-gateway", "no language rust"]),
    ]
    assert all(c["server_id"] == f"id-{c['server']}" for c in ranked)


@pytest.mark.parametrize(
    ("requirements", "given_values", "expected"),
    [
        ({}, {}, []),
        ({}, {"status": "offline"}, ["offline"]),
        ({}, {"status": "draining"}, ["draining"]),
        ({}, {"status": "revoked"}, ["revoked"]),
        ({}, {"busy": 4}, ["full (4 of 4 slots taken)"]),
        ({}, {"busy": 5}, ["full (5 of 4 slots taken)"]),
        ({"server": "id-s"}, {}, []),
        ({"server": "other"}, {}, ["the task was given to another server"]),
        ({"repo": "a"}, {"repos": {"a": {}}}, []),
        ({"repo": "a"}, {"repos": {"b": {}}}, ["no repo a"]),
        ({"languages": ["rust"]}, {"languages": ["rust"]}, []),
        ({"languages": ["rust"]}, {"languages": None}, []),
        ({"languages": ["rust"]}, {"languages": []}, ["no language rust"]),
        ({"languages": ["Rust"]}, {"languages": ["RUST"]}, []),
        ({"languages": ["ts"]}, {"languages": ["TypeScript"]}, []),
        ({"languages": ["javascript", "golang"]}, {"languages": ["JS", "go"]}, []),
        ({"languages": ["py"]}, {"languages": ["python"]}, []),
        (
            {"languages": ["rust", "go"]},
            {"languages": ["python"]},
            ["no language go", "no language rust"],
        ),
        ({"frameworks": ["flask"]}, {"frameworks": ["django"]}, ["no framework flask"]),
        ({"capabilities": ["gpu"]}, {"capabilities": []}, ["no capability gpu"]),
        ({"capabilities": ["gpu"]}, {}, []),
        (
            {"repo": "a", "languages": ["rust"], "capabilities": ["gpu"]},
            {"status": "offline", "languages": [], "capabilities": [], "busy": 4},
            [
                "offline",
                "no repo a",
                "no language rust",
                "no capability gpu",
                "full (4 of 4 slots taken)",
            ],
        ),
    ],
)
def test_every_reason_against_a_server_is_named(requirements, given_values, expected):
    assert reasons(requirements, **given_values) == expected


@pytest.mark.parametrize(
    ("requirements", "given_values", "points"),
    [
        ({}, {}, 105),
        ({}, {"busy": 2}, 103),  # 5 × 2/4 = 2.5
        ({}, {"busy": 3}, 101),  # 1.25
        ({}, {"slots": 3, "busy": 1}, 103),  # 3.33
        ({}, {"slots": 3, "busy": 2}, 102),  # 1.67
        ({}, {"slots": 10, "busy": 9}, 101),  # 0.5: halves go up
        ({}, {"slots": 10, "busy": 7}, 102),  # 1.5
        ({}, {"slots": 100, "busy": 91}, 100),  # 0.45
        ({"repo": "a"}, {"repos": {"a": {}}}, 205),
        ({"languages": ["rust"]}, {"languages": ["rust"]}, 155),
        ({"languages": ["rust"]}, {"languages": None}, 105),  # unknown: no bonus, no exclusion
        ({"frameworks": ["flask"]}, {"frameworks": ["flask"]}, 105),
        ({"prefer": {"repo": "a"}}, {"repos": {"a": {}}}, 105),
        ({"prefer": {"repo": "a"}}, {}, 95),
        ({"prefer": {"languages": ["rust", "go"]}}, {"languages": ["go"]}, 95),
        ({"prefer": {"languages": ["rust", "go"]}}, {"languages": []}, 85),
        ({"prefer": {"languages": ["rust"]}}, {"languages": None}, 105),
        ({"prefer": {"capabilities": ["gpu"], "repo": "a"}}, {"capabilities": []}, 85),
    ],
)
def test_the_score_is_counted_as_documented(requirements, given_values, points):
    assert score(requirements, **given_values) == points


@pytest.mark.parametrize(
    ("servers", "order"),
    [
        ([server("b"), server("a")], "ab"),
        # 3 of 4 and 6 of 8 free are the same points: the one with less to do comes first
        ([server("a", slots=8, busy=2), server("b", slots=4, busy=1)], "ba"),
        ([server("a", busy=1), server("b")], "ba"),
        ([server("a", status="offline"), server("b", busy=3)], "ba"),
    ],
)
def test_ties_go_to_the_least_busy_and_then_by_name(servers, order):
    assert "".join(c["server"] for c in cascade.rank({}, servers)) == order


def test_a_preference_decides_between_servers_that_fit():
    ranked = cascade.rank(
        {"prefer": {"capabilities": ["gpu"]}},
        [server("a", capabilities=[]), server("b", capabilities=["gpu"])],
    )
    assert [(c["server"], c["score"]) for c in ranked] == [("b", 105), ("a", 95)]


def test_equal_requirements_have_one_signature():
    one = cascade.signature({"repo": "a", "languages": ["TS", "rust"], "frameworks": []})
    other = cascade.signature({"languages": ["Rust", "typescript"], "repo": "a"})
    assert one == other == '{"languages":["rust","typescript"],"repo":"a"}'
    assert cascade.signature({}) == "{}"


requirement = st.fixed_dictionaries(
    {},
    optional={
        "repo": st.sampled_from(["a", "b"]),
        "languages": st.lists(st.sampled_from(["ts", "TypeScript", "rust"]), max_size=2),
        "capabilities": st.lists(st.sampled_from(["gpu", "GPU", "x"]), max_size=2),
    },
)
some_server = st.builds(
    lambda **kw: server("s", **kw),
    repos=st.sampled_from([{}, {"a": {}}, {"a": {}, "b": {}}]),
    languages=st.sampled_from([None, [], ["rust"], ["js", "ts"]]),
    capabilities=st.sampled_from([None, [], ["gpu"]]),
)


@given(requirement, requirement, some_server)
def test_what_has_the_same_signature_fits_the_same_servers(one, other, candidate):
    """The queue looks at signatures only, so they must say everything that decides."""
    if cascade.signature(one) == cascade.signature(other):
        assert cascade.exclusions(one, candidate) == cascade.exclusions(other, candidate)
        assert cascade.score(one, candidate) == cascade.score(other, candidate)
    stored = json.loads(cascade.signature(one))
    assert bool(cascade.exclusions(one, candidate)) == bool(cascade.exclusions(stored, candidate))


@pytest.mark.parametrize(
    ("requirements", "servers", "sentence"),
    [
        ({}, [], "no server is registered in this project"),
        ({"repo": "x"}, [server("a"), server("b")], "no server has repo x"),
        ({}, [server("a", busy=4)], "1 server fits but is full"),
        ({}, [server("a", busy=4), server("b", busy=4)], "2 servers fit but are full"),
        (
            {"repo": "x"},
            [server("a", repos={"x": {}}, busy=4), server("b")],
            "1 server fits but is full",
        ),
        (
            {"server": "id-b"},
            [server("a"), server("b", status="offline")],
            "waiting for b: offline",
        ),
        (
            {"repo": "x"},
            [server("a", status="offline", repos={"x": {}}), server("b", status="offline")],
            "no server fits; nearest is a: offline",
        ),
        (
            {"capabilities": ["gpu"]},
            [server("a", capabilities=[])],
            "no server fits; nearest is a: no capability gpu",
        ),
    ],
)
def test_one_sentence_says_why_a_ready_task_waits(requirements, servers, sentence):
    assert cascade.why_waiting(requirements, cascade.rank(requirements, servers)) == sentence
