"""What Prefect runs: flows only."""
