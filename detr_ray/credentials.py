"""Finds passwords, keys and signatures in addresses, and removes them from messages.

The configuration is stored with the run, in its records and in its checkpoints, so addresses with credentials in it
are refused. Addresses from the environment (``MLFLOW_TRACKING_URI``) may contain credentials; they are never stored.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://\S+")
_USER_OF_NO_SCHEME = re.compile(r"^(?!models:)[^\s/@:]+:(?!//)[^\s@]+@(?=\S)")  # models:/detr@champion has no user
_QUERY_BEGINS = re.compile(r"[?#]")
_SECRET_NAME = re.compile(
    r"(pass(word|wd|phrase)?|pwd|secret|token|sig|signature|signed|credentials?|auth|authorization|bearer|session|"
    r"(api|access|account|shared|secret|private|storage)?[-_]?key([-_]?id)?|googleaccessid|policy|expires|code)$",
    re.IGNORECASE,
)
_WEB = ("http", "https")
_LONGEST_PLAIN_VALUE = 16
"""Longer values in the query of a web address count as secrets. Others (``download=true``, ``v=2``) are short."""

_USER, _QUERY, _PERHAPS = (
    "a user or a password",
    "a password, a key or a signature in its query",
    "what may be a signature in its query",
)


def credentials_in(address: str) -> str | None:
    """Names the kind of credentials in an address, for messages; None if there are none.

    Args:
        address: a location, the address of a store or server, or any other text.
    """
    scheme, place, query = _parts(address.strip())
    if scheme is None:
        return None
    authority, _, path = place.partition("/")
    if ":" in unquote(authority.rpartition("@")[0]) or ("@" in authority and scheme in ("s3", *_WEB)):
        return _USER
    # A secret key may contain slashes, so the text before an @ may be a key. Bucket names have neither colon nor @.
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
    """A text without the credentials in its addresses."""
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
    """Scheme in lower case (None without one); host and path; options, including those in a fragment."""
    scheme, mark, rest = address.partition("://")
    place, *query = _QUERY_BEGINS.split(rest, maxsplit=1)
    return (scheme.lower() if mark else None), place, "&".join(query).replace("#", "&")
