"""Roll-outs and the guard: evidence, verdicts, and what follows from them."""
