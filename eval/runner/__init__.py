"""Running an evaluation: options, caches and presses by name, measurement, result folders."""
