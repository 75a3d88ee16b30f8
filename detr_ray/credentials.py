"""Passwords, keys and signatures in addresses: found before an address is kept, taken out of what is shown.

An address in the configuration is kept with the run, in its records and in its checkpoints, so one with credentials is
refused. Those of the environment (``MLFLOW_TRACKING_URI``) may hold them: they are used, and never written as they are.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://\S+")
_USER_OF_NO_SCHEME = re.compile(r"^[^\s/@:]+:(?!//)[^\s@]+@(?=\S)")
_QUERY_BEGINS = re.compile(r"[?#]")
_SECRET_NAME = re.compile(
    r"(pass(word|wd|phrase)?|pwd|secret|token|sig|signature|signed|credentials?|auth|authorization|bearer|session|"
    r"(api|access|account|shared|secret|private|storage)?[-_]?key([-_]?id)?|googleaccessid|policy|expires|code)$",
    re.IGNORECASE,
)
_WEB = ("http", "https")
_LONGEST_PLAIN_VALUE = 16
"""What a query of the web says without being a secret (``download=true``, ``v=2``) is short."""

_USER, _QUERY, _PERHAPS = (
    "a user or a password",
    "a password, a key or a signature in its query",
    "what may be a signature in its query",
)


def credentials_in(address: str) -> str | None:
    """What an address holds that nobody else should see, in words; None where it holds nothing of that kind.

    Args:
        address: a location, the address of a store or server, or any other text.
    """
    scheme, place, query = _parts(address.strip())
    if scheme is None:
        return None
    authority, _, path = place.partition("/")
    if ":" in unquote(authority.rpartition("@")[0]) or ("@" in authority and scheme in ("s3", *_WEB)):
        return _USER
    # Secret keys may hold slashes: up to an @ all of it may be one. No bucket's name has a colon or an @.
    if scheme == "s3" and (":" in authority or "@" in path.partition("/")[0]):
        return _USER
    if "@" in path and ":" in authority and not authority.rpartition(":")[2].isdigit():
        return _USER
    for name, value in parse_qsl(query, keep_blank_values=True):
        if _SECRET_NAME.search(name) or _SECRET_NAME.search(value.partition("=")[0]) or "@" in value or "=" in value:
            return _QUERY
        if scheme in _WEB and len(value) > _LONGEST_PLAIN_VALUE:
            return _PERHAPS
    return None


def without_credentials(text: str) -> str:
    """A message, or an address, without the credentials of the addresses in it."""
    return _ADDRESS.sub(lambda found: _shown(found[0]), _USER_OF_NO_SCHEME.sub("", text))


def _shown(address: str) -> str:
    if credentials_in(address) is None:
        return address
    begin, mark, rest = address.partition("://")
    place, *query = _QUERY_BEGINS.split(rest, maxsplit=1)
    authority, slash, path = place.partition("/")
    if "@" in authority and not begin.lower().startswith("s3"):
        place = authority.rpartition("@")[2] + slash + path
    else:
        place = place.rpartition("@")[2]
    return begin + mark + place + ("?..." if query else "")


def _parts(address: str) -> tuple[str | None, str, str]:
    """Scheme in lower case (None where there is none), host and path, and options; a fragment counts as some."""
    scheme, mark, rest = address.partition("://")
    place, *query = _QUERY_BEGINS.split(rest, maxsplit=1)
    return (scheme.lower() if mark else None), place, "&".join(query).replace("#", "&")
