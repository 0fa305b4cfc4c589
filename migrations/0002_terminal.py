"""What keeps a session's terminal: tmux, or a plain pseudo-terminal of the agent."""


def up(migrator, db):
    db.execute_sql("ALTER TABLE session ADD COLUMN terminal TEXT NOT NULL DEFAULT 'tmux'")
