"""Keys and values of the latent frames a causal model has finished."""
