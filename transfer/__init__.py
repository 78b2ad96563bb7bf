"""The pure core: plan, globs, staging, ledger, receipt, errors. No Prefect, no network."""
