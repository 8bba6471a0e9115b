"""Who takes part, where, and what is a round?"""
