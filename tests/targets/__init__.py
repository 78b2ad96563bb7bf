"""Tests of targets. A module without `test_` is the harnesses of a type; a folder holds the tests of one idea."""
