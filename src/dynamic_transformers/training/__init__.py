"""Training: one loop for all architectures, with an account of the work done."""
