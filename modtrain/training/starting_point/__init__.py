"""The checkpoint of another run that a run starts from: `find.find_starting_point` is the door.

Two ways. A branch (``branch.run``) continues the other run: its steps count as the branch's own. A
warm start (``init.run``) is a new run from step 0, whose initial weights are the other run's.
"""
