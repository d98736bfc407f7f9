"""Every error this process raises on purpose. Each message says what, where and what to do."""


class RetrainDaemonError(Exception):
    """Base of them all; the command line turns it into one line and an exit code."""

    exit_code = 1


class UsageError(RetrainDaemonError):
    """The command or its configuration is not usable; the message names the key and the remedy."""

    exit_code = 2


class StaleOwner(RetrainDaemonError):
    """Another member took over: everything since its last checkpoint is its business now."""


class LedgerError(RetrainDaemonError):
    """The ledger could not be read or written; nothing after its last checkpoint has happened."""


class LedgerAway(LedgerError):
    """The ledger's server does not answer, or not as it should; it may come back."""
