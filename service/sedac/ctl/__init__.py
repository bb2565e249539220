"""`sedac ctl`: its commands, their options and their tables."""
