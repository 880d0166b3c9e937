"""Candidates whose training was given up, what a pilot chose, and accuracies on test images; the views with them."""

import importlib
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

# The views and triggers of before, which are made of the same tables; as that migration, they never change.
before: Any = importlib.import_module("studies.migrations.versions.0008_trainings")


def _changed(view: str, old: str, new: str) -> str:
    text: str = before.VIEWS[view]
    assert text.count(old) == 1, view
    return text.replace(old, new)


VIEWS = {
    **before.VIEWS,
    "convfirst_evaluations": _changed(
        "convfirst_evaluations", "c.confirmed_trainings,\n",
        "c.confirmed_trainings,\n"
        "       c.given_up_at, c.predicted_accuracy, c.predicted_deviation, c.needed_accuracy,\n",
    ),
    "pareto_front": _changed(
        "pareto_front", "           AS training_batch_size\n",
        "           AS training_batch_size,\n"
        "       CASE WHEN confirmed = 1 THEN (SELECT AVG(t.test_accuracy) FROM convfirst_trainings t\n"
        "           WHERE t.trial_id = ranked.trial_id AND t.stage = 'confirmation') END AS test_accuracy\n",
    ),
}  # fmt: skip


def upgrade() -> None:
    for name in reversed(VIEWS):
        op.execute(f"DROP VIEW IF EXISTS {name}")
    op.add_column("convfirst_studies", sa.Column("pilot", sa.Text))
    op.add_column("convfirst_candidates", sa.Column("given_up_at", sa.Integer))
    for name in ("predicted_accuracy", "predicted_deviation", "needed_accuracy"):
        op.add_column("convfirst_candidates", sa.Column(name, sa.Double))
    op.add_column("convfirst_trainings", sa.Column("test_accuracy", sa.Double))
    for view in VIEWS.values():
        op.execute(view)
