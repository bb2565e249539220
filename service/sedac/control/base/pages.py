"""Pages of lists: how many entries one holds, and where the next begins."""

from __future__ import annotations

import re

from sedac.control.base.status import refuse
from sedac.errors import PolicyInvalid

MAX_PAGE_BYTES = 1 << 20
"""How many bytes an answer should have at most; clients take 4 MiB unless they are told otherwise."""
_DEFAULT_PAGE, _MAX_PAGE = 50, 1000


def get_limit(page_size: int) -> int:
    """Return how many entries a page holds.

    Raises:
        PolicyInvalid: the size asked for is negative or over the limit.
    """
    if not 0 <= page_size <= _MAX_PAGE:
        raise refuse("page_size", f"{page_size} is outside 0..{_MAX_PAGE}")
    return page_size or _DEFAULT_PAGE


def read_number(page_token: str) -> int | None:
    """Return the number of the last entry of the page before, newest first; None: this is the first page.

    Raises:
        PolicyInvalid: the token is none that such a list gives.
    """
    if not re.fullmatch("[0-9]{0,18}", page_token):
        raise refuse_token(page_token)
    return int(page_token) if page_token else None


def refuse_token(page_token: str) -> PolicyInvalid:
    """Make the error for a token that no page gave."""
    return refuse("page_token", f"{page_token[:40]!r} was not made by this service; start again without one")
