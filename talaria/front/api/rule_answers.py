"""What the routes of rules answer, key by key."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from talaria.front.api.answers import ExactAnswer, TargetChangeAnswer, TypeFieldAnswer


class MessageAnswer(ExactAnswer):
    """A message to people."""

    recipient: str = Field(description="E-mail address; empty for a rule with one destination.")
    number: int
    state: str = Field(description="open, sent or failed.")
    made: str
    due: str | None = Field(description="When it is tried next; null for one that is not tried any more.")
    ended: str | None
    tries: int
    count: int = Field(description="How many happenings it tells of.")
    error: str | None = Field(description="Why the last try failed.")


class ListedRuleAnswer(BaseModel):
    """A rule in the list: also every field of its type that is not the default, secrets masked."""

    model_config = ConfigDict(extra="allow")

    name: str
    type: str
    enabled: bool | None
    broken: str | None = Field(description="Why its settings are not valid; null if they are.")
    leads_to: str = Field(description="Where messages go, without secrets.")
    waiting: int = Field(description="Messages that have not been sent yet.")
    last: MessageAnswer | None


class RuleListAnswer(ExactAnswer):
    """All rules."""

    rules: list[ListedRuleAnswer]


class RuleSettingsAnswer(BaseModel):
    """A rule: name, type, the fields of its type, secrets masked; its newest messages."""

    model_config = ConfigDict(extra="allow")

    name: str
    type: str
    messages: list[MessageAnswer]


class RuleChangeAnswer(TargetChangeAnswer):
    """What was done with a rule."""

    note: str = Field(description="What it is to hear of by name and is not there; empty for nothing.")


class AppliedRulesAnswer(ExactAnswer):
    """What was done with each rule, or would be."""

    dry_run: bool
    rules: list[RuleChangeAnswer]


class RuleTryAnswer(ExactAnswer):
    """How a test message went to one recipient."""

    recipient: str
    ok: bool
    detail: str


class RuleTestAnswer(ExactAnswer):
    """How a test of a rule ended."""

    name: str
    ok: bool
    recipients: list[RuleTryAnswer]


class RuleTypeAnswer(ExactAnswer):
    """A type of rule."""

    fields: dict[str, TypeFieldAnswer]


class RuleTypesAnswer(ExactAnswer):
    """The types of rule, and what rules may hear of."""

    types: dict[str, RuleTypeAnswer]
    events: list[str]
