"""How busy each server was, a sample a minute for the last hour; tokens that people name."""


def up(migrator, db):
    db.execute_sql(
        "CREATE TABLE load (server_id TEXT NOT NULL REFERENCES server(id), minute INTEGER NOT NULL,"
        " cpu REAL, memory REAL, disk REAL, PRIMARY KEY (server_id, minute)) WITHOUT ROWID"
    )
    db.execute_sql("ALTER TABLE token ADD COLUMN name TEXT NOT NULL DEFAULT ''")
    db.execute_sql("CREATE INDEX token_user ON token (user_id)")
