"""What people touch: the command line, the settings, the front door, and the embedded Prefect server and worker."""

__version__ = "0.1.0"
