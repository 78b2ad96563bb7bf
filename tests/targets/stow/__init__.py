"""STOW-RS: every answer that servers give, and what becomes of the instances."""
