"""Training of the bundled reference model: optimizer, curriculum, batches and the data-parallel loop.

A seed comes in, weights and a model card go out, into `eval/reference_model`. For a checkout only, no wheel has it; may
import all of the evaluation, which may not import it.
"""
