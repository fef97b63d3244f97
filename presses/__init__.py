"""kvpress-compatible presses. None is in this release; AGENTS.md tells how one is added."""
