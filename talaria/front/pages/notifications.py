"""Pages of notifications: the rules that write to people, what each has written, and what their buttons do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from talaria.front.pages.editing import RULE
from talaria.front.pages.named import NamedPages, Row
from talaria.service import Office

if TYPE_CHECKING:
    from blocks.named import NamedBlock


class NotificationPages(NamedPages):
    """Rules that write to people."""

    subject, texts, template = RULE, "notifications", "notification.html"

    async def rows(self, office: Office) -> list[Row]:
        from talaria.service import rules

        return [one | {"state": _state(one)} for one in (await rules.list_rules(office))["rules"]]

    async def loaded(self, office: Office, ref: str) -> NamedBlock:
        from talaria.service import rules

        return await rules.load_rule(office, ref)

    async def about(self, office: Office, ref: str, row: Row) -> dict[str, Any]:
        from talaria.service import rules

        note = ""
        if not row["broken"]:
            rule = await rules.load_rule(office, ref)
            note = (await rules.unknown_to(office, [rule]))[rule.name]
        return {"messages": await rules.messages_of(office, row["name"]), "note": note}

    async def tested(self, office: Office, ref: str, sent: dict[str, str]) -> dict[str, Any]:
        from talaria.service import rules

        return await rules.test_rule(office, ref, sent.get("to", "").strip())

    async def enabled(self, office: Office, ref: str, on: bool) -> dict[str, Any]:
        from talaria.service import rules

        return await rules.enable_rule(office, ref, on)

    async def removed(self, office: Office, ref: str) -> dict[str, Any]:
        from talaria.service import rules

        return await rules.remove_rule(office, ref)


def _state(row: Row) -> str:
    """Return how a rule is: one whose last message was not sent needs somebody."""
    if row["broken"]:
        return "broken"
    if not row["enabled"]:
        return "off"
    return "failing" if row["last"] and row["last"]["error"] else "ready"
