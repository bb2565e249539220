"""Drafts for self-speculation: made from collected states, judged by rollouts, measured in the engine."""
