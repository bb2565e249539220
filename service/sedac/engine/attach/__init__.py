"""How SEDAC gets into a model: vLLM builds one of the classes in models.py, and attach.py gives its layers what the other rooms have."""
