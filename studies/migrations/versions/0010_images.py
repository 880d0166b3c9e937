"""The classes of a study's images, and how they are normalised."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("convfirst_studies", sa.Column("images", sa.Text))
