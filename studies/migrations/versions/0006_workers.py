"""The worker that trained each candidate."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("convfirst_candidates", sa.Column("worker", sa.Integer))
