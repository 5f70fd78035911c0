"""Images over HTTP: bundles kept open, requests put together into batches. Needs the `serve` extra."""
