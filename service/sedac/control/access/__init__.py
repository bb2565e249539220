"""Who may call: principals, roles, TLS, limits, the audit log."""
