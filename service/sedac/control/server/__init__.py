"""The process: it wires every room together and answers for its health."""
