"""Longer trainings of a study's candidates, and the front by them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# One row per candidate, deployment and longer training.
RETRAINED = """
CREATE VIEW convfirst_retrained AS
SELECT e.*,
       r.data AS retrained_data, r.data_fingerprint AS retrained_fingerprint, r.resolution AS retrained_resolution,
       r.steps AS retrained_steps, r.batch_size AS retrained_batch_size, r.learning_rate AS retrained_learning_rate,
       r.seed AS retrained_seed, r.accuracy AS retrained_accuracy, r.loss AS retrained_loss,
       r.train_seconds AS retrained_seconds
FROM convfirst_evaluations e
JOIN convfirst_retrainings r ON r.trial_id = e.trial_id AND r.accuracy IS NOT NULL
"""

# As `pareto_front`, by the accuracy of longer trainings, of each kind of them.
RETRAINED_FRONT = """
CREATE VIEW retrained_front AS
SELECT *
FROM (
    SELECT e.*,
           MAX(retrained_accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads,
                   retrained_fingerprint, retrained_resolution, retrained_steps, retrained_batch_size,
                   retrained_learning_rate, retrained_seed
               ORDER BY latency_ms GROUPS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ) AS best_of_faster,
           MAX(retrained_accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads,
                   retrained_fingerprint, retrained_resolution, retrained_steps, retrained_batch_size,
                   retrained_learning_rate, retrained_seed, latency_ms
           ) AS best_of_equally_fast
    FROM convfirst_retrained e
    WHERE latency_ms IS NOT NULL AND NOT latency_over_limit
) ranked
WHERE retrained_accuracy = best_of_equally_fast AND (best_of_faster IS NULL OR retrained_accuracy > best_of_faster)
"""

# Triggers fire for rows that other triggers delete, too.
TRIGGER = """
CREATE TRIGGER convfirst_candidate_deleted AFTER DELETE ON convfirst_candidates BEGIN
    DELETE FROM convfirst_retrainings WHERE trial_id = OLD.trial_id;
END
"""


def upgrade() -> None:
    op.create_table(
        "convfirst_retrainings",
        sa.Column("retraining_id", sa.Integer, primary_key=True),
        sa.Column(
            "trial_id", sa.Integer, sa.ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("data_fingerprint", sa.String(12), nullable=False),
        sa.Column("resolution", sa.Integer, nullable=False),
        sa.Column("steps", sa.Integer, nullable=False),
        sa.Column("batch_size", sa.Integer, nullable=False),
        sa.Column("learning_rate", sa.Double, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("curve", sa.Text),
        sa.Column("train_seconds", sa.Double),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint(
            "trial_id", "data_fingerprint", "resolution", "steps", "batch_size", "learning_rate", "seed"
        ),
    )  # fmt: skip
    op.execute(RETRAINED)
    op.execute(RETRAINED_FRONT)
    if op.get_bind().dialect.name == "sqlite":
        op.execute(TRIGGER)
