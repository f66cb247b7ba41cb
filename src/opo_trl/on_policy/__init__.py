"""What keeps the distribution that samples and the one that is trained the same."""
