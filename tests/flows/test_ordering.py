"""Events that wait for each other, after a server was started again."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from prefect.server.database import provide_database_interface
from prefect.server.events.ordering import EventArrivedEarly, get_triggers_causal_ordering
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.schemas.states import StateType
from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL, PREFECT_SERVER_EVENTS_CAUSAL_ORDERING, temporary_settings

from flows.settings import Settings
from flows.stack import ordering
from flows.stack.services import describe_service


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty database of Prefect's, and the ordering that our server is started with."""
    tmp_path = tmp_path_factory.mktemp("prefect")
    module = describe_service("prefect", Settings(home=tmp_path), {}).environment["PREFECT_SERVER_EVENTS_CAUSAL_ORDERING"]
    url = f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}"
    with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: url, PREFECT_SERVER_EVENTS_CAUSAL_ORDERING: module}):
        yield


async def _running_since(moment: datetime, *, kind: StateType = StateType.RUNNING, by_schedule: bool = False) -> UUID:
    """The state of a flow run that began at that moment, of a run that goes on unless it is said otherwise."""
    database = provide_database_interface()
    await database.create_db()
    async with database.session_context(begin_transaction=True) as session:
        flow = database.Flow(name=f"{moment} {kind} {by_schedule}")
        session.add(flow)
        await session.flush()
        run = database.FlowRun(flow_id=flow.id, auto_scheduled=by_schedule)
        session.add(run)
        await session.flush()
        state = database.FlowRunState(flow_run_id=run.id, type=kind, name=kind.value.capitalize(), timestamp=moment)
        session.add(state)
        await session.flush()
        return state.id


async def _is_looked_at(follows: UUID) -> bool:
    event = ReceivedEvent.model_validate(
        {
            "id": uuid4(),
            "event": "prefect.flow-run.Crashed",
            "resource": {"prefect.resource.id": "prefect.flow-run.1"},
            "follows": follows,
            "occurred": datetime.now(UTC),
        }
    )

    async def later(event: ReceivedEvent, depth: int = 0) -> None:
        raise AssertionError("nobody waits for this event")

    try:
        async with get_triggers_causal_ordering().preceding_event_confirmed(later, event):
            return True
    except EventArrivedEarly:
        return False


@pytest.mark.usefixtures("database")
def test_a_state_from_before_the_server_started_is_not_waited_for() -> None:
    """What follows the state of an earlier server's time is looked at; what follows one that is yet to come waits."""

    async def ask() -> tuple[bool, bool]:
        return await _is_looked_at(await _running_since(ordering.STARTED - timedelta(seconds=5))), await _is_looked_at(uuid4())

    assert asyncio.run(ask()) == (True, False)


@pytest.mark.usefixtures("database")
def test_a_state_of_this_server_s_time_is_waited_for() -> None:
    """Its event is under way."""

    async def ask() -> bool:
        return await _is_looked_at(await _running_since(ordering.STARTED + timedelta(seconds=5)))

    assert not asyncio.run(ask())


@pytest.mark.usefixtures("database")
def test_no_event_says_that_a_schedule_made_a_run() -> None:
    """What follows is looked at; but that a run was scheduled by somebody else is said, and waited for."""

    async def ask(*, by_schedule: bool) -> bool:
        since = ordering.STARTED + timedelta(seconds=6)
        return await _is_looked_at(await _running_since(since, kind=StateType.SCHEDULED, by_schedule=by_schedule))

    assert asyncio.run(ask(by_schedule=True))
    assert not asyncio.run(ask(by_schedule=False))
