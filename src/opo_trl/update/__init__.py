"""How one exact optimizer step is computed cheaply."""
