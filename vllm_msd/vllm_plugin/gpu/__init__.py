"""The GPU way, Model Runner V2: speculator, model state, sampler, attention."""
