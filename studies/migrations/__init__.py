"""Alembic migrations of our own tables. They have a version table of their own: `alembic_version` is Optuna's."""
