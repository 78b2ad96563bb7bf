"""SSH: the client, host keys and our own keys, shells, SFTP and rsync."""
