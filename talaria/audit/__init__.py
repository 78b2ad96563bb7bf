"""The audit trail beyond its file (`transfer.audit`): as DICOM audit messages, to a syslog server over TLS."""
