"""Routes of rules that write to people. Secrets go in and never come out."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field

from talaria.front.access import Role, needs
from talaria.front.api import answers, rule_answers
from talaria.front.api.asking import Asked, RequestBody, Who, add


class ApplyRules(RequestBody):
    """Rules to create or update."""

    rules: Annotated[
        dict[str, Any],
        Field(description="By name: `type` and fields, as in the file; texts as they are, no variable is filled in."),
    ]
    dry_run: bool = Field(default=False, description="Only say what would be done.")
    replace: bool = Field(default=False, description="Replace rules of another type that have the same name.")
    prune: bool = Field(default=False, description="Remove the rules that are not listed.")


class EnableRule(RequestBody):
    """Whether a rule writes."""

    enabled: bool = True


class TestMessage(RequestBody):
    """To whom a test message goes."""

    __test__ = False  # for pytest, which would take it for tests

    to: str = Field(default="", description="E-mail address, instead of those of the rule.")


@needs(Role.VIEWER)
async def list_rules(asked: Asked) -> dict[str, Any]:
    """List all rules, secrets masked, each with its last message."""
    from talaria.service import rules

    return await rules.list_rules(await asked())


@needs(Role.ADMIN)
async def apply_rules(asked: Asked, body: ApplyRules) -> dict[str, Any]:
    """Create or update rules; all of them or, if one is wrong, none."""
    from talaria.service import rules

    return await rules.apply_rules(await asked(), body.rules, body.dry_run, body.replace, body.prune)


@needs(Role.VIEWER)
async def rule_types(who: Who) -> dict[str, Any]:
    """List the types of rule with their fields, and what rules may hear of."""
    from talaria.service import rules

    return await rules.rule_types()


@needs(Role.VIEWER)
async def show_rule(asked: Asked, name: str) -> dict[str, Any]:
    """Return one rule's settings, secrets masked, and its newest messages with why they could not be sent."""
    from talaria.service import rules

    return await rules.show_rule(await asked(), name)


@needs(Role.ADMIN)
async def remove_rule(asked: Asked, name: str) -> dict[str, Any]:
    """Remove a rule, and what it has not sent yet."""
    from talaria.service import rules

    return await rules.remove_rule(await asked(), name)


@needs(Role.ADMIN)
async def enable_rule(asked: Asked, name: str, body: EnableRule) -> dict[str, Any]:
    """Let a rule write again, or pause it: what happens meanwhile is told to nobody by it."""
    from talaria.service import rules

    return await rules.enable_rule(await asked(), name, body.enabled)


@needs(Role.OPERATOR)
async def test_rule(asked: Asked, name: str, body: TestMessage | None = None) -> dict[str, Any]:
    """Send a test message by a saved rule, at once; answers how that went for each recipient."""
    from talaria.service import rules

    return await rules.test_rule(await asked(), name, body.to if body else "")


def add_to(app: FastAPI) -> None:
    """Add the routes; those with a fixed end stand before those that take any name, which may hold a slash."""
    add(app, "GET", "/rules", list_rules, answer=rule_answers.RuleListAnswer)
    add(app, "POST", "/rules", apply_rules, answer=rule_answers.AppliedRulesAnswer)
    add(app, "GET", "/rule-types", rule_types, answer=rule_answers.RuleTypesAnswer)
    add(app, "POST", "/rules/{name:path}/test", test_rule, answer=rule_answers.RuleTestAnswer)
    add(app, "POST", "/rules/{name:path}/enable", enable_rule, answer=answers.TargetChangeAnswer)
    add(app, "GET", "/rules/{name:path}", show_rule, answer=rule_answers.RuleSettingsAnswer)
    add(app, "DELETE", "/rules/{name:path}", remove_rule, answer=answers.TargetChangeAnswer)
