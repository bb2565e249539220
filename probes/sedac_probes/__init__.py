"""The probe workshop: from a model and some text to a probe set that `sedac` serves."""
