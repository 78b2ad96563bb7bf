"""The few types of XNAT's data model that the stand-in serves: clients that build classes from it need them."""

from __future__ import annotations


def _type(name: str, base: str, fields: dict[str, str], body: str = "") -> str:
    """A complex type; fields are elements of simple types."""
    inner = "".join(f'<xs:element name="{one}" type="xs:{kind}" minOccurs="0"/>' for one, kind in fields.items()) + body
    content = f"<xs:sequence>{inner}</xs:sequence>"
    if base:
        content = f'<xs:complexContent><xs:extension base="xnat:{base}">{content}</xs:extension></xs:complexContent>'
    return f'<xs:complexType name="{name}">{content}</xs:complexType>'


def _list(outer: str, inner: str, kind: str) -> str:
    """A list of items of one type, as XNAT nests them."""
    return (
        f'<xs:element name="{outer}" minOccurs="0"><xs:complexType><xs:sequence>'
        f'<xs:element name="{inner}" type="xnat:{kind}" minOccurs="0" maxOccurs="unbounded"/>'
        "</xs:sequence></xs:complexType></xs:element>"
    )


def xnat_xsd(modalities: list[str]) -> str:
    """The schema `xnat`, with the session and scan types of these modalities."""
    string, number = "string", "integer"
    types = [
        _type("abstractResource", "", {"label": string, "file_count": number, "file_size": number}),
        _type("resource", "abstractResource", {"URI": string, "format": string, "content": string}),
        _type("resourceCatalog", "resource", {}),
        _type("projectData", "", {"ID": string, "name": string, "description": string}),
        _type("subjectData", "", {"ID": string, "project": string, "label": string}),
        _type("experimentData", "", {"ID": string, "project": string, "label": string, "date": string, "time": string}),
        _type("subjectAssessorData", "experimentData", {"subject_ID": string}),
        _type(
            "imageScanData",
            "",
            {"ID": string, "UID": string, "type": string, "quality": string, "series_description": string,
             "modality": string, "frames": number},
            '<xs:element name="file" type="xnat:abstractResource" minOccurs="0" maxOccurs="unbounded"/>',
        ),
        _type(
            "imageSessionData",
            "subjectAssessorData",
            {"UID": string, "modality": string, "dcmPatientId": string, "dcmPatientName": string},
            _list("scans", "scan", "imageScanData"),
        ),
    ]  # fmt: skip
    for one in modalities:
        types.append(_type(f"{one}SessionData", "imageSessionData", {}))
        types.append(_type(f"{one}ScanData", "imageScanData", {}))
    elements = ["Project:projectData", "Subject:subjectData"]
    elements += [f"{one}Session:{one}SessionData" for one in modalities]
    tops = "".join('<xs:element name="{}" type="xnat:{}"/>'.format(*one.split(":")) for one in elements)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<xs:schema targetNamespace="http://nrg.wustl.edu/xnat" '
        'xmlns:xnat="http://nrg.wustl.edu/xnat" xmlns:xs="http://www.w3.org/2001/XMLSchema" '
        'elementFormDefault="qualified">' + tops + "".join(types) + "</xs:schema>"
    )
