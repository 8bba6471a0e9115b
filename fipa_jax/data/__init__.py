"""Where do arrays come from, and who owns which example?

`sources` prepares published data sets, `loading` reads what is prepared, `own_arrays` reads a user's own; `partition`
splits labelled examples over clients.
"""
