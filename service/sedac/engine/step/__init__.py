"""What happens around each step of an engine: requests, sides, their tokens, counters, adaptation."""
