"""Telegram: bots, who is paired with them, what is told to whom, and what was sent."""

TABLES = """
CREATE TABLE bot (
    id TEXT PRIMARY KEY, username TEXT, position INTEGER, trouble TEXT, trouble_at REAL);

CREATE TABLE project_bot (
    project_id TEXT PRIMARY KEY REFERENCES project(id) ON DELETE CASCADE, token TEXT NOT NULL,
    set_by TEXT NOT NULL, set_at REAL NOT NULL);

CREATE TABLE pairing_code (
    id TEXT PRIMARY KEY, hash TEXT NOT NULL,
    user_id TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    expires_at REAL NOT NULL, tries INTEGER NOT NULL DEFAULT 0);

CREATE TABLE chat (
    id TEXT PRIMARY KEY, bot_id TEXT NOT NULL, chat_id INTEGER NOT NULL, title TEXT NOT NULL,
    token_id TEXT UNIQUE REFERENCES token(id) ON DELETE CASCADE,
    user_id TEXT REFERENCES user(id) ON DELETE CASCADE,
    project_id TEXT REFERENCES project(id) ON DELETE CASCADE,
    kinds TEXT, forum INTEGER NOT NULL DEFAULT 0, listed TEXT NOT NULL DEFAULT '[]',
    muted_until REAL, refused TEXT, created_by TEXT NOT NULL, created_at REAL NOT NULL,
    UNIQUE (bot_id, chat_id));
CREATE INDEX chat_user ON chat (user_id);
CREATE INDEX chat_project ON chat (project_id);

CREATE TABLE topic (
    chat TEXT NOT NULL REFERENCES chat(id) ON DELETE CASCADE, about TEXT NOT NULL,
    thread_id INTEGER NOT NULL, PRIMARY KEY (chat, about)) WITHOUT ROWID;

CREATE TABLE focus (
    chat TEXT NOT NULL REFERENCES chat(id) ON DELETE CASCADE, thread_id INTEGER NOT NULL,
    session_id TEXT NOT NULL, user_id TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    message_id INTEGER, began_at REAL NOT NULL,
    PRIMARY KEY (chat, thread_id)) WITHOUT ROWID;

CREATE TABLE bot_update (
    bot_id TEXT NOT NULL, update_id INTEGER NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (bot_id, update_id)) WITHOUT ROWID;
CREATE INDEX bot_update_at ON bot_update (at);

CREATE TABLE wish (
    user_id TEXT PRIMARY KEY REFERENCES user(id) ON DELETE CASCADE,
    quiet_from TEXT, quiet_to TEXT, zone TEXT, patient INTEGER NOT NULL DEFAULT 1);

CREATE TABLE project_wish (
    user_id TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    project_id TEXT NOT NULL REFERENCES project(id) ON DELETE CASCADE,
    kinds TEXT NOT NULL, PRIMARY KEY (user_id, project_id)) WITHOUT ROWID;

CREATE TABLE post (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    chat TEXT REFERENCES chat(id) ON DELETE CASCADE, bot_id TEXT NOT NULL, chat_id INTEGER NOT NULL,
    kind TEXT NOT NULL, about TEXT, thread_id INTEGER, message_id INTEGER, body TEXT NOT NULL,
    opened TEXT, reply_to INTEGER, silent INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL, version INTEGER NOT NULL DEFAULT 0, due_at REAL NOT NULL, sent_at REAL,
    why TEXT);
CREATE INDEX post_open ON post (bot_id, seq) WHERE state IN ('due', 'stale', 'gone', 'void');
CREATE INDEX post_message ON post (bot_id, chat_id, message_id);
CREATE INDEX post_last ON post (chat, kind, seq);
CREATE INDEX post_age ON post (due_at);

CREATE TABLE notice (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    chat TEXT NOT NULL REFERENCES chat(id) ON DELETE CASCADE, event_id INTEGER NOT NULL,
    kind TEXT NOT NULL, subject TEXT, about TEXT, due_at REAL, again_at REAL,
    state TEXT NOT NULL DEFAULT 'due',
    post INTEGER REFERENCES post(seq) ON DELETE CASCADE,
    reminder INTEGER REFERENCES post(seq) ON DELETE SET NULL,
    UNIQUE (chat, event_id));
CREATE INDEX notice_due ON notice (due_at) WHERE state = 'due';
CREATE INDEX notice_again ON notice (again_at) WHERE again_at IS NOT NULL;
CREATE INDEX notice_subject ON notice (subject) WHERE subject IS NOT NULL;
CREATE INDEX notice_about ON notice (about) WHERE subject IS NOT NULL;
CREATE INDEX notice_post ON notice (post);
CREATE INDEX notice_reminder ON notice (reminder);

ALTER TABLE intervention ADD COLUMN ended_where TEXT;
ALTER TABLE plan ADD COLUMN decided_where TEXT;
"""


def up(migrator, db):
    for statement in TABLES.split(";"):
        if statement.strip():
            db.execute_sql(statement)
