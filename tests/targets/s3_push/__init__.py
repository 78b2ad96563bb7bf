"""Pushes to S3 stores, scripted for what real ones do seldom."""
