"""Which host a source belongs to, where several share a ledger: the one on which it was applied last.

The queue of its deployment says so; without a host there, it may be any one's.
"""

from __future__ import annotations

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName

from tasks.paging import every
from transfer.home import host_name
from transfer.shared import of_queue, several


async def hosts_of(client: PrefectClient) -> dict[str, str]:
    """Return the host that each source belongs to, by its name; only of those that have one of their own."""
    found = await every(client.read_deployments, flow_filter=FlowFilter(name=FlowFilterName(any_=["batch"])))
    return {one.name: host for one in found if (host := of_queue(one.work_queue_name))}


async def elsewhere(client: PrefectClient) -> dict[str, str]:
    """Return the sources that belong to other hosts, each with its host."""
    if not several():
        return {}
    return {name: host for name, host in (await hosts_of(client)).items() if host != host_name()}
