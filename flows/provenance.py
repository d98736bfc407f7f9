"""Provenance: the code and the packages that a model was made with."""

import hashlib
import subprocess
from functools import cache
from importlib import metadata


@cache
def constraints_digest() -> str:
    """SHA-256 over the sorted `name==version` lines of every installed distribution."""
    lines = {
        f"{name.lower()}=={distribution.version}"
        for distribution in metadata.distributions()
        if (name := distribution.metadata["Name"])
    }
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def git_commit() -> str:
    """The working folder's commit, with `-dirty` where files differ from it; `unknown` without one."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str:
    try:
        ended = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""
