"""The commands of `sedac-probes`, one file each; cli.py puts them together."""
