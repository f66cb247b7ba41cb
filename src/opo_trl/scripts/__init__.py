"""The scripts that train and evaluate on mathematics, and the command line on top of them."""
