"""What waits for a person, and what is said about a task: questions, plans, notes."""

TABLES = """
CREATE TABLE intervention (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES project(id), task_id TEXT NOT NULL REFERENCES task(id),
    attempt INTEGER NOT NULL, kind TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'pending',
    question TEXT NOT NULL, context TEXT, urgency TEXT NOT NULL DEFAULT 'normal',
    server_id TEXT, session_id TEXT, target_session_id TEXT, asked_by TEXT NOT NULL,
    asked_at REAL NOT NULL, response TEXT, closed_why TEXT, ended_by TEXT, ended_at REAL);
CREATE INDEX intervention_project ON intervention (project_id, seq);
CREATE INDEX intervention_status ON intervention (project_id, status, seq);
CREATE INDEX intervention_task ON intervention (task_id, seq);
CREATE INDEX intervention_open ON intervention (task_id) WHERE status = 'pending';

CREATE TABLE plan (
    task_id TEXT NOT NULL REFERENCES task(id), version INTEGER NOT NULL,
    attempt INTEGER NOT NULL, plan TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'pending',
    author TEXT NOT NULL, at REAL NOT NULL, feedback TEXT, decided_by TEXT, decided_at REAL,
    PRIMARY KEY (task_id, version)) WITHOUT ROWID;

CREATE TABLE note (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES project(id), task_id TEXT NOT NULL REFERENCES task(id),
    attempt INTEGER NOT NULL, content TEXT NOT NULL, urgent INTEGER NOT NULL DEFAULT 0,
    author TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX note_task ON note (task_id, seq);
"""


def up(migrator, db):
    for statement in TABLES.split(";"):
        if statement.strip():
            db.execute_sql(statement)
