"""Run by Alembic: migrates the connection that `studies.schema.upgrade` hands over, in that caller's transaction."""

from alembic import context

from studies.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
