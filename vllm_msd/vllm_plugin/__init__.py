"""Everything that touches vLLM: registration, patches, draft model, the runners' drafters."""
