"""Moving the accepted path's rows in paged KV caches: eager twin, Triton kernel, public call."""
