"""The reverse KL's gradient from the vocabulary columns that matter: `skip_tolerance`."""
