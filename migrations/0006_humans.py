"""Humans in the loop: permission requests with rules and grants, alerts, how an answer was
delivered, and what a coding agent is started with."""

TABLES = """
CREATE TABLE permission (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES project(id), server_id TEXT NOT NULL, session_id TEXT,
    task_id TEXT, attempt INTEGER, agent TEXT, via TEXT NOT NULL,
    asks TEXT NOT NULL DEFAULT 'permission', tool TEXT NOT NULL,
    input TEXT NOT NULL, subject TEXT NOT NULL, directory TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'pending', asked_at REAL NOT NULL, decided_by TEXT,
    decided_at REAL, rule_id TEXT, scope TEXT, reason TEXT, answers TEXT, answered_where TEXT,
    delivery TEXT, delivery_why TEXT);
CREATE INDEX permission_project ON permission (project_id, seq);
CREATE INDEX permission_status ON permission (project_id, status, seq);
CREATE INDEX permission_session ON permission (session_id, seq);
CREATE INDEX permission_task ON permission (task_id, seq);
CREATE INDEX permission_open ON permission (session_id) WHERE status = 'pending';

CREATE TABLE rule (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, position INTEGER NOT NULL,
    project_id TEXT REFERENCES project(id), server_id TEXT, agent TEXT, tool TEXT NOT NULL,
    pattern TEXT, action TEXT NOT NULL, note TEXT NOT NULL DEFAULT '',
    enabled INTEGER NOT NULL DEFAULT 1, created_by TEXT NOT NULL, created_at REAL NOT NULL);
CREATE INDEX rule_order ON rule (position, seq);

CREATE TABLE session_grant (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    session_id TEXT NOT NULL, tool TEXT NOT NULL, subject TEXT NOT NULL, directory TEXT NOT NULL,
    granted_by TEXT NOT NULL, at REAL NOT NULL);
CREATE UNIQUE INDEX grant_session ON session_grant (session_id, tool, subject, directory);

CREATE TABLE alert (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES project(id), kind TEXT NOT NULL, session_id TEXT,
    server_id TEXT, task_id TEXT, about TEXT NOT NULL DEFAULT '', sentence TEXT NOT NULL,
    at REAL NOT NULL, status TEXT NOT NULL DEFAULT 'open', ended_by TEXT, ended_at REAL);
CREATE INDEX alert_project ON alert (project_id, status, seq);
CREATE INDEX alert_session ON alert (session_id, status);
CREATE UNIQUE INDEX alert_open ON alert (kind, COALESCE(session_id, ''), COALESCE(task_id, ''),
    about) WHERE status = 'open';

ALTER TABLE intervention ADD COLUMN delivery TEXT;
ALTER TABLE intervention ADD COLUMN delivery_why TEXT;
ALTER TABLE intervention ADD COLUMN claim TEXT;
ALTER TABLE intervention ADD COLUMN claim_until REAL;
CREATE INDEX intervention_held ON intervention (claim_until) WHERE delivery = 'held';

ALTER TABLE session ADD COLUMN signal TEXT;
ALTER TABLE session ADD COLUMN signals TEXT NOT NULL DEFAULT '[]';
ALTER TABLE session ADD COLUMN activity_at REAL;
ALTER TABLE session ADD COLUMN progress_at REAL;
ALTER TABLE session ADD COLUMN model TEXT;
ALTER TABLE session ADD COLUMN conversation TEXT;
ALTER TABLE session ADD COLUMN resumes TEXT;
ALTER TABLE session ADD COLUMN mode TEXT;

ALTER TABLE task ADD COLUMN model TEXT;
ALTER TABLE task ADD COLUMN mode TEXT;
"""


def up(migrator, db):
    for statement in TABLES.split(";"):
        if statement.strip():
            db.execute_sql(statement)
