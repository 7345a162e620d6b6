"""Experiments: what to run, typed and in YAML; running, resuming and comparing."""
