"""What OPO computes. Pure torch."""
