"""An old file opens with today's code, with what was in it."""

import importlib.util
import shutil
import sqlite3

import peewee
import pytest

import models
from conftest import ROOT
from models import Table

MIGRATIONS = sorted((ROOT / "migrations").glob("[0-9]*.py"))


@pytest.fixture
def opened():
    yield models.open_db
    models.close_db()


def old_file(path, upto: int) -> None:
    """A database as the first `upto` migrations alone made it."""
    folder = path.parent / "migrations-then"
    folder.mkdir()
    for migration in MIGRATIONS[:upto]:
        shutil.copy(migration, folder)
    now, models.MIGRATIONS = models.MIGRATIONS, folder
    try:
        models.open_db(path)
        models.close_db()
    finally:
        models.MIGRATIONS = now


def schema(path) -> dict:
    connection = sqlite3.connect(path)
    try:
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        return dict(found.fetchall())
    finally:
        connection.close()


def test_migrations_are_numbered_without_gaps_and_can_be_loaded():
    numbers = [int(path.name[:4]) for path in MIGRATIONS]
    assert numbers == list(range(1, len(numbers) + 1))
    for path in MIGRATIONS:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(module.up)


@pytest.mark.parametrize("upto", range(1, len(MIGRATIONS) + 1))
def test_a_file_of_any_age_opens_and_keeps_what_was_in_it(tmp_path, opened, upto):
    path = tmp_path / "old.db"
    old_file(path, upto)
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO project (id, name, created_at) VALUES ('p', 'old', 1)")
    connection.execute(
        "INSERT INTO task (id, project_id, title, spec, created_by, created_at, updated_at)"
        " VALUES ('t', 'p', 'old task', 'spec', 'somebody', 1, 1)"
    )
    connection.commit()
    epoch = connection.execute("SELECT value FROM meta WHERE key = 'hub_epoch'").fetchone()[0]
    connection.close()
    opened(path)
    assert models.one("SELECT title FROM task")["title"] == "old task"
    assert models.epoch() == epoch
    fresh = tmp_path / "fresh.db"
    models.close_db()
    opened(fresh)
    assert schema(path) == schema(fresh)


def test_opening_again_changes_nothing(tmp_path, opened):
    path = tmp_path / "hub.db"
    opened(path)
    before, epoch = schema(path), models.epoch()
    models.close_db()
    opened(path)
    assert (schema(path), models.epoch()) == (before, epoch)


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "hub.db"
    models.open_db(path)
    models.close_db()
    before = schema(path)
    folder = tmp_path / "migrations"
    shutil.copytree(ROOT / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / f"{len(MIGRATIONS) + 1:04d}_broken.py").write_text(
        "def up(migrator, db):\n"
        "    db.execute_sql('CREATE TABLE half_done (id TEXT)')\n"
        "    db.execute_sql('CREATE NONSENSE')\n"
    )
    monkeypatch.setattr(models, "MIGRATIONS", folder)
    with pytest.raises(peewee.OperationalError):
        models.open_db(path)
    assert schema(path) == before
    monkeypatch.undo()
    models.open_db(path)
    models.close_db()


@pytest.mark.parametrize("model", Table.__subclasses__(), ids=lambda m: m.__name__)
def test_the_models_have_exactly_the_columns_of_their_tables(tmp_path, opened, model):
    opened(tmp_path / "hub.db")
    found = {r["name"]: r for r in models.rows(f"PRAGMA table_info({model._meta.table_name})")}
    declared = {field.column_name: field for field in model._meta.sorted_fields}
    assert set(declared) == set(found)
    for name, field in declared.items():
        if not found[name]["pk"]:
            assert field.null == (not found[name]["notnull"]), name


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "hub.db"
    path.write_text("this is no database, and it is long enough to be sure of that\n" * 20)
    with pytest.raises(peewee.DatabaseError):
        models.open_db(path)
