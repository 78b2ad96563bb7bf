"""Rules that write to people, as Prefect keeps them."""

from __future__ import annotations

from blocks import RULES, Rule
from tasks.documents import Documents

SAVED_RULES = Documents(Rule, RULES)
