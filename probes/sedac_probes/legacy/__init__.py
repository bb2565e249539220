"""The earlier versions' files, read and written."""
