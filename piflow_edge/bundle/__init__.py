"""The folder that is shipped: its manifest, files, signature, archive, and where it runs."""
