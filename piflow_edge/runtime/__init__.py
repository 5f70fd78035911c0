"""A bundle, opened: requests in, images out, no PyTorch."""
