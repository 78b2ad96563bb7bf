"""The front door: one application on one socket, with one login, in front of Talaria's API and Prefect's API and UI.

`app` puts it together; `gate` lets in or refuses; `access` knows roles and who asks; `prefect_rules` says which of
Prefect's routes a role may use; `users`, `tokens` and `sessions` keep what identifies people; `embedded` and `remote`
are the Prefect server behind; `__main__` is the server process. Used by `talaria.up`, `talaria.server`, `talaria.cli`.
"""
