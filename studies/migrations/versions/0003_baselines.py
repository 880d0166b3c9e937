"""Baselines: trainings and latencies of networks that a study's candidates are compared with."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# As the triggers of 0001, beside that for our other tables.
TRIGGER = """
CREATE TRIGGER convfirst_baselines_deleted AFTER DELETE ON studies BEGIN
    DELETE FROM convfirst_baseline_trainings WHERE study_id = OLD.study_id;
    DELETE FROM convfirst_baseline_latencies WHERE study_id = OLD.study_id;
END
"""


def upgrade() -> None:
    op.create_table(
        "convfirst_baseline_trainings",
        sa.Column("baseline_training_id", sa.Integer, primary_key=True),
        sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id", ondelete="CASCADE"), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("resolution", sa.Integer, nullable=False),
        sa.Column("steps", sa.Integer, nullable=False),
        sa.Column("batch_size", sa.Integer, nullable=False),
        sa.Column("learning_rate", sa.Double, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("trial", sa.Integer),
        sa.Column("params", sa.BigInteger, nullable=False),
        sa.Column("macs", sa.BigInteger, nullable=False),
        sa.Column("classes", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("curve", sa.Text),
        sa.Column("train_seconds", sa.Double),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("study_id", "name", "resolution", "steps", "batch_size", "learning_rate"),
    )
    op.create_table(
        "convfirst_baseline_latencies",
        sa.Column("baseline_latency_id", sa.Integer, primary_key=True),
        sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id", ondelete="CASCADE"), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id"), nullable=False),
        sa.Column("engine", sa.String(64), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("batch_size", sa.Integer, nullable=False),
        sa.Column("resolution", sa.Integer, nullable=False),
        sa.Column("threads", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("median_ms", sa.Double),
        sa.Column("p20_ms", sa.Double),
        sa.Column("p80_ms", sa.Double),
        sa.Column("repeats", sa.Integer),
        sa.Column("interval_share", sa.Double),
        sa.Column("capped", sa.Boolean),
        sa.Column("throttled", sa.Boolean),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint(
            "study_id", "name", "device_id", "engine", "dtype", "batch_size", "resolution", "threads"
        ),
    )  # fmt: skip
    if op.get_bind().dialect.name == "sqlite":
        op.execute(TRIGGER)
