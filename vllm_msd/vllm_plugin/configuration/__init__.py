"""From what a user types to an engine config: flags, finding the draft, guards, tree sizes."""
