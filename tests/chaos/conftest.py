"""What lies here is a program and its parts: `make chaos`."""

collect_ignore_glob = ["*.py"]
