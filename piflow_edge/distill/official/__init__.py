"""Students as the authors of pi-Flow publish them: their files, names and settings, read as networks of ours."""
