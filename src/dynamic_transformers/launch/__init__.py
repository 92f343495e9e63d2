"""Training on more than one process: several GPUs of one node, or several nodes of a cluster."""
