"""How the real pair was made: prompts people wrote, own replies, a target that sees, its draft."""
