"""Which form of the protocol a server's agent speaks: 1 is the older one of the public daemon."""


def up(migrator, db):
    db.execute_sql("ALTER TABLE server ADD COLUMN protocol INTEGER NOT NULL DEFAULT 2")
