"""What every room of the service stands on: settings, the database, metrics, errors as statuses."""
