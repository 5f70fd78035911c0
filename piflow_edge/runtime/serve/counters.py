"""What a server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Counters:
    """The counters of one server. Their labels are names of bundles and endpoints, never what a caller sent."""

    def __init__(self):
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def make(kind: type, name: str, text: str, *labels: str, **more):
            return kind(f"piflow_{name}", text, labels, registry=registry, **more)

        self.requests = make(Counter, "requests", "Requests answered.", "endpoint", "status")
        self.seconds = make(Histogram, "request_seconds", "Time to answer.", "endpoint", buckets=_SECONDS)
        self.images = make(Counter, "images", "Images made.", "bundle")
        self.batches = make(Histogram, "batch_images", "Images drawn at a time.", "bundle", buckets=_BATCHES)
        self.stages = make(Counter, "stage_seconds", "Time of each stage of drawing.", "bundle", "stage")
        self.refused = make(Counter, "refused", "Requests refused because too many wait.", "bundle")
        self.abandoned = make(
            Counter, "abandoned", "Requests whose caller left, or that took too long.", "bundle"
        )
        self.failed = make(Counter, "failed_batches", "Batches that an engine failed on.", "bundle")
        self._waiting = make(Gauge, "waiting_images", "Images that wait.", "bundle")

    def watch_waiting(self, bundle: str, count: Callable[[], int]) -> None:
        """Show how many images wait for a bundle, which is asked when somebody reads the counters."""
        self._waiting.labels(bundle).set_function(count)

    def write(self) -> bytes:
        """Return the counters as Prometheus reads them."""
        return generate_latest(self._registry)
