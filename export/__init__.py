"""From a trained student to files that run anywhere."""
