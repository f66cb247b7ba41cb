"""Which groups a step trains on, whether they have a learning signal, and the vLLM server that generates them."""
