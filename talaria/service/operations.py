"""All operations by name; routes of the API call them, and so do commands where no API answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from talaria.service import Office, dispatches, jobs, pruning, retrievals, rules, sources, status, targets

CALLS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    "list_targets": targets.list_targets,
    "show_target": targets.show_target,
    "apply_targets": targets.apply_targets,
    "remove_target": targets.remove_target,
    "rename_target": targets.rename_target,
    "enable_target": targets.enable_target,
    "export_targets": targets.export_targets,
    "target_types": targets.target_types,
    "list_sources": sources.list_sources,
    "show_source": sources.show_source,
    "apply_sources": sources.apply_sources,
    "remove_source": sources.remove_source,
    "enable_source": sources.enable_source,
    "source_types": sources.source_types,
    "test_source": sources.test_source,
    "sweep_source": sources.sweep_source,
    "retry_source": sources.retry_source,
    "list_rules": rules.list_rules,
    "show_rule": rules.show_rule,
    "apply_rules": rules.apply_rules,
    "remove_rule": rules.remove_rule,
    "enable_rule": rules.enable_rule,
    "test_rule": rules.test_rule,
    "rule_types": rules.rule_types,
    "create_dispatch": dispatches.create_dispatch,
    "plan_dispatch": dispatches.plan_dispatch,
    "find_matches": retrievals.find_matches,
    "create_query": retrievals.create_query,
    "create_retrieval": retrievals.create_retrieval,
    "list_jobs": jobs.list_jobs,
    "show_job": jobs.show_job,
    "retry_job": jobs.retry_job,
    "send_job": jobs.send_job,
    "cancel_job": jobs.cancel_job,
    "pause_job": jobs.pause_job,
    "resume_job": jobs.resume_job,
    "recover_jobs": jobs.recover_jobs,
    "prune": pruning.prune,
    "status": status.status,
}
STREAMS: dict[str, Callable[..., AsyncIterator[tuple[str, dict[str, Any]]]]] = {
    "test_targets": targets.test_targets,
    "test_values": targets.test_values,
    "follow_job": jobs.follow_job,
}

__all__ = ["CALLS", "STREAMS", "Office"]
