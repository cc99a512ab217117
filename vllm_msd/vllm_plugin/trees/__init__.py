"""Draft trees inside vLLM: attention, acceptance and drafting for both model runners."""
