"""From a request to latents and images: the sampling loop, and what surrounds it in a generator's call."""
