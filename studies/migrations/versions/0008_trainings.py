"""Every training of a candidate is a row of one table; accuracies are confirmed by trainings with other seeds."""

import json
from functools import partial
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

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
       b.median_ms AS searched_latency_ms, COALESCE(c.resolution, l.resolution) AS network_resolution,
       c.macs * l.batch_size / NULLIF(l.median_ms / 1000 * p.macs_per_s, 0) AS computational_efficiency,
       c.confirmed_accuracy, c.confirmed_low, c.confirmed_high, c.confirmed_trainings,
       CASE WHEN o.confirmed_at IS NOT NULL AND o.confirmed_in = l.device_id || ' ' || l.engine || ' ' || l.dtype
           || ' ' || l.batch_size || ' ' || l.resolution || ' ' || l.threads THEN 1 ELSE 0 END AS confirmed
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
# Where the front of a deployment is confirmed, `accuracy` is the confirmed one, and candidates that have none are not
# on it.
PARETO_FRONT = """
CREATE VIEW pareto_front AS
SELECT study_name, device_name, engine, dtype, batch_size, resolution, threads,
       number, front_accuracy AS accuracy, latency_ms, latency_p20_ms, latency_p80_ms, params, macs, weight_bytes,
       workspace_bytes, arch_id, summary, arch, study_id, trial_id, device_id, device_kind,
       computational_efficiency, latency_stage, latency_interval_share, latency_capped, searched_latency_ms,
       network_resolution, confirmed, accuracy AS searched_accuracy,
       CASE WHEN confirmed = 1 THEN confirmed_low END AS accuracy_low,
       CASE WHEN confirmed = 1 THEN confirmed_high END AS accuracy_high,
       CASE WHEN confirmed = 1 THEN confirmed_trainings END AS accuracy_trainings,
       (SELECT MAX(t.steps) FROM convfirst_trainings t WHERE t.trial_id = ranked.trial_id AND t.stage = 'search')
           AS training_steps,
       (SELECT MAX(t.batch_size) FROM convfirst_trainings t WHERE t.trial_id = ranked.trial_id AND t.stage = 'search')
           AS training_batch_size
FROM (
    SELECT k.*,
           MAX(front_accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads
               ORDER BY latency_ms GROUPS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ) AS best_of_faster,
           MAX(front_accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads, latency_ms
           ) AS best_of_equally_fast
    FROM (
        SELECT e.*, CASE WHEN confirmed = 1 THEN confirmed_accuracy ELSE accuracy END AS front_accuracy
        FROM convfirst_evaluations e
        WHERE state = 'complete' AND latency_ms IS NOT NULL AND NOT latency_over_limit
    ) k
    WHERE front_accuracy IS NOT NULL
) ranked
WHERE front_accuracy = best_of_equally_fast AND (best_of_faster IS NULL OR front_accuracy > best_of_faster)
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
JOIN convfirst_trainings r ON r.trial_id = e.trial_id AND r.stage = 'retraining' AND r.accuracy IS NOT NULL
"""

# The same as `pareto_front`, but by the accuracy of longer trainings, and with one front for each kind of training.
# One kind is at each network's own resolution. Where networks were trained at another one, those that have it as their
# own are on that front, too. `one_resolution` is that of all trainings of a front; NULL where each network had its own.
KIND = """study_id, device_id, engine, dtype, batch_size, resolution, threads, retrained_fingerprint, retrained_steps,
                   retrained_batch_size, retrained_learning_rate, retrained_seed"""
RETRAINED_FRONT = f"""
CREATE VIEW retrained_front AS
SELECT *
FROM (
    SELECT k.*,
           MAX(retrained_accuracy) OVER (
               PARTITION BY {KIND}, one_resolution
               ORDER BY latency_ms GROUPS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ) AS best_of_faster,
           MAX(retrained_accuracy) OVER (
               PARTITION BY {KIND}, one_resolution, latency_ms
           ) AS best_of_equally_fast
    FROM (
        SELECT e.*, CAST(NULL AS INTEGER) AS one_resolution
        FROM convfirst_retrained e
        WHERE retrained_resolution = network_resolution
        UNION ALL
        SELECT e.*, retrained_resolution AS one_resolution
        FROM convfirst_retrained e
        WHERE EXISTS (
            SELECT 1 FROM convfirst_retrained o
            WHERE o.retrained_resolution = e.retrained_resolution AND o.network_resolution <> e.retrained_resolution
              AND o.study_id = e.study_id AND o.device_id = e.device_id AND o.engine = e.engine AND o.dtype = e.dtype
              AND o.batch_size = e.batch_size AND o.resolution = e.resolution AND o.threads = e.threads
              AND o.retrained_fingerprint = e.retrained_fingerprint AND o.retrained_steps = e.retrained_steps
              AND o.retrained_batch_size = e.retrained_batch_size AND o.retrained_seed = e.retrained_seed
              AND o.retrained_learning_rate = e.retrained_learning_rate
        )
    ) k
    WHERE latency_ms IS NOT NULL AND NOT latency_over_limit
) ranked
WHERE retrained_accuracy = best_of_equally_fast AND (best_of_faster IS NULL OR retrained_accuracy > best_of_faster)
"""

VIEWS = {
    "convfirst_evaluations": EVALUATIONS, "pareto_front": PARETO_FRONT, "convfirst_retrained": RETRAINED,
    "retrained_front": RETRAINED_FRONT,
}  # fmt: skip

# SQLite enforces foreign keys only for connections that ask for it, which others that delete (the dashboard) do not.
TRIGGERS = {
    "convfirst_trial_deleted": """
CREATE TRIGGER convfirst_trial_deleted AFTER DELETE ON trials BEGIN
    DELETE FROM convfirst_latencies WHERE trial_id = OLD.trial_id;
    DELETE FROM convfirst_candidates WHERE trial_id = OLD.trial_id;
END
""",
    "convfirst_candidate_deleted": """
CREATE TRIGGER convfirst_candidate_deleted AFTER DELETE ON convfirst_candidates BEGIN
    DELETE FROM convfirst_trainings WHERE trial_id = OLD.trial_id;
END
""",
}
# What a study was trained with, where its configuration does not say.
STEPS, BATCH_SIZE, LEARNING_RATE, SOURCE, RESOLUTION = 200, 32, 8e-3, "digits", 32

required = partial(sa.Column, nullable=False)


def upgrade() -> None:
    # Some are made of others.
    for name in reversed(VIEWS):
        op.execute(f"DROP VIEW IF EXISTS {name}")
    sqlite = op.get_bind().dialect.name == "sqlite"
    if sqlite:
        for name in TRIGGERS:
            op.execute(f"DROP TRIGGER IF EXISTS {name}")
    op.add_column("convfirst_studies", sa.Column("confirmed_at", sa.DateTime(timezone=True)))
    op.add_column("convfirst_studies", sa.Column("confirmed_in", sa.Text))
    for name in ("confirmed_accuracy", "confirmed_low", "confirmed_high"):
        op.add_column("convfirst_candidates", sa.Column(name, sa.Double))
    op.add_column("convfirst_candidates", sa.Column("confirmed_trainings", sa.Integer))
    trainings = op.create_table(
        "convfirst_trainings",
        sa.Column("training_id", sa.Integer, primary_key=True),
        required("trial_id", sa.Integer, sa.ForeignKey("convfirst_candidates.trial_id", ondelete="CASCADE")),
        required("stage", sa.String(16)),
        required("data", sa.Text),
        required("data_fingerprint", sa.String(12)),
        required("resolution", sa.Integer),
        required("steps", sa.Integer),
        required("batch_size", sa.Integer),
        required("learning_rate", sa.Double),
        required("seed", sa.BigInteger),
        sa.Column("host", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("curve", sa.Text),
        sa.Column("train_seconds", sa.Double),
        required("finished_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint(
            "trial_id", "stage", "data_fingerprint", "resolution", "steps", "batch_size", "learning_rate", "seed"
        ),
    )
    for row in _trainings_of_searches():
        op.execute(trainings.insert().values(row))
    columns = (
        "trial_id, data, data_fingerprint, resolution, steps, batch_size, learning_rate, seed, reason, accuracy, loss, "
        "curve, train_seconds, finished_at"
    )
    op.execute(
        f"INSERT INTO convfirst_trainings (stage, {columns}) SELECT 'retraining', {columns} FROM convfirst_retrainings "
        "ORDER BY retraining_id"
    )
    op.drop_table("convfirst_retrainings")
    op.drop_table("convfirst_learning_curves")
    for view in VIEWS.values():
        op.execute(view)
    if sqlite:
        for trigger in TRIGGERS.values():
            op.execute(trigger)


def _trainings_of_searches() -> list[dict[str, Any]]:
    """The rows of the trainings by which candidates were judged."""
    bind = op.get_bind()
    points = bind.execute(sa.text(
        "SELECT trial_id, step, train_loss, train_accuracy, seconds FROM convfirst_learning_curves "
        "ORDER BY trial_id, step"
    ))  # fmt: skip
    curves = {
        trial_id: json.dumps([list(point[1:]) for point in curve])
        for trial_id, curve in groupby(points, key=lambda point: point[0])
    }
    studies = {
        row.study_id: (json.loads(row.config), row.data_fingerprint)
        for row in bind.execute(sa.text("SELECT study_id, config, data_fingerprint FROM convfirst_studies"))
    }
    finished = sa.text(
        "SELECT trial_id, study_id, resolution, seed, accuracy, loss, train_seconds, finished_at "
        "FROM convfirst_candidates WHERE accuracy IS NOT NULL ORDER BY trial_id"
    ).columns(finished_at=sa.DateTime(timezone=True))
    rows = []
    for each in bind.execute(finished):
        config, fingerprint = studies[each.study_id]
        proxy, data = config.get("proxy", {}), config.get("data", {})
        rows.append(dict(
            trial_id=each.trial_id, stage="search", data=data.get("source", SOURCE), data_fingerprint=fingerprint,
            resolution=each.resolution or data.get("resolution", RESOLUTION), steps=proxy.get("steps", STEPS),
            batch_size=proxy.get("batch_size", BATCH_SIZE), learning_rate=proxy.get("learning_rate", LEARNING_RATE),
            seed=each.seed, accuracy=each.accuracy, loss=each.loss, curve=curves.get(each.trial_id),
            train_seconds=each.train_seconds, finished_at=each.finished_at,
        ))  # fmt: skip
    return rows
