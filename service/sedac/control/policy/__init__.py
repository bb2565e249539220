"""The service of operators: read, change, roll back and watch the policy."""
