"""What does one client do? Its examples, its local solver, the terms of its objective.

A solver is a factory in `first_order` or `second_order`, entered in the table there; its type, and what solvers share,
is in `local_solver`. A term of the objective is one in `terms`.
"""
