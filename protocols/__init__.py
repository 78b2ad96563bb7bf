"""Speaks one wire protocol each, well and fast; knows no target and no Prefect."""
