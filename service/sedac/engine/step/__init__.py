"""What happens around each step of an engine: requests, arms, their tokens, counters, adaptation."""
