"""A real language model, SmolLM2-135M-Instruct, as a LLaVA's, with the MSD draft trained for it."""
