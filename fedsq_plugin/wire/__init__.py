"""What travels between processes: the form of messages, TLS, certificates."""
