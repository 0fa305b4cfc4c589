"""The number of the last sync of each server's agents, so that a late copy of an earlier one is
known."""


def up(migrator, db):
    db.execute_sql("ALTER TABLE server ADD COLUMN synced INTEGER NOT NULL DEFAULT 0")
