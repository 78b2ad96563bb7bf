"""Files on this machine, written so that nobody sees half of one. Every protocol may use it, as `net` and `http`."""
