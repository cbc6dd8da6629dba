"""URLs in configurations, which are stored and shown: they hold no credentials."""

from __future__ import annotations

import re

from pydantic.config import JsonDict

CREDENTIALS = r"://(?!arn:)[^/@]*[:@]"
"""In a URL: a secret may itself hold a slash, so a colon in front of the first one says enough; an access point's ARN
holds some."""
WITHOUT_CREDENTIALS: JsonDict = {"pattern": rf"^(?!.*{CREDENTIALS})"}
"""For JSON schemas: Prefect's server refuses other values before it stores them."""


def without_credentials(url: str) -> str:
    """The URL of a store, which is written into records and shown to people.

    Raises:
        ValueError: it holds a user or a password.
    """
    if re.search(CREDENTIALS, url):
        raise ValueError(
            "the URL holds credentials; give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the AWS files"
        )
    return url


def plain_address(url: str) -> str:
    """The address of a server, which is stored and shown to people.

    Raises:
        ValueError: it holds more than host, port and path. The message leaves it out, for it may hold a secret.
    """
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):
        raise ValueError("it is no plain address; give http(s)://HOST/PATH without user, password, query and spaces")
    return url
