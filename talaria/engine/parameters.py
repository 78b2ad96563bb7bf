"""The parameters of flows, as Prefect's pages ask people for them."""

from __future__ import annotations

from typing import Any

from prefect import Flow
from prefect.utilities.callables import parameter_schema

# Labels of parameters whose names say less than a label does; the same words as on our pages.
TITLES = {
    "paths": "files and folders",
    "exclude": "leave out",
    "force": "send again what has arrived",
    "each": "what is a study of its own",
    "into": "folder on the worker",
    "level": "what one match is",
}


def form(flow: Flow[..., Any]) -> dict[str, Any]:
    """Return the schema of a flow's parameters, as Prefect's UI makes a form of it: with titles for people."""
    schema = parameter_schema(flow).model_dump_for_openapi()
    for name, field in schema["properties"].items():
        words = (
            TITLES.get(str(name), str(name))
            .replace("_", " ")
            .replace("aet", "AE title")
            .replace("uid", "UID")
            .replace("accessions", "accession numbers")
        )
        field["title"] = words[0].upper() + words[1:]
        about = str(field.get("description", ""))
        field["description"] = about[:1].upper() + about[1:]
    return schema
