"""What Talaria keeps at a Prefect server: block types, the work pool with its queues, and deployments."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import BlockDocumentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import WorkQueueFilter, WorkQueueFilterName
from prefect.client.schemas.objects import BlockSchema, Worker, WorkerStatus, WorkPool
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from blocks import SOURCES, TYPES
from talaria.engine import hosts
from talaria.engine.batches import deploy_all, put_right
from talaria.engine.parameters import form
from talaria.engine.table import FLOWS
from talaria.settings import POOL
from tasks.paging import every
from tasks.sources.saved import KEPT
from tasks.targets import TARGETS
from transfer.home import host_name

# Our workers need nothing of it, but a server takes no empty one.
TEMPLATE = {
    "job_configuration": {"name": "{{ name }}"},
    "variables": {"type": "object", "properties": {"name": {"type": "string", "title": "Name"}}},
}
TRIES = 5  # each of them gets further: what there was to make becomes less
CHECKS = "checks"  # the queue of checks: they have places of their own
# Lower numbers first: an urgent dispatch overtakes, an off-peak one goes last.
QUEUES = {"urgent": 1, CHECKS: 5, "normal": 10, "offpeak": 100}


async def register(client: PrefectClient) -> None:
    """Create or update everything at the server; may be repeated at any time, and by several hosts at once."""
    for left in reversed(range(TRIES)):
        try:
            await _register(client)
            return
        except ObjectAlreadyExists:  # another host has made it since we looked: it is found the next time
            if not left:
                raise


async def _register(client: PrefectClient) -> None:
    for cls in (*TYPES.values(), *SOURCES.values()):
        await cls.aregister_type_and_schema(client=client)
    await _forms(client)
    await make_pool(client)
    for name, (flow, entrypoint) in FLOWS.items():
        await _deployment(client, name, flow, entrypoint)
    await deploy_all(client)


async def workers(client: PrefectClient) -> list[Worker]:
    """Return the workers that are online."""
    try:
        found = await client.read_workers_for_work_pool(POOL)
    except ObjectNotFound:
        return []
    return [worker for worker in found if worker.status is WorkerStatus.ONLINE]


async def queues(client: PrefectClient) -> dict[UUID, str]:
    """Return the names, by id, of the pool's queues that a worker of this host takes runs from."""
    found = await every(client.read_work_queues, work_pool_name=POOL)
    return {one.id: one.name for one in found if hosts.of_queue(one.name) in ("", host_name())}


def waiting(now: datetime, **queue: list[str]) -> dict[str, Any]:
    """Return what asks Prefect for the runs that wait in queues, also at rest; not for those that are yet to come.

    Of these, schedules have some hundred each.

    Args:
        queue: of which queues, as Prefect filters their names.
    """
    known = {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"before_": now.isoformat()}}
    return {"flow_runs": known, "work_pools": {"name": {"any_": [POOL]}}, "work_pool_queues": {"name": queue}}


async def deployed(client: PrefectClient, name: str) -> Any:
    """Return the deployment of a flow; register it first if it isn't there."""
    try:
        return await client.read_deployment_by_name(f"{name}/talaria")
    except ObjectNotFound:
        await register(client)
        return await client.read_deployment_by_name(f"{name}/talaria")


async def _forms(client: PrefectClient) -> None:
    """Let targets and sources that an older version saved be edited with today's labels and fields.

    Prefect makes a form of the schema that a document was saved with. One of a newer version is left alone.
    """
    schemas: dict[UUID, datetime] = {}
    by_slug = {cls.get_block_type_slug(): cls for cls in (*TYPES.values(), *SOURCES.values())}
    for document in (*await TARGETS.documents(client), *await KEPT.documents(client)):
        cls = by_slug.get(document.block_type.slug if document.block_type else "")
        ours = cls._block_schema_id if cls else None
        if ours is None or ours == document.block_schema_id:
            continue
        if ours not in schemas:
            answer = await client.request("GET", "/block_schemas/{id}", path_params={"id": ours})
            schemas[ours] = BlockSchema.model_validate(answer.json()).created or datetime.max.replace(tzinfo=UTC)
        theirs = document.block_schema.created if document.block_schema else None
        if theirs is None or theirs < schemas[ours]:
            update = BlockDocumentUpdate(block_schema_id=ours, data={}, merge_existing_data=True)
            await client.update_block_document(document.id, update)


async def make_pool(client: PrefectClient) -> WorkPool:
    """Make the work pool, and the queues of it that runs for this host come into, as far as they are not there."""
    try:
        pool = await client.read_work_pool(POOL)
    except ObjectNotFound:
        try:
            pool = await client.create_work_pool(WorkPoolCreate(name=POOL, type="talaria", base_job_template=TEMPLATE))
        except ObjectAlreadyExists:
            pool = await client.read_work_pool(POOL)
    ours = {hosts.own(name): priority for name, priority in QUEUES.items() if name != CHECKS}
    for name, priority in (QUEUES | (ours if hosts.several() else {})).items():
        found = await client.read_work_queues(
            work_pool_name=POOL, work_queue_filter=WorkQueueFilter(name=WorkQueueFilterName(any_=[name]))
        )
        if not found:
            await client.create_work_queue(name=name, work_pool_name=POOL, priority=priority)
    return pool


async def _deployment(client: PrefectClient, name: str, flow: Flow[..., Any], entrypoint: str) -> None:
    """Create a deployment, or update our part of it: creating it again would delete its schedules."""
    queue, description = queue_of(name), description_of(flow)
    flow_id = await client.create_flow(flow)
    schema = form(flow)
    try:
        there = await client.read_deployment_by_name(f"{name}/talaria")
    except ObjectNotFound:
        there = None
    if there is not None:
        ours = {
            "description": description,
            "entrypoint": entrypoint,
            "enforce_parameter_schema": True,
            "parameter_openapi_schema": schema,
            "work_pool_name": POOL,
            "work_queue_name": queue,
        }
        await put_right(client, there, ours)
        return
    await client.create_deployment(
        flow_id=flow_id,
        name="talaria",
        description=description,
        work_pool_name=POOL,
        work_queue_name=queue,
        entrypoint=entrypoint,
        parameter_openapi_schema=schema,
        enforce_parameter_schema=True,
        tags=["talaria"],
    )


def queue_of(name: str) -> str:
    """Return the queue that the runs of a deployment come into where nobody says another."""
    return CHECKS if name == "check" else "normal"


def description_of(flow: Flow[..., Any]) -> str:
    """Return what is said of a flow's deployment."""
    return (flow.description or "").split("\n\n")[0]
