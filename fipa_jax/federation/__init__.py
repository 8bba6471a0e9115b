"""Who takes part, where, and what is a round?

`round` is one round, of the `parts` that it is made of; `server` is the server's half; `state` is what the next round
needs. Between server and clients lies a `channel` (late and faulty clients); `population` says where clients live and
who takes part, `parallel` how many are run.
"""
