"""Teachers and students as PyTorch networks."""
