"""Latencies of two stages with what they are worth, devices' measured limits, and latencies of single blocks."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

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

# As in 0001, with more columns, and without those that break a limit, measured again.
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


def upgrade() -> None:
    op.execute("DROP VIEW pareto_front")
    op.execute("DROP VIEW convfirst_evaluations")
    remake_latencies()
    op.create_table(
        "convfirst_profiles",
        sa.Column("profile_id", sa.Integer, primary_key=True),
        sa.Column("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id"), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("threads", sa.Integer, nullable=False),
        sa.Column("copy_bytes_per_s", sa.Double, nullable=False),
        sa.Column("macs_per_s", sa.Double, nullable=False),
        sa.Column("launch_seconds", sa.Double, nullable=False),
        sa.Column("graph_launch_seconds", sa.Double),
        sa.Column("network_yardstick_ms", sa.Double, nullable=False),
        sa.Column("product_yardstick_ms", sa.Double, nullable=False),
        sa.Column("interval_share", sa.Double, nullable=False),
        sa.Column("throttled", sa.Boolean),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("device_id", "dtype", "threads"),
    )
    op.create_table(
        "convfirst_block_latencies",
        sa.Column("block_latency_id", sa.Integer, primary_key=True),
        sa.Column("device_id", sa.Integer, sa.ForeignKey("convfirst_devices.device_id"), nullable=False),
        sa.Column("engine", sa.String(64), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("batch_size", sa.Integer, nullable=False),
        sa.Column("threads", sa.Integer, nullable=False),
        sa.Column("kernels", sa.String(12), nullable=False),
        sa.Column("shape_id", sa.String(12), nullable=False),
        sa.Column("shape", sa.Text, nullable=False),
        sa.Column("median_ms", sa.Double, nullable=False),
        sa.Column("p20_ms", sa.Double, nullable=False),
        sa.Column("p80_ms", sa.Double, nullable=False),
        sa.Column("repeats", sa.Integer, nullable=False),
        sa.Column("interval_share", sa.Double, nullable=False),
        sa.Column("capped", sa.Boolean, nullable=False),
        sa.Column("throttled", sa.Boolean),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("device_id", "engine", "dtype", "batch_size", "threads", "kernels", "shape_id"),
    )
    op.execute(EVALUATIONS)
    op.execute(PARETO_FRONT)


def remake_latencies() -> None:
    """Make the table anew, as SQLite cannot alter a constraint, with the rows it had.

    By way of a copy, and not by renaming: SQLite would carry a new name into the triggers that 0001 made, or refuse it
    for their sake.
    """
    op.execute("CREATE TABLE convfirst_latencies_0001 AS SELECT * FROM convfirst_latencies")
    op.drop_table("convfirst_latencies")
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
        sa.Column("stage", sa.String(16), nullable=False, server_default="search"),
        sa.Column("median_ms", sa.Double, nullable=False),
        sa.Column("p20_ms", sa.Double, nullable=False),
        sa.Column("p80_ms", sa.Double, nullable=False),
        sa.Column("repeats", sa.Integer, nullable=False),
        sa.Column("interval_share", sa.Double),
        sa.Column("capped", sa.Boolean),
        sa.Column("raw_median_ms", sa.Double, nullable=False),
        sa.Column("anchor_median_ms", sa.Double, nullable=False),
        sa.Column("weight_bytes", sa.BigInteger, nullable=False),
        sa.Column("workspace_bytes", sa.BigInteger, nullable=False),
        sa.Column("throttled", sa.Boolean),
        sa.Column("sm_clock_mhz", sa.Double),
        sa.Column("temperature_c", sa.Double),
        sa.Column("over_limit", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("trial_id", "device_id", "engine", "dtype", "batch_size", "resolution", "threads", "stage"),
    )
    kept = """
        latency_id, trial_id, device_id, engine, dtype, batch_size, resolution, threads, median_ms, p20_ms, p80_ms,
        repeats, raw_median_ms, anchor_median_ms, weight_bytes, workspace_bytes, measured_at
    """
    op.execute(f"INSERT INTO convfirst_latencies ({kept}) SELECT {kept} FROM convfirst_latencies_0001")
    op.drop_table("convfirst_latencies_0001")
    if op.get_bind().dialect.name == "postgresql":
        # The next id comes after those that were copied.
        op.execute(
            "SELECT setval(pg_get_serial_sequence('convfirst_latencies', 'latency_id'), MAX(latency_id)) "
            "FROM convfirst_latencies"
        )
