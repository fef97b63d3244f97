"""Which stored contexts should go first."""
