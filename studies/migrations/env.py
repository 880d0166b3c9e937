"""The script that Alembic runs: it migrates the connection of `studies.schema.upgrade`, in its caller's transaction."""

from alembic import context

from studies.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
