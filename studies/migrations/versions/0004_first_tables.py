"""The tables, views and SQLite triggers of the first release.

Versions 0001 to 0003 were never released; a database of one of them is refused.
"""

from functools import partial

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = None

# One row per candidate and deployment: the final latency where there is one, with the search's beside it.
EVALUATIONS = """
CREATE VIEW convfirst_evaluations AS
SELECT s.study_name, c.study_id, c.trial_id, c.number, c.state, c.reason, c.arch_id, c.summary, c.arch,
       c.params, c.macs, c.accuracy, c.loss, c.seed, c.train_seconds, c.train_memory_bytes, c.latency_seconds,
       c.total_seconds, c.finished_at,
       l.median_ms AS latency_ms, l.p20_ms AS latency_p20_ms, l.p80_ms AS latency_p80_ms, l.repeats AS latency_repeats,
       l.raw_median_ms AS latency_raw_ms, l.anchor_median_ms, l.weight_bytes, l.workspace_bytes,
       l.engine, l.dtype, l.batch_size, l.resolution, l.threads, l.device_id,
       d.kind AS device_kind, d.name AS device_name, o.config,
       l.stage AS latency_stage, l.interval_share AS latency_interval_share, l.capped AS latency_capped,
       l.throttled AS latency_throttled, l.sm_clock_mhz, l.temperature_c, l.over_limit AS latency_over_limit,
       b.median_ms AS searched_latency_ms,
       c.macs * l.batch_size / NULLIF(l.median_ms / 1000 * p.macs_per_s, 0) AS computational_efficiency
FROM convfirst_candidates c
JOIN studies s ON s.study_id = c.study_id
JOIN convfirst_studies o ON o.study_id = c.study_id
LEFT JOIN convfirst_latencies l ON l.trial_id = c.trial_id AND NOT EXISTS (
    SELECT 1 FROM convfirst_latencies f
    WHERE f.trial_id = l.trial_id AND f.device_id = l.device_id AND f.engine = l.engine AND f.dtype = l.dtype
      AND f.batch_size = l.batch_size AND f.resolution = l.resolution AND f.threads = l.threads
      AND f.stage = 'final' AND l.stage = 'search'
)
LEFT JOIN convfirst_latencies b
    ON b.trial_id = l.trial_id AND b.device_id = l.device_id AND b.engine = l.engine AND b.dtype = l.dtype
    AND b.batch_size = l.batch_size AND b.resolution = l.resolution AND b.threads = l.threads AND b.stage = 'search'
LEFT JOIN convfirst_devices d ON d.device_id = l.device_id
LEFT JOIN convfirst_profiles p ON p.device_id = l.device_id AND p.dtype = l.dtype AND p.threads = l.threads
"""

# A point is dominated if a strictly faster one is at least as accurate, or an equally fast one is more accurate.
# Windows over groups of equal latency find both in one sort, where a self-join would compare all pairs.
# A candidate that broke the study's limit on the latency when it was measured again is not on the front.
PARETO_FRONT = """
CREATE VIEW pareto_front AS
SELECT study_name, device_name, engine, dtype, batch_size, resolution, threads,
       number, accuracy, latency_ms, latency_p20_ms, latency_p80_ms, params, macs, weight_bytes, workspace_bytes,
       arch_id, summary, arch, study_id, trial_id, device_id, device_kind,
       computational_efficiency, latency_stage, latency_interval_share, latency_capped, searched_latency_ms
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
    WHERE state = 'complete' AND latency_ms IS NOT NULL AND NOT latency_over_limit
) ranked
WHERE accuracy = best_of_equally_fast AND (best_of_faster IS NULL OR accuracy > best_of_faster)
"""

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

# The same as `pareto_front`, but by the accuracy of longer trainings, and with one front for each kind of training.
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

# SQLite enforces foreign keys only for connections that ask for it, which others that delete (the dashboard) do not.
# Triggers also fire for rows that other triggers delete.
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
    """
CREATE TRIGGER convfirst_baselines_deleted AFTER DELETE ON studies BEGIN
    DELETE FROM convfirst_baseline_trainings WHERE study_id = OLD.study_id;
    DELETE FROM convfirst_baseline_latencies WHERE study_id = OLD.study_id;
END
""",
    """
CREATE TRIGGER convfirst_candidate_deleted AFTER DELETE ON convfirst_candidates BEGIN
    DELETE FROM convfirst_retrainings WHERE trial_id = OLD.trial_id;
END
""",
)

required = partial(sa.Column, nullable=False)


def upgrade() -> None:
    op.create_table(
        "convfirst_devices",
        sa.Column("device_id", sa.Integer, primary_key=True),
        required("kind", sa.String(64)),
        required("name", sa.String(256)),
        required("driver", sa.String(256)),
        required("torch", sa.String(64)),
        required("triton", sa.String(64)),
        sa.UniqueConstraint("kind", "name", "driver", "torch", "triton"),
    )
    op.create_table(
        "convfirst_studies",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.study_id", ondelete="CASCADE"), primary_key=True),
        required("config", sa.Text),
        required("data_fingerprint", sa.Text),
        required("versions", sa.Text),
        required("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id")),
        required("anchor", sa.Text),
        required("anchor_ms", sa.Double),
        required("created_at", sa.DateTime(timezone=True)),
        sa.Column("owner", sa.Text),
    )
    op.create_table(
        "convfirst_candidates",
        sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id", ondelete="CASCADE"), primary_key=True),
        required("study_id", sa.Integer, sa.ForeignKey("studies.study_id", ondelete="CASCADE")),
        required("number", sa.Integer),
        required("arch_id", sa.String(12)),
        required("arch", sa.Text),
        required("summary", sa.Text),
        required("params", sa.BigInteger),
        required("macs", sa.BigInteger),
        required("state", sa.String(16)),
        sa.Column("reason", sa.Text),
        required("seed", sa.BigInteger),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("train_seconds", sa.Double),
        sa.Column("train_memory_bytes", sa.BigInteger),
        sa.Column("latency_seconds", sa.Double),
        required("total_seconds", sa.Double),
        required("finished_at", sa.DateTime(timezone=True)),
    )
    complete = sa.text("state = 'complete'")
    op.create_index(
        "convfirst_candidates_once", "convfirst_candidates", ["study_id", "arch_id"], unique=True,
        sqlite_where=complete, postgresql_where=complete,
    )  # fmt: skip
    op.create_table(
        "convfirst_latencies",
        sa.Column("latency_id", sa.Integer, primary_key=True),
        required("trial_id", sa.Integer, sa.ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE")),
        required("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id")),
        required("engine", sa.String(64)),
        required("dtype", sa.String(16)),
        required("batch_size", sa.Integer),
        required("resolution", sa.Integer),
        required("threads", sa.Integer),
        required("stage", sa.String(16), server_default="search"),
        required("median_ms", sa.Double),
        required("p20_ms", sa.Double),
        required("p80_ms", sa.Double),
        required("repeats", sa.Integer),
        sa.Column("interval_share", sa.Double),
        sa.Column("capped", sa.Boolean),
        required("raw_median_ms", sa.Double),
        required("anchor_median_ms", sa.Double),
        required("weight_bytes", sa.BigInteger),
        required("workspace_bytes", sa.BigInteger),
        sa.Column("throttled", sa.Boolean),
        sa.Column("sm_clock_mhz", sa.Double),
        sa.Column("temperature_c", sa.Double),
        required("over_limit", sa.Boolean, server_default=sa.false()),
        required("measured_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("trial_id", "device_id", "engine", "dtype", "batch_size", "resolution", "threads", "stage"),
    )
    op.create_table(
        "convfirst_learning_curves",
        sa.Column(
            "trial_id", sa.Integer, sa.ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("step", sa.Integer, primary_key=True),
        required("train_loss", sa.Double),
        required("train_accuracy", sa.Double),
        required("seconds", sa.Double),
    )
    op.create_table(
        "convfirst_profiles",
        sa.Column("profile_id", sa.Integer, primary_key=True),
        required("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id")),
        required("dtype", sa.String(16)),
        required("threads", sa.Integer),
        required("copy_bytes_per_s", sa.Double),
        required("macs_per_s", sa.Double),
        required("launch_seconds", sa.Double),
        sa.Column("graph_launch_seconds", sa.Double),
        required("network_yardstick_ms", sa.Double),
        required("product_yardstick_ms", sa.Double),
        required("interval_share", sa.Double),
        sa.Column("throttled", sa.Boolean),
        required("measured_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("device_id", "dtype", "threads"),
    )
    op.create_table(
        "convfirst_block_latencies",
        sa.Column("block_latency_id", sa.Integer, primary_key=True),
        required("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id")),
        required("engine", sa.String(64)),
        required("dtype", sa.String(16)),
        required("batch_size", sa.Integer),
        required("threads", sa.Integer),
        required("kernels", sa.String(12)),
        required("shape_id", sa.String(12)),
        required("shape", sa.Text),
        required("median_ms", sa.Double),
        required("p20_ms", sa.Double),
        required("p80_ms", sa.Double),
        required("repeats", sa.Integer),
        required("interval_share", sa.Double),
        required("capped", sa.Boolean),
        sa.Column("throttled", sa.Boolean),
        required("measured_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("device_id", "engine", "dtype", "batch_size", "threads", "kernels", "shape_id"),
    )
    op.create_table(
        "convfirst_baseline_trainings",
        sa.Column("baseline_training_id", sa.Integer, primary_key=True),
        required("study_id", sa.Integer, sa.ForeignKey("studies.study_id", ondelete="CASCADE")),
        required("name", sa.String(128)),
        required("resolution", sa.Integer),
        required("steps", sa.Integer),
        required("batch_size", sa.Integer),
        required("learning_rate", sa.Double),
        required("kind", sa.String(16)),
        required("summary", sa.Text),
        sa.Column("trial", sa.Integer),
        required("params", sa.BigInteger),
        required("macs", sa.BigInteger),
        required("classes", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("curve", sa.Text),
        sa.Column("train_seconds", sa.Double),
        required("finished_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("study_id", "name", "resolution", "steps", "batch_size", "learning_rate"),
    )
    op.create_table(
        "convfirst_baseline_latencies",
        sa.Column("baseline_latency_id", sa.Integer, primary_key=True),
        required("study_id", sa.Integer, sa.ForeignKey("studies.study_id", ondelete="CASCADE")),
        required("name", sa.String(128)),
        required("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id")),
        required("engine", sa.String(64)),
        required("dtype", sa.String(16)),
        required("batch_size", sa.Integer),
        required("resolution", sa.Integer),
        required("threads", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("median_ms", sa.Double),
        sa.Column("p20_ms", sa.Double),
        sa.Column("p80_ms", sa.Double),
        sa.Column("repeats", sa.Integer),
        sa.Column("interval_share", sa.Double),
        sa.Column("capped", sa.Boolean),
        sa.Column("throttled", sa.Boolean),
        required("measured_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("study_id", "name", "device_id", "engine", "dtype", "batch_size", "resolution", "threads"),
    )
    op.create_table(
        "convfirst_retrainings",
        sa.Column("retraining_id", sa.Integer, primary_key=True),
        required("trial_id", sa.Integer, sa.ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE")),
        required("data", sa.Text),
        required("data_fingerprint", sa.String(12)),
        required("resolution", sa.Integer),
        required("steps", sa.Integer),
        required("batch_size", sa.Integer),
        required("learning_rate", sa.Double),
        required("seed", sa.BigInteger),
        sa.Column("reason", sa.Text),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("curve", sa.Text),
        sa.Column("train_seconds", sa.Double),
        required("finished_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint(
            "trial_id", "data_fingerprint", "resolution", "steps", "batch_size", "learning_rate", "seed"
        ),
    )
    for view in (EVALUATIONS, PARETO_FRONT, RETRAINED, RETRAINED_FRONT):
        op.execute(view)
    if op.get_bind().dialect.name == "sqlite":
        for trigger in TRIGGERS:
            op.execute(trigger)
