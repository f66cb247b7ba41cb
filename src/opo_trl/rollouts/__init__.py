"""Which groups a step trains on, and whether they have a learning signal."""
