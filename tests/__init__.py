"""Tests, laid out as the product is; harnesses of targets in `targets`, real servers in `servers`."""
