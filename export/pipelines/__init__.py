"""A text-to-image pipeline of diffusers and an adapter of pi-Flow's authors as all that a bundle is made of."""
