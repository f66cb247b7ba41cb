"""What OPO computes, in torch alone: baselines, the rollout, metrics. A new baseline starts here."""
