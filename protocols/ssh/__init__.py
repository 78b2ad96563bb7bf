"""SSH. For `tasks/ssh.py`, `tasks/rsync/` and `tasks/sftp/`.

login    login (where and as whom), keys (ours), hostkeys (theirs), account and handshake (paramiko), client (ssh(1))
use      shell, sftp with packets, rsync
shared   programs, memfiles, words (what ssh(1) says)
"""
