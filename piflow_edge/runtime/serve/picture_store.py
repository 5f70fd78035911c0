"""Pictures that are fetched by their address a moment after they were made."""

import secrets
from collections import OrderedDict


class PictureStore:
    """Keeps the last pictures in memory, under names that nobody can guess.

    `most`: pictures that are kept; the oldest go first.
    """

    def __init__(self, most: int):
        self._most = most
        self._pictures: OrderedDict[str, tuple[bytes, str]] = OrderedDict()

    def add(self, content: bytes, media_type: str) -> str:
        """Keep a picture and return its name."""
        name = secrets.token_urlsafe(24)
        self._pictures[name] = (content, media_type)
        while len(self._pictures) > self._most:
            self._pictures.popitem(last=False)
        return name

    def find(self, name: str) -> tuple[bytes, str] | None:
        """Return a picture and its type, or None if there is none of that name any more."""
        return self._pictures.get(name)
