"""In which order Prefect's server looks at events after it was started again. ``_prefect_server`` names this module to it.

The event of a change of state waits until the one that it follows has been looked at, for up to 15 minutes. A server that was
killed has forgotten what it looked at, and of a run that a schedule made no event says that it was scheduled: a run that
crashed would not be seen to have crashed for so long, and one that completed would be taken for lost, if the state before was
of the last five minutes. Here neither a state that was there before the server started nor the first one of a scheduled run has
to be waited for.
"""

from datetime import UTC, datetime
from uuid import UUID

import sqlalchemy as sa
from prefect.server.database import provide_database_interface
from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import Event

STARTED = datetime.now(UTC)


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, which keeps in memory what it has seen, and looks up what was there before."""

    async def event_has_been_seen(self, event: UUID | Event) -> bool:
        """Whether an event was looked at by this server, or is of a state that none will come of."""
        if await super().event_has_been_seen(event):
            return True
        database = provide_database_interface()
        state, run = database.FlowRunState, database.FlowRun
        of_event = event.id if isinstance(event, Event) else event
        silent = sa.or_(state.timestamp < STARTED, sa.and_(run.auto_scheduled, state.name == "Scheduled"))
        found = sa.select(state.id).join(run, run.id == state.flow_run_id).where(state.id == of_event, silent)
        async with database.session_context() as session:
            return await session.scalar(found) is not None
