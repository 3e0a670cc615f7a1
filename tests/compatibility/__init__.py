"""Runs that earlier versions made, kept to see that they still load.

``COMMIT.tar.xz`` holds the ``prepared`` data and each run of `tests.compatibility.runs.TRAIN`,
stopped midway, with one checkpoint. ``COMMIT.json`` holds what that commit computed from them.
``python -m tests.compatibility.record COMMIT`` makes both, once for a commit.
"""
