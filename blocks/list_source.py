"""A list: a file of paths, or of accession numbers, that are dispatched a few at a time."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, HttpUrl, field_validator, model_validator

from blocks.fields import Group, about
from blocks.source import LOGO, FileSource, SourcePriority, check_path


class ListSource(FileSource):
    """A CSV or text file on the worker that lists studies: their paths, or accession numbers at a query target.

    What becomes of each is written into a file beside it. A line that is added later is dispatched then.
    """

    _block_type_name = "List Source"
    _block_type_slug = "list-source"
    _documentation_url = HttpUrl("https://docs.prefect.io/v3/concepts/schedules")
    _logo_url = HttpUrl(LOGO)
    _code_example = """```python
from blocks.list_source import ListSource

backlog = ListSource.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "list"
    watched: ClassVar[bool] = True

    file: str = Field(
        description="Absolute path of a text file with one study in each line, or of a CSV file with a first line of "
        "names.",
        title="File on the worker",
        json_schema_extra=about(Group.CONNECTION, placeholder="/data/todo.csv"),
    )
    column: str = Field(
        default="",
        description="Name of the column of a CSV file that holds the paths or accession numbers; empty for the one "
        "that has paths, or is titled for numbers.",
        title="Column",
        json_schema_extra=about(Group.CONNECTION, advanced=True, placeholder="path"),
    )
    query: str = Field(
        default="",
        description="Name of the target that the accession numbers are fetched from; empty if the file lists paths.",
        title="Fetch from",
        json_schema_extra=about(Group.CONNECTION, placeholder="pacs", names="target"),
    )
    at_once: int = Field(
        default=10,
        ge=1,
        le=1000,
        description="How many studies are under way at once, at most.",
        title="Studies at once",
        json_schema_extra=about(Group.LIMITS),
    )

    @field_validator("file")
    @classmethod
    def _file(cls, value: str) -> str:
        return check_path(value)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.query and self.priority is SourcePriority.URGENT:
            raise ValueError("priority: what is fetched has priority normal or offpeak")
        if self.query and self.copy_first:
            raise ValueError("copy_first: what is fetched is nobody else's to write to")
        if self.query and _name(self.query) in map(_name, self.targets):
            raise ValueError(f"query: {self.query} is among the targets: nothing is sent to where it comes from")
        return self


def _name(written: str) -> str:
    """Return the name of a target as it is without its type, as in `dicom/pacs`."""
    return written.strip().rpartition("/")[2]
