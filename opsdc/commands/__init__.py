"""The commands of `opsdc`, by what they are for; `cli.py` finds them.

What is large is imported when a command runs, so that --help answers at once.
"""
