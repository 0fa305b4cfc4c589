"""The first schema: everything the pipeline needs."""

import uuid

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);

CREATE TABLE user (
    id TEXT PRIMARY KEY, username TEXT NOT NULL COLLATE NOCASE UNIQUE, password_hash TEXT,
    is_admin INTEGER NOT NULL DEFAULT 0, disabled INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL);

CREATE TABLE project (
    id TEXT PRIMARY KEY, name TEXT NOT NULL COLLATE NOCASE UNIQUE,
    profile TEXT NOT NULL DEFAULT 'command', settings TEXT NOT NULL DEFAULT '{}',
    created_at REAL NOT NULL);

CREATE TABLE membership (
    user_id TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    project_id TEXT NOT NULL REFERENCES project(id) ON DELETE CASCADE,
    role TEXT NOT NULL, PRIMARY KEY (user_id, project_id)) WITHOUT ROWID;

CREATE TABLE token (
    id TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    kind TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, created_at REAL NOT NULL,
    expires_at REAL NOT NULL, used_at REAL);

CREATE TABLE registration (
    id TEXT PRIMARY KEY, project_id TEXT NOT NULL REFERENCES project(id),
    hash TEXT NOT NULL UNIQUE, note TEXT, created_by TEXT NOT NULL, created_at REAL NOT NULL,
    expires_at REAL NOT NULL, used_at REAL, server_id TEXT);

CREATE TABLE server (
    id TEXT PRIMARY KEY, project_id TEXT NOT NULL REFERENCES project(id), name TEXT NOT NULL,
    hostname TEXT NOT NULL DEFAULT '', os TEXT NOT NULL DEFAULT '', key_hash TEXT UNIQUE,
    machine_id TEXT NOT NULL DEFAULT '', online INTEGER NOT NULL DEFAULT 0,
    draining INTEGER NOT NULL DEFAULT 0, revoked INTEGER NOT NULL DEFAULT 0,
    manual INTEGER NOT NULL DEFAULT 0, repos TEXT NOT NULL DEFAULT '{}', languages TEXT,
    frameworks TEXT, capabilities TEXT, declared TEXT NOT NULL DEFAULT '{}',
    profiles TEXT NOT NULL DEFAULT '{}', slots INTEGER NOT NULL DEFAULT 1,
    busy INTEGER NOT NULL DEFAULT 0, info TEXT NOT NULL DEFAULT '{}',
    agent_version TEXT NOT NULL DEFAULT '', instance TEXT NOT NULL DEFAULT '',
    spool_id TEXT NOT NULL DEFAULT '', spool_upto INTEGER NOT NULL DEFAULT 0,
    last_seen REAL, offline_at REAL, created_at REAL NOT NULL);
CREATE UNIQUE INDEX server_name ON server (project_id, name) WHERE revoked = 0;

CREATE TABLE pipeline (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES project(id), name TEXT NOT NULL,
    id_map TEXT NOT NULL, created_by TEXT NOT NULL, created_at REAL NOT NULL);
CREATE INDEX pipeline_project ON pipeline (project_id, seq);

CREATE TABLE task (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES project(id), pipeline_id TEXT, title TEXT NOT NULL,
    spec TEXT NOT NULL, structured_spec TEXT, acceptance_criteria TEXT NOT NULL DEFAULT '[]',
    type TEXT NOT NULL DEFAULT 'feature', priority INTEGER NOT NULL DEFAULT 1,
    status TEXT NOT NULL DEFAULT 'pending', attempt INTEGER NOT NULL DEFAULT 1,
    failures INTEGER NOT NULL DEFAULT 0, open_deps INTEGER NOT NULL DEFAULT 0,
    target_branch TEXT, requirements TEXT NOT NULL DEFAULT '{}',
    signature TEXT, waiting_since REAL, not_before REAL,
    server_id TEXT, session_id TEXT, pinned_server TEXT, pinned_session TEXT,
    require_plan INTEGER NOT NULL DEFAULT 0, asked_in TEXT, profile TEXT, command TEXT,
    auto_assign INTEGER NOT NULL DEFAULT 0, on_lost TEXT NOT NULL DEFAULT 'retry',
    max_attempts INTEGER NOT NULL DEFAULT 1, retry_delay_s REAL NOT NULL DEFAULT 0,
    queue_timeout REAL, start_timeout REAL, progress_timeout REAL, timeout REAL,
    deadline_at REAL, resolved_inputs TEXT, plan TEXT, plan_feedback TEXT, result TEXT,
    git_diff_stats TEXT, source_session_id TEXT, created_by TEXT NOT NULL,
    created_at REAL NOT NULL, assigned_at REAL, started_at REAL, completed_at REAL,
    updated_at REAL NOT NULL);
CREATE INDEX task_project ON task (project_id, seq);
CREATE INDEX task_status ON task (project_id, status, seq);
CREATE INDEX task_pipeline ON task (pipeline_id, seq) WHERE pipeline_id IS NOT NULL;
CREATE INDEX task_server ON task (server_id)
    WHERE status IN ('assigned', 'planning', 'plan_review', 'running', 'needs_human');
CREATE INDEX task_server_seq ON task (server_id, seq) WHERE server_id IS NOT NULL;
CREATE INDEX task_queue ON task (project_id, signature, priority DESC, waiting_since, seq)
    WHERE waiting_since IS NOT NULL;
CREATE INDEX task_deadline ON task (deadline_at) WHERE deadline_at IS NOT NULL;
CREATE INDEX task_not_before ON task (not_before) WHERE not_before IS NOT NULL;

CREATE TABLE attempt (
    task_id TEXT NOT NULL REFERENCES task(id), number INTEGER NOT NULL, server_id TEXT,
    session_id TEXT, outcome TEXT NOT NULL, report TEXT, assigned_at REAL, started_at REAL,
    ended_at REAL NOT NULL, PRIMARY KEY (task_id, number)) WITHOUT ROWID;

CREATE TABLE dependency (
    id INTEGER PRIMARY KEY, task_id TEXT NOT NULL REFERENCES task(id),
    upstream_id TEXT NOT NULL REFERENCES task(id), kind TEXT NOT NULL,
    key TEXT NOT NULL DEFAULT '', resolved INTEGER NOT NULL DEFAULT 0,
    UNIQUE (task_id, upstream_id, kind, key));
CREATE INDEX dependency_upstream ON dependency (upstream_id);
CREATE UNIQUE INDEX dependency_input ON dependency (task_id, key) WHERE kind = 'input';

CREATE TABLE contract (
    task_id TEXT NOT NULL REFERENCES task(id), key TEXT NOT NULL, data TEXT NOT NULL,
    attempt INTEGER NOT NULL, author TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (task_id, key)) WITHOUT ROWID;

CREATE TABLE session (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES project(id),
    server_id TEXT NOT NULL REFERENCES server(id), task_id TEXT, attempt INTEGER,
    name TEXT NOT NULL, role TEXT NOT NULL DEFAULT 'plain', profile TEXT, command TEXT,
    state TEXT NOT NULL DEFAULT 'starting', activity TEXT NOT NULL DEFAULT 'working',
    reason TEXT, tmux_name TEXT NOT NULL, pid INTEGER, exit_code INTEGER, error TEXT,
    working_directory TEXT, repo TEXT, cols INTEGER NOT NULL DEFAULT 120,
    rows INTEGER NOT NULL DEFAULT 40, log_start INTEGER NOT NULL DEFAULT 0,
    log_end INTEGER NOT NULL DEFAULT 0, created_by TEXT NOT NULL, created_at REAL NOT NULL,
    started_at REAL, closed_at REAL, state_at REAL NOT NULL);
CREATE INDEX session_server ON session (server_id, state);
CREATE INDEX session_name ON session (name, state);
CREATE INDEX session_project ON session (project_id, seq);
CREATE INDEX session_state ON session (project_id, state, seq);
CREATE INDEX session_recovering ON session (state_at) WHERE state = 'recovering';

CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT, project_id TEXT, type TEXT NOT NULL, task_id TEXT,
    cause_id TEXT, session_id TEXT, server_id TEXT, actor TEXT NOT NULL, details TEXT NOT NULL,
    at REAL NOT NULL, task_seq INTEGER, cause_seq INTEGER);
CREATE INDEX event_task ON event (task_seq, id) WHERE task_seq IS NOT NULL;
CREATE INDEX event_cause ON event (cause_seq, id) WHERE cause_seq IS NOT NULL;
CREATE INDEX event_project ON event (project_id, id);

CREATE TABLE command (
    id INTEGER PRIMARY KEY AUTOINCREMENT, server_id TEXT NOT NULL REFERENCES server(id),
    type TEXT NOT NULL, session_id TEXT, task_id TEXT, attempt INTEGER,
    body TEXT NOT NULL DEFAULT '{}', created_at REAL NOT NULL, acked_at REAL);
CREATE INDEX command_open ON command (server_id, id) WHERE acked_at IS NULL;
"""


def up(migrator, db):
    for statement in TABLES.split(";"):
        if statement.strip():
            db.execute_sql(statement)
    db.execute_sql("INSERT INTO meta VALUES ('hub_epoch', ?)", (str(uuid.uuid4()),))
