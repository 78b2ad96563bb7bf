"""What a target is: one Prefect block per type."""
