"""Sources: what they hold, which of it is ready, what was dispatched, and what becomes of it. For flows and talaria."""
