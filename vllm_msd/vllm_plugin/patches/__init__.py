"""Where vLLM is changed: the ledger of patches, how they are applied, checks of overrides."""
