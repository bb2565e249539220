"""What changes the policy in force: roll-outs and the guard, the evidence that they judge, and what follows from their verdicts."""
