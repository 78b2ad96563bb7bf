"""`talaria demo`, as `make demo` runs it."""

from __future__ import annotations

from pathlib import Path

from talaria.cli.demo import SAMPLES
from tests.servers.up import Talaria


def test_the_demo_delivers_its_study_to_all_three_targets(tmp_path: Path) -> None:
    one = Talaria(tmp_path)
    root = one.home
    one.home = root / "demo" / "state"
    one.begin_with_a_database()
    ran = one("demo", env={"TALARIA_HOME": str(root)})
    assert ran.returncode == 0, ran.stderr
    assert all(f"demo-{name}" in ran.stdout for name in ("pacs", "archive", "dicomweb"))
    places = root / "demo" / "places"
    for name in ("pacs", "archive", "dicomweb"):
        arrived = [path for path in (places / name).rglob("*") if path.is_file()]
        assert sum(path.suffix == ".dcm" for path in arrived) == len(SAMPLES), name
        assert not any(path.suffix in (".png", ".json") for path in arrived), name
    assert list((places / "archive").glob("*/.complete"))
