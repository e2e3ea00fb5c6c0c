"""In which order Prefect's server looks at events after it was started again. ``_prefect_server`` names this module to it.

The event of a change of state waits until the one that it follows has been looked at, for up to 15 minutes. A server that was
killed has forgotten what it looked at: for five minutes after each change of state a run that crashed would not be seen to
have crashed, and one that completed would be taken for lost. Here a state that was there before the server started does not
have to be waited for.
"""

from datetime import UTC, datetime
from uuid import UUID

import sqlalchemy as sa
from prefect.server.database import provide_database_interface
from prefect.server.events.ordering import SEEN_EXPIRATION, memory
from prefect.server.events.schemas.events import Event

STARTED = datetime.now(UTC)


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, which keeps in memory what it has seen, and looks up what was there before."""

    async def event_has_been_seen(self, event: UUID | Event) -> bool:
        """Whether an event was looked at by this server, or is of a state that a run was in before it started."""
        if await super().event_has_been_seen(event):
            return True
        if datetime.now(UTC) - STARTED > SEEN_EXPIRATION:
            return False
        database = provide_database_interface()
        state, of_event = database.FlowRunState, event.id if isinstance(event, Event) else event
        async with database.session_context() as session:
            return await session.scalar(sa.select(state.id).where(state.id == of_event, state.timestamp < STARTED)) is not None
