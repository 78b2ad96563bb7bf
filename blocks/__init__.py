"""What a target is: one Prefect block per type (types are added here as they come)."""
from importlib import import_module

from blocks.base import Direction, Target

TYPES: dict[str, type[Target]] = {}
for _name in ("dicom", "dicom_tls", "dicomweb", "folder", "rsync", "s3", "sftp", "xnat"):
    try:
        _module = import_module(f"blocks.{_name}")
    except ModuleNotFoundError:
        continue
    for _cls in vars(_module).values():
        if isinstance(_cls, type) and issubclass(_cls, Target) and _cls.__module__ == f"blocks.{_name}" and _cls.type_name:
            TYPES[_cls.type_name] = _cls
__all__ = ["TYPES", "Direction", "Target"]
