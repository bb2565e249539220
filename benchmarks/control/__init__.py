"""What the control plane promises under load, faults and in fleets, as figures.

    python -m benchmarks.control fleet      8 agents and 256 simulated engines: seconds until all have acknowledged a change
    python -m benchmarks.control load       1,000 policy changes and 100 probe-set swaps under closed-loop load of one engine
    python -m benchmarks.control away       the same load while the control service is killed, frozen and replaced by garbage

Each prints a table and writes its part of benchmarks/results/control.json. `load` and `away` start the real `sedac serve` on the demo
model, without drafts. Absolute times of a shared machine are noise; ratios are taken between windows of one run that lie beside each other.
"""
