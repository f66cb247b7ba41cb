"""How one exact optimizer step is computed cheaply: micro-batches, ranks, statistics."""
