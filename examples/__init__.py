"""Training with asam_jax: a quickstart, studies, and the paper's experiments."""
