"""The policy: every knob that may change at run time, what it may be, and what certifies it. Needs neither gRPC nor torch."""
