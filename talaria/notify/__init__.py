"""Writes to people, by rules, when something happens: by webhook, e-mail or a command.

`notifier` runs in the server process of `talaria up`, so that no worker's crash keeps it from writing. `lookout` looks
for what nobody reports (late dispatches, certificates, disks), `dead` asks whether dead targets are back, `collect`
makes messages of what happened, `words` puts them into words, and `webhook`, `mail` and `command` send them.
"""
