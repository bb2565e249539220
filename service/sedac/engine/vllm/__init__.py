"""Everything that touches vLLM.

`patches.py` lists every touch and checks it. `plugin.py` is what vLLM calls, and `registry.py` names SEDAC's classes in the place of
vLLM's. `config.py` reads what an engine asks for, and `refusals.py` says what it can't have. `parts.py`, `runner.py`, `sampling.py` and
`speculation.py` are vLLM as the step, the backends and drafting see it.
"""
