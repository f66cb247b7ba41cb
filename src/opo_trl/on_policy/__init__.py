"""Checks that completions are sampled from the distribution of the trained policy."""
