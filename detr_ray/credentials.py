"""Passwords, keys and signatures in addresses: found before an address is kept, taken out of what is shown.

An address in the configuration is kept with the run, in its records and in its checkpoints, so one with credentials is
refused. Those of the environment (``MLFLOW_TRACKING_URI``) may hold them: they are used, and never written as they are.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

_USER_INFO = re.compile(r"(://)[^\s/@]*:\S*@(?=[^\s/])|((?:https?|s3)://)[^\s/@]+@(?=[^\s/])", re.IGNORECASE)
_USER_INFO_OF_NO_SCHEME = re.compile(r"^[^\s/@:]+:[^\s@]+@(?=\S)")
_QUERY = re.compile(r"(?<=\?)[^\s'\"]+")
_SECRET_NAME = re.compile(
    r"(pass(word|wd|phrase)?|pwd|secret|token|sig|signature|signed|credentials?|auth|authorization|bearer|session|"
    r"(api|access|account|shared|secret|private|storage)?[-_]?key([-_]?id)?|googleaccessid|policy|expires|code)$",
    re.IGNORECASE,
)
_WEB = ("http", "https")
_LONGEST_PLAIN_VALUE = 16
"""What a query of the web says without being a secret (``download=true``, ``v=2``) is short."""


def credentials_in(address: str) -> str | None:
    """What an address holds that nobody else should see, in words; None where it holds nothing of that kind.

    Args:
        address: a location, the address of a store or server, or any other text.
    """
    scheme, mark, rest = address.strip().partition("://")
    if not mark:
        return None
    scheme = scheme.lower()
    # Secret keys may hold slashes: up to the last @ all of it may be one. No bucket's name has a colon or an @.
    authority, _, path = rest.partition("?")[0].partition("/")
    named = "@" in authority or (scheme == "s3" and (":" in authority or "@" in path.partition("/")[0]))
    if ":" in unquote(authority.rpartition("@")[0]) or (named and scheme in ("s3", *_WEB)):
        return "a user or a password"
    for name, value in parse_qsl(_query(rest), keep_blank_values=True):
        if _SECRET_NAME.search(name) or _SECRET_NAME.search(value.partition("=")[0]) or "@" in value or "=" in value:
            return "a password, a key or a signature in its query"
        if scheme in _WEB and len(value) > _LONGEST_PLAIN_VALUE:
            return "what may be a signature in its query"
    return None


def without_credentials(text: str) -> str:
    """A message, or an address, without the users, passwords and queries of the addresses in it."""
    text = _USER_INFO_OF_NO_SCHEME.sub("", _USER_INFO.sub(lambda found: found[1] or found[2], text))
    return _QUERY.sub(lambda query: "..." if credentials_in(f"x://x?{query[0]}") else query[0], text)


def _query(rest: str) -> str:
    """The options behind an address; a fragment counts as one of them."""
    _, mark, query = rest.partition("?")
    return query.replace("#", "&") if mark else rest.partition("#")[2]
