"""How the real pair's draft was made: prompts people wrote, the target's own replies, training."""
