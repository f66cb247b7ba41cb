"""What any run of TRL's GRPOTrainer needs, and OPO does not define."""
