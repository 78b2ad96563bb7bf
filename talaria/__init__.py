"""What people touch: command line, settings, the embedded server and worker."""
