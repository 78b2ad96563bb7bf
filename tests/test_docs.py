"""What the documents say is what the product does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from blocks import EXTENSIONS, TYPES, Target
from talaria.cli import app
from talaria.targetfile import field_names
from tasks import DRIVERS

ROOT = Path(__file__).parents[1]
OWN = [name for name in TYPES if name not in EXTENSIONS]


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


@pytest.mark.parametrize("name", OWN)
def test_every_field_is_described_as_the_block_describes_it(name: str) -> None:
    text = (ROOT / "docs/targets.md").read_text()
    common, own = section(text, "Every target"), section(text, f"`{name}`")
    for field in field_names(TYPES[name]):
        words = TYPES[name].model_fields[field].description
        shared = field in Target.model_fields and Target.model_fields[field].description == words
        place = common if shared else own
        assert f"| `{field}` |" in place, field
        assert str(words).replace("|", "\\|") in place, field


def test_the_readme_tells_what_each_type_can_do() -> None:
    text = (ROOT / "README.md").read_text()
    for name in OWN:
        driver = DRIVERS[name]
        pull = "yes" if driver.find and driver.retrieve else "no"
        levels = ", ".join(driver.facts.verifies_by)
        assert f"| `{name}` | yes | {pull} | {levels} |" in text, name


def test_the_readme_s_tour_puts_something_into_each_of_its_inboxes() -> None:
    """Its last line says of each source that one is done; of one there was nothing that could be."""
    tour = (ROOT / "README.md").read_text().partition("`site.yaml`:")[2].partition("## Use")[0]
    text, commands = re.findall(r"```yaml\n(.*?)```(.*)", tour, re.S)[0]
    sources = {name: one for name, one in yaml.safe_load(text)["sources"].items() if one["type"] == "inbox"}
    assert len(sources) == 2
    for one in sources.values():
        assert one["folder"] in commands.partition("mkdir")[2].partition(";")[0]
        assert re.search(rf"\$ cp -r study {one['folder']}/\w+", commands) and one["settle_s"] < 10


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"`talaria {name}" in text or f"talaria {name} " in text, name
        for sub in getattr(command, "commands", {}):
            assert re.search(rf"`(talaria {name} )?{sub}\b", text), f"{name} {sub}"
