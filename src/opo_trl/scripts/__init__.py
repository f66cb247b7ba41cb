"""Training and evaluation on mathematics, and the command line."""
