"""Passwords in URLs: where they stand, so that nobody is shown one."""

import re

HIDDEN = "***"

# Up to the last @ before a space: a password may hold a slash, or an @ that nobody encoded.
_IN_URL = re.compile(r"(?P<before>://[^/@\s:]*:)(?P<user>[^@\s]+(?:@[^@\s/]+)*)(?P<after>@)")
_IN_QUERY = re.compile(r"(?P<before>[?&](?:ssl)?password=)(?P<query>[^&\s'\"]+)", re.IGNORECASE)


def passwords_in(text: str) -> tuple[str, ...]:
    """
    The passwords of the URLs in a text.

    >>> passwords_in("postgresql://us:s3/cr3t@db/ledger and http://u:p@h/?password=q")
    ('s3/cr3t', 'p', 'q')
    """
    users = tuple(found["user"] for found in _IN_URL.finditer(text))
    return users + tuple(found["query"] for found in _IN_QUERY.finditer(text))


def without_passwords(text: str) -> str:
    """
    The text with each of them hidden.

    >>> without_passwords("postgresql://us:s3/cr3t@db/ledger?sslpassword=x&a=b")
    'postgresql://us:***@db/ledger?sslpassword=***&a=b'
    >>> without_passwords("http://127.0.0.1:4200/api, told by somebody@there")
    'http://127.0.0.1:4200/api, told by somebody@there'
    """
    shown = _IN_URL.sub(rf"\g<before>{HIDDEN}\g<after>", text)
    return _IN_QUERY.sub(rf"\g<before>{HIDDEN}", shown)
