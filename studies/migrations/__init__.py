"""Alembic migrations of our own tables, under a version table of our own: `alembic_version` is Optuna's."""
