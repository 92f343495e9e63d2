"""Training: one loop for the four architectures, with an account of the work done."""
