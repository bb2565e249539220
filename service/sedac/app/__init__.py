"""The programs: `sedac` with its commands, and what starts an engine."""
