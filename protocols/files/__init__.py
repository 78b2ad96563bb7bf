"""Files on this machine: written so that nobody sees half of one. Shared by every protocol, as `net` and `http`."""
