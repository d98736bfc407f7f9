"""What lies here is a program and its parts; its test is in `tests/acceptance/test_chaos.py`."""

collect_ignore_glob = ["*.py"]
