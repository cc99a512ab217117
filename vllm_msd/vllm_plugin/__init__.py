"""Everything that touches vLLM: registration, patches, draft model, the runners' drafters."""

METHOD = "msd"  # the speculative method's name, as users ask for it
