"""What rsync and SFTP have in common: logins, host keys, jump hosts, what messages show."""
