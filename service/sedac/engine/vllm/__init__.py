"""Everything that touches vLLM.

`patches.py` lists every touch and checks it; `plugin.py` is what vLLM calls, `registry.py` and `models.py` put SEDAC's classes in the place of
vLLM's, `attach.py` attaches to a built model what `config.py` asks for and `refusals.py` lets through. `parts.py`, `runner.py`, `sampling.py` and
`speculation.py` are vLLM as the step, the backends and drafting see it.
"""
