"""A close look at one problem, or at one step that failed."""
