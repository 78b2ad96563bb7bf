"""What keeps dispatches running: the worker, the runs, their deployments, and recovery after a crash."""
