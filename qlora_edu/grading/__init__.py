"""Grading a class: every submission in a process of its own, judged from outside.

    make grade SUBMISSIONS=folder OUT=grades

A submission's cells run in a confined child (`sandbox`, `child`); this process sends it inputs, gets values back
(`values`), and runs the check on them (`session`, `grade`). So nothing that a submission does to Python, to the
checks or to its own notebook can change what counts as right, and the expected values and the secret never enter
its process. `submissions` finds and reads what was handed in, `report` writes feedback, tables and the list of
written answers to mark. What is graded already is kept and not graded again.

What this cannot do stands in `docs/instructor.md`.
"""
