"""Training of the bundled reference model: optimizer, curriculum, batches and the data-parallel loop."""
