"""What a server lets its callers ask for, and how much it holds at a time."""

from dataclasses import dataclass, field

from piflow_edge.errors import UsageError
from piflow_edge.option import check_options, option

# Host names that reach a server on this machine alone. A web page that names another host is refused.
_LOCAL_NAMES = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server. The defaults are for one machine and small models.

    `api_key`: what callers must send as "Authorization: Bearer KEY"; None lets everybody in.

    Raises:
        UsageError: a limit out of range, or limits that contradict each other.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network that this machine is in.")
    port: int = option(8000, "To listen on; 0 takes a free one.", minimum=0, maximum=65535)
    max_batch: int = option(16, "Images that are drawn at a time.", minimum=1, maximum=64)
    max_images: int = option(10, "Images of one request.", minimum=1, maximum=64)
    max_waiting: int = option(64, "Images that wait; more are refused with status 429.", minimum=1)
    max_nfe: int = option(16, "Network calls per image that a request may ask for.", minimum=1)
    max_substeps: int = option(1024, "Euler steps that a request may ask for.", minimum=1)
    max_body: int = option(65536, "Bytes of a request.", minimum=1024)
    max_connections: int = option(256, "Open connections; more are refused with status 503.", minimum=1)
    max_pictures: int = option(256, "Pictures kept for a while, for those who ask for a url.", minimum=1)
    timeout: float = option(120.0, "Seconds that a request may take, waiting included.", above=0)
    allowed_hosts: tuple[str, ...] = option(
        (), "Names that callers reach this server by; else localhost, and any name where --host is another."
    )
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self):
        check_options(self, UsageError)
        if self.max_images > self.max_batch:
            raise UsageError(
                f"the images of one request fit into one batch; got {self.max_images=} and {self.max_batch=}"
            )
        if self.api_key is not None and not (self.api_key.isascii() and len(self.api_key) >= 16):
            raise UsageError("an API key has 16 characters of ASCII or more, such as: openssl rand -hex 32")

    @property
    def is_local(self) -> bool:
        """Return True if only this machine can reach the server."""
        return self.host in _LOCAL_NAMES

    @property
    def host_names(self) -> list[str]:
        """Return the values of the header Host that are answered; "*" is any."""
        return list(self.allowed_hosts) or (list(_LOCAL_NAMES) if self.is_local else ["*"])
