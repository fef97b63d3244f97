"""presses."""
