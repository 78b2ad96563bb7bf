"""The pure core of a transfer, without Prefect and network. Every floor above may use it.

what is sent       plan, walk, source, roots, beneath, globs, staging, watch, content, duplicates, accessions, query
where it goes      layout, window
what became of it  outcome, receipt, ledger, audit, health
how it is done     fanout, meter, throttle, stopping, readers
shared             errors, oserrors, validation, home
"""
