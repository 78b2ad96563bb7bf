"""Users and tokens as they are kept: hashes that take their time, in files that are closed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from argon2 import extract_parameters
from argon2.low_level import Type

from talaria.front.access import Role
from tests.front.door import PASSWORD, FrontDoor


@pytest.fixture
def door(tmp_path: Path) -> FrontDoor:
    one = FrontDoor(tmp_path / "home")
    one.keys.users.add("anna", Role.OPERATOR, PASSWORD)
    return one


def test_passwords_are_kept_as_argon2id_and_files_closed(door: FrontDoor) -> None:
    path = door.home.root / "users.json"
    kept = json.loads(path.read_text())["anna"]
    parameters = extract_parameters(kept["hash"])
    assert parameters.type is Type.ID and parameters.memory_cost >= 19 * 1024 and PASSWORD not in path.read_text()
    text = door.keys.tokens.create(Role.VIEWER, None)[1]
    assert text not in (door.home.root / "tokens.json").read_text()
    for name in ("users.json", "tokens.json", "session.key", "api.auth", "worker.auth"):
        assert (door.home.root / name).stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="characters"):
        door.keys.users.add("ben", Role.VIEWER, "short")
    for name in ("", "a b", "talaria", "Worker", "x" * 65, "../x", "a\n"):
        with pytest.raises(ValueError, match="not valid"):
            door.keys.users.add(name, Role.VIEWER, PASSWORD)
    with pytest.raises(ValueError, match="is there already"):
        door.keys.users.add("anna", Role.VIEWER, PASSWORD)


def test_a_user_is_known_by_the_right_password_only(door: FrontDoor) -> None:
    users = door.keys.users
    found = users.verify("anna", PASSWORD)
    assert found and (found.name, found.role) == ("anna", Role.OPERATOR)
    assert users.verify("anna", PASSWORD + "x") is None and users.verify("ben", PASSWORD) is None
