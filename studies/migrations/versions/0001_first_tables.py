"""The first tables, the views over them, and SQLite's triggers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# One row per candidate and deployment: what a person would type a join for.
EVALUATIONS = """
CREATE VIEW convfirst_evaluations AS
SELECT s.study_name, c.study_id, c.trial_id, c.number, c.state, c.reason, c.arch_id, c.summary, c.arch,
       c.params, c.macs, c.accuracy, c.loss, c.seed, c.train_seconds, c.train_memory_bytes, c.latency_seconds,
       c.total_seconds, c.finished_at,
       l.median_ms AS latency_ms, l.p20_ms AS latency_p20_ms, l.p80_ms AS latency_p80_ms, l.repeats AS latency_repeats,
       l.raw_median_ms AS latency_raw_ms, l.anchor_median_ms, l.weight_bytes, l.workspace_bytes,
       l.engine, l.dtype, l.batch_size, l.resolution, l.threads, l.device_id,
       d.kind AS device_kind, d.name AS device_name, o.config
FROM convfirst_candidates c
JOIN studies s ON s.study_id = c.study_id
JOIN convfirst_studies o ON o.study_id = c.study_id
LEFT JOIN convfirst_latencies l ON l.trial_id = c.trial_id
LEFT JOIN convfirst_devices d ON d.device_id = l.device_id
"""

# A point is dominated if a strictly faster one is at least as accurate, or an equally fast one is more accurate.
# Windows over groups of equal latency find both in one sort, where a self-join would compare all pairs.
PARETO_FRONT = """
CREATE VIEW pareto_front AS
SELECT study_name, device_name, engine, dtype, batch_size, resolution, threads,
       number, accuracy, latency_ms, latency_p20_ms, latency_p80_ms, params, macs, weight_bytes, workspace_bytes,
       arch_id, summary, arch, study_id, trial_id, device_id, device_kind
FROM (
    SELECT e.*,
           MAX(accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads
               ORDER BY latency_ms GROUPS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ) AS best_of_faster,
           MAX(accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads, latency_ms
           ) AS best_of_equally_fast
    FROM convfirst_evaluations e
    WHERE state = 'complete' AND latency_ms IS NOT NULL
) ranked
WHERE accuracy = best_of_equally_fast AND (best_of_faster IS NULL OR accuracy > best_of_faster)
"""

# SQLite enforces foreign keys only for connections that ask for it, which others that delete (the dashboard) do not.
TRIGGERS = (
    """
CREATE TRIGGER convfirst_trial_deleted AFTER DELETE ON trials BEGIN
    DELETE FROM convfirst_learning_curves WHERE trial_id = OLD.trial_id;
    DELETE FROM convfirst_latencies WHERE trial_id = OLD.trial_id;
    DELETE FROM convfirst_candidates WHERE trial_id = OLD.trial_id;
END
""",
    """
CREATE TRIGGER convfirst_study_deleted AFTER DELETE ON studies BEGIN
    DELETE FROM convfirst_studies WHERE study_id = OLD.study_id;
END
""",
)


def upgrade() -> None:
    op.create_table(
        "convfirst_devices",
        sa.Column("device_id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("driver", sa.String(256), nullable=False),
        sa.Column("torch", sa.String(64), nullable=False),
        sa.Column("triton", sa.String(64), nullable=False),
        sa.UniqueConstraint("kind", "name", "driver", "torch", "triton"),
    )
    op.create_table(
        "convfirst_studies",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id", ondelete="CASCADE"), primary_key=True),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("data_fingerprint", sa.Text, nullable=False),
        sa.Column("versions", sa.Text, nullable=False),
        sa.Column("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id"), nullable=False),
        sa.Column("anchor", sa.Text, nullable=False),
        sa.Column("anchor_ms", sa.Double, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("owner", sa.Text),
    )
    op.create_table(
        "convfirst_candidates",
        sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id", ondelete="CASCADE"), primary_key=True),
        sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id", ondelete="CASCADE"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("arch_id", sa.String(12), nullable=False),
        sa.Column("arch", sa.Text, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("params", sa.BigInteger, nullable=False),
        sa.Column("macs", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("train_seconds", sa.Double),
        sa.Column("train_memory_bytes", sa.BigInteger),
        sa.Column("latency_seconds", sa.Double),
        sa.Column("total_seconds", sa.Double, nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False),
    )
    complete = sa.text("state = 'complete'")
    op.create_index(
        "convfirst_candidates_once", "convfirst_candidates", ["study_id", "arch_id"], unique=True,
        sqlite_where=complete, postgresql_where=complete,
    )  # fmt: skip
    op.create_table(
        "convfirst_latencies",
        sa.Column("latency_id", sa.Integer, primary_key=True),
        sa.Column(
            "trial_id", sa.Integer, sa.ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id"), nullable=False),
        sa.Column("engine", sa.String(64), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("batch_size", sa.Integer, nullable=False),
        sa.Column("resolution", sa.Integer, nullable=False),
        sa.Column("threads", sa.Integer, nullable=False),
        sa.Column("median_ms", sa.Double, nullable=False),
        sa.Column("p20_ms", sa.Double, nullable=False),
        sa.Column("p80_ms", sa.Double, nullable=False),
        sa.Column("repeats", sa.Integer, nullable=False),
        sa.Column("raw_median_ms", sa.Double, nullable=False),
        sa.Column("anchor_median_ms", sa.Double, nullable=False),
        sa.Column("weight_bytes", sa.BigInteger, nullable=False),
        sa.Column("workspace_bytes", sa.BigInteger, nullable=False),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("trial_id", "device_id", "engine", "dtype", "batch_size", "resolution", "threads"),
    )
    op.create_table(
        "convfirst_learning_curves",
        sa.Column(
            "trial_id", sa.Integer, sa.ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("train_loss", sa.Double, nullable=False),
        sa.Column("train_accuracy", sa.Double, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
    )
    op.execute(EVALUATIONS)
    op.execute(PARETO_FRONT)
    if op.get_bind().dialect.name == "sqlite":
        for trigger in TRIGGERS:
            op.execute(trigger)
