"""Finding what is wrong with an installation."""
