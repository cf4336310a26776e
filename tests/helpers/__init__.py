"""What several tests need: one fit with everything that happened in it, two ranks, a run that is killed."""
