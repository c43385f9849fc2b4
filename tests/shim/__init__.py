"""Nothing of the project's own; see `old_names`."""
