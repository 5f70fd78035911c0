"""Training: the teacher, the student and the imitation loss that ties them."""
