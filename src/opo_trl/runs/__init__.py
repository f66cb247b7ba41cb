"""What any run of GRPOTrainer needs: checkpoints, preemption, failures, the Hub, tracking, model cards."""
