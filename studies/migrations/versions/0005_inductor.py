"""The engine `compile` is called `inductor`, which is what it was."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

TABLES = ("convfirst_latencies", "convfirst_block_latencies", "convfirst_baseline_latencies")


def upgrade() -> None:
    for table in TABLES:
        op.execute(f"UPDATE {table} SET engine = 'inductor' WHERE engine = 'compile'")
    old, new = '"engine": "compile"', '"engine": "inductor"'
    statement = sa.text("UPDATE convfirst_studies SET config = REPLACE(config, :old, :new)")
    op.get_bind().execute(statement, {"old": old, "new": new})
