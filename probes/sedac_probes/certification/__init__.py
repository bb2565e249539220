"""The fastest policy whose mean loss is shown to be within a bound."""
