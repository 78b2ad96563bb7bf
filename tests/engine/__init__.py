"""Tests of the engine: dispatches and retrievals as people make them, at a server and a worker that run."""
