"""Alerts are found by what they are about."""


def up(migrator, db):
    db.execute_sql("CREATE INDEX alert_about ON alert (about, kind)")
